"""Loading a model, its facts and calibration, KV as bytes, and odd shapes of model."""

import numpy as np
import pytest
import torch

from controlplane.errors import ConfigError
from controlplane.latency import StepFeatures, step_s
from gpuworkers.calibration import faster_dtype, fit_step_model
from gpuworkers.kvcache import TorchKVCache
from gpuworkers.models.config import read_config
from gpuworkers.models.llama import load_llama
from gpuworkers.runner import TorchRunner, load
from gpuworkers.scheduler import Plan, PlanRow
from gpuworkers.sequence import from_assign
from gpuworkers.stepper import Stepper
from gpuworkers.weights import WeightFiles
from kernels.ops import Heads
from kernels.reference import ReferenceOps
from tests.gpuworkers.enginekit import assign
from tests.gpuworkers.tinyllama import bench_of, write_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("runner"))


def test_load_tells_the_facts_of_model_and_device(folder):
    runner, model, device, latency = load(folder, "tiny", dtype="fp32", kv_tokens=400)
    assert (model.model_id, model.vocab_size, model.max_model_len) == ("tiny", 512, 400)
    assert model.kv_bytes_per_token == 2 * 2 * 2 * 16 * 4
    assert model.weights_sha256 == WeightFiles(folder).sha256()
    assert (device.kind, device.dtype, device.num_sms) == ("cpu", "fp32", 1)
    assert device.memory_bytes > 1 << 28 and device.name
    assert runner.kv.num_blocks == 25 and runner.eos_token_ids == {2}
    coefficients = latency.coefficients()
    assert coefficients.base_s > 0 and coefficients.per_token_s >= 0


def test_kv_room_by_default_depends_on_memory(folder, monkeypatch):
    runner, *_ = load(folder, "tiny", dtype="fp32")
    assert runner.kv.num_blocks == 1024
    monkeypatch.setattr("gpuworkers.runner.memory_bytes", lambda: 16 * 512 * 160)
    runner, model, *_ = load(folder, "tiny", dtype="fp32")
    assert (runner.kv.num_blocks, model.max_model_len) == (10, 160)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"dtype": "fp8"}, "dtype='fp8': expected one of auto, fp32, bf16"),
        ({"numerics": "sloppy"}, "numerics='sloppy': expected one of exact, fast"),
        ({"kv_tokens": 15}, "kv_tokens=15"),
        ({"threads": 0}, "threads=0"),
    ],
)
def test_impossible_options_are_refused_by_name(folder, options, message):
    with pytest.raises(ConfigError, match=message):
        load(folder, "tiny", **options)


def test_bfloat16_runs_and_agrees_roughly(folder):
    ids = [5 + i for i in range(40)]
    logits = []
    for dtype in ("fp32", "bf16"):
        runner, *_ = load(folder, "tiny", dtype=dtype, kv_tokens=64)
        sequence = from_assign(assign("r", ids), 0.0)
        sequence.block_ids = [3, 0, 1]
        with torch.inference_mode():
            logits.append(runner.logits((PlanRow(sequence, 0, 40, True),)))
    assert runner.kv.dtype_name == "bf16"
    assert torch.nn.functional.cosine_similarity(*logits) > 0.99


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": False}, {"num_key_value_heads": 6}, {"num_key_value_heads": 1}],
)
def test_the_forward_pass_agrees_with_the_float64_reference(tmp_path, changes):
    folder = write_tiny(tmp_path, **changes)
    config = read_config(folder)
    runner, *_ = load(folder, "tiny", dtype="fp32", kv_tokens=160)
    reference = ReferenceOps()
    plain = load_llama(config, WeightFiles(folder), torch.float32, reference)
    kv = TorchKVCache(config.num_layers, 10, 16, plain.heads, torch.float32)
    slow = TorchRunner(Stepper(plain, reference, kv.layers, 16), kv)
    prompts = [from_assign(assign(f"r{i}", 30 + 9 * i), 0.0) for i in range(2)]
    prompts[0].block_ids, prompts[1].block_ids = [4, 2], [7, 0, 1]
    logits = []
    for each in (runner, slow):
        with torch.inference_mode():
            each.logits(tuple(PlanRow(s, 0, len(s.token_ids) - 1, False) for s in prompts))
            rows = tuple(PlanRow(s, len(s.token_ids) - 1, 1, True) for s in prompts)
            logits.append(each.logits(rows))
    assert torch.allclose(*logits, atol=2e-4), (logits[0] - logits[1]).abs().max()


