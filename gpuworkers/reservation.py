"""Who gets KV blocks: online sequences at once, batch sequences from what a reserve leaves over.

An online sequence gets all the blocks it can ever need when it starts, so nothing in hand waits for
another to end. A batch sequence starts with the blocks of its tokens and grows; it is admitted when
the predicted peak of all of them fits (Past-Future, algorithms.md 2a). Where a prediction was too
low or an online sequence arrives, the latest batch sequences are preempted: their KV is in host
memory already, but for the block being filled, and comes back by a copy; what the host tier could
not keep is computed again.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from gpuworkers import blocks
from gpuworkers.blocks import BlockPool
from gpuworkers.hostcache import HostCache
from gpuworkers.kvstore import KVStore
from gpuworkers.lengths import OutputLengths
from gpuworkers.sequence import Sequence


@dataclass(slots=True)
class KVCounts:
    """What preemption did since the start."""

    preemptions: int = 0
    restored_tokens: int = 0  # came back from the prefix cache or the host tier
    recomputed_tokens: int = 0  # had been computed and were lost


def peak_blocks(rows: list[tuple[int, int]], block_tokens: int) -> int:
    """Most blocks that sequences hold together while each grows a token a step until it ends.

    rows: (tokens now, tokens to come). The peak is at the end of some sequence."""
    peak = 0
    by_end = sorted(rows, key=lambda row: -row[1])
    for index, (_, steps) in enumerate(by_end):
        alive = by_end[: index + 1]
        peak = max(peak, sum(blocks.blocks_for(now + steps, block_tokens) for now, _ in alive))
    return peak


class Reservations:
    """Gives the blocks of one pool to sequences and keeps their names current."""

    def __init__(self, kv: KVStore, batch_reserve_ratio: float, host_blocks_max: int) -> None:
        self.pool = BlockPool(kv.num_blocks, kv.block_tokens)
        self.host = HostCache(kv, host_blocks_max)
        self.lengths = OutputLengths()
        self.counts = KVCounts()
        self.batch_reserve = int(kv.num_blocks * batch_reserve_ratio)  # blocks batch leaves free

    def can_ever_fit(self, sequence: Sequence) -> bool:
        """Would the sequence fit into an empty pool?"""
        blocks_max = self.pool.num_blocks - (self.batch_reserve if sequence.is_batch else 0)
        return blocks.blocks_for(sequence.tokens_max, self.pool.block_tokens) <= blocks_max

    def has_room(self, sequence: Sequence, in_hand: Iterable[Sequence]) -> bool:
        """May the sequence start now, taking blocks from nobody?"""
        hashes, num_blocks = self._wanted(sequence)
        if not sequence.is_batch:
            return self.pool.has_room(hashes, num_blocks)
        if not self.pool.has_room(hashes, num_blocks, self.batch_reserve):
            return False
        others = [s for s in in_hand if s.is_batch and s.block_ids and s is not sequence]
        held = sum(len(other.block_ids) for other in others)
        rows = [self._growth(row) for row in (sequence, *others)]
        peak = peak_blocks(rows, self.pool.block_tokens)
        return peak + self.batch_reserve <= self.pool.num_available + held

    def _growth(self, sequence: Sequence) -> tuple[int, int]:
        """Tokens a batch sequence needs blocks for now, and those predicted to come."""
        now = len(sequence.token_ids)
        output_max = sequence.sampling.output_tokens_max
        output = self.lengths.predict(sequence.output_tokens, output_max)
        last = min(sequence.tokens_max, sequence.prompt_tokens + output - 1)
        return now, max(0, last - now)

    def start(self, sequence: Sequence) -> None:
        """Give the sequence its blocks and the KV of it that is still somewhere; the caller has
        asked `has_room`."""
        hashes, num_blocks = self._wanted(sequence)
        size = self.pool.block_tokens
        reused = self.pool.allocate(sequence.key, hashes, num_blocks, sequence.is_batch)
        sequence.block_ids = self.pool.block_ids(sequence.key)
        if sequence.is_batch:
            end = reused + self.host.load(hashes[reused:], sequence.block_ids[reused : len(hashes)])
            for index in range(reused, end):
                self.pool.publish(sequence.key, index, hashes[index])
            self.host.save(sequence.key, hashes[:end], sequence.block_ids[:end])
            reused = end
        sequence.computed_tokens = reused * size
        if sequence.preempted_tokens:
            self._resume(sequence, reused)
        else:
            sequence.cached_tokens = min(sequence.computed_tokens, sequence.prompt_tokens)
        sequence.phase = "arriving" if sequence.stage == "decode" else "running"

    def _resume(self, sequence: Sequence, num_full: int) -> None:
        """Copy the block back that was being filled, and count what was saved and what lost."""
        is_there = num_full < len(sequence.block_ids)
        block_id = sequence.block_ids[num_full] if is_there else None
        sequence.computed_tokens += self.host.load_tail(
            sequence.key, sequence.computed_tokens, block_id
        )
        lost = max(0, sequence.preempted_tokens - sequence.computed_tokens)
        self.counts.recomputed_tokens += lost
        self.counts.restored_tokens += sequence.preempted_tokens - lost
        sequence.preempted_tokens = 0

    def make_room(self, sequence: Sequence, in_hand: Iterable[Sequence]) -> bool:
        """Preempt batch sequences, latest arrivals first, until an online sequence has room.

        False, with nothing preempted, when even all of them would not do."""
        in_hand = list(in_hand)
        if self.has_room(sequence, in_hand):
            return True
        victims = [s for s in in_hand if s.is_batch and s.phase == "running"]
        held = sum(self.pool.num_held(victim.key) for victim in victims)
        _, num_blocks = self._wanted(sequence)
        if sequence.is_batch or num_blocks > self.pool.num_available + held:
            return False
        for victim in sorted(victims, key=_arrival, reverse=True):
            self.preempt(victim)
            if self.has_room(sequence, in_hand):
                return True
        return False  # blocks counted twice above, because victims share them

    def grow(self, in_hand: Iterable[Sequence]) -> None:
        """Before a step: blocks for the newest token of every running batch sequence, oldest
        first. Where none is left the latest arrival gives up its own."""
        running = sorted((s for s in in_hand if s.is_batch and s.phase == "running"), key=_arrival)
        while running:
            sequence = running.pop(0)
            needed = blocks.blocks_for(len(sequence.token_ids), self.pool.block_tokens)
            missing = needed - len(sequence.block_ids)
            while missing > self.pool.num_available and running:
                self.preempt(running.pop())
            if missing > self.pool.num_available:
                self.preempt(sequence)
            elif missing > 0:
                sequence.block_ids += self.pool.grow(sequence.key, missing)

    def preempt(self, sequence: Sequence) -> None:
        """Take the blocks of a running batch sequence between two steps; it waits for new ones."""
        assert sequence.is_batch and sequence.phase == "running", sequence.key
        size = self.pool.block_tokens
        full, rest = divmod(sequence.computed_tokens, size)
        if rest:
            self.host.save_tail(sequence.key, full * size, rest, sequence.block_ids[full])
        self.counts.preemptions += 1
        sequence.preempted_tokens = sequence.computed_tokens
        self._free_blocks(sequence)
        sequence.computed_tokens = 0
        sequence.phase = "waiting"
        if sequence.stage == "decode":  # its KV came from a peer: what is lost is computed here
            sequence.stage = "full"

    def free(self, sequence: Sequence) -> None:
        """The sequence has ended or is forgotten: take its blocks, if it has any."""
        self._free_blocks(sequence)
        self.host.release(sequence.key)

    def _free_blocks(self, sequence: Sequence) -> None:
        if sequence.block_ids:
            self.pool.free(sequence.key)
            sequence.block_ids = []

    def publish(self, sequence: Sequence, first_block: int) -> None:
        """Name the blocks from first_block on that are full now, so that others can reuse them;
        those of a batch sequence are copied to host memory."""
        size = self.pool.block_tokens
        full = sequence.computed_tokens // size
        if full == first_block:
            return
        blocks.extend_hashes(sequence.hashes, sequence.salt, sequence.token_ids, full * size, size)
        for index in range(first_block, full):
            self.pool.publish(sequence.key, index, sequence.hashes[index])
        if sequence.is_batch:
            fresh = slice(first_block, full)
            self.host.save(sequence.key, sequence.hashes[fresh], sequence.block_ids[fresh])

    def _wanted(self, sequence: Sequence) -> tuple[list[bytes], int]:
        """Names of blocks that may be reused, and the number of blocks needed to start."""
        size = self.pool.block_tokens
        tokens = len(sequence.token_ids) if sequence.is_batch else sequence.tokens_max
        num_blocks = blocks.blocks_for(tokens, size)
        if sequence.stage == "decode":  # the peer's KV is written into them: share none
            return [], num_blocks
        reusable = (len(sequence.token_ids) - 1) // size  # the last token must be computed
        blocks.extend_hashes(
            sequence.hashes, sequence.salt, sequence.token_ids, reusable * size, size
        )
        return sequence.hashes[:reusable], num_blocks

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Assert that blocks are conserved and belong to these sequences and nobody else."""
        self.pool.check_integrity()
        self.host.check_integrity()
        num_owners = 0
        for sequence in sequences:
            assert (sequence.phase != "waiting") == bool(sequence.block_ids), sequence.key
            assert self.pool.num_held(sequence.key) == len(sequence.block_ids), sequence.key
            num_owners += bool(sequence.block_ids)
        assert num_owners == self.pool.num_owners, (num_owners, self.pool.num_owners)


def _arrival(sequence: Sequence) -> tuple[float, tuple[str, int]]:
    return sequence.arrived_at_s, sequence.key
