"""Rolling statistics of this process: what the Overview page shows, built once per tick.

Percentiles come from histograms over the last WINDOW_S seconds with the buckets of `/metrics` plus
the class's own target as a boundary, so "p99 within target" is exact and not a matter of
interpolation. A value without data is None, never NaN and never a stale number.
"""

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from console import costs
from console.costbook import CostBook
from console.facts import RequestFact
from console.metrics import ITL_BUCKETS_S, TTFT_BUCKETS_S
from controlplane import domain, protocol

WINDOW_S = 60  # percentiles, attainment and cost
RATE_WINDOW_S = 10  # tokens per second
LOOK_S = 1.0  # how soon a changed class counts for the gaps of running streams
CLASSES_MAX = 64  # classes with statistics at one time; operators define classes


class WindowSums:
    """Sums of a fixed number of columns over the last `window_s` whole seconds."""

    def __init__(self, num_columns: int, window_s: int) -> None:
        self.window_s = window_s
        self.totals: list[float] = [0] * num_columns
        self._slots: deque[tuple[int, list[float]]] = deque()  # (second, sums), oldest first

    def add(self, column: int, amount: float, now_s: float) -> None:
        second = int(now_s)
        if not self._slots or self._slots[-1][0] < second:
            self.expire(now_s)
            self._slots.append((second, [0] * len(self.totals)))
        self._slots[-1][1][column] += amount
        self.totals[column] += amount

    def expire(self, now_s: float) -> None:
        """Forget whole seconds that have left the window; an empty window sums to exactly 0."""
        oldest_kept = int(now_s) - self.window_s + 1
        while self._slots and self._slots[0][0] < oldest_kept:
            _, sums = self._slots.popleft()
            self.totals = [total - gone for total, gone in zip(self.totals, sums, strict=True)]
        if not self._slots:
            self.totals = [0] * len(self.totals)


class WindowHistogram:
    """Counts by bucket over a window; `bounds_s` are inclusive upper bounds, one more is +Inf."""

    def __init__(self, bounds_s: Sequence[float], window_s: int = WINDOW_S) -> None:
        self.bounds_s = tuple(bounds_s)
        self._counts = WindowSums(len(self.bounds_s) + 1, window_s)

    def observe(self, value_s: float, now_s: float) -> None:
        self._counts.add(bisect_left(self.bounds_s, value_s), 1, now_s)

    def quantile(self, q: float, now_s: float) -> float | None:
        """The q-quantile in seconds by linear interpolation in its bucket; None without data.

        In the last, open bucket it is the highest bound, as in Prometheus."""
        self._counts.expire(now_s)
        counts = self._counts.totals
        rank = q * sum(counts)
        if rank == 0:
            return None
        below = 0.0
        for i, bound_s in enumerate(self.bounds_s):
            if below + counts[i] >= rank:
                lower_s = self.bounds_s[i - 1] if i else 0.0
                return lower_s + (bound_s - lower_s) * (rank - below) / counts[i]
            below += counts[i]
        return self.bounds_s[-1]


