"""Which worker holds which prefix blocks, as far as routing has caused it; bounded in memory.

The index predicts: what a worker has evicted it computes again, and only a prediction was wrong.
Each worker has a count of blocks that were routed to it; a block is taken to have left the device
when as many blocks as the device holds came after it, and the host tier likewise. Names of blocks
are salted per tenant, so the index cannot match across tenants.

Blocks that were new together are one segment, found by the name of its first block; with each
holder stands how many of the segment's blocks it has. A chain that leaves a segment goes on in
another one. So a decision looks up a few segments, not every block of its prompt, and a block costs
little more than its key: a radix tree (SGLang's RadixAttention, arXiv:2312.07104) over names of
blocks instead of tokens.

Memory: two generations. All routing puts blocks into the younger; when that is full it becomes the
older one, and what was in the older and was not routed since is forgotten.
"""

from collections.abc import Sequence
from sys import getsizeof
from typing import NamedTuple

import msgspec

KEY_BYTES = 8  # of a block's name: two of a million collide once in 4e7 indexes
STAMP_BITS = 19
STAMP_MASK = (1 << STAMP_BITS) - 1
STAMP_BLOCKS = 256  # blocks of one worker per stamp
SLOTS_MAX = 1 << 13


class Hit(NamedTuple):
    """Leading blocks of a prompt that a worker should still have."""

    device_blocks: int
    host_blocks: int  # after those on the device


