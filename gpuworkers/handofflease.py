"""One prompt that a peer may fetch once: what of it is final, what has left, how it ended."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from gpuworkers.handoffwire import ACK, HandoffError, Piece
from gpuworkers.reports import Key


@dataclass(frozen=True, slots=True)
class Departure:
    """Blocks [first, end) of one layer: when they were final and when they had left; one clock."""

    key: Key
    layer: int
    first: int
    end: int
    final_at_s: float
    left_at_s: float


@dataclass(slots=True)
class Lease:
    """Event loop's thread only. One coroutine sends it and waits on it."""

    key: Key
    digest: bytes  # of the capability
    tokens: int
    lease_s: float
    num_layers: int
    num_blocks: int
    block_ids: list[int] = field(default_factory=list)
    first_ids: list[int] = field(default_factory=list)
    ready_at_s: float = 0.0  # the prompt is computed
    num_sent: int = 0  # pieces
    num_acks: int = 0
    is_taken: bool = False
    is_over: bool = False
    is_peer_gone: bool = False
    expiry: asyncio.TimerHandle | None = None
    _final: list[int] = field(init=False)  # leading blocks, by layer
    _left: list[int] = field(init=False)
    # (layer, end, when) in the order in which they became final; at most layers x blocks
    _waiting: deque[tuple[int, int, float]] = field(default_factory=deque)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._final = [0] * self.num_layers
        self._left = [0] * self.num_layers

    @property
    def has_piece(self) -> bool:
        return bool(self._waiting)

    @property
    def has_left(self) -> bool:
        """Every block of every layer."""
        return all(left == self.num_blocks for left in self._left)

    def advance(self, block_ids: list[int], layers: range, end: int, at_s: float) -> None:
        """The leading `end` blocks are final in these layers."""
        assert end <= self.num_blocks == len(block_ids), (self.key, end, self.num_blocks)
        self.block_ids = block_ids
        for layer in layers:
            if end > self._final[layer]:
                self._final[layer] = end
                self._waiting.append((layer, end, at_s))
        self._changed.set()

    def take(self, blocks_max: int) -> tuple[Piece, float]:
        """The next piece to leave, and since when it is final."""
        layer, end, at_s = self._waiting[0]
        first = self._left[layer]
        if end - first <= blocks_max:
            self._waiting.popleft()
        self._left[layer] = min(end, first + blocks_max)
        return Piece(layer, first, self._left[layer]), at_s

    def finish(self, first_ids: list[int], at_s: float) -> None:
        """The prompt is computed."""
        self.first_ids, self.ready_at_s = first_ids, at_s
        self._changed.set()

    def end(self) -> None:
        self.is_over = True
        if self.expiry is not None:
            self.expiry.cancel()
        self._changed.set()

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait for it. Raises HandoffError when the lease or the peer ends before."""
        while True:
            if self.is_over:
                raise HandoffError("refused", f"{self.key} is over")
            if holds():
                return
            if self.is_peer_gone:
                raise HandoffError("unreachable", f"the peer of {self.key} is gone")
            self._changed.clear()
            await self._changed.wait()

    async def watch(self, reader: asyncio.StreamReader) -> None:
        """Counts what the peer confirms until it is gone, or says something else."""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while await reader.readexactly(1) == ACK:
                self.num_acks += 1
                self._changed.set()
        self.is_peer_gone = True
        self._changed.set()
