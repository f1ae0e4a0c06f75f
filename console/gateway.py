"""From a checked request to its text: submit, receive ids, decode, stop, settle.

`Gateway.generate` is the one path of interactive and batch work. It yields `Delta`s, the last of
them with `finish_reason` and `usage`; a refusal is a value too: a `Refusal` ends the iteration, as
its first item when nothing was generated, after some deltas when the request failed half-way.
Close the generator (`contextlib.aclosing`) to cancel. A request is settled, that is counted and
stored, before its last item is yielded.
"""

import asyncio
import secrets
from collections.abc import AsyncGenerator
from datetime import UTC, datetime, timedelta
from typing import Literal, Protocol

import msgspec

from console.facts import RequestStatus
from console.generation import (
    Completion,
    Delta,
    GenerateSpec,
    LiveRequest,
    Refusal,
    Tokens,
    Usage,
)
from console.journal import Journal
from console.live import LiveStats
from console.metrics import Metrics
from console.settling import Progress, fact_of, status_of
from console.stops import OutputText
from console.writer import FactWriter
from controlplane import domain, protocol
from controlplane.decisions import Explanation
from controlplane.ledger import RateView

HASH_BLOCK_TOKENS = 16  # of the router's prefix index; workers' blocks are multiples of it
EVENTS_SLACK = 64  # decisions that may wait beside one event per output token
MERGE_TOKENS_MAX = 4  # ids in one delta when the reader is behind


class RequestFleet(Protocol):
    """What the gateway asks of the fleet; `console.fleet.Fleet`, or a script in tests."""

    def now_s(self) -> float:
        """The monotonic clock that all times of requests are on."""

    def submit(self, live: LiveRequest) -> None:
        """Ask the plane for a place; outcomes and ids arrive in `live.events`."""

    def rates(self, live: LiveRequest) -> "tuple[RateView, RateView] | None":
        """Requests and tokens a minute that the request's contract allows, None without one."""

    def first_token(self, live: LiveRequest, ttft_s: float) -> None: ...

    def finished(self, live: LiveRequest, status: str) -> None:
        """Once for each submit: forget the request (completed, cancelled or failed) and stop what
        a worker still does for it. After a stop string or a disconnect one still runs it."""

    def explain(self, request_id: str) -> Explanation | None:
        """Its decisions and their outcome, also when it has just ended."""


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

    def rates(self, live: LiveRequest) -> tuple[RateView, RateView] | None:
        return self._fleet.rates(live)

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
                token_ids, end, rejected = await self._next(live, progress)
                if token_ids or end is not None:
                    delta = self._delta(spec, live, progress, text, token_ids, end)
                    if delta.finish_reason is not None:
                        is_settled = True
                        self._finish(live, progress, "completed")
                        self._settle(spec, live, progress, "completed", delta.finish_reason)
                        yield delta
                        return
                    yield delta
                if rejected is not None:
                    is_settled = True
                    self._finish(live, progress, "failed")
                    status = status_of(rejected, progress)
                    self._settle(spec, live, progress, status, "", rejected.code)
                    yield Refusal(rejected)
                    return
        except (GeneratorExit, asyncio.CancelledError):
            abandoned = "cancelled"
            raise
        finally:
            if not is_settled:
                self._finish(live, progress, abandoned)
                self._settle(spec, live, progress, abandoned)

    def _finish(self, live: LiveRequest, progress: Progress, status: str) -> None:
        live.delivered_tokens = progress.output_tokens
        live.itl_s_p99 = progress.itl_s_p99
        self._fleet.finished(live, status)

    async def _next(
        self, live: LiveRequest, progress: Progress
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

    def _delta(
        self,
        spec: GenerateSpec,
        live: LiveRequest,
        progress: Progress,
        text: OutputText,
        token_ids: list[int],
        end: str | None,
    ) -> Delta:
        """What the ids add to the output; with a reason and usage when it is complete."""
        piece = text.feed(token_ids, is_last=end is not None)
        kept = token_ids[: piece.num_ids]
        seq = progress.output_tokens
        if kept:
            self._observe(spec, live, progress, len(kept))
        finish_reason = "stop" if piece.is_stopped else end
        usage = None
        if finish_reason is not None:
            usage = Usage(len(spec.prompt_ids), progress.output_tokens, live.cached_tokens)
        logprobs: tuple[protocol.TokenLogprobs | None, ...] = ()
        if spec.sampling.logprobs is not None:
            known = live.journal.logprobs
            logprobs = tuple(known.get(index) for index in range(seq, seq + len(kept)))
        return Delta(piece.text, seq, kept, finish_reason, usage, logprobs)

    async def collect(
        self, spec: GenerateSpec, live: LiveRequest | None = None
    ) -> Completion | Refusal:
        """The whole output at once; cancelling the task cancels the request."""
        live = self.prepare(spec) if live is None else live
        texts: list[str] = []
        token_ids: list[int] = []
        logprobs: list[protocol.TokenLogprobs | None] = []
        stream = self.generate(spec, live)
        try:
            async for item in stream:
                if isinstance(item, Refusal):
                    return item
                texts.append(item.text)
                token_ids += item.token_ids
                logprobs += item.logprobs
                if item.finish_reason is not None and item.usage is not None:
                    return Completion(
                        live.request_id,
                        "".join(texts),
                        token_ids,
                        item.finish_reason,
                        item.usage,
                        logprobs,
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
            key_id=spec.key_id,
            weight=spec.tenant.weight,
            fingerprint=protocol.fingerprint(salt, spec.prompt_ids),
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

    def _begin(self, spec: GenerateSpec) -> Progress:
        now_s = self._fleet.now_s()
        arrived_at_s = now_s if spec.arrived_at_s is None else spec.arrived_at_s
        return Progress(
            arrived_at_s=arrived_at_s,
            arrived_at=datetime.now(UTC) - timedelta(seconds=now_s - arrived_at_s),
        )

    def _observe(
        self, spec: GenerateSpec, live: LiveRequest, progress: Progress, num_ids: int
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
        progress: Progress,
        status: RequestStatus,
        finish_reason: str = "",
        error_code: str = "",
    ) -> None:
        """Count and store a request that has just ended."""
        now_s, explanation = self._fleet.now_s(), self._fleet.explain(live.request_id)
        fact = fact_of(spec, live, progress, explanation, now_s, status, finish_reason, error_code)
        self._live.observe_request(fact)
        self._metrics.observe_fact(fact)
        self._writer.put(fact)
