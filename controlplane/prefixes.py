"""Which worker holds which prefix blocks, as far as routing has caused it; bounded in memory.

The index predicts: what a worker has evicted it computes again, and only a prediction was wrong.
Each worker has a count of blocks that were routed to it; a block is taken to have left the device
when as many blocks as the device holds came after it, and the host tier likewise. Names of blocks
are salted per tenant, so the index cannot match across tenants.

Memory: two dictionaries. All routing puts a block into the younger; when that is full it becomes
the older one, and what was in the older and was not routed since is forgotten. Blocks of a chain
that are routed together share one value, so a block costs about one dictionary entry and its key.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from sys import getsizeof

KEY_BYTES = 8  # of a block's name: two of a million collide once in 4e7 indexes
STAMP_BITS = 19
STAMP_MASK = (1 << STAMP_BITS) - 1
STAMP_BLOCKS = 256  # blocks of one worker per stamp
HOLDER_BITS = 32  # slot and stamp
HOLDER_MASK = (1 << HOLDER_BITS) - 1
SLOTS_MAX = 1 << (HOLDER_BITS - STAMP_BITS)


@dataclass(frozen=True, slots=True)
class Hit:
    """Leading blocks of a prompt that a worker should still have."""

    device_blocks: int
    host_blocks: int  # after those on the device


class _Slot:
    """One worker in the index. Capacities are in stamps."""

    __slots__ = ("device", "host", "num_written", "worker_id")

    def __init__(self) -> None:
        self.worker_id = ""  # empty: free
        self.num_written = 0
        self.device = self.host = 0

    @property
    def stamp(self) -> int:
        return (self.num_written // STAMP_BLOCKS) & STAMP_MASK


class PrefixIndex:
    """At most `blocks_max` blocks, each with its `holders_max` newest holders."""

    def __init__(self, blocks_max: int, holders_max: int) -> None:
        assert blocks_max >= 2 and holders_max >= 1, (blocks_max, holders_max)
        self._generation_max = blocks_max // 2
        self._holders_mask = (1 << (HOLDER_BITS * holders_max)) - 1
        self._young: dict[bytes, int] = {}
        self._old: dict[bytes, int] = {}
        self._slots: list[_Slot] = [_Slot()]  # nobody's: a holder is never 0
        self._free: list[int] = []
        self._slot_of: dict[str, int] = {}
        # The chain matched last, as it was found: a decision inserts it right after.
        self._chain: Sequence[bytes] = ()
        self._keys: list[bytes] = []
        self._found: list[int] = []

    def __len__(self) -> int:
        """Blocks that can be found; those in both dictionaries count twice."""
        return len(self._young) + len(self._old)

    def num_bytes(self) -> int:
        """Memory of the blocks: dictionaries, their keys, and the values, of which chains share
        one."""
        total, values = 0, {}
        for blocks in (self._young, self._old):
            total += getsizeof(blocks) + sum(map(getsizeof, blocks))
            values.update({id(packed): getsizeof(packed) for packed in blocks.values()})
        return total + sum(values.values())

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
        slot.host = -(-host_blocks // STAMP_BLOCKS)

    def leave(self, worker_id: str) -> None:
        """The worker is forgotten. Whoever gets its slot finds none of its blocks: they are half a
        turn of the stamps old then."""
        index = self._slot_of.pop(worker_id, None)
        if index is not None:
            slot = self._slots[index]
            slot.worker_id = ""
            slot.num_written += STAMP_BLOCKS * (STAMP_MASK // 2)
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
        slot.num_written += len(hashes)
        if len(self._young) + len(hashes) > self._generation_max:
            self._old, self._young = self._young, {}
            self._chain = ()
        self._look_up(hashes)
        young = self._young
        before, after = 0, code
        for key, packed in zip_longest(self._keys, self._found, fillvalue=0):
            if packed != before:
                before, after = packed, self._with(packed, code)
            young[key] = after  # type: ignore[index]  # there are never more holders than keys
        self._chain = ()

    def _with(self, packed: int, code: int) -> int:
        """The holders with this one in front, newest first."""
        rest, place, left = 0, 0, packed
        while left:
            holder = left & HOLDER_MASK
            if (holder ^ code) >> STAMP_BITS:
                rest |= holder << place
                place += HOLDER_BITS
            left >>= HOLDER_BITS
        return (rest << HOLDER_BITS | code) & self._holders_mask

    def _look_up(self, hashes: Sequence[bytes]) -> None:
        """Keys of a chain's blocks, and holders of those up to the first that nobody holds: what
        comes after it in a chain was not routed since either."""
        if self._chain is hashes:
            return
        young, old = self._young, self._old
        self._chain = hashes
        self._keys = [name[:KEY_BYTES] for name in hashes]
        self._found = found = []
        for key in self._keys:
            packed = young.get(key) or old.get(key)
            if packed is None:
                break
            found.append(packed)

    def matched(self, hashes: Sequence[bytes]) -> dict[str, Hit]:
        """Leading blocks that each worker holds; workers without the first are absent."""
        self._look_up(hashes)
        depths: dict[int, list[int]] = {}  # slot -> [device blocks, host blocks]
        before, run = 0, 0  # so many blocks in a row with the same holders
        start = 0
        for packed in self._found:
            if packed != before:
                if run and not self._count(before, start, run, depths):
                    run = 0
                    break
                start, run, before = start + run, 0, packed
            run += 1
        if run:
            self._count(before, start, run, depths)
        return {
            self._slots[index].worker_id: Hit(device, host)
            for index, (device, host) in depths.items()
        }

    def _count(self, packed: int, start: int, run: int, depths: dict[int, list[int]]) -> bool:
        """Add a run of blocks from `start` on to the holders that hold all before; False when
        nobody does any more."""
        is_any = False
        while packed:
            holder = packed & HOLDER_MASK
            packed >>= HOLDER_BITS
            index = holder >> STAMP_BITS
            slot = self._slots[index]
            age = (slot.stamp - holder) & STAMP_MASK
            if not slot.worker_id or age > slot.device + slot.host:
                continue
            found = depths.get(index)
            if found is None:
                if start:
                    continue
                found = depths[index] = [0, 0]
            elif found[0] + found[1] != start:
                continue
            if age <= slot.device and not found[1]:
                found[0] += run
            else:
                found[1] += run
            is_any = True
        return is_any
