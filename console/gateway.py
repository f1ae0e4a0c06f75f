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
    Event,
    GenerateSpec,
    LiveRequest,
    Mailbox,
    Refusal,
    Tokens,
    Usage,
)
from console.live import LiveStats
from console.metrics import Metrics
from console.settling import Progress, fact_of, status_of
from console.stops import OutputText
from console.writer import FactWriter
from controlplane import domain, protocol
from controlplane.decisions import Explanation
from controlplane.journal import Journal
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
        generation = self.begin(spec, live)
        try:
            while not generation.is_over:
                for item in await generation.next():
                    yield item
        except (GeneratorExit, asyncio.CancelledError):
            generation.cancel()
            raise
        finally:
            generation.close()

    def begin(self, spec: GenerateSpec, live: LiveRequest | None = None) -> "Generation":
        """Submit a request. The caller takes its items and calls `close` whatever happens."""
        return Generation(self, spec, self.prepare(spec) if live is None else live)

    async def collect(
        self, spec: GenerateSpec, live: LiveRequest | None = None
    ) -> Completion | Refusal:
        """The whole output at once; cancelling the task cancels the request."""
        generation = self.begin(spec, live)
        try:
            items = await generation.rest()
        except asyncio.CancelledError:
            generation.cancel()
            raise
        finally:
            generation.close()
        if isinstance(items[-1], Refusal):
            return items[-1]
        deltas = [item for item in items if isinstance(item, Delta)]
        reason, usage = deltas[-1].finish_reason, deltas[-1].usage
        assert reason is not None and usage is not None, generation.live.request_id
        return Completion(
            generation.live.request_id,
            "".join(delta.text for delta in deltas),
            [token_id for delta in deltas for token_id in delta.token_ids],
            reason,
            usage,
            [entry for delta in deltas for entry in delta.logprobs],
        )

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
                gap_s_max=slo.gap_s_max,
            ),
            salt=salt,
            journal=Journal(sampling.output_tokens_max),
            events=Mailbox(sampling.output_tokens_max + EVENTS_SLACK),
        )