def test_a_step_without_sampling_rows_gives_no_ids(folder):
    runner, *_ = load(folder, "tiny", dtype="fp32", kv_tokens=64)
    sequence = from_assign(assign("r", 40), 0.0)
    sequence.block_ids = [0, 1, 2]
    part = Plan((PlanRow(sequence, 0, 20, False),), 1, StepFeatures(), 0.0, 0.0, 0.0)
    assert runner.run(part).token_ids == []
    rest = Plan((PlanRow(sequence, 20, 20, True),), 1, StepFeatures(), 0.0, 0.0, 0.0)
    assert len(runner.run(rest).token_ids) == 1


def test_weights_that_give_no_numbers_end_the_request_with_an_error(folder):
    bench = bench_of(folder, kv_tokens=512)
    bench.runner.model._norm[:] = torch.nan
    bench.assign("r", 20, 5)
    bench.run_dry()
    assert bench.finish_reasons("r") == ["error"] and bench.output("r") == []


# --- KV as bytes


def cache() -> TorchKVCache:
    made = TorchKVCache(2, 5, 16, Heads(4, 2, 8), torch.float32)
    for layer in made.layers:
        layer.copy_(torch.randn(layer.shape))
    return made


def test_a_layers_block_is_one_contiguous_piece_k_before_v():
    kv = cache()
    assert kv.layer_block_bytes == 2 * 2 * 16 * 8 * 4
    data = np.frombuffer(kv.read(1, [3]), dtype=np.float32).reshape(2, 2, 16, 8)
    assert np.array_equal(data, kv.layers[1][3].numpy())


def test_blocks_written_elsewhere_are_the_blocks_that_were_read():
    source, target = cache(), cache()
    untouched = target.layers[0].clone()
    target.write(0, [4, 1], memoryview(source.read(0, [0, 2])))
    assert torch.equal(target.layers[0][4], source.layers[0][0])
    assert torch.equal(target.layers[0][1], source.layers[0][2])
    assert torch.equal(target.layers[0][[0, 2, 3]], untouched[[0, 2, 3]])
    target.write(0, [], b"")


def test_kv_of_a_wrong_size_or_not_finite_is_refused_and_nothing_is_written():
    kv = cache()
    before = kv.layers[0].clone()
    with pytest.raises(ValueError, match="expected 4096"):
        kv.write(0, [0, 1], bytes(4095))
    with pytest.raises(ValueError, match="not finite"):
        kv.write(0, [0], np.full(512, np.nan, dtype=np.float32).tobytes())
    assert torch.equal(kv.layers[0], before)


# --- calibration


def test_the_fit_finds_the_coefficients_it_was_made_from():
    features = [StepFeatures(r, c) for r, c in ((1, 64), (4, 260), (4, 1000), (64, 128), (16, 900))]
    seconds = [0.04 + 0.003 * f.rows + 1e-5 * f.context_tokens for f in features]
    fitted = fit_step_model(list(zip(features, seconds, strict=True)))
    assert fitted.base_s == pytest.approx(0.04) and fitted.per_token_s == pytest.approx(0.003)
    assert fitted.per_context_token_s == pytest.approx(1e-5)


def test_no_coefficient_is_negative_whatever_was_measured():
    noisy = [
        (StepFeatures(1, 1000), 0.05),
        (StepFeatures(4, 10), 0.06),
        (StepFeatures(64, 50), 0.2),
    ]
    falling = [(StepFeatures(1, 10), 0.5), (StepFeatures(50, 10), 0.1)]
    for observed in (noisy, falling, noisy[:1]):
        fitted = fit_step_model(observed)
        assert fitted.base_s > 0
        assert fitted.per_token_s >= 0 and fitted.per_context_token_s >= 0
        assert step_s(fitted, StepFeatures(10, 100)) > 0


def test_the_dtype_probe_gives_a_dtype_that_can_be_served():
    assert faster_dtype(64, 128) in (torch.float32, torch.bfloat16)
