"""From a checked request to its text: submit, receive ids, decode, stop, settle.

`Gateway.generate` is the one path of interactive and batch work. It yields `Delta`s, the last of
them with `finish_reason` and `usage`; a refusal is a value too: a `Refusal` ends the iteration, as
its first item when nothing was generated, after some deltas when the request failed half-way.
Close the generator (`contextlib.aclosing`) to cancel. A request is settled, that is counted and
stored, before its last item is yielded.
"""

import asyncio
import dataclasses
import math
import secrets
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, Protocol

import msgspec

from console.facts import Endpoint, RequestFact, RequestStatus
from console.journal import Journal
from console.live import LiveStats
from console.metrics import Metrics
from console.snapshot import TenantFacts
from console.stops import OutputText
from console.tokens import ModelTokenizer
from console.writer import FactWriter
from controlplane import domain, protocol

HASH_BLOCK_TOKENS = 16  # of the router's prefix index; workers' blocks are multiples of it
EVENTS_SLACK = 64  # decisions that may wait beside one event per output token
MERGE_TOKENS_MAX = 4  # ids in one delta when the reader is behind
DECISIONS_MAX = 16  # decision records stored of one request: the first and the latest
CANDIDATES_MAX = 16  # candidates stored of one record


@dataclass(frozen=True, slots=True)
class Tokens:
    """Ids that joined the journal, in order; `finish_reason` when the output is complete."""

    token_ids: list[int]
    finish_reason: protocol.FinishReason | None


@dataclass(slots=True)
class LiveRequest:
    """A running request: what the fleet needs to dispatch it, and where its events go.

    The fleet writes everything below `events`, the gateway reads it when it settles; both live on
    the event loop."""

    request: domain.GenerateRequest
    prompt_ids: list[int]
    sampling: protocol.Sampling
    targets: protocol.ClassTargets
    salt: bytes
    journal: Journal
    events: "asyncio.Queue[Tokens | domain.Decided]"
    epoch: int = 0
    placement: domain.Placement | None = None
    decisions: list[domain.DecisionRecord] = field(default_factory=list)
    cached_tokens: int = 0
    failovers: int = 0
    handoff_bytes: int = 0
    handoff_ms: float = 0.0
    handoff_recomputed_tokens: int = 0

    @property
    def request_id(self) -> str:
        return self.request.request_id


class RequestFleet(Protocol):
    """What the gateway asks of the fleet; `console.fleet.Fleet`, or a script in tests."""

    def now_s(self) -> float:
        """The monotonic clock that all times of requests are on."""

    def submit(self, live: LiveRequest) -> None:
        """Ask the plane for a place; outcomes and ids arrive in `live.events`."""

    def first_token(self, live: LiveRequest, ttft_s: float) -> None: ...

    def finished(self, live: LiveRequest, status: str) -> None:
        """Once for each submit: forget the request (completed, cancelled or failed) and stop what
        a worker still does for it. After a stop string or a disconnect one still runs it."""


