"""The kernel bench through a timer of its own, on the torch backend: what is counted as moved and
computed, ceilings and rivals, and a machine without a GPU."""

import json

import pytest
import torch

from kernels import bench
from kernels.bench import Case, Ceilings, Shape, ceilings, measure, table
from kernels.ops import Heads
from tests.kernels.bufferedtorch import BufferedTorch

CPU = torch.device("cpu")
SHAPE = Shape(
    heads=Heads(4, 2, 16),
    hidden=64,
    width=32,
    vocab=128,
    block_tokens=16,
    long_rows=40,
    short_rows=3,
    decodes=((2, 33),),
    prefills=((0, 20), (16, 5)),
    sampled_rows=6,
    linear_rows=(2, 9),
)


def once(run) -> float:
    """A timer: the work is done, its time is a millisecond."""
    run()
    return 1e-3


@pytest.fixture(scope="module")
def made() -> dict[tuple[str, str], Case]:
    with torch.inference_mode():
        found = {}
        for case in bench.cases(BufferedTorch(), CPU, SHAPE):
            case.run()
            found[case.kernel, case.size] = case
        return found


def test_every_operation_is_run_at_long_and_short_sizes(made):
    row_wise = ("rms_norm", "add_rms_norm", "silu_mul", "norm_heads", "rope_write")
    for kernel in row_wise:
        assert (kernel, "40 rows") in made and (kernel, "3 rows") in made
    others = {kernel for kernel, _ in made} - set(row_wise)
    assert others == {
        "decode attention", "prefill attention", "sample greedy", "sample plain",
        "sample top-k 50", "sample top-k 50, top-p 0.9", "sample top-p 0.9",
        "linear qkv", "linear out", "linear gate up", "linear down", "linear head",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kernel", "size", "num_bytes", "num_flops"),
    [
        ("rms_norm", "40 rows", 2 * 40 * 64 * 2, 0),
        ("add_rms_norm", "3 rows", 4 * 3 * 64 * 2, 0),
        ("silu_mul", "40 rows", 3 * 40 * 32 * 2, 0),
        ("norm_heads", "40 rows", 2 * 40 * 6 * 16 * 2, 0),
        ("rope_write", "40 rows", 2 * 40 * 8 * 16 * 2 + 2 * 40 * 16 * 4, 0),
        # K and V of 33 tokens for 2 heads, and q and out of 4 heads; two products each way
        ("decode attention", "2 x 33", 2 * (2 * 33 * 2 + 2 * 4) * 16 * 2, 2 * 4 * 4 * 16 * 33),
        ("prefill attention", "20 after 0", 2 * (20 * 2 + 20 * 4) * 16 * 2, 4 * 4 * 16 * 210),
        ("prefill attention", "5 after 16", 2 * (21 * 2 + 5 * 4) * 16 * 2, 4 * 4 * 16 * 95),
        ("sample greedy", "6 x 128", 6 * 128 * 2, 0),
        ("linear gate up", "9 rows", 2 * (64 * 64 + 9 * 128), 2 * 9 * 64 * 64),
        ("linear head", "2 rows", 2 * (128 * 64 + 2 * 192), 2 * 2 * 128 * 64),
    ],
)
def test_bytes_and_operations_of_a_case(made, kernel, size, num_bytes, num_flops):
    case = made[kernel, size]
    assert (case.num_bytes, case.num_flops) == (num_bytes, num_flops)


def test_attention_stands_beside_torchs_on_the_same_lengths(made):
    assert any(name.startswith("sdpa") for name in made["decode attention", "2 x 33"].rivals)
    assert any(name.startswith("sdpa") for name in made["prefill attention", "20 after 0"].rivals)
    assert made["prefill attention", "5 after 16"].rivals == {}  # torch has no such mask
    assert list(made["sample greedy", "6 x 128"].rivals) == ["argmax"]


def test_a_linear_is_bound_by_its_weights_until_the_rows_are_many(made):
    assert made["linear qkv", "2 rows"].bound == "copy"
    assert made["linear qkv", "9 rows"].bound == "gemm"
    assert ("linear head", "9 rows") not in made  # so many rows are never sampled
    assert list(made["linear gate up", "9 rows"].rivals) == ["two halves"]


def test_the_fastest_rival_counts_and_shares_are_of_the_ceiling_that_bounds():
    seconds = {"mine": 2e-3, "slow": 5e-3, "quick": 3e-3}
    case = Case(
        "k", "s", 4_000_000, 10**12, "copy", lambda: "mine",
        {"slow": lambda: "slow", "quick": lambda: "quick"},
    )  # fmt: skip
    row = measure(case, lambda run: seconds[run()], Ceilings(4.0, 1000.0))
    assert (row.us, row.gb_per_s, row.tflop_per_s) == pytest.approx((2000.0, 2.0, 500.0))
    assert (row.rival, row.rival_us, row.ratio) == ("quick", pytest.approx(3000.0), 1.5)
    assert row.share == pytest.approx(0.5)
    bounded = Case("k", "s", 4_000_000, 10**12, "gemm", lambda: "mine", {})
    row = measure(bounded, lambda run: seconds[run()], Ceilings(4.0, 1000.0))
    assert row.share == pytest.approx(0.5) and row.rival is None and row.ratio is None


def test_ceilings_count_bytes_read_and_written_and_two_operations_a_product():
    found = ceilings(once, CPU, copy_bytes=1000, gemm_size=10)
    assert found.copy_gb_per_s == pytest.approx(2000 / 1e-3 / 1e9)
    assert found.gemm_tflop_per_s == pytest.approx(2 * 1000 / 1e-3 / 1e12)


def test_the_table_has_the_ceilings_and_a_line_for_each_row(made):
    ceiling = Ceilings(4000.0, 700.0)
    with torch.inference_mode():
        rows = [measure(case, once, ceiling) for case in list(made.values())[:3]]
    lines = table(ceiling, rows)
    assert len(lines) == 2 + 3 and "copy 4000 GB/s" in lines[0]
    assert lines[2].startswith("rms_norm") and "of copy" in lines[2]


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_without_a_gpu_it_says_so_in_one_line(arguments, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code = bench.main(arguments)
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "no NVIDIA GPU on this machine" in out
    assert code == (1 if arguments else 0)
    if arguments:
        assert set(json.loads(out)) == {"error"}