class ClassStats:
    """Latencies and outcomes of one SLO class."""

    def __init__(self, slo: domain.SLOClass) -> None:
        self.slo = slo
        self.ttft = WindowHistogram(sorted({*TTFT_BUCKETS_S, slo.ttft_s_p99}))
        self.itl = WindowHistogram(sorted({*ITL_BUCKETS_S, slo.itl_s_p99}))
        self.outcomes = WindowSums(2, WINDOW_S)  # requests that ended, and those within targets

    def observe_request(self, fact: RequestFact, now_s: float) -> None:
        if fact.status == "cancelled":
            return  # the client's own choice says nothing about the promise
        self.outcomes.add(0, 1, now_s)
        is_met = (
            fact.status == "completed"
            and fact.ttft_ms is not None
            and fact.ttft_ms <= self.slo.ttft_s_p99 * 1000
            and (fact.itl_ms_p99 is None or fact.itl_ms_p99 <= self.slo.itl_s_p99 * 1000)
        )
        if is_met:
            self.outcomes.add(1, 1, now_s)

    def row(self, now_s: float) -> dict[str, Any]:
        """One tile of the Overview; milliseconds."""
        self.outcomes.expire(now_s)
        num_requests, num_met = self.outcomes.totals
        ttft_p99, itl_p99 = self.ttft.quantile(0.99, now_s), self.itl.quantile(0.99, now_s)
        if ttft_p99 is None and itl_p99 is None:
            status = "no_data"
        elif (ttft_p99 or 0) > self.slo.ttft_s_p99 or (itl_p99 or 0) > self.slo.itl_s_p99:
            status = "missed"
        else:
            status = "ok"
        return {
            "name": self.slo.name,
            "is_batch": self.slo.is_batch,
            "ttft_ms_p50": milliseconds(self.ttft.quantile(0.5, now_s)),
            "ttft_ms_p99": milliseconds(ttft_p99),
            "ttft_target_ms": milliseconds(self.slo.ttft_s_p99),
            "itl_ms_p50": milliseconds(self.itl.quantile(0.5, now_s)),
            "itl_ms_p99": milliseconds(itl_p99),
            "itl_target_ms": milliseconds(self.slo.itl_s_p99),
            "attainment": num_met / num_requests if num_requests else None,
            "requests": int(num_requests),
            "status": status,
        }


class LiveStats:
    """The owner of all rolling statistics; touched on the event loop only.

    `classes` and `view` give the current SLO classes and the plane's view; `clock` is the fleet's.
    """

    def __init__(
        self,
        classes: Callable[[], Sequence[domain.SLOClass]],
        view: Callable[[], domain.ClusterView],
        gpu_hour_usd: float,
        clock: Callable[[], float],
    ) -> None:
        self._classes = classes
        self._view = view
        self._gpu_hour_usd = gpu_hour_usd
        self._clock = clock
        self._by_class: dict[str, ClassStats] = {}
        self._looked_until_s = -math.inf
        self._rates = WindowSums(2, RATE_WINDOW_S)  # output tokens: interactive, batch
        self._tokens = WindowSums(2, WINDOW_S)  # the same over the cost window
        self._busy_s = WindowSums(2, WINDOW_S)  # worker seconds that each lane pays for
        self._totals = dict.fromkeys(
            ("requests_total", "completed", "failed", "cancelled", "rejected", "expired")
            + ("tokens_interactive", "tokens_batch", "placements_local", "placements_handoff")
            + ("failovers", "batch_lines"),
            0,
        )
        self._seq = 0
        self.costs: CostBook | None = None  # set once by serve

    def observe_request(self, fact: RequestFact) -> None:
        """A request has ended."""
        if self.costs is not None:
            self.costs.observe(fact)
        self._totals["requests_total"] += 1
        self._totals[fact.status] += 1
        self._totals["failovers"] += fact.failovers
        if fact.split:
            self._totals[f"placements_{fact.split}"] += 1
        if fact.is_batch:
            self._totals["batch_lines"] += 1
        stats = self._stats(fact.class_name)
        if stats is not None:
            stats.observe_request(fact, self._clock())

    def observe_tokens(self, is_batch: bool, num_tokens: int, now_s: float) -> None:
        """Output tokens have reached the gateway."""
        self._rates.add(int(is_batch), num_tokens, now_s)
        self._tokens.add(int(is_batch), num_tokens, now_s)
        self._totals["tokens_batch" if is_batch else "tokens_interactive"] += num_tokens

    def observe_ttft(self, class_name: str, ttft_s: float) -> None:
        stats = self._stats(class_name)
        if stats is not None:
            stats.ttft.observe(ttft_s, self._clock())

    def observe_itl(self, class_name: str, itl_s: float, now_s: float) -> None:
        """Once for each token: looks at the classes again only after a second."""
        stats = self._by_class.get(class_name)
        if stats is None or now_s >= self._looked_until_s:
            self._looked_until_s = now_s + LOOK_S
            stats = self._stats(class_name)
        if stats is not None:
            stats.itl.observe(itl_s, now_s)

    def observe_load(self, load: protocol.WorkerLoad, now_s: float) -> None:
        """A worker reported how it spent its time since its last report. Interactive work pays for
        the time in which it waits for more (costs.py, attributed)."""
        self._busy_s.add(0, load.online_s + load.idle_s, now_s)
        self._busy_s.add(1, load.batch_s, now_s)

    def frame(self, now_s: float) -> dict[str, Any]:
        """Everything the Overview shows, JSON-ready and complete in itself."""
        self._seq += 1
        for sums in (self._rates, self._tokens, self._busy_s):
            sums.expire(now_s)
        view = self._view()
        rows = self.class_rows(now_s)
        lanes = ("interactive", "batch")
        usd = [
            costs.usd_per_million(busy_s, self._gpu_hour_usd, int(num_tokens))
            for busy_s, num_tokens in zip(self._busy_s.totals, self._tokens.totals, strict=True)
        ]
        rates = [total / RATE_WINDOW_S for total in self._rates.totals]
        return {
            "seq": self._seq,
            "t": now_s,
            "topic": "overview",
            "classes": rows,
            "tokens_per_s": dict(zip(lanes, rates, strict=True)),
            "workers": [worker_row(worker) for worker in view.workers],
            "usd_per_million": dict(zip(lanes, usd, strict=True)),
            "queued": dict(view.queued_by_class),
            "running": sum(request.phase != "queued" for request in view.requests),
            "counters": dict(self._totals),
        }

    def class_rows(self, now_s: float) -> list[dict[str, Any]]:
        """How each class's promise was kept in the last WINDOW_S."""
        return [stats.row(now_s) for slo in self._classes() if (stats := self._stats(slo.name))]

    def _stats(self, class_name: str) -> ClassStats | None:
        """The statistics of a class, begun anew when its targets changed; None for no class."""
        known = self._by_class.get(class_name)
        slo = next((slo for slo in self._classes() if slo.name == class_name), None)
        if slo is None:
            self._by_class.pop(class_name, None)
            return None
        if known is None or known.slo != slo:
            if known is None and len(self._by_class) >= CLASSES_MAX:
                return None
            known = self._by_class[class_name] = ClassStats(slo)
        return known


