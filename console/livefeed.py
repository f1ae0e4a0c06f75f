"""One frame a second for every open page: what LiveStats knows, made ready to show.

The feed samples once per period, whatever the number of pages, and keeps a short history for
charts. It starts with the first page that asks and belongs to one ServerState.
"""

import asyncio
import logging
import time
import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from console import state
from controlplane import domain
from controlplane.planner import SplitView

FRAME_PERIOD_S = 1.0
HISTORY_POINTS_MAX = 600  # of the charts; ten minutes
ROWS_MAX = 200  # live requests on a page
PHASES = ("queued", "prefill", "transfer", "decode")
ALERTS_MAX = 8  # lines in the strip; the rest is counted

logger = logging.getLogger(__name__)
encoder = msgspec.json.Encoder()  # NaN becomes null


def enriched(
    frame: dict[str, Any],
    view: domain.ClusterView,
    seq: int,
    splits: Sequence[SplitView] = (),
) -> dict[str, Any]:
    """The frame of LiveStats with a sequence of its own, wall time, alerts, charts and shapes.

    A shape changes when a part of a page must be rendered again instead of filled in."""
    classes, workers = frame["classes"], frame["workers"]
    plan = view.plans[0] if view.plans else None
    return {
        **frame,
        "seq": seq,
        "t": round(time.time() * 1000),  # milliseconds since 1970, as JavaScript's Date
        "queued_total": sum(frame["queued"].values()),
        "alerts": alerts(frame),
        "charts": {**charts(frame), "split": split_points(splits)},
        "splits": [split_row(view) for view in splits],
        "planner_mode": view.planner_mode,
        "shapes": {
            "classes": ",".join(row["name"] for row in classes),
            "workers": ",".join(
                f"{row['worker_id']}:{row['role']}:{row['exception']}" for row in workers
            ),
            "plans": ""
            if plan is None
            else f"{len(view.plans)}:{plan.worker_id}:{plan.role_after}",
            "split": shape_of(view.planner_mode, plan, *map(split_row, splits)),
            "setup": f"{bool(workers)}:{frame['counters']['requests_total'] > 0}",
        },
    }


def alerts(frame: dict[str, Any]) -> list[dict[str, str]]:
    """What needs an operator now, one sentence each with the numbers that decided.

    Level `bad` is a broken promise or a worker in trouble, `warn` an exception that serves."""
    lines = []
    for row in frame["classes"]:
        for name, unit in (("ttft", "TTFT"), ("itl", "ITL")):
            value_ms, target_ms = row[f"{name}_ms_p99"], row[f"{name}_target_ms"]
            if row["status"] == "missed" and value_ms is not None and value_ms > target_ms:
                text = f"{row['name']}: {unit} p99 is over its target of {target_ms:.0f} ms"
                lines.append({"level": "bad", "text": text})
    for worker in frame["workers"]:
        if worker["status"] in ("suspect", "lost"):
            text = f"{worker['worker_id']} is {worker['status']}: nothing heard from it in time"
            lines.append({"level": "bad", "text": text})
        if worker["exception"]:
            text = f"{worker['worker_id']} {worker['exception']}"
            lines.append({"level": "warn", "text": text})
    if len(lines) > ALERTS_MAX:
        more = {"level": "warn", "text": f"and {len(lines) - ALERTS_MAX + 1} more"}
        lines = [*lines[: ALERTS_MAX - 1], more]
    return lines


def charts(frame: dict[str, Any]) -> dict[str, list[float | None]]:
    """One value per trace, in the order in which the page names them."""
    promise: list[float | None] = []
    for row in frame["classes"]:
        if not row["is_batch"]:
            for name in ("ttft", "itl"):
                value_ms = row[f"{name}_ms_p99"]
                percent = None if value_ms is None else 100 * value_ms / row[f"{name}_target_ms"]
                promise.append(None if percent is None else round(percent, 2))
    rates = frame["tokens_per_s"]
    queues = [frame["queued"].get(row["name"], 0) for row in frame["classes"]]
    return {
        "tokens": [rates["interactive"], rates["batch"]],
        "promise": promise,
        "queues": queues,
    }


def shape_of(*values: Any) -> str:
    """Short text that differs when any of the values does."""
    return f"{zlib.crc32(repr(values).encode()):08x}"


def split_row(view: SplitView) -> dict[str, Any]:
    """One model of the Split page; None where nothing is forecast."""
    needs = view.needs
    return {
        "name": view.model_id,
        "num_prefill": view.num_prefill,
        "num_others": view.num_others,
        "need_prefill": None if needs is None else needs.prefill,
        "need_others": None if needs is None else needs.others,
        "long_per_s": None if needs is None else needs.prompts.per_s,
        "prefill_s": None if needs is None else needs.prompts.service_s,
        "requests_per_s": None if needs is None else needs.outputs.per_s,
        "output_tokens": None if needs is None else needs.outputs.output_tokens,
        "horizon_s": view.horizon_s,
    }