@dataclass(frozen=True, slots=True)
class GenerateSpec:
    """Everything that one generation needs; `console.requests.spec_of` makes it."""

    tenant: TenantFacts
    key_id: str
    model_id: str
    tokenizer: ModelTokenizer
    slo: domain.SLOClass
    service_tier: str
    endpoint: Endpoint
    prompt_ids: list[int]
    sampling: protocol.Sampling
    is_seeded: bool
    stop: tuple[str, ...]
    stream: bool
    is_batch: bool = False
    request_id: str = ""  # empty: the gateway makes one
    arrived_at_s: float | None = None  # on the fleet's clock; None: now


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Delta:
    """Some more output. Text may lag behind ids: unfinished characters and possible stop strings
    are held back. `seq` is the output index of token_ids[0]."""

    text: str
    seq: int
    token_ids: list[int]
    finish_reason: str | None = None  # stop | length
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """The plane refused the request, or gave it up."""

    rejected: domain.Rejected


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole output."""

    request_id: str
    text: str
    token_ids: list[int]
    finish_reason: str
    usage: Usage


@dataclass(slots=True)
class _Progress:
    """Times and counts of one generation, for its fact."""

    arrived_at_s: float
    arrived_at: datetime
    first_at_s: float | None = None
    placed_at_s: float | None = None
    last_at_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)  # at most output_tokens_max
    output_tokens: int = 0


class Gateway:
    """Runs generations on the fleet and settles each exactly once."""

    def __init__(
        self,
        fleet: RequestFleet,
        live: LiveStats,
        metrics: Metrics,
        writer: FactWriter,
        gateway_id: str = "g1",
    ) -> None:
        self._fleet = fleet
        self._live = live
        self._metrics = metrics
        self._writer = writer
        self._gateway_id = gateway_id

    def new_request_id(self) -> str:
        """Ids begin with the gateway's; 80 random bits are unique without asking anyone."""
        return f"{self._gateway_id}-{secrets.token_hex(10)}"

    def now_s(self) -> float:
        return self._fleet.now_s()

    async def generate(
        self, spec: GenerateSpec, live: LiveRequest | None = None
    ) -> AsyncGenerator[Delta | Refusal, None]:
        """See the module's docstring. `live` from `prepare`, for a caller that reads it too."""
        live = self.prepare(spec) if live is None else live
        progress = self._begin(spec)
        text = OutputText(spec.tokenizer, spec.stop, spec.sampling.output_tokens_min)
        is_settled = False
        abandoned: Literal["failed", "cancelled"] = "failed"
        self._fleet.submit(live)
        try:
            while True:
                token_ids, reason, rejected = await self._next(live, progress)
                is_end = reason in ("stop", "length")
                if token_ids or is_end:
                    piece = text.feed(token_ids, is_last=is_end)
                    kept = token_ids[: piece.num_ids]
                    seq = progress.output_tokens
                    if kept:
                        self._observe(spec, live, progress, len(kept))
                    if piece.is_stopped or is_end:
                        finish_reason = "stop" if piece.is_stopped else reason
                        usage = Usage(
                            len(spec.prompt_ids), progress.output_tokens, live.cached_tokens
                        )
                        is_settled = True
                        self._fleet.finished(live, "completed")
                        self._settle(spec, live, progress, "completed", finish_reason)
                        yield Delta(piece.text, seq, kept, finish_reason, usage)
                        return
                    yield Delta(piece.text, seq, kept)
                if reason is not None:
                    rejected = domain.Rejected(
                        "worker_error", f"The worker ended this request: {reason}.", None
                    )
                if rejected is not None:
                    is_settled = True
                    self._fleet.finished(live, "failed")
                    status = _status_of(rejected, progress)
                    self._settle(spec, live, progress, status, "", rejected.code)
                    yield Refusal(rejected)
                    return
        except (GeneratorExit, asyncio.CancelledError):
            abandoned = "cancelled"
            raise
        finally:
            if not is_settled:
                self._fleet.finished(live, abandoned)
                self._settle(spec, live, progress, abandoned)

    async def _next(
        self, live: LiveRequest, progress: _Progress
    ) -> tuple[list[int], str | None, domain.Rejected | None]:
        """Wait for one event and take what else is there: (ids, finish reason, rejection)."""
        token_ids: list[int] = []
        event = await live.events.get()
        while True:
            if isinstance(event, Tokens):
                token_ids += event.token_ids
                if event.finish_reason is not None:
                    return token_ids, event.finish_reason, None
            elif isinstance(event.outcome, domain.Rejected):
                return token_ids, None, event.outcome
            elif isinstance(event.outcome, domain.Placed) and progress.placed_at_s is None:
                progress.placed_at_s = self._fleet.now_s()
            if token_ids and (live.events.empty() or len(token_ids) >= MERGE_TOKENS_MAX):
                return token_ids, None, None
            event = await live.events.get()

    async def collect(
        self, spec: GenerateSpec, live: LiveRequest | None = None
    ) -> Completion | Refusal:
        """The whole output at once; cancelling the task cancels the request."""
        live = self.prepare(spec) if live is None else live
        texts: list[str] = []
        token_ids: list[int] = []
        stream = self.generate(spec, live)
        try:
            async for item in stream:
                if isinstance(item, Refusal):
                    return item
                texts.append(item.text)
                token_ids += item.token_ids
                if item.finish_reason is not None and item.usage is not None:
                    return Completion(
                        live.request_id, "".join(texts), token_ids, item.finish_reason, item.usage
                    )
        finally:
            await stream.aclose()
        raise AssertionError(f"request {live.request_id} ended without an outcome")

    def prepare(self, spec: GenerateSpec) -> LiveRequest:
        """The live request of a spec, not yet submitted."""
        slo, sampling = spec.slo, spec.sampling
        if not spec.is_seeded and sampling.temperature > 0:
            sampling = msgspec.structs.replace(sampling, seed=secrets.randbits(63))
        now_s = self._fleet.now_s()
        arrived_at_s = now_s if spec.arrived_at_s is None else spec.arrived_at_s
        salt = spec.tenant.salt
        request = domain.GenerateRequest(
            request_id=spec.request_id or self.new_request_id(),
            tenant_id=spec.tenant.tenant_id,
            model_id=spec.model_id,
            slo=slo,
            prompt_tokens=len(spec.prompt_ids),
            output_tokens_max=sampling.output_tokens_max,
            block_hashes=protocol.block_hashes(salt, spec.prompt_ids, HASH_BLOCK_TOKENS),
            arrived_at_s=arrived_at_s,
            tenant_concurrency_max=spec.tenant.concurrency_max,
        )
        return LiveRequest(
            request=request,
            prompt_ids=spec.prompt_ids,
            sampling=sampling,
            targets=protocol.ClassTargets(
                name=slo.name,
                rank=slo.rank,
                ttft_s_left=slo.ttft_s_p99 - (now_s - arrived_at_s),
                itl_s=slo.itl_s_p99,
                is_batch=slo.is_batch,
            ),
            salt=salt,
            journal=Journal(sampling.output_tokens_max),
            events=asyncio.Queue(sampling.output_tokens_max + EVENTS_SLACK),
        )

    def _begin(self, spec: GenerateSpec) -> _Progress:
        now_s = self._fleet.now_s()
        arrived_at_s = now_s if spec.arrived_at_s is None else spec.arrived_at_s
        return _Progress(
            arrived_at_s=arrived_at_s,
            arrived_at=datetime.now(UTC) - timedelta(seconds=now_s - arrived_at_s),
        )

    def _observe(
        self, spec: GenerateSpec, live: LiveRequest, progress: _Progress, num_ids: int
    ) -> None:
        """Latency as the client sees it: to the first delta, then between deltas."""
        now_s = self._fleet.now_s()
        if progress.first_at_s is None:
            progress.first_at_s = now_s
            ttft_s = now_s - progress.arrived_at_s
            self._fleet.first_token(live, ttft_s)
            self._live.observe_ttft(spec.slo.name, ttft_s)
            self._metrics.observe_ttft(spec.slo.name, ttft_s)
        else:
            gap_s = now_s - progress.last_at_s
            progress.gaps_s.append(gap_s)
            self._live.observe_itl(spec.slo.name, gap_s)
            self._metrics.observe_itl(spec.slo.name, gap_s)
        progress.last_at_s = now_s
        progress.output_tokens += num_ids
        self._live.observe_tokens(spec.is_batch, num_ids, now_s)

    def _settle(
        self,
        spec: GenerateSpec,
        live: LiveRequest,
        progress: _Progress,
        status: RequestStatus,
        finish_reason: str = "",
        error_code: str = "",
    ) -> None:
        """Count and store a request that has just ended."""
        fact = _fact(spec, live, progress, self._fleet.now_s(), status, finish_reason, error_code)
        self._live.observe_request(fact)
        self._metrics.observe_fact(fact)
        self._writer.put(fact)


