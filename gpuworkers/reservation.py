"""Who gets KV blocks: online sequences at once, batch sequences from what a reserve leaves over.

A sequence gets all the blocks it can ever need when it starts, so nothing in hand waits for another
to end. Online arrivals may take the blocks of running batch sequences, which wait and are computed
again; what the prefix cache still holds of them is not.
"""

from collections.abc import Iterable

from gpuworkers import blocks
from gpuworkers.blocks import BlockPool
from gpuworkers.sequence import Sequence


class Reservations:
    """Gives the blocks of one pool to sequences and keeps their names current."""

    def __init__(self, num_blocks: int, block_tokens: int, batch_reserve_ratio: float) -> None:
        self.pool = BlockPool(num_blocks, block_tokens)
        self.batch_reserve = int(num_blocks * batch_reserve_ratio)  # blocks batch leaves free

    def can_ever_fit(self, sequence: Sequence) -> bool:
        """Would the sequence fit into an empty pool?"""
        blocks_max = self.pool.num_blocks - (self.batch_reserve if sequence.is_batch else 0)
        return blocks.blocks_for(sequence.tokens_max, self.pool.block_tokens) <= blocks_max

    def has_room(self, sequence: Sequence) -> bool:
        """May the sequence start now, taking blocks from nobody?"""
        hashes, num_blocks = self._wanted(sequence)
        reserve = self.batch_reserve if sequence.is_batch else 0
        return self.pool.has_room(hashes, num_blocks, reserve)

    def start(self, sequence: Sequence) -> None:
        """Give the sequence its blocks; the caller has asked `has_room`."""
        hashes, num_blocks = self._wanted(sequence)
        reused = self.pool.allocate(sequence.key, hashes, num_blocks)
        sequence.block_ids = self.pool.block_ids(sequence.key)
        sequence.computed_tokens = reused * self.pool.block_tokens
        sequence.cached_tokens = min(sequence.computed_tokens, sequence.prompt_tokens)
        sequence.phase = "arriving" if sequence.stage == "decode" else "running"

    def make_room(self, sequence: Sequence, in_hand: Iterable[Sequence]) -> bool:
        """Preempt batch sequences, latest arrivals first, until an online sequence has room.

        False, with nothing preempted, when even all of them would not do."""
        if self.has_room(sequence):
            return True
        victims = [s for s in in_hand if s.is_batch and s.phase == "running"]
        held = sum(self.pool.num_held(victim.key) for victim in victims)
        _, num_blocks = self._wanted(sequence)
        if sequence.is_batch or num_blocks > self.pool.num_available + held:
            return False
        for victim in sorted(victims, key=lambda s: s.arrived_at_s, reverse=True):
            self._preempt(victim)
            if self.has_room(sequence):
                return True
        return False  # blocks counted twice above, because victims share them

    def _preempt(self, sequence: Sequence) -> None:
        self.free(sequence)
        sequence.computed_tokens = 0
        sequence.phase = "waiting"
        if sequence.stage == "decode":  # its KV came from a peer: what is lost is computed here
            sequence.stage = "full"

    def free(self, sequence: Sequence) -> None:
        """Take the sequence's blocks, if it has any."""
        if sequence.block_ids:
            self.pool.free(sequence.key)
            sequence.block_ids = []

    def publish(self, sequence: Sequence, first_block: int) -> None:
        """Name the blocks from first_block on that are full now, so that others can reuse them."""
        size = self.pool.block_tokens
        full = sequence.computed_tokens // size
        if full == first_block:
            return
        blocks.extend_hashes(sequence.hashes, sequence.salt, sequence.token_ids, full * size, size)
        for index in range(first_block, full):
            self.pool.publish(sequence.key, index, sequence.hashes[index])

    def _wanted(self, sequence: Sequence) -> tuple[list[bytes], int]:
        """Names of blocks that may be reused, and the number of blocks needed in all."""
        size = self.pool.block_tokens
        num_blocks = blocks.blocks_for(sequence.tokens_max, size)
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
        num_owners = 0
        for sequence in sequences:
            assert (sequence.phase != "waiting") == bool(sequence.block_ids), sequence.key
            assert self.pool.num_held(sequence.key) == len(sequence.block_ids), sequence.key
            num_owners += bool(sequence.block_ids)
        assert num_owners == self.pool.num_owners, (num_owners, self.pool.num_owners)
