"""Exact numerics: a token's logits are bitwise the same in any batch, chunking and stage."""

import pytest
import torch

from controlplane.protocol import Accepted
from gpuworkers.runner import TorchRunner, load
from gpuworkers.scheduler import PlanRow
from gpuworkers.sequence import Sequence, from_assign
from tests.gpuworkers.enginekit import BATCH, EngineBench, assign
from tests.gpuworkers.realmodel import real_model_folder
from tests.gpuworkers.tinyllama import bench_of, write_tiny

LENGTH_MAX = 150


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("exact"))


@pytest.fixture(scope="module")
def runner(folder) -> TorchRunner:
    loaded, *_ = load(folder, "tiny", dtype="fp32", kv_tokens=33 * 160 + 160)
    return loaded


def prompt(index: int, length: int) -> list[int]:
    return [3 + (31 * index + 17 * i + i * i) % 500 for i in range(length)]


def sequence(index: int, length: int, slot: int | None = None) -> Sequence:
    """A sequence with blocks of its own: `slot` of 10 blocks each."""
    made = from_assign(assign(f"r{index}", prompt(index, length)), 0.0)
    first = (index if slot is None else slot) * 10
    made.block_ids = list(range(first, first + 10))
    return made


def logits(runner: TorchRunner, rows: list[tuple[Sequence, int, int]]) -> torch.Tensor:
    with torch.inference_mode():
        return runner.logits(tuple(PlanRow(s, start, count, True) for s, start, count in rows))


def lengths(count: int) -> list[int]:
    return [1 + (37 * index) % LENGTH_MAX for index in range(count)]


@pytest.fixture(scope="module")
def alone(runner) -> torch.Tensor:
    """Last-token logits of 33 prompts, each computed whole and alone."""
    return torch.cat([logits(runner, [(sequence(i, n), 0, n)]) for i, n in enumerate(lengths(33))])


@pytest.mark.parametrize("size", range(1, 34))
def test_logits_are_bitwise_equal_in_a_prefill_of_any_batch_size(size, runner, alone):
    rows = [(sequence(i, n), 0, n) for i, n in enumerate(lengths(size))]
    assert torch.equal(logits(runner, rows), alone[:size])


@pytest.mark.parametrize("size", range(1, 34))
def test_logits_are_bitwise_equal_in_a_decode_of_any_batch_size(size, runner, alone):
    sequences = [sequence(i, n) for i, n in enumerate(lengths(size))]
    logits(runner, [(s, 0, n) for s, n in zip(sequences, lengths(size), strict=True)])
    rows = [(s, n - 1, 1) for s, n in zip(sequences, lengths(size), strict=True)]
    assert torch.equal(logits(runner, rows), alone[:size])


@pytest.mark.parametrize("cuts", [(1,), (15,), (16,), (17, 64), (63, 65, 100), tuple(range(149))])
def test_logits_are_bitwise_equal_for_every_chunking(cuts, runner):
    whole = logits(runner, [(sequence(0, LENGTH_MAX), 0, LENGTH_MAX)])
    edges = [0, *[cut for cut in cuts if cut], LENGTH_MAX]
    other = sequence(1, LENGTH_MAX, slot=5)
    other.token_ids = prompt(0, LENGTH_MAX)
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        last = logits(runner, [(other, start, end - start)])
    assert torch.equal(last, whole)


def test_logits_are_bitwise_equal_beside_chunks_and_decodes_of_others(runner):
    whole = logits(runner, [(sequence(0, 90), 0, 90)])
    others = [sequence(i, 120) for i in range(1, 6)]
    logits(runner, [(s, 0, 100) for s in others])
    mine = sequence(0, 90, slot=20)
    logits(runner, [(others[0], 100, 7), (mine, 0, 50), (others[1], 100, 1)])
    mixed = logits(runner, [(others[2], 100, 1), (mine, 50, 40), (others[3], 100, 20)])
    assert torch.equal(mixed[1:2], whole)


def test_bfloat16_logits_are_bitwise_equal_too(folder):
    runner, *_ = load(folder, "tiny", dtype="bf16", kv_tokens=5 * 160)
    sequences = [sequence(i, n) for i, n in enumerate((1, 38, 75, 112, 149))]
    alone = torch.cat([logits(runner, [(s, 0, len(s.token_ids))]) for s in sequences])
    together = logits(runner, [(s, 0, len(s.token_ids)) for s in sequences])
    decoded = logits(runner, [(s, len(s.token_ids) - 1, 1) for s in sequences])
    assert torch.equal(together, alone) and torch.equal(decoded, alone)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "auto"])
def test_the_real_models_logits_are_bitwise_equal_across_batch_sizes_and_chunkings(dtype):
    runner, *_ = load(real_model_folder(), "real", dtype=dtype, kv_tokens=34 * 160)
    sequences = [sequence(i, 1 + (7 * i) % 70) for i in range(33)]
    alone = torch.cat([logits(runner, [(s, 0, len(s.token_ids))]) for s in sequences])
    for size in range(1, 34):
        rows = [(s, len(s.token_ids) - 1, 1) for s in sequences[:size]]
        assert torch.equal(logits(runner, rows), alone[:size]), size
    assert torch.equal(logits(runner, [(s, 0, len(s.token_ids)) for s in sequences]), alone)
    whole = sequence(33, 70)
    expected = logits(runner, [(whole, 0, 70)])
    for cuts in ((1, 17, 64, 65), (40,), (66, 67)):
        chunked = sequence(33, 70, slot=32)
        for start, end in zip((0, *cuts), (*cuts, 70), strict=True):
            last = logits(runner, [(chunked, start, end - start)])
        assert torch.equal(last, expected), cuts