class Generation:
    """One running request of a gateway, without any waiting of its own.

    Events go in, deltas come out; it is settled, that is counted and stored, before its last item
    is given. `close` settles what was left unfinished."""

    def __init__(self, gateway: Gateway, spec: GenerateSpec, live: LiveRequest) -> None:
        self.live = live
        self.is_over = False
        self._gateway = gateway
        self._fleet = gateway._fleet
        self._stats = gateway._live
        self._metrics = gateway._metrics
        self._spec = spec
        self._text = OutputText(spec.tokenizer, spec.stop, spec.sampling.output_tokens_min)
        self._abandoned: Literal["failed", "cancelled"] = "failed"
        now_s = self._fleet.now_s()
        arrived_at_s = now_s if spec.arrived_at_s is None else spec.arrived_at_s
        self._progress = Progress(
            arrived_at_s=arrived_at_s,
            arrived_at=datetime.now(UTC) - timedelta(seconds=now_s - arrived_at_s),
        )
        self._fleet.submit(live)

    async def next(self) -> list[Delta | Refusal]:
        """Items of the next event; of several, when a slow reader let ids gather."""
        event: Event | None = await self.live.events.take()
        token_ids: list[int] = []
        while isinstance(event, Tokens) and event.finish_reason is None:
            token_ids += event.token_ids
            if len(token_ids) >= MERGE_TOKENS_MAX:
                event = None
                break
            event = self.live.events.take_now()
        if isinstance(event, Tokens):
            return self.take(Tokens(token_ids + event.token_ids, event.finish_reason))
        items = self.take(Tokens(token_ids, None)) if token_ids else []
        return items if event is None else items + self.take(event)

    async def rest(self) -> list[Delta | Refusal]:
        """All items up to the last, with one wake-up for all of them."""
        items: list[Delta | Refusal] = []
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        mailbox = self.live.events

        def sink(event: Event) -> None:
            try:
                items.extend(self.take(event))
                if self.is_over:
                    over.set_result(None)
            except Exception as error:  # a bug must end this request, not the worker's link
                mailbox.sink = None
                over.set_exception(error)

        while not over.done() and (event := mailbox.take_now()) is not None:
            sink(event)
        if not over.done():
            mailbox.sink = sink
            await over
        return items

    def take(self, event: Event) -> list[Delta | Refusal]:
        """What one event adds to the output: at most a delta, or how the request was refused."""
        assert not self.is_over, self.live.request_id
        if isinstance(event, Tokens):
            return self._take_tokens(event.token_ids, event.finish_reason)
        if isinstance(event.outcome, domain.Rejected):
            rejected = event.outcome
            self._settle("failed", status_of(rejected, self._progress), "", rejected.code)
            return [Refusal(rejected)]
        if isinstance(event.outcome, domain.Placed) and self._progress.placed_at_s is None:
            self._progress.placed_at_s = self._fleet.now_s()
        return []

    def cancel(self) -> None:
        """Nobody wants the rest; `close` then settles the request as cancelled."""
        self._abandoned = "cancelled"

    def close(self) -> None:
        """The end of every use; does nothing when the request has ended by itself."""
        self.live.events.sink = None
        if not self.is_over:
            self._settle(self._abandoned, self._abandoned)

    def _take_tokens(self, token_ids: list[int], end: str | None) -> list[Delta | Refusal]:
        spec, progress = self._spec, self._progress
        piece = self._text.feed(token_ids, is_last=end is not None)
        kept = token_ids[: piece.num_ids]
        seq = progress.output_tokens
        if kept:
            self._observe(len(kept))
        finish_reason = "stop" if piece.is_stopped else end
        logprobs: tuple[protocol.TokenLogprobs | None, ...] = ()
        if spec.sampling.logprobs is not None:
            known = self.live.journal.logprobs
            logprobs = tuple(known.get(index) for index in range(seq, seq + len(kept)))
        if finish_reason is None:
            return [Delta(piece.text, seq, kept, None, None, logprobs)]
        self._settle("completed", "completed", finish_reason)
        usage = Usage(len(spec.prompt_ids), progress.output_tokens, self.live.cached_tokens)
        return [Delta(piece.text, seq, kept, finish_reason, usage, logprobs)]

    def _observe(self, num_ids: int) -> None:
        """Latency as the client sees it: to the first delta, then between deltas."""
        spec, progress = self._spec, self._progress
        now_s = self._fleet.now_s()
        if progress.first_at_s is None:
            progress.first_at_s = now_s
            ttft_s = now_s - progress.arrived_at_s
            self._fleet.first_token(self.live, ttft_s)
            self._stats.observe_ttft(spec.slo.name, ttft_s)
            self._metrics.observe_ttft(spec.slo.name, ttft_s)
        else:
            gap_s = now_s - progress.last_at_s
            progress.gaps_s.append(gap_s)
            self._stats.observe_itl(spec.slo.name, gap_s, now_s)
            self._metrics.observe_itl(spec.slo.name, gap_s)
        progress.last_at_s = now_s
        progress.output_tokens += num_ids
        self._stats.observe_tokens(spec.is_batch, num_ids, now_s)

    def _settle(
        self, fate: str, status: RequestStatus, finish_reason: str = "", error_code: str = ""
    ) -> None:
        """Tell the fleet, count and store a request that has just ended."""
        self.is_over = True
        live, progress, fleet = self.live, self._progress, self._fleet
        live.events.sink = None
        live.delivered_tokens = progress.output_tokens
        live.itl_s_p99 = progress.itl_s_p99
        fleet.finished(live, fate)
        fact = fact_of(
            self._spec,
            live,
            progress,
            fleet.explain(live.request_id),
            fleet.now_s(),
            status,
            finish_reason,
            error_code,
        )
        self._stats.observe_request(fact)
        self._metrics.observe_fact(fact)
        self._gateway._writer.put(fact)
