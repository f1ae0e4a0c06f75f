"""Times whole engine steps on a placed model: scheduling, the forward pass, sampling, recording.

Apart from enginebench.py because an engine speaks the wire format: it needs msgspec, which a bare
GPU machine may lack.
"""

from collections.abc import Callable

import numpy as np

from controlplane import protocol
from controlplane.latency import LatencyModel
from gpuworkers.aheadrunner import AheadRunner
from gpuworkers.engine import Engine, EngineConfig
from gpuworkers.enginebench import WARMUPS, StepTime
from gpuworkers.kvcache import TorchKVCache
from gpuworkers.stepper import GraphStepper

SHAPES = (  # (batch, tokens of context, on average over the timed steps)
    (1, 1024), (8, 1024), (32, 1024), (64, 1024), (128, 1024), (256, 1024), (64, 4096),
)  # fmt: skip
REPEATS = 50
OUTPUT_TOKENS = 200  # more than prompts of others and the timed steps take
STEP_TOKENS = 8192
PREFILL_STEPS_MAX = 1000
MODEL_ID = "loop"
STEP_MODEL = protocol.StepModel(0.004, 2e-5, 3e-8)  # near an H200's; it is learned anyway
TARGETS = protocol.ClassTargets("loop", 0, ttft_s_left=3600.0, itl_s=3600.0)


def time_steps(
    stepper: GraphStepper,
    kv: TorchKVCache,
    batch: int,
    context: int,
    device_s: float,
    clock: Callable[[], float],
) -> StepTime:
    """One decode step of an engine with `batch` sequences; device_s: of the same step, queued."""
    config = stepper.model.config
    facts = protocol.ModelFacts(MODEL_ID, "", config.max_model_len, config.vocab_size, 1)
    policy = protocol.Policy(step_tokens_max=STEP_TOKENS, chunk_tokens_max=STEP_TOKENS)
    runner = AheadRunner(stepper, kv)
    engine = Engine(runner, EngineConfig(policy=policy), LatencyModel(STEP_MODEL), facts, "mixed")
    for index in range(batch):
        length = context - WARMUPS - REPEATS // 2 - index % 16
        prompt = [(index + i) % config.vocab_size for i in range(length)]
        sampling = protocol.Sampling(OUTPUT_TOKENS, ignore_eos=True)
        answer = engine.assign(
            protocol.Assign(
                str(index), 1, MODEL_ID, "full", prompt, [], sampling, TARGETS, str(index).encode()
            ),
            clock(),
        )
        assert isinstance(answer, protocol.Accepted), answer
    for _ in range(PREFILL_STEPS_MAX):
        if engine.load(0.0).running_online == batch:
            break
        engine.step(clock(), clock)
    walls = []
    for _ in range(WARMUPS + REPEATS):
        started_at_s = clock()
        result = engine.step(clock(), clock)
        engine.load(0.0)
        walls.append(clock() - started_at_s)
        if len(result.sequences) < batch:  # prompts took so long that the first have ended
            break
    return StepTime("engine loop", batch, context, float(np.median(walls[WARMUPS:])), device_s)