def _status_of(rejected: domain.Rejected, progress: _Progress) -> RequestStatus:
    if rejected.code == "queue_timeout":
        return "expired"
    if progress.first_at_s is not None or rejected.code in ("retries_exhausted", "worker_error"):
        return "failed"
    return "rejected"


def _fact(
    spec: GenerateSpec,
    live: LiveRequest,
    progress: _Progress,
    now_s: float,
    status: RequestStatus,
    finish_reason: str,
    error_code: str,
) -> RequestFact:
    placement, first_at_s = live.placement, progress.first_at_s
    start_s, placed_at_s = progress.arrived_at_s, progress.placed_at_s
    gaps_s = sorted(progress.gaps_s)
    decisions = live.decisions
    if len(decisions) > DECISIONS_MAX:
        decisions = [decisions[0], *decisions[1 - DECISIONS_MAX :]]
    return RequestFact(
        request_id=live.request_id,
        tenant_id=spec.tenant.tenant_id,
        key_id=spec.key_id,
        model_id=spec.model_id,
        class_name=spec.slo.name,
        service_tier=spec.service_tier,
        endpoint=spec.endpoint,
        is_batch=spec.is_batch,
        stream=spec.stream,
        status=status,
        finish_reason=finish_reason,
        error_code=error_code,
        prompt_tokens=len(spec.prompt_ids),
        cached_tokens=live.cached_tokens,
        output_tokens=progress.output_tokens,
        arrived_at=progress.arrived_at,
        queue_ms=None if placed_at_s is None else (placed_at_s - start_s) * 1000,
        ttft_ms=None if first_at_s is None else (first_at_s - start_s) * 1000,
        itl_ms_p99=gaps_s[math.ceil(0.99 * len(gaps_s)) - 1] * 1000 if gaps_s else None,
        itl_ms_mean=sum(gaps_s) / len(gaps_s) * 1000 if gaps_s else None,
        e2e_ms=(now_s - start_s) * 1000,
        split="" if placement is None else placement.split,
        prefill_worker="" if placement is None else placement.prefill_worker,
        decode_worker="" if placement is None else placement.decode_worker,
        failovers=live.failovers,
        handoff_bytes=live.handoff_bytes,
        handoff_ms=live.handoff_ms if live.handoff_bytes else None,
        handoff_recomputed_tokens=live.handoff_recomputed_tokens,
        predicted_ttft_ms=None if placement is None else placement.predicted_ttft_s * 1000,
        decision=[_decision_json(record) for record in decisions],
    )


def _decision_json(record: domain.DecisionRecord) -> dict[str, Any]:
    """A decision record as stored: its best candidates only."""
    ranked = sorted(record.candidates, key=lambda c: (not c.eligible, -c.score, c.worker_id))
    return dataclasses.asdict(
        dataclasses.replace(record, candidates=tuple(ranked[:CANDIDATES_MAX]))
    )
