"""Prometheus series of the serving process, and the raw ASGI answer of `/metrics`.

Counters of requests, tokens and handoffs rise when a request's fact is settled, from that fact, so
the page of metrics and the table of requests always count the same things.
"""

from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from console.costs import CostLine, Key
from console.facts import RequestFact
from controlplane import domain
from controlplane.gpuledger import GpuView
from controlplane.overload import OverloadView

# Seconds. TTFT as vLLM's loggers.py; ITL begins lower, because a decode step takes 5-20 ms on an
# H200; queue waits begin at 1 ms, because a 100 ms target is blind to vLLM's 0.3 s.
TTFT_BUCKETS_S = (
    (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75)
    + (1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
)  # fmt: skip
ITL_BUCKETS_S = (
    (0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75)
    + (1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
)  # fmt: skip
QUEUE_BUCKETS_S = (
    (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
    + (10.0, 30.0, 60.0, 300.0)
)  # fmt: skip
HANDOFF_BUCKETS_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
COST_SERIES_MAX = 256  # tenants × models × classes in `/metrics`
LAG_BUCKETS_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)


class ClassHistogram(Collector):
    """A histogram by SLO class that costs one bisection a value: it is asked for every token.

    prometheus_client's own looks for its bucket from the first on, under two locks. Values come on
    the event loop only; a scrape in another thread may miss the newest."""

    def __init__(self, name: str, text: str, bounds_s: Sequence[float]) -> None:
        self._name = name
        self._text = text
        self._bounds_s = tuple(bounds_s)
        self._counts: dict[str, list[int]] = {}  # by class; bounded by LiveStats' classes
        self._sums_s: dict[str, float] = {}

    def observe(self, class_name: str, value_s: float) -> None:
        counts = self._counts.get(class_name)
        if counts is None:
            counts = self._counts[class_name] = [0] * (len(self._bounds_s) + 1)
            self._sums_s[class_name] = 0.0
        counts[bisect_left(self._bounds_s, value_s)] += 1
        self._sums_s[class_name] += value_s

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._text, labels=["slo_class"])
        bounds = [*map(floatToGoString, self._bounds_s), "+Inf"]
        for class_name, counts in list(self._counts.items()):
            buckets = list(zip(bounds, accumulate(counts), strict=True))
            family.add_metric([class_name], buckets, self._sums_s[class_name])
        yield family


class Metrics:
    """All series, in a registry of their own; touched on the event loop only."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        common: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter(
            "slackwater_requests", "Requests that ended", ["slo_class", "status"], **common
        )
        self.placements = Counter(
            "slackwater_placements", "Requests by placement", ["kind", "slo_class"], **common
        )
        self.handoff_bytes = Counter("slackwater_handoff_bytes", "KV bytes moved", **common)
        self.handoff_recomputed_tokens = Counter(
            "slackwater_handoff_recomputed_tokens",
            "Prompt tokens computed again because a handoff failed",
            **common,
        )
        self.failovers = Counter(
            "slackwater_failovers", "Moves of a request off a lost worker", **common
        )
        self.planned_moves = Counter(
            "slackwater_planned_moves",
            "Streams that left a worker which still served them, by what became of their KV",
            ["kv"],
            **common,
        )
        self.tokens = Counter("slackwater_tokens", "Tokens by lane", ["lane", "kind"], **common)
        self.batch_lines = Counter(
            "slackwater_batch_lines", "Batch lines that ended", ["status"], **common
        )
        self.worker_frames = Counter(
            "slackwater_worker_frames", "Frames received from workers", **common
        )
        self.loop_restarts = Counter(
            "slackwater_control_loop_restarts", "Control loop restarts after an error", **common
        )
        self.handoff_seconds = Histogram(
            "slackwater_handoff_seconds",
            "Time of a KV transfer",
            buckets=HANDOFF_BUCKETS_S,
            **common,
        )
        self.ttft_seconds = ClassHistogram(
            "slackwater_ttft_seconds", "Time to first token", TTFT_BUCKETS_S
        )
        self.itl_seconds = ClassHistogram(
            "slackwater_itl_seconds", "Time between output tokens", ITL_BUCKETS_S
        )
        self.registry.register(self.ttft_seconds)
        self.registry.register(self.itl_seconds)
        self.queue_wait_seconds = Histogram(
            "slackwater_queue_wait_seconds",
            "Wait before dispatch",
            buckets=QUEUE_BUCKETS_S,
            **common,
        )
        self.loop_lag_seconds = Histogram(
            "slackwater_event_loop_lag_seconds",
            "How late the event loop wakes the control loop",
            buckets=LAG_BUCKETS_S,
            **common,
        )
        self.workers = Gauge(
            "slackwater_workers", "Workers by role and status", ["role", "status"], **common
        )

        self.gpu_seconds = Gauge(
            "slackwater_gpu_seconds",
            "Worker seconds since the worker's start, by what they were spent on",
            ["worker", "model", "kind"],
            **common,
        )
        self.gpu_loss = Gauge(
            "slackwater_gpu_unaccounted_ratio",
            "Share of a worker's wall time of the last hour that it did not account for",
            ["worker"],
            **common,
        )
        self.cost_usd = Gauge(
            "slackwater_cost_usd_last_hour",
            "Cost of the last hour; views: attributed, incremental cash",
            ["tenant", "model", "slo_class", "view"],
            **common,
        )
        self.cost_per_million = Gauge(
            "slackwater_cost_usd_per_million_tokens",
            "The same for a million prompt and output tokens",
            ["tenant", "model", "slo_class", "view"],
            **common,
        )

        self.overload_rung = Gauge(
            "slackwater_overload_rung", "Rung of the overload ladder, 0 to 4", **common
        )
        self.overload_signal = Gauge(
            "slackwater_overload_signal_ratio",
            "Share of a limit, 1 at the limit; the highest decides the rung",
            ["signal"],
            **common,
        )

    def set_overload(self, view: OverloadView) -> None:
        self.overload_rung.set(view.rung)
        for name, share in view.signals.items():
            self.overload_signal.labels(name).set(share)

    def set_gpu(self, workers: Sequence[GpuView]) -> None:
        """How workers spent their time; those that left disappear."""
        self.gpu_seconds.clear()
        self.gpu_loss.clear()
        for worker in workers:
            spent = worker.spent
            kinds = {
                "interactive_prefill": spent.online_prefill_s,
                "interactive_decode": spent.online_decode_s,
                "batch_prefill": spent.batch_prefill_s,
                "batch_decode": spent.batch_decode_s,
                "idle": spent.idle_s,
            }
            for kind, seconds in kinds.items():
                self.gpu_seconds.labels(worker.worker_id, worker.model_id, kind).set(seconds)
            if worker.loss is not None:
                self.gpu_loss.labels(worker.worker_id).set(worker.loss)

    def set_costs(self, lines: Mapping[Key, CostLine]) -> None:
        """Costs of the last hour; at most COST_SERIES_MAX, the dearest first."""
        self.cost_usd.clear()
        self.cost_per_million.clear()
        dearest = sorted(lines.items(), key=lambda item: (-item[1].usd, item[0]))
        for key, line in dearest[:COST_SERIES_MAX]:
            for view, usd in (("attributed", line.usd), ("incremental_cash", line.cash_usd)):
                self.cost_usd.labels(*key, view).set(usd)
                per_million = line.per_million(usd, line.tokens)
                if per_million is not None:
                    self.cost_per_million.labels(*key, view).set(per_million)

    def observe_fact(self, fact: RequestFact) -> None:
        """Count a request that has ended."""
        self.requests.labels(fact.class_name, fact.status).inc()
        if fact.split:
            self.placements.labels(fact.split, fact.class_name).inc()
        lane = "batch" if fact.is_batch else "interactive"
        self.tokens.labels(lane, "prompt").inc(fact.prompt_tokens)
        self.tokens.labels(lane, "output").inc(fact.output_tokens)
        self.handoff_bytes.inc(fact.handoff_bytes)
        self.handoff_recomputed_tokens.inc(fact.handoff_recomputed_tokens)
        self.failovers.inc(fact.failovers)
        if fact.queue_ms is not None:
            self.queue_wait_seconds.observe(fact.queue_ms / 1000)
        if fact.is_batch:
            self.batch_lines.labels(fact.status).inc()

    def observe_ttft(self, class_name: str, ttft_s: float) -> None:
        self.ttft_seconds.observe(class_name, ttft_s)

    def observe_itl(self, class_name: str, itl_s: float) -> None:
        self.itl_seconds.observe(class_name, itl_s)

    def set_workers(self, workers: tuple[domain.WorkerView, ...]) -> None:
        """Replace the worker gauge, so that a state nobody is in any more disappears."""
        self.workers.clear()
        for (role, status), num_workers in Tally((w.role, w.status) for w in workers).items():
            self.workers.labels(role, status).set(num_workers)

    def render(self) -> bytes:
        """Prometheus text exposition."""
        return generate_latest(self.registry)


async def answer(metrics: Metrics, send: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
    """Send `/metrics`."""
    headers = [(b"content-type", CONTENT_TYPE_LATEST.encode()), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": metrics.render()})
