"""Requests that kill or fail their workers, and a worker that fails its requests, as processes."""

import threading
from pathlib import Path

import openai
import pytest

from tests.e2e.harness import MODELLED, Server, stream_lines, until

pytestmark = [pytest.mark.serial, pytest.mark.kill]
FAULTY = Path(__file__).parent / "faulty"
NUM_WORKERS = 3


@pytest.fixture
def faulty_server(tmp_path, monkeypatch):
    """Three modelled workers that the markers of tests/e2e/faulty make fail."""
    monkeypatch.setenv("PYTHONPATH", str(FAULTY))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    options = ("--workers", f"mixed={NUM_WORKERS}", "--engine", "fake", "--profile", "h200-8b")
    served = Server(tmp_path / "var", options)
    yield served.start(NUM_WORKERS)
    served.stop()


def body(text, max_tokens=16):
    return {
        "model": MODELLED,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
    }


class Neighbours:
    """Long streams of other clients, running while a test does harm."""

    def __init__(self, server, count=4):
        self.server = server
        self.bodies = [body(f"neighbour {index}", 600) for index in range(count)]
        self.undisturbed = [stream_lines(server, item) for item in self.bodies]
        self.streams = [None] * count
        self.started = [threading.Event() for _ in range(count)]
        self.threads = [threading.Thread(target=self._run, args=(i,)) for i in range(count)]

    def _run(self, index):
        heard = self.started[index]
        self.streams[index] = stream_lines(
            self.server, self.bodies[index], lambda num_ids: num_ids and heard.set()
        )

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        for event in self.started:
            assert event.wait(60)
        return self

    def __exit__(self, *exception):
        for thread in self.threads:
            thread.join(90)

    def check(self):
        for expected, seen in zip(self.undisturbed, self.streams, strict=True):
            assert seen.error == "" and seen.is_contiguous()
            assert seen.token_ids == expected.token_ids and seen.text == expected.text


def ask(server, text):
    request = body(text)
    del request["ignore_eos"]
    with server.client() as client:
        return client.chat.completions.create(**request).choices[0].message.content


def refused(server, text):
    """Code and header of a request that ends with 500."""
    with pytest.raises(openai.InternalServerError) as caught:
        ask(server, text)
    return caught.value.code, caught.value.response.headers["x-should-retry"]


def test_poison_request_costs_two_workers_and_no_neighbour(faulty_server):
    neighbours = Neighbours(faulty_server)
    with neighbours:
        assert refused(faulty_server, "poison ~") == ("poison_request", "false")
    neighbours.check()
    until(lambda: faulty_server.num_live() == NUM_WORKERS, "all workers again")
    assert faulty_server.num_starts() - NUM_WORKERS == 2
    assert refused(faulty_server, "poison ~") == ("poison_request", "false")
    assert faulty_server.num_starts() - NUM_WORKERS == 2, "the prompt is quarantined"
    assert ask(faulty_server, "no poison")


def test_request_that_fails_on_every_worker_ends_and_harms_nobody(faulty_server):
    neighbours = Neighbours(faulty_server)
    with neighbours:
        assert refused(faulty_server, "fails ^") == ("worker_error", "false")
    neighbours.check()
    assert faulty_server.num_starts() == NUM_WORKERS
    assert faulty_server.num_live() == NUM_WORKERS


def test_requests_that_one_worker_fails_end_well_on_another(faulty_server):
    texts = [ask(faulty_server, f"asks {index} |") for index in range(6)]
    assert all(len(text) == 16 for text in texts)
    assert faulty_server.metric("slackwater_failovers_total") == 1, "then it was quarantined"
