"""Logprobs travel with the ids they belong to: step by step, merged, sent again and resumed."""

import math

import pytest

from controlplane import protocol
from gpuworkers.outbox import Outbox
from tests.gpuworkers.enginekit import BATCH
from tests.gpuworkers.tinyllama import bench_of, write_tiny

IDS = [5, 6, 7, 8, 9]


@pytest.fixture
def folder(tmp_path):
    return write_tiny(tmp_path)


def logprobs(bench, name: str) -> list[protocol.TokenLogprobs | None]:
    return [entry for r in bench.reports if r.request_id == name for entry in r.logprobs]


def run(folder, name: str = "r", **kwargs):
    bench = bench_of(folder)
    bench.assign(name, IDS, 12, ignore_eos=True, **kwargs)
    bench.run_dry()
    return bench


def test_every_id_has_its_logprob_and_the_likeliest_beside_it(folder):
    bench = run(folder, logprobs=3)
    entries = logprobs(bench, "r")
    assert len(entries) == 12
    for token_id, entry in zip(bench.output("r"), entries, strict=True):
        assert entry.top_ids[0] == token_id and len(entry.top_ids) == 3  # greedy
        assert entry.logprob == entry.top_logprobs[0] < 0.0
        assert entry.top_logprobs == sorted(entry.top_logprobs, reverse=True)
        assert sum(math.exp(value) for value in entry.top_logprobs) <= 1.0


def test_asking_changes_no_id_and_not_asking_gives_none(folder):
    sampling = {"temperature": 1.0, "seed": 3, "top_p": 0.9}
    without, with_them = run(folder, **sampling), run(folder, logprobs=0, **sampling)
    assert without.output("r") == with_them.output("r")
    assert logprobs(without, "r") == []
    assert [entry.top_ids for entry in logprobs(with_them, "r")] == [[]] * 12


def test_they_do_not_depend_on_temperature_or_truncation(folder):
    plain, hot = run(folder, logprobs=2), run(folder, logprobs=2, temperature=0.01, top_k=1)
    assert logprobs(plain, "r") == logprobs(hot, "r")


def test_a_resumed_sequence_goes_on_with_the_same_ones(folder):
    whole = run(folder, logprobs=2)
    entries = logprobs(whole, "r")
    resumed = run(folder, logprobs=2, epoch=2, delivered=whole.output("r")[:5])
    assert logprobs(resumed, "r") == entries[5:]
    preempted = bench_of(folder)
    preempted.assign("r", IDS, 12, ignore_eos=True, logprobs=2, targets=BATCH)
    for _ in range(5):
        preempted.step()
    preempted.engine.preempt("r", 1)
    preempted.run_dry()
    assert logprobs(preempted, "r") == entries


def test_they_are_sent_again_with_their_ids(folder):
    bench = run(folder, logprobs=1)
    again = bench.engine.resend("r", 1, 9)
    assert again.logprobs == logprobs(bench, "r")[9:] and len(again.token_ids) == 3


def test_merged_reports_keep_them_in_order(folder):
    bench = run(folder, logprobs=1)
    outbox = Outbox()
    load = bench.engine.load(0.0)
    for report in bench.reports:
        outbox.put(protocol.StepReport([report], load))
    sent = outbox.take()
    assert [len(r.logprobs) for r in sent.sequences] == [12]
    assert sent.sequences[0].logprobs == logprobs(bench, "r")
    assert protocol.decode_from_worker(protocol.encode(sent)) == sent


def test_choices_of_one_request_differ_by_their_index_only(folder):
    sampling = {"temperature": 1.0, "seed": 3}
    outputs = [run(folder, choice_index=i, **sampling).output("r") for i in range(3)]
    assert len(set(map(tuple, outputs))) == 3
    assert run(folder, choice_index=1, **sampling).output("r") == outputs[1]
