"""Decision records: what was decided for a request, on which numbers, in sentences, and how it
turned out. A request's records are kept while it lives and, bounded, for a while after its end."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from controlplane.config import ControlPlaneConfig
from controlplane.counterfactuals import Counterfactual, best_of, counterfactuals
from controlplane.domain import DecisionRecord, Finished, GenerateRequest, Rejected, SLOClass
from controlplane.failover import Tracked
from controlplane.router import Route


def placed(tracked: Tracked, route: Route, waited_s: float, now_s: float) -> DecisionRecord:
    return _record(tracked, "placed", route.reason, waited_s, route, now_s)


def queued(tracked: Tracked, route: Route, waited_s: float, now_s: float) -> DecisionRecord:
    return _record(tracked, "queued", f"waits: {route.reason}", waited_s, route, now_s)


def _record(
    tracked: Tracked, outcome: str, reason: str, waited_s: float, route: Route, now_s: float
) -> DecisionRecord:
    """The reason says first what made a running request move, then why it is surplus."""
    assert outcome in ("placed", "queued"), outcome
    parts = [tracked.move_reason, tracked.demotion.message if tracked.demotion else "", reason]
    return DecisionRecord(
        request_id=tracked.request_id,
        epoch=tracked.epoch,
        outcome="placed" if outcome == "placed" else "queued",
        reason="; ".join(part for part in parts if part),
        split_reason=route.split_reason,
        waited_s=waited_s,
        uncached_tokens=route.uncached_tokens,
        handoff_threshold_tokens=route.threshold_tokens,
        placement=route.placement,
        candidates=route.candidates,
        tier=tracked.tier,
        bound=route.bound,
        cause=tracked.cause,
        after_s=max(0.0, now_s - tracked.request.arrived_at_s),
    )


def rejected(
    tracked: Tracked, outcome: Rejected, route: Route | None, now_s: float
) -> DecisionRecord:
    """`route`: where it would have gone, when that was looked at."""
    waited_s = max(0.0, now_s - tracked.request.arrived_at_s)
    return DecisionRecord(
        request_id=tracked.request_id,
        epoch=tracked.epoch,
        outcome="rejected",
        reason=f"{outcome.code}: {outcome.message}",
        split_reason=route.split_reason if route else "",
        waited_s=waited_s,
        uncached_tokens=route.uncached_tokens if route else 0,
        handoff_threshold_tokens=route.threshold_tokens if route else 0,
        placement=None,
        candidates=route.candidates if route else (),
        tier=tracked.tier,
        bound=outcome.code,
        cause=tracked.cause,
        after_s=waited_s,
        retry_after_s=outcome.retry_after_s,
    )


@dataclass(frozen=True, slots=True)
class Transfer:
    """A KV handoff that ended well."""

    epoch: int
    bytes: int
    took_s: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a request ended, beside what was predicted when the placement that gave its first token
    was made. Seconds; TTFT counts from the arrival. None: nothing was measured or predicted."""

    status: str  # completed, cancelled, failed, or the code of its refusal
    is_met: bool  # both targets of its class
    output_tokens: int
    ttft_s: float | None
    ttft_s_predicted: float | None
    ttft_s_p99_predicted: float | None
    itl_s_p99: float | None
    itl_s_predicted: float | None
    transfer_s: float | None
    transfer_s_predicted: float | None


@dataclass(frozen=True, slots=True)
class Explanation:
    """Everything about one request's way; `outcome` is None while it runs."""

    request_id: str
    tenant_id: str
    model_id: str
    class_name: str
    prompt_tokens: int
    output_tokens_max: int
    ttft_s_target: float | None  # None for batch
    itl_s_target: float | None
    records: tuple[DecisionRecord, ...]
    records_left_out: int  # between the first and the others
    transfers: tuple[Transfer, ...]
    outcome: Outcome | None
    counterfactuals: tuple[Counterfactual, ...]  # of the last decision


@dataclass(slots=True)
class _Story:
    request: GenerateRequest
    records: list[DecisionRecord] = field(default_factory=list)
    num_left_out: int = 0
    transfers: list[Transfer] = field(default_factory=list)
    first_epoch: int | None = None  # of the placement that gave the first token
    ttft_s: float | None = None
    outcome: Outcome | None = None