def run(bench: EngineBench, *names_and_prompts, output: int = 24, **kwargs) -> dict[str, list[int]]:
    for name, ids in names_and_prompts:
        answer = bench.assign(name, ids, output, ignore_eos=True, **kwargs)
        assert isinstance(answer, Accepted), answer
    bench.run_dry()
    return {name: bench.output(name) for name, _ in names_and_prompts}


SEEDED = {"temperature": 1.0, "seed": 1234, "top_p": 0.9}


@pytest.mark.parametrize("sampling", [{}, SEEDED, {"temperature": 0.7, "seed": 5}])
def test_output_is_the_same_alone_together_and_from_the_prefix_cache(folder, sampling):
    prompts = [(f"r{i}", prompt(i, n)) for i, n in enumerate((5, 64, 100, 17, 130))]
    alone = {}
    for name, ids in prompts:
        alone |= run(bench_of(folder), (name, ids), **sampling)
    bench = bench_of(folder)
    assert run(bench, *prompts, **sampling) == alone
    again = [(f"again-{name}", ids) for name, ids in prompts]
    assert list(run(bench, *again, **sampling).values()) == list(alone.values())
    reused = {r.request_id: r.cached_tokens for r in bench.reports}
    assert reused["again-r4"] == 128 and reused["r4"] == 0
    assert len({tuple(ids) for ids in alone.values()}) == len(alone)
    assert max(len(set(ids)) for ids in alone.values()) > 5


@pytest.mark.parametrize("sampling", [{}, SEEDED])
def test_output_goes_on_the_same_wherever_it_was_interrupted(folder, sampling):
    whole = run(bench_of(folder), ("r", prompt(3, 70)), **sampling)["r"]
    bench = bench_of(folder)
    for cut in (1, 2, 11, 23):
        name = f"cut-{cut}"
        resumed = run(bench, (name, prompt(3, 70)), epoch=2, delivered=whole[:cut], **sampling)
        assert resumed[name] == whole[cut:], cut


@pytest.mark.parametrize("sampling", [{}, SEEDED])
def test_output_with_a_handoff_is_the_same_as_without(folder, sampling):
    ids = prompt(4, 100)
    whole = run(bench_of(folder), ("r", ids), **sampling)["r"]
    sender, receiver = bench_of(folder), bench_of(folder)
    first_ids = hand_over(sender, receiver, ids, sampling)
    receiver.run_dry()
    assert first_ids + receiver.output("r") == whole


def hand_over(sender: EngineBench, receiver: EngineBench, ids, sampling, flip=None) -> list[int]:
    """Prefill on one, copy layer by layer, install on the other."""
    kwargs = {"ignore_eos": True, **sampling}
    sender.assign("r", ids, 24, stage="prefill", **kwargs)
    sender.run_dry()
    run(receiver, ("other", prompt(9, 50)))  # its blocks are not where the sender's are
    receiver.assign("r", ids, 24, stage="decode", **kwargs)
    source = (flip or sender).engine.blocks_of("r", 1)
    target = receiver.engine.blocks_of("r", 1)
    kv_from, kv_to = (flip or sender).runner.kv, receiver.runner.kv
    for layer in range(kv_from.num_layers):
        kv_to.write(layer, target, kv_from.read(layer, source))
    first_ids = sender.engine.first_ids("r", 1)
    receiver.engine.installed("r", 1, first_ids, receiver.now_s)
    return first_ids


def test_another_prompts_kv_in_the_sent_blocks_changes_the_output(folder):
    ids = prompt(4, 100)
    whole = run(bench_of(folder), ("r", ids))["r"]
    sender, receiver, wrong = bench_of(folder), bench_of(folder), bench_of(folder)
    wrong.assign("r", prompt(8, 100), 24, stage="prefill", ignore_eos=True)
    wrong.run_dry()
    first_ids = hand_over(sender, receiver, ids, {}, flip=wrong)
    receiver.run_dry()
    assert first_ids + receiver.output("r") != whole


def test_a_preempted_batch_sequence_gives_the_same_output(folder):
    ids = prompt(6, 60)
    whole = run(bench_of(folder), ("b", ids), targets=BATCH)["b"]
    bench = bench_of(folder, kv_tokens=160)
    bench.assign("b", ids, 24, targets=BATCH, ignore_eos=True)
    for _ in range(8):
        bench.step()
    assert 0 < len(bench.output("b")) < 24
    run(bench, ("online", prompt(7, 120)), output=8)
    assert bench.output("b") == whole
    assert max(r.context_tokens for r in bench.reports if r.request_id == "b") == 83


def test_fast_numerics_compute_the_same_model(folder):
    exact = run(bench_of(folder), ("r", prompt(1, 40)), output=4)
    assert run(bench_of(folder, numerics="fast"), ("r", prompt(1, 40)), output=4) == exact
