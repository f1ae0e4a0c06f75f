"""The worker's way through the CUDA kernels, run on the CPU: model, captured decodes, engine."""

from dataclasses import replace

import pytest
import torch

from controlplane import protocol
from gpuworkers import greedycheck
from gpuworkers.aheadrunner import AheadRunner
from gpuworkers.gpumodel import BLOCK_TOKENS, DTYPE, place
from gpuworkers.greedycheck import compare, generate
from gpuworkers.kvcache import TorchKVCache
from gpuworkers.models.llama import load_llama
from gpuworkers.randommodel import SMALL, RandomWeights
from gpuworkers.runner import calibrate
from gpuworkers.stepper import Forward, GraphStepper, Stepper
from kernels.cuda.backend import CudaOps
from kernels.torchops.backend import TorchOps
from tests.cudasim.sim import SimLauncher
from tests.gpuworkers.enginekit import EngineBench

CPU = torch.device("cpu")
CONFIGS = {
    "llama": replace(
        SMALL, num_layers=2, hidden_size=128, num_q_heads=4, num_kv_heads=2, head_dim=32,
        intermediate_size=96, vocab_size=512,
    ),
    "qwen3": replace(
        SMALL, num_layers=2, hidden_size=64, num_q_heads=3, num_kv_heads=1, head_dim=64,
        intermediate_size=72, vocab_size=500, has_head_norms=True, tie_word_embeddings=False,
    ),
}  # fmt: skip
PROMPTS = [[(7 * i + 3 * j) % 499 for i in range(size)] for j, size in enumerate((1, 63, 64, 150))]
OUTPUT = 5
FILES = RandomWeights("cpu", "cpu")
KV_TOKENS = 1024


def rerun(forward: Forward) -> Forward:
    """A capture for a machine without CUDA."""
    logits = forward()
    return lambda: logits.copy_(forward())


def placed(name: str) -> tuple[GraphStepper, TorchKVCache]:
    ops = CudaOps(SimLauncher(), CPU, num_sms=2)
    return place(CONFIGS[name], FILES, ops, "cpu", KV_TOKENS, rerun, (1, 4))


@pytest.mark.parametrize("name", CONFIGS)
def test_kernels_and_captured_decodes_give_the_output_of_the_torch_backend(name):
    config, ops = CONFIGS[name], TorchOps()
    model = load_llama(config, FILES, DTYPE, ops)
    kv = TorchKVCache(2, KV_TOKENS // BLOCK_TOKENS, BLOCK_TOKENS, model.heads, DTYPE)
    eager = Stepper(model, ops, kv.layers, BLOCK_TOKENS)
    expected = generate(eager, BLOCK_TOKENS, PROMPTS, OUTPUT)
    stepper, _ = placed(name)
    agreement = compare(expected, generate(stepper, BLOCK_TOKENS, PROMPTS, OUTPUT))
    assert agreement.is_right and agreement.equal >= 2, agreement
    assert stepper.num_replays == OUTPUT - 1
    assert greedycheck.MARGIN < 0.1  # logits of these models differ by about 1


def test_an_engine_serves_greedy_and_seeded_requests_on_the_kernels():
    stepper, kv = placed("llama")
    facts = protocol.ModelFacts("tiny", "", KV_TOKENS, 512, kv_bytes_per_token=512)
    runner = AheadRunner(stepper, kv)
    bench = EngineBench(runner, model=facts)
    for number in (1, 2):  # the second finds its first block in the prefix cache
        bench.assign(f"greedy{number}", 100, 6)
        bench.assign(f"seeded{number}", 70, 6, temperature=0.9, top_k=40, seed=5)
        bench.assign(f"probable{number}", 20, 3, logprobs=2)
        bench.run_dry()
    for kind, count in (("greedy", 6), ("seeded", 6), ("probable", 3)):
        output = bench.output(f"{kind}1")
        assert len(output) == count and bench.finish_reasons(f"{kind}1") == ["length"]
        assert bench.output(f"{kind}2")[:1] == output[:1]
    assert stepper.num_replays >= 10 and runner.num_taken >= 8
    logprobs = [r.logprobs for r in bench.reports if r.request_id == "probable1" and r.logprobs]
    assert [len(each[0].top_ids) for each in logprobs] == [2, 2, 2]


def test_calibration_runs_the_shapes_that_the_cache_holds():
    stepper, kv = placed("llama")
    shapes = ((1, 64, 1), (4, 64, 1), (1, 0, 100), (64, 1024, 1))
    fitted = calibrate(AheadRunner(stepper, kv), shapes, repeats=1)
    assert fitted.base_s > 0 and stepper.num_replays == 2
