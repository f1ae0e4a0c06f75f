"""What engine tests share: assignments, and an engine over a scripted runner with its own clock."""

from collections.abc import Callable, Iterable

from controlplane import protocol
from controlplane.latency import LatencyModel
from gpuworkers.engine import Engine, EngineConfig, RunResult, StepResult
from gpuworkers.scheduler import Plan

MODEL = protocol.ModelFacts("tiny", "", max_model_len=1000, vocab_size=512, kv_bytes_per_token=8)
STEP_MODEL = protocol.StepModel(base_s=0.010, per_token_s=0.001, per_context_token_s=1e-6)
ONLINE = protocol.ClassTargets("interactive", rank=0, ttft_s_left=1.0, itl_s=0.1)
BATCH = protocol.ClassTargets("batch", rank=9, ttft_s_left=1e6, itl_s=1e6, is_batch=True)
EOS = 2


def assign(
    request_id: str,
    prompt: Iterable[int] | int = 20,
    output: int = 4,
    *,
    epoch: int = 1,
    stage: protocol.Stage = "full",
    targets: protocol.ClassTargets = ONLINE,
    delivered: list[int] | None = None,
    salt: bytes = b"salt",
    model_id: str = "tiny",
    **sampling: object,
) -> protocol.Assign:
    """An assignment; `prompt` is ids, or how many to make up."""
    ids = [7 + i % 400 for i in range(prompt)] if isinstance(prompt, int) else list(prompt)
    return protocol.Assign(
        request_id,
        epoch,
        model_id,
        stage,
        ids,
        delivered or [],
        protocol.Sampling(output, **sampling),
        targets,
        salt,
    )


class ScriptedKV:
    """Sizes only: the engine never looks into KV."""

    num_layers = 2
    layer_block_bytes = 64
    dtype_name = "none"

    def __init__(self, num_blocks: int, block_tokens: int = 16) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens

    def read(self, layer: int, block_ids: list[int]) -> bytes:
        return bytes(self.layer_block_bytes * len(block_ids))

    def write(self, layer: int, block_ids: list[int], data: bytes | memoryview) -> None:
        assert len(data) == self.layer_block_bytes * len(block_ids)


class ScriptedRunner:
    """Ids are a function of the tokens before, like a model's; `script` overrides them by index."""

    eos_token_ids = frozenset({EOS})
    can_guide = False

    def __init__(self, num_blocks: int = 64) -> None:
        self.kv = ScriptedKV(num_blocks)
        self.script: dict[tuple[str, int], int | None] = {}
        self.plans: list[Plan] = []

    def prepare(self) -> None:
        """See engine.Runner."""

    def run(self, plan: Plan, layer_written: Callable[[int], None] | None = None) -> RunResult:
        self.plans.append(plan)
        sequences = [row.sequence for row in plan.rows if row.samples]
        return RunResult(
            [
                self.script.get((s.request_id, s.output_tokens), (sum(s.token_ids) % 400) + 50)
                for s in sequences
            ],
            modelled_s=0.02,
        )


class EngineBench:
    """An engine with a clock of its own."""

    def __init__(self, runner=None, config: EngineConfig | None = None, model=MODEL, step=None):
        self.runner = runner or ScriptedRunner()
        self.engine = Engine(
            self.runner, config or EngineConfig(), LatencyModel(step or STEP_MODEL), model, "mixed"
        )
        self.now_s = 100.0
        self.reports: list[protocol.SequenceReport] = []

    def assign(self, request_id: str, *args, **kwargs) -> protocol.Accepted | protocol.Rejected:
        kwargs.setdefault("model_id", self.engine.model.model_id)
        return self.engine.assign(assign(request_id, *args, **kwargs), self.now_s)

    def step(self) -> StepResult:
        result = self.engine.step(self.now_s, lambda: self.now_s)
        self.now_s += max(result.measured_s, 0.001)
        self.reports += result.sequences
        self.engine.check_integrity()
        return result

    def run_dry(self, steps_max: int = 2000) -> None:
        for _ in range(steps_max):
            if not self.engine.has_work():
                return
            self.step()
        raise AssertionError(f"still has work after {steps_max} steps")

    def output(self, request_id: str) -> list[int]:
        """Reported ids, checked to be contiguous."""
        ids: list[int] = []
        first = None
        for report in self.reports:
            if report.request_id != request_id:
                continue
            first = report.seq if first is None else first
            assert report.seq == first + len(ids), (report, len(ids))
            ids += report.token_ids
        return ids

    def finish_reasons(self, request_id: str) -> list[str]:
        return [
            r.finish_reason for r in self.reports if r.request_id == request_id and r.finish_reason
        ]
