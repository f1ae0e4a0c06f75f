"""The waiting room: who may enter, who is next, and who has waited too long.

Requests that have lost their worker go before all that have not started; then classes by rank, fair
over tenants inside a class; batch lines come last.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from controlplane.config import ControlPlaneConfig
from controlplane.domain import GenerateRequest, Rejected, SLOClass
from controlplane.fairqueue import FairQueue
from controlplane.registry import Worker

RETRY_S = 1.0  # a tenant's own requests end at this pace at best
NO_WORKER_RETRY_S = 5.0  # a worker process starts in about this time
DRAINING_RETRY_S = 5.0


def refuse_worker(request: GenerateRequest, workers: Iterable[Worker]) -> Rejected | None:
    """No member could ever run it. Lost members may come back, so they count."""
    known = list(workers)
    serving = [worker for worker in known if worker.has_model(request.model_id)]
    if not serving:
        if request.slo.is_batch:  # its deadline is hours away: it waits for a worker
            return None
        if not known:
            return Rejected("no_worker", "no worker has joined", NO_WORKER_RETRY_S)
        return Rejected("model_not_served", f"no worker serves {request.model_id}", None)
    prompt, total = request.prompt_tokens, request.prompt_tokens + request.output_tokens_max
    model_tokens = max(worker.model(request.model_id).max_model_len for worker in serving)
    if total > model_tokens:
        text = f"prompt of {prompt} and output of {request.output_tokens_max} tokens, at most"
        return Rejected("prompt_too_long", f"{text} {model_tokens} together", None)
    kv_tokens = max(worker.hello.num_blocks * worker.hello.block_tokens for worker in serving)
    if total - 1 > kv_tokens:
        text = f"prompt and output of {total} tokens, KV for {kv_tokens} on the largest worker"
        return Rejected("prompt_too_long", text, None)
    return None


@dataclass(slots=True)
class WaitingRoom:
    """Bounded queues per class, and the requests that move between workers."""

    config: ControlPlaneConfig
    _queues: dict[str, FairQueue] = field(default_factory=dict)
    _classes: dict[str, SLOClass] = field(default_factory=dict)
    _moving: OrderedDict[str, GenerateRequest] = field(default_factory=OrderedDict)
    _since_s: dict[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._since_s)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._since_s

    def refuse_queue(self, slo: SLOClass) -> Rejected | None:
        """The class already has as many waiting as it may; batch is bounded by its feeder."""
        queue = self._queues.get(slo.name)
        if slo.is_batch or queue is None or len(queue) < self.config.queue_max:
            return None
        return Rejected(
            "queue_full",
            f"{len(queue)} requests of class {slo.name} are waiting, at most"
            f" {self.config.queue_max}",
            RETRY_S,
        )

    def enter(self, request: GenerateRequest, now_s: float) -> None:
        slo = request.slo
        self._classes[slo.name] = slo
        queue = self._queues.setdefault(slo.name, FairQueue(self.config.tenants_max))
        queue.push(request)
        self._since_s[request.request_id] = now_s

    def enter_moving(self, request: GenerateRequest, now_s: float) -> None:
        """It had a worker before: it goes on before anything new starts."""
        assert request.request_id not in self._since_s, request.request_id
        self._moving[request.request_id] = request
        self._since_s[request.request_id] = now_s

    def next_up(self) -> list[GenerateRequest]:
        """Requests to try now, in order; at most scan_max of each queue."""
        limit = self.config.scan_max
        moving = sorted(
            self._moving.values(),
            key=lambda request: (request.slo.rank, request.arrived_at_s, request.request_id),
        )
        heads = [head for head in moving if not head.slo.is_batch][:limit]
        for name in sorted(self._queues, key=lambda name: (self._classes[name].rank, name)):
            if not self._classes[name].is_batch:
                heads += self._queues[name].heads(limit)
        heads += [head for head in moving if head.slo.is_batch][:limit]
        for name in sorted(self._queues):
            if self._classes[name].is_batch:
                heads += self._queues[name].heads(limit)
        return heads

    def take(self, request: GenerateRequest) -> None:
        """The request starts."""
        del self._since_s[request.request_id]
        if self._moving.pop(request.request_id, None) is None:
            self._queue(request).take(request.request_id)

    def remove(self, request: GenerateRequest) -> None:
        """The request ends without (another) start."""
        del self._since_s[request.request_id]
        if self._moving.pop(request.request_id, None) is None:
            self._queue(request).remove(request.request_id)

    def _queue(self, request: GenerateRequest) -> FairQueue:
        return self._queues[request.slo.name]

    def position(self, request: GenerateRequest) -> int:
        if request.request_id in self._moving:
            return list(self._moving).index(request.request_id) + 1
        return len(self._moving) + self._queue(request).position(request.request_id)

    def waited_s(self, request_id: str, now_s: float) -> float:
        return now_s - self._since_s[request_id]

    def overdue(self, now_s: float) -> list[GenerateRequest]:
        """Requests that have waited longer than their class allows."""
        late = [
            request
            for request in self._all()
            if self.waited_s(request.request_id, now_s) > _wait_s_max(request.slo)
        ]
        return sorted(late, key=lambda request: request.request_id)

    def _all(self) -> list[GenerateRequest]:
        waiting = list(self._moving.values())
        for queue in self._queues.values():
            waiting += queue.requests()
        return waiting

    def counts(self) -> tuple[tuple[str, int], ...]:
        """Requests waiting for a first start, by class in order of rank."""
        names = sorted(self._queues, key=lambda name: (self._classes[name].rank, name))
        return tuple((name, len(self._queues[name])) for name in names)


def _wait_s_max(slo: SLOClass) -> float:
    if slo.is_batch and slo.deadline_s is not None:
        return slo.deadline_s
    return slo.queue_s_max