class _Slot:
    """One worker in the index. Capacities are in stamps; those of a free slot hold nothing."""

    __slots__ = ("device", "num_written", "stamp", "total", "worker_id")

    def __init__(self) -> None:
        self.worker_id = ""
        self.num_written = self.stamp = 0
        self.device = self.total = -1  # on the device; there and on the host

    def wrote(self, num_blocks: int) -> None:
        self.num_written += num_blocks
        self.stamp = (self.num_written // STAMP_BLOCKS) & STAMP_MASK


class _Holder(NamedTuple):
    """A worker that was sent the first blocks of a segment."""

    code: int  # slot and stamp
    reach: int  # so many blocks
    num_newer: int  # other workers that were sent as many, later


class _Segment(msgspec.Struct, gc=False):
    """Blocks that follow each other in a chain."""

    keys: bytes  # KEY_BYTES of each block's name
    holders: tuple[_Holder, ...]  # newest first

    @property
    def num_blocks(self) -> int:
        return len(self.keys) // KEY_BYTES

    def num_shared(self, hashes: Sequence[bytes], start: int) -> int:
        """Blocks that it shares with hashes[start:], given that the first is one. A name stands for
        the whole chain up to it: equal at one place is equal at all before."""
        keys, equal = self.keys, 1
        different = min(self.num_blocks, len(hashes) - start) + 1
        while different - equal > 1:
            middle = (equal + different) // 2
            if keys.startswith(hashes[start + middle - 1][:KEY_BYTES], KEY_BYTES * (middle - 1)):
                equal = middle
            else:
                different = middle
        return equal


class _Generation:
    """Segments by the key of their first block."""

    __slots__ = ("num_blocks", "segments")

    def __init__(self) -> None:
        self.segments: dict[bytes, _Segment] = {}
        self.num_blocks = 0

    def put(self, segment: _Segment) -> None:
        self.segments[segment.keys[:KEY_BYTES]] = segment
        self.num_blocks += segment.num_blocks

    def remove(self, segment: _Segment) -> None:
        del self.segments[segment.keys[:KEY_BYTES]]
        self.num_blocks -= segment.num_blocks

    def split(self, segment: _Segment, count: int, holders_max: int) -> None:
        """The segment keeps its first blocks, the others become one of their own."""
        end, before = KEY_BYTES * count, segment.holders
        behind = [item._replace(reach=item.reach - count) for item in before if item.reach > count]
        rest = _Segment(segment.keys[end:], tuple(behind))
        segment.keys, segment.holders = segment.keys[:end], ()
        for code, reach, _ in reversed(before):
            segment.holders = with_holder(segment.holders, code, min(reach, count), holders_max)
        self.segments[rest.keys[:KEY_BYTES]] = rest


def with_holder(
    holders: Sequence[_Holder], code: int, reach: int, holders_max: int
) -> tuple[_Holder, ...]:
    """The holders with this one in front. A worker is forgotten where holders_max others were sent
    as many blocks later; of its own earlier visits only one that reached further counts."""
    index, own = code >> STAMP_BITS, 0
    after = [_Holder(code, reach, 0)]
    for holder in holders:
        if holder.code >> STAMP_BITS == index:
            own = max(own, holder.reach)
            if holder.reach > reach:
                after.append(holder)
        elif own < holder.reach <= reach:
            if holder.num_newer + 1 < holders_max:
                after.append(_Holder(holder.code, holder.reach, holder.num_newer + 1))
        else:
            after.append(holder)
    return tuple(after)


_Found = tuple[_Generation, _Segment, int]  # where it is, and how many of its blocks match


class PrefixIndex:
    """At most `blocks_max` blocks; a holder of one is kept until `holders_max` others were sent it
    and all after it that the holder had."""

    def __init__(self, blocks_max: int, holders_max: int) -> None:
        assert blocks_max >= 2 and holders_max >= 1, (blocks_max, holders_max)
        self._generation_max = blocks_max // 2
        self._holders_max = holders_max
        self._young = _Generation()
        self._old = _Generation()
        self._slots: list[_Slot] = [_Slot()]  # nobody's: a holder is never 0
        self._free: list[int] = []
        self._slot_of: dict[str, int] = {}
        # The chain matched last, as it was found: a decision inserts it right after.
        self._chain: Sequence[bytes] = ()
        self._found: list[_Found] = []

    def __len__(self) -> int:
        """Blocks that can be found."""
        return self._young.num_blocks + self._old.num_blocks

    def num_bytes(self) -> int:
        """Memory of the blocks: dictionaries, their keys, segments and what they hold."""
        total, holders = 0, {}
        for segments in (self._young.segments, self._old.segments):
            total += getsizeof(segments) + sum(map(getsizeof, segments))
            for segment in segments.values():
                total += getsizeof(segment) + getsizeof(segment.keys) + getsizeof(segment.holders)
                holders.update({id(holder): getsizeof(holder) for holder in segment.holders})
        return total + sum(holders.values())

    # --- workers

    def join(self, worker_id: str, device_blocks: int, host_blocks: int) -> None:
        """The worker caches so many blocks (of the index's size) on its device and its host.
        Joining again changes the sizes; the blocks it had still count."""
        index = self._slot_of.get(worker_id)
        if index is None:
            if self._free:
                index = self._free.pop()
            else:
                assert len(self._slots) < SLOTS_MAX, f"{SLOTS_MAX} workers in the prefix index"
                index = len(self._slots)
                self._slots.append(_Slot())
            self._slot_of[worker_id] = index
        slot = self._slots[index]
        slot.worker_id = worker_id
        slot.device = -(-device_blocks // STAMP_BLOCKS)
        slot.total = slot.device - (-host_blocks // STAMP_BLOCKS)

    def leave(self, worker_id: str) -> None:
        """The worker is forgotten. Whoever gets its slot finds none of its blocks: they are half a
        turn of the stamps old then."""
        index = self._slot_of.pop(worker_id, None)
        if index is not None:
            slot = self._slots[index]
            slot.worker_id, slot.device, slot.total = "", -1, -1
            slot.wrote(STAMP_BLOCKS * (STAMP_MASK // 2))
            self._free.append(index)

    # --- blocks

    def insert(self, worker_id: str, hashes: Sequence[bytes]) -> None:
        """The worker will hold these blocks once it has computed or received them."""
        index = self._slot_of.get(worker_id)
        if index is None or not hashes:
            return
        slot = self._slots[index]
        code = index << STAMP_BITS | slot.stamp
        hashes = hashes[: self._generation_max]
        slot.wrote(len(hashes))
        if self._young.num_blocks + len(hashes) > self._generation_max:
            self._old, self._young = self._young, _Generation()
            self._chain = ()
        young = self._young
        start = 0
        for home, segment, run in self._look_up(hashes):
            if home is not young:
                if run < segment.num_blocks:
                    home.split(segment, run, self._holders_max)
                home.remove(segment)
                young.put(segment)
            segment.holders = with_holder(segment.holders, code, run, self._holders_max)
            start += run
        if start < len(hashes):
            keys = b"".join([name[:KEY_BYTES] for name in hashes[start:]])
            young.put(_Segment(keys, (_Holder(code, len(hashes) - start, 0),)))
        self._chain = ()

    def _look_up(self, hashes: Sequence[bytes]) -> list[_Found]:
        """The segments that the chain begins with."""
        if self._chain is hashes:
            return self._found
        young, old = self._young, self._old
        self._chain = hashes
        self._found = found = []
        start, end = 0, len(hashes)
        while start < end:
            key, home = hashes[start][:KEY_BYTES], young
            segment = young.segments.get(key)
            if segment is None:
                segment, home = old.segments.get(key), old
                if segment is None:
                    break
            run = len(segment.keys) // KEY_BYTES
            last = start + run
            if last > end or not segment.keys.endswith(hashes[last - 1][:KEY_BYTES]):
                run = segment.num_shared(hashes, start)
            found.append((home, segment, run))
            start += run
        return found

    def matched(self, hashes: Sequence[bytes]) -> dict[str, Hit]:
        """Leading blocks that each worker holds; workers without the first are absent."""
        slots, start = self._slots, 0
        depths: dict[int, int] = {}  # by slot
        on_host: dict[int, int] = {}  # of those blocks
        for _, segment, run in self._look_up(hashes):
            for code, reach, _ in segment.holders:
                index = code >> STAMP_BITS
                held = depths.get(index, 0) - start
                if reach > run:
                    reach = run
                if held < 0 or reach <= held:
                    continue  # it lacks a block before this segment, or came again later
                slot = slots[index]
                age = (slot.stamp - code) & STAMP_MASK
                if age > slot.total:
                    continue
                depths[index] = start + reach
                if age > slot.device or index in on_host:
                    on_host[index] = on_host.get(index, 0) + reach - held
            start += run
        return {
            slots[index].worker_id: Hit(depth - on_host.get(index, 0), on_host.get(index, 0))
            for index, depth in depths.items()
        }
