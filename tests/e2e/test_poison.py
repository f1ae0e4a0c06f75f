"""Requests that kill or fail their workers, and a worker that fails its requests, as processes."""

import os
import subprocess
import sys
import threading

import openai
import pytest

from tests.e2e.harness import MODELLED, ROOT, Server, stream_lines, until

pytestmark = [pytest.mark.serial, pytest.mark.kill]
NUM_WORKERS = 3
PREPARED = f"""
from console import jointokens
from console.models import Model
Model.objects.get_or_create(model_id="{MODELLED}", defaults=dict(folder="", max_model_len=4096))
print(*(jointokens.mint("a test") for _ in range(12)))
"""


class Workers:
    """Worker processes that fail on marked prompts, each started again when it ends."""

    def __init__(self, server, folder):
        self.server = server
        self.folder = folder
        self.tokens = server.manage("shell", "-v", "0", "-c", PREPARED).stdout.split()
        self.num_starts = 0
        self.is_over = threading.Event()
        self.threads = [threading.Thread(target=self._keep, args=(i,)) for i in range(NUM_WORKERS)]
        for thread in self.threads:
            thread.start()

    def _keep(self, index):
        while not self.is_over.is_set():
            self.num_starts += 1
            process = self._start(index, self.tokens.pop())
            while process.poll() is None and not self.is_over.wait(0.05):
                pass
            process.kill()
            process.wait()

    def _start(self, index, token):
        url = f"ws://127.0.0.1:{self.server.port}/ws/worker"
        command = [sys.executable, "-m", "tests.e2e.faultyworker", "--join", url]
        command += ["--engine", "fake", "--name", f"faulty-{index}"]
        command += ["--exit-with-parent", str(os.getpid())]
        environ = {**os.environ, "SLACKWATER_JOIN_TOKEN": token, "TMPDIR": str(self.folder)}
        with (self.folder / f"faulty-{index}.log").open("a") as log:
            return subprocess.Popen(
                command, cwd=ROOT, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def stop(self):
        self.is_over.set()
        for thread in self.threads:
            thread.join()


@pytest.fixture
def faulty(tmp_path):
    """A server and its workers."""
    served = Server(tmp_path / "var", ("--engine", "fake"))
    served.start(num_workers=None)
    workers = Workers(served, tmp_path)
    try:
        until(lambda: served.num_live() == NUM_WORKERS, "the workers")
        until(lambda: MODELLED in [m.id for m in served.client().models.list()], "its row")
        yield served, workers
    finally:
        workers.stop()
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
        assert [stream.error for stream in self.undisturbed] == [""] * count
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
            assert event.wait(60), (self.streams, self.server.tail())
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


def test_poison_request_costs_two_workers_and_no_neighbour(faulty):
    server, workers = faulty
    neighbours = Neighbours(server)
    with neighbours:
        assert refused(server, "poison ~") == ("poison_request", "false")
    neighbours.check()
    until(lambda: server.num_live() == NUM_WORKERS, "all workers again")
    assert workers.num_starts - NUM_WORKERS == 2
    assert refused(server, "poison ~") == ("poison_request", "false")
    assert workers.num_starts - NUM_WORKERS == 2, "the prompt is quarantined"
    assert ask(server, "no poison")


def test_request_that_fails_on_every_worker_ends_and_harms_nobody(faulty):
    server, workers = faulty
    neighbours = Neighbours(server)
    with neighbours:
        assert refused(server, "fails ^") == ("worker_error", "false")
    neighbours.check()
    assert workers.num_starts == NUM_WORKERS
    assert server.num_live() == NUM_WORKERS


def test_requests_that_one_worker_fails_end_well_on_another(faulty):
    server, _ = faulty
    texts = [ask(server, f"asks {index} |") for index in range(6)]
    assert all(len(text) == 16 for text in texts)
    assert server.metric("slackwater_failovers_total") == 1, "then it was quarantined"