class DecisionBook:
    """Records by request: of live ones all up to a limit each, of ended ones the newest."""

    def __init__(self, config: ControlPlaneConfig) -> None:
        self._classes: tuple[SLOClass, ...] = ()
        self._config = config
        self._live: dict[str, _Story] = {}
        self._ended: OrderedDict[str, _Story] = OrderedDict()

    def sizes(self) -> dict[str, tuple[int, int]]:
        config = self._config
        return {
            "decided live": (len(self._live), config.requests_max),
            "decided": (len(self._ended), config.decided_max),
            "classes": (len(self._classes), config.classes_max),
        }

    def set_classes(self, classes: Iterable[SLOClass]) -> None:
        """Those that are served; decisions are compared with the strictest of them."""
        self._classes = tuple(sorted(classes, key=lambda slo: (slo.rank, slo.name)))
        self._classes = self._classes[: self._config.classes_max]

    def add(self, request: GenerateRequest, record: DecisionRecord) -> None:
        story = self._live.get(request.request_id)
        if story is None:
            self._ended.pop(request.request_id, None)  # a batch line that is tried again
            story = self._live[request.request_id] = _Story(request)
        if len(story.records) == self._config.records_max:
            del story.records[1]  # the first says why it began where it did
            story.num_left_out += 1
        story.records.append(record)

    def first_token(self, request_id: str, epoch: int, ttft_s: float) -> None:
        """As the client saw it."""
        story = self._live[request_id]
        story.first_epoch, story.ttft_s = epoch, ttft_s

    def moved(self, request_id: str, epoch: int, num_bytes: int, seconds: float) -> None:
        """Its KV went to the decode worker; at most as many are kept as records."""
        story = self._live[request_id]
        if len(story.transfers) == self._config.records_max:
            del story.transfers[0]
        story.transfers.append(Transfer(epoch, num_bytes, seconds))

    def end(self, request_id: str, status: str, is_met: bool, finished: Finished | None) -> None:
        """The terminal event: prediction against outcome. None: refused or given up."""
        story = self._live.pop(request_id)
        story.outcome = _outcome(story, status, is_met, finished)
        self._ended[request_id] = story
        if len(self._ended) > self._config.decided_max:
            self._ended.popitem(last=False)

    def check_integrity(self, tracked: Mapping[str, Tracked]) -> None:
        """Live stories are those of tracked requests, and each has a record."""
        assert self._live.keys() == tracked.keys(), (list(self._live), list(tracked))
        for story in (*self._live.values(), *self._ended.values()):
            assert 0 < len(story.records) <= self._config.records_max, story

    def explain(self, request_id: str) -> Explanation | None:
        story = self._live.get(request_id) or self._ended.get(request_id)
        if story is None:
            return None
        request, slo = story.request, story.request.slo
        last = story.records[-1]
        return Explanation(
            request_id=request_id,
            tenant_id=request.tenant_id,
            model_id=request.model_id,
            class_name=slo.name,
            prompt_tokens=request.prompt_tokens,
            output_tokens_max=request.output_tokens_max,
            ttft_s_target=None if slo.is_batch else slo.ttft_s_p99,
            itl_s_target=None if slo.is_batch else slo.itl_s_p99,
            records=tuple(story.records),
            records_left_out=story.num_left_out,
            transfers=tuple(story.transfers),
            outcome=story.outcome,
            counterfactuals=counterfactuals(last, slo, self._classes, self._config.late_margin),
        )


def _outcome(story: _Story, status: str, is_met: bool, finished: Finished | None) -> Outcome:
    """The record of the first token's placement; without a token that of the last placement."""
    placements = [record for record in story.records if record.placement is not None]
    of_first = [record for record in placements if record.epoch == story.first_epoch]
    record = (of_first or placements)[-1] if placements else None
    row = best_of(record) if record else None
    transfers = [item for item in story.transfers if record and item.epoch == record.epoch]
    is_handoff = bool(record and record.placement and record.placement.split == "handoff")
    placement = record.placement if record else None
    return Outcome(
        status=status,
        is_met=is_met,
        output_tokens=finished.output_tokens if finished else 0,
        ttft_s=story.ttft_s,
        ttft_s_predicted=record.after_s + placement.predicted_ttft_s
        if record and placement
        else None,
        ttft_s_p99_predicted=record.after_s + row.ttft_s_p99 if record and row else None,
        itl_s_p99=finished.itl_s_p99 if finished and finished.output_tokens > 1 else None,
        itl_s_predicted=placement.predicted_itl_s if placement else None,
        transfer_s=transfers[-1].took_s if transfers else None,
        transfer_s_predicted=row.transfer_s if row and is_handoff else None,
    )
