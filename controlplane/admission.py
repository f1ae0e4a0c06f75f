"""Decides before any prefill: guaranteed, surplus, or refused with a time at which it would work.

Only online work counts: batch rows give way, so batch never causes a refusal. What was admitted as
feasible is never rejected for its lateness afterwards; a forecast that fails demotes it.
Source: algorithms.md 2c.
"""

from collections import deque
from dataclasses import dataclass, field

import msgspec

from controlplane.config import ControlPlaneConfig
from controlplane.domain import GenerateRequest, Rejected, SLOClass
from controlplane.pools import Pool

RETRY_S = 1.0  # a tenant's own requests end at this pace at best
NO_WORKER_RETRY_S = 5.0  # a worker process starts in about this time
DRAINING_RETRY_S = 5.0
DUE_SLACK_S = 0.05  # a retry may come so much before its time: clocks differ


def refuse_worker(request: GenerateRequest, pool: Pool | None, num_workers: int) -> Rejected | None:
    """No member could ever run it. Lost members may come back, so they count."""
    if pool is None:
        if request.slo.is_batch:  # its deadline is hours away: it waits for a worker
            return None
        if not num_workers:
            return Rejected("no_worker", "no worker has joined", NO_WORKER_RETRY_S)
        return Rejected("model_not_served", f"no worker serves {request.model_id}", None)
    prompt, total = request.prompt_tokens, request.prompt_tokens + request.output_tokens_max
    if total > pool.model_tokens_max:
        text = f"prompt of {prompt} and output of {request.output_tokens_max} tokens, at most"
        return Rejected("prompt_too_long", f"{text} {pool.model_tokens_max} together", None)
    if total - 1 > pool.kv_tokens_max:
        text = f"prompt and output of {total} tokens, KV for {pool.kv_tokens_max} on the largest"
        return Rejected("prompt_too_long", f"{text} worker", None)
    return None


class Outlook(msgspec.Struct, frozen=True):
    """What the best worker would give the request now, batch removed. Seconds from now."""

    worker_id: str
    ttft_s: float  # mean prediction
    ttft_s_p99: float  # calibrated
    itl_s: float  # of a step after it has joined
    work_s: float  # prefill seconds that it adds
    num_workers: int  # that could compute its prompt


def late_by_s(outlook: Outlook, slo: SLOClass, waited_s: float, margin: float) -> float:
    """Seconds by which the calibrated prediction misses the TTFT target less its margin."""
    return waited_s + outlook.ttft_s_p99 - (1.0 - margin) * slo.ttft_s_p99


def late_text(outlook: Outlook, slo: SLOClass, waited_s: float, promised_s: float) -> str:
    """The numbers that decided, in one sentence."""
    text = (
        f"predicted TTFT p99 {(waited_s + outlook.ttft_s_p99 + promised_s) * 1000.0:.0f} ms on"
        f" {outlook.worker_id}, target {slo.ttft_s_p99 * 1000.0:.0f} ms; step"
        f" {outlook.itl_s * 1000.0:.0f} ms, target {slo.itl_s_p99 * 1000.0:.0f} ms"
    )
    if promised_s > 0.0:
        text += f"; {promised_s * 1000.0:.0f} ms are promised to earlier refusals"
    return text


RetryKey = tuple[str, str, str, int, int, bytes]
KEPT_WEIGHT = 0.02  # of one promise in the share that is kept


def retry_key(request: GenerateRequest) -> RetryKey:
    """What a refused request and its retry have in common, without the client's help."""
    hashes = request.block_hashes
    return (
        request.tenant_id,
        request.model_id,
        request.slo.name,
        request.prompt_tokens,
        request.output_tokens_max,
        hashes[-1] if hashes else b"",
    )


@dataclass(slots=True)
class _Promise:
    due_at_s: float
    key: RetryKey
    work_s: float
    is_open: bool = True


@dataclass(slots=True)
class RetryBook:
    """Room promised to those who were refused: each is told a time of its own, and work promised
    for the near future counts as if it were queued, in the share in which clients do come back.
    Bounded; kept in order of due time. Equal requests of a tenant are as good as each other."""

    config: ControlPlaneConfig
    kept_share: float = 1.0  # of the promises that fell due lately: redeemed, not lapsed
    _promises: deque[_Promise] = field(default_factory=deque)
    _by_key: dict[RetryKey, deque[_Promise]] = field(default_factory=dict)
    _num_open: int = 0
    _booked_at_s: float = 0.0  # before this all that may be promised is

    def __len__(self) -> int:
        return self._num_open

    def _expire(self, now_s: float) -> None:
        lapsed_s = now_s - self.config.retry_grace_s
        while self._promises and self._promises[0].due_at_s < lapsed_s:
            promise = self._promises.popleft()
            if promise.is_open:
                self._close(promise, is_kept=False)

    def _close(self, promise: _Promise, is_kept: bool) -> None:
        promise.is_open = False
        self._num_open -= 1
        self.kept_share += KEPT_WEIGHT * (is_kept - self.kept_share)
        same = self._by_key[promise.key]
        same.popleft()  # of one key they fall due in order
        if not same:
            del self._by_key[promise.key]

    def promise(
        self, key: RetryKey, wait_s: float, work_s: float, num_workers: int, now_s: float
    ) -> float:
        """Seconds until a retry, at least wait_s. A full book gives its end without a promise."""
        self._expire(now_s)
        due_at_s = max(now_s + wait_s, self._booked_at_s)
        if self._num_open < self.config.promises_max:
            share = max(1, num_workers) * self.config.retry_share
            self._booked_at_s = due_at_s + work_s / share
            promise = _Promise(due_at_s, key, work_s)
            self._promises.append(promise)
            self._by_key.setdefault(key, deque()).append(promise)
            self._num_open += 1
        return due_at_s - now_s

    def redeem(self, key: RetryKey, now_s: float) -> bool:
        """Is this the retry of a promise that is due? It is used up by asking."""
        self._expire(now_s)
        same = self._by_key.get(key)
        if same is None or same[0].due_at_s > now_s + DUE_SLACK_S:
            return False
        self._close(same[0], is_kept=True)
        return True

    def ahead_s(self, horizon_s: float, num_workers: int, now_s: float) -> float:
        """Prefill seconds per worker that are promised for between now and the horizon, as far as
        clients keep to it."""
        self._expire(now_s)
        work_s = 0.0
        for promise in self._promises:
            if promise.due_at_s > now_s + horizon_s:
                break
            work_s += promise.work_s if promise.is_open and promise.due_at_s >= now_s else 0.0
        return self.kept_share * work_s / max(1, num_workers)