def split_points(splits: Sequence[SplitView]) -> list[float | None]:
    """Of all models together: prefill workers, others, and what the forecast asks for of each."""
    known = [view.needs for view in splits if view.needs is not None]
    is_known = bool(known) and len(known) == len(splits)
    return [
        sum(view.num_prefill for view in splits),
        sum(view.num_others for view in splits),
        sum(needs.prefill for needs in known) if is_known else None,
        sum(needs.others for needs in known) if is_known else None,
    ]


def request_rows(view: domain.ClusterView) -> list[dict[str, Any]]:
    """Requests in flight for the live table, longest running first, at most ROWS_MAX."""
    rows = []
    for found in sorted(view.requests, key=lambda r: (-r.age_s, r.request_id))[:ROWS_MAX]:
        placement = found.placement
        is_handoff = placement is not None and placement.split == "handoff"
        steps = [phase for phase in PHASES if phase != "transfer" or is_handoff]
        now = steps.index(found.phase) if found.phase in steps else len(steps) - 1
        rows.append(
            {
                "request_id": found.request_id,
                "tenant_id": found.tenant_id,
                "model_id": found.model_id,
                "class_name": found.class_name,
                "phase": found.phase,
                "steps": [
                    "done" if i < now else "now" if i == now else "" for i in range(len(steps))
                ],
                "age_s": found.age_s,
                "phase_s": found.phase_s,
                "epoch": found.epoch,
                "prompt_tokens": found.prompt_tokens,
                "prefill_worker": "" if placement is None else placement.prefill_worker,
                "decode_worker": "" if placement is None else placement.decode_worker,
            }
        )
    return rows


def requests_part(
    current: state.ServerState, query: Mapping[str, str]
) -> tuple[str, dict[str, Any]]:
    """Template and context of the live table that the socket replaces."""
    return "console/requests_live.html#swap", {"rows": request_rows(current.fleet.view())}


class LiveFeed:
    """Samples once per FRAME_PERIOD_S while the server runs; on its event loop only."""

    def __init__(self, current: state.ServerState) -> None:
        self.current = current
        self._newest: dict[str, Any] | None = None
        self._text = ""
        self._points: deque[tuple[int, dict[str, list[float | None]]]] = deque(
            maxlen=HISTORY_POINTS_MAX
        )
        self._fresh = asyncio.Event()
        self.sample()
        self._task = asyncio.get_running_loop().create_task(self._run())
        self._task.add_done_callback(self._ended)

    @property
    def newest(self) -> dict[str, Any]:
        assert self._newest is not None, "sampled in __init__"
        return self._newest

    @property
    def is_over(self) -> bool:
        """Stopped, or ended by an error that the log has."""
        return self._task.done()

    async def after(self, seq: int) -> tuple[int, str] | None:
        """Number and text of the newest frame that is later than `seq`; skips what was missed.

        None when there will be no later one."""
        while self.newest["seq"] <= seq:
            if self.is_over:
                return None
            await self._fresh.wait()
        return self.newest["seq"], self._text

    def history(self) -> dict[str, Any]:
        """The kept points by column, for a chart that begins or has lost frames."""
        return {
            "seq": self.newest["seq"],
            "t": [at_ms for at_ms, _ in self._points],
            "charts": {
                name: [values[name] for _, values in self._points] for name in self.newest["charts"]
            },
        }

    def stop(self) -> None:
        self._task.cancel()

    def sample(self) -> None:
        fleet = self.current.fleet
        seq = 1 if self._newest is None else self._newest["seq"] + 1
        frame = enriched(self.current.live.frame(fleet.now_s()), fleet.view(), seq, fleet.splits())
        self._newest, self._text = frame, encoder.encode(frame).decode()
        self._points.append((frame["t"], frame["charts"]))
        self._fresh.set()
        self._fresh = asyncio.Event()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            logger.error("live feed ended", exc_info=task.exception())
        self._fresh.set()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(FRAME_PERIOD_S)
            self.sample()


_feed: LiveFeed | None = None


async def feed_of(current: state.ServerState) -> LiveFeed:
    """The feed of this server, started when it is first asked for."""
    global _feed
    if _feed is None or _feed.current is not current or _feed.is_over:
        if _feed is not None:
            _feed.stop()
        _feed = LiveFeed(current)
    return _feed


async def newest(current: state.ServerState) -> dict[str, Any]:
    return (await feed_of(current)).newest


async def history(current: state.ServerState) -> dict[str, Any]:
    return (await feed_of(current)).history()
