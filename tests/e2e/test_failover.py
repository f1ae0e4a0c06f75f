"""A worker is killed under running streams: clients see the undisturbed output, nothing else."""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from console.demoload import SENTENCES
from tests.e2e.harness import MODELLED, Server, stream_lines, stream_openai, until

LONG_TEXT = " ".join(SENTENCES[:8])  # long enough to be prefilled apart


def bodies(model_id, output_tokens):
    """Six streams: short and long prompts, greedy and seeded."""
    made = []
    for index in range(6):
        text = f"{index} {LONG_TEXT}" if index % 2 else f"Tell me more about tide {index}."
        body = {
            "model": model_id,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": output_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
        }
        if index in (2, 3):
            body |= {"temperature": 0.8, "seed": 40 + index}
        made.append(body)
    return made


def run_all(server, wanted, kill_at=None, victim=None):
    """All streams side by side; the victim is killed when the slowest has `kill_at` ids."""
    counts = dict.fromkeys(range(len(wanted)), 0)
    killed = threading.Event()
    lock = threading.Lock()
    pid = server.worker_pids()[victim] if victim else None

    def heard(index, num_ids):
        with lock:
            counts[index] = num_ids
            if pid and not killed.is_set() and min(counts.values()) >= kill_at:
                killed.set()
                os.kill(pid, signal.SIGKILL)

    def one(index):
        stream = stream_lines if index == 0 else stream_openai
        return stream(server, wanted[index], lambda n: heard(index, n))

    with ThreadPoolExecutor(len(wanted)) as pool:
        streams = list(pool.map(one, range(len(wanted))))
    assert victim is None or killed.is_set(), "the streams ended before the kill"
    return streams


def check_kill(server, wanted, kill_at, victim):
    undisturbed = run_all(server, wanted)
    survived = run_all(server, wanted, kill_at, victim)
    gap_s = max(stream.longest_gap_s for stream in survived)
    failovers = server.metric("slackwater_failovers_total")
    print(f"killed {victim} at {kill_at} ids: {failovers:.0f} moves, longest gap {gap_s:.2f} s")
    for expected, seen in zip(undisturbed, survived, strict=True):
        assert seen.error == ""
        assert seen.is_contiguous()
        assert seen.token_ids == expected.token_ids
        assert seen.text == expected.text
        assert seen.logprobs == pytest.approx(expected.logprobs, abs=1e-3)
        assert seen.usage["completion_tokens"] == len(expected.token_ids)
        assert seen.usage["prompt_tokens"] == expected.usage["prompt_tokens"]
        assert seen.finish_reasons == expected.finish_reasons == ["length"]
        assert seen.num_done == 1
    return failovers


@pytest.fixture
def fragile_server(tmp_path, request):
    options = ("--workers", "prefill=1,decode=1", "--engine", "fake", "--profile", "h200-8b")
    served = Server(tmp_path / "var", (*options, "--no-restart-workers"))
    yield served.start()
    served.stop()


@pytest.mark.kill
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("victim", ["prefill-1", "decode-1"])
def test_streams_survive_the_death_of_either_worker(fragile_server, victim, share):
    failovers = check_kill(fragile_server, bodies(MODELLED, 400), int(share * 400), victim)
    if victim == "decode-1":
        assert failovers >= 1


@pytest.mark.kill
@pytest.mark.parametrize("victim", ["prefill-1", "decode-1"])
def test_with_one_role_gone_the_other_serves_both(fragile_server, victim):
    os.kill(fragile_server.worker_pids()[victim], signal.SIGKILL)
    until(lambda: fragile_server.num_live() == 1, "the loss to be noticed")
    streams = run_all(fragile_server, bodies(MODELLED, 64))
    assert [stream.error for stream in streams] == [""] * 6
    assert [len(stream.token_ids) for stream in streams] == [64] * 6


@pytest.mark.kill
def test_a_restarted_worker_takes_its_role_again(tmp_path):
    served = Server(tmp_path / "var")
    try:
        served.start()
        before = served.worker_pids()
        os.kill(before["decode-1"], signal.SIGKILL)
        until(lambda: served.worker_pids().get("decode-1") not in (None, before["decode-1"]), "it")
        until(lambda: served.num_live() == 2, "two live workers")
        assert run_all(served, bodies(MODELLED, 16))[0].error == ""
    finally:
        served.stop()


@pytest.mark.kill
@pytest.mark.parametrize("victim", ["prefill-1", "decode-1"])
def test_the_real_model_says_the_same_when_a_worker_dies(tmp_path, model_folder, victim):
    options = ("--workers", "prefill=1,decode=1", "--model", str(model_folder))
    served = Server(
        tmp_path / "var", (*options, "--model-id", "smollm2-135m", "--no-restart-workers")
    )
    try:
        served.start()
        wanted = bodies("smollm2-135m", 64)[:4]
        for body in wanted:
            body |= {"logprobs": True, "top_logprobs": 1}
        check_kill(served, wanted, 32, victim)
    finally:
        served.stop()
