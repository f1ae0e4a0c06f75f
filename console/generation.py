"""What passes between `/v1`, gateway and fleet: a generation's spec, its events, its output."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from console.facts import Endpoint
from console.snapshot import TenantFacts
from console.tokens import ModelTokenizer
from console.tools import NO_TOOLS, ToolPlan
from controlplane import domain, protocol
from controlplane.journal import Journal


@dataclass(frozen=True, slots=True)
class Tokens:
    """Ids that joined the journal, in order; `finish_reason` when the output is complete."""

    token_ids: list[int]
    finish_reason: protocol.FinishReason | None


Event = Tokens | domain.Decided


class Mailbox:
    """Events of one request, in order: given to `sink` at once while there is one, else queued.

    Handing a token on without waking a task is most of what a token would cost otherwise. A sink
    must not raise. Not thread-safe: the event loop only."""

    __slots__ = ("_queue", "sink")

    def __init__(self, size_max: int) -> None:
        self._queue: asyncio.Queue[Event] = asyncio.Queue(size_max)
        self.sink: Callable[[Event], None] | None = None

    def put(self, event: Event) -> None:
        if self.sink is not None:
            self.sink(event)
        else:
            self._queue.put_nowait(event)

    async def take(self) -> Event:
        return await self._queue.get()

    def take_now(self) -> Event | None:
        """The next event when it is here already."""
        return None if self._queue.empty() else self._queue.get_nowait()


@dataclass(slots=True)
class LiveRequest:
    """A running request: what the fleet needs to dispatch it, and where its events go.

    The fleet writes everything below `events`, the gateway reads it when it settles; both live on
    the event loop. The gateway writes what it delivered before it calls `finished`."""

    request: domain.GenerateRequest
    prompt_ids: list[int]
    sampling: protocol.Sampling
    targets: protocol.ClassTargets
    salt: bytes
    journal: Journal
    events: Mailbox
    epoch: int = 0
    progressed_epoch: int = 0  # the plane knows that this epoch has given an id
    placement: domain.Placement | None = None
    waited_s: float | None = None  # for its newest decision
    cached_tokens: int = 0
    failovers: int = 0
    handoff_bytes: int = 0
    handoff_ms: float = 0.0
    handoff_recomputed_tokens: int = 0
    # Seconds of each worker and epoch that it was charged: prefill, decode. Totals, so that reports
    # may come twice.
    gpu_s: dict[tuple[str, int], tuple[float, float]] = field(default_factory=dict)
    delivered_tokens: int = 0
    itl_s_p99: float = 0.0

    @property
    def request_id(self) -> str:
        return self.request.request_id


@dataclass(frozen=True, slots=True)
class Shape:
    """What an answer holds beside the generated text."""

    echo: str = ""  # put before it
    tools: ToolPlan = NO_TOOLS  # calls of these are taken out of it
    pieces: Sequence[bytes] | None = None  # of the vocabulary, where logprobs are asked for


PLAIN = Shape()


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
    shape: Shape = PLAIN
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
    logprobs: tuple[protocol.TokenLogprobs | None, ...] = ()  # one per id where asked for


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
    logprobs: list[protocol.TokenLogprobs | None]