def worker_row(worker: domain.WorkerView) -> dict[str, Any]:
    """One worker of the Overview's strip; values of the load are None until it has reported."""
    load = worker.load
    row: dict[str, Any] = {
        "worker_id": worker.worker_id,
        "name": worker.name,
        "engine": worker.engine,
        "device": worker.device.name,
        "role": worker.role,
        "status": worker.status,
        "heard_ago_s": round(worker.heard_ago_s, 3),
        "requests": worker.requests,
        "exception": worker.exception,
        "kv_used_ratio": None,
        "running": None,
        "waiting": None,
        "online_rows": None,
        "batch_rows": None,
        "step_ms": None,
        "predicted_ms": None,
    }
    if load is not None:
        used_blocks = load.kv_blocks_total - load.kv_blocks_free - load.kv_blocks_cached
        is_busy = load.running_online + load.running_batch > 0
        row |= {
            "kv_used_ratio": used_blocks / load.kv_blocks_total if load.kv_blocks_total else 0.0,
            "running": load.running_online + load.running_batch,
            "waiting": load.waiting_online + load.waiting_batch,
            "online_rows": load.rows_online if is_busy else 0,
            "batch_rows": load.rows_batch if is_busy else 0,
            "step_ms": milliseconds(load.measured_s) if is_busy else 0.0,
            "predicted_ms": milliseconds(load.predicted_s) if is_busy else 0.0,
        }
    return row


def milliseconds(seconds: float | None) -> float | None:
    """Milliseconds with three decimals for public JSON."""
    return None if seconds is None else round(seconds * 1000, 3)
