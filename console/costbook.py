"""Gathers GPU time in memory and closes it into a few facts each minute, never one per token."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

from console.costs import CostLine, Key, attribute
from console.facts import CostFact, GpuFact, RequestFact
from controlplane.gpuledger import GpuView
from controlplane.protocol import GpuSeconds

KEYS_MAX = 4_096  # tenants × models × classes of one minute; what more come share one key
OVER = "(other)"
MINUTES_KEPT = 60  # for the figures of the last hour


@dataclass(slots=True)
class _Sums:
    is_batch: bool
    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    prefill_gpu_s: float = 0.0
    decode_gpu_s: float = 0.0


class CostBook:
    """Touched on the event loop only. `put` hands a fact to the writer and never blocks;
    `gpu_hour_usd` gives a model's price now; `run` names this run of the server."""

    def __init__(
        self,
        put: Callable[[CostFact | GpuFact], None],
        gpu_hour_usd: Callable[[str], float],
        run: str,
    ) -> None:
        self._put = put
        self._run = run
        self._gpu_hour_usd = gpu_hour_usd
        self._minute: datetime | None = None
        self._sums: dict[Key, _Sums] = {}
        self._spent: dict[str, GpuSeconds] = {}  # of each worker when the last minute was closed
        self._costs: deque[list[CostFact]] = deque(maxlen=MINUTES_KEPT)
        self._gpus: deque[list[GpuFact]] = deque(maxlen=MINUTES_KEPT)

    def observe(self, fact: RequestFact) -> None:
        """A request has ended; one that no worker ran costs nothing."""
        if fact.gpu_prefill_s + fact.gpu_decode_s <= 0.0:
            return
        key = (fact.tenant_id, fact.model_id, fact.class_name)
        if key not in self._sums and len(self._sums) >= KEYS_MAX:
            key = (OVER, fact.model_id, OVER)
        sums = self._sums.setdefault(key, _Sums(fact.is_batch))
        sums.requests += 1
        sums.prompt_tokens += fact.prompt_tokens
        sums.output_tokens += fact.output_tokens
        sums.prefill_gpu_s += fact.gpu_prefill_s
        sums.decode_gpu_s += fact.gpu_decode_s

    def tick(self, now: datetime, workers: Sequence[GpuView]) -> bool:
        """At each turn of the control loop; True when a minute was closed."""
        minute = now.replace(second=0, microsecond=0)
        if self._minute == minute:
            return False
        closed, self._minute = self._minute, minute
        gpus = self._gpu_facts(closed or minute, workers)
        if closed is None:
            return False
        self._close(closed, gpus)
        return True

    def close(self, now: datetime, workers: Sequence[GpuView]) -> None:
        """The server ends in the middle of a minute."""
        minute = self._minute or now.replace(second=0, microsecond=0)
        self._close(minute, self._gpu_facts(minute, workers))

    def _close(self, minute: datetime, gpus: list[GpuFact]) -> None:
        costs = [
            CostFact(
                minute,
                self._run,
                *key,
                sums.is_batch,
                sums.requests,
                sums.prompt_tokens,
                sums.output_tokens,
                sums.prefill_gpu_s,
                sums.decode_gpu_s,
            )
            for key, sums in self._sums.items()
        ]
        self._sums.clear()
        self._costs.append(costs)
        self._gpus.append(gpus)
        for fact in (*costs, *gpus):
            self._put(fact)

    def _gpu_facts(self, minute: datetime, workers: Sequence[GpuView]) -> list[GpuFact]:
        """Of each model, what its workers spent since the last call. What a worker spent before it
        was first seen is not ours."""
        before, self._spent = self._spent, {}
        lanes: dict[str, list[float]] = {}
        for worker in workers:
            spent = self._spent[worker.worker_id] = worker.spent
            told = before.get(worker.worker_id, spent)
            sums = lanes.setdefault(worker.model_id, [0.0, 0.0, 0.0, 0.0])
            sums[0] += spent.online_s - told.online_s
            sums[1] += spent.batch_s - told.batch_s
            sums[2] += spent.batch_fixed_s - told.batch_fixed_s
            sums[3] += spent.idle_s - told.idle_s
        return [
            GpuFact(minute, self._run, model_id, *sums, self._gpu_hour_usd(model_id))
            for model_id, sums in sorted(lanes.items())
            if sum(sums) > 0.0
        ]

    def last_hour(self) -> dict[Key, CostLine]:
        """Costs of the last MINUTES_KEPT closed minutes."""
        costs = (fact for minute in self._costs for fact in minute)
        return attribute(costs, (fact for minute in self._gpus for fact in minute))
