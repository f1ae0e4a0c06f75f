"""Streams leave a worker that is drained or flipped: clients see the undisturbed output."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from console.demoload import SENTENCES
from tests.e2e.harness import MODELLED, Server, stream_lines, until

pytestmark = pytest.mark.serial
TEXT = " ".join(SENTENCES[:4])
OUTPUT_TOKENS = 1500


def bodies():
    for index in range(4):
        body = {
            "model": MODELLED,
            "messages": [{"role": "user", "content": f"{index} {TEXT}"}],
            "max_tokens": OUTPUT_TOKENS,
            "temperature": 0.8 if index % 2 else 0.0,
            "seed": index,
            "ignore_eos": True,
        }
        yield body


def run_all(server, order=None):
    """All streams side by side; `order()` is called when each has an eighth of its ids."""
    counts, lock = dict.fromkeys(range(4), 0), threading.Lock()
    ordered = threading.Event()

    def heard(index, num_ids):
        with lock:
            counts[index] = num_ids
            is_time = order and not ordered.is_set() and min(counts.values()) > OUTPUT_TOKENS // 8
            if is_time:
                ordered.set()
        if is_time:
            order()

    def one(index, body):
        return stream_lines(server, body, lambda num_ids: heard(index, num_ids))

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(one, range(4), bodies()))


@pytest.fixture
def pair(tmp_path):
    """Two modelled workers, and a call of the operator's API."""
    options = ("--workers", "mixed=2", "--engine", "fake", "--profile", "h200-8b")
    served = Server(tmp_path / "var", options)
    served.start()
    token = json.loads(served.manage("operator", "create", "ann", "--json").stdout)["token"]

    def call(method, path, **body):
        url = f"{served.url}/api/v1/{path}"
        headers = {"authorization": f"Bearer {token}"}
        answer = httpx.request(method, url, json=body, headers=headers, trust_env=False)
        assert answer.is_success, answer.text
        return answer.json()

    yield served, call
    served.stop()


def check(server, call, path, **body):
    """The worker with the streams is ordered to do something else; gives its id and theirs."""
    undisturbed = run_all(server)
    moved = []

    def order():
        workers = call("get", "workers/")["results"]
        worker = max(workers, key=lambda item: item["requests"])
        moved.append((worker["worker_id"], worker["requests"]))
        call("post", f"workers/{worker['worker_id']}/{path}/", **body)

    streams = run_all(server, order)
    for expected, seen in zip(undisturbed, streams, strict=True):
        assert seen.error == "" and seen.is_contiguous()
        assert seen.token_ids == expected.token_ids and seen.text == expected.text
        assert seen.finish_reasons == ["length"] and seen.num_done == 1
    ((worker_id, num_requests),) = moved
    assert num_requests >= 1
    return worker_id, num_requests


@pytest.mark.kill
def test_streams_of_a_drained_worker_go_on_elsewhere_with_their_kv(pair):
    server, call = pair
    worker_id, num_requests = check(server, call, "drain")
    assert server.metric("slackwater_planned_moves_total", kv="copied") == num_requests
    assert server.metric("slackwater_failovers_total") == 0
    until(lambda: call("get", f"workers/{worker_id}/")["status"] == "drained", "drained")


@pytest.mark.kill
def test_streams_of_a_worker_that_turns_to_prompts_go_on_elsewhere(pair):
    server, call = pair
    worker_id, num_requests = check(server, call, "role", role="prefill")
    assert server.metric("slackwater_planned_moves_total", kv="copied") == num_requests
    assert server.metric("slackwater_failovers_total") == 0
    assert call("get", f"workers/{worker_id}/")["status"] == "live"
