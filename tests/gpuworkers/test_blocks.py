"""The block pool: conservation, sharing by name, eviction, leases."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gpuworkers.blocks import BlockPool, blocks_for, chain_hash, extend_hashes

A, B, C = ("a", 1), ("b", 1), ("c", 1)


def names(token_ids: list[int], salt: bytes = b"s", size: int = 4) -> list[bytes]:
    hashes: list[bytes] = []
    extend_hashes(hashes, salt, token_ids, len(token_ids), size)
    return hashes


def publish_all(pool: BlockPool, owner, hashes: list[bytes]) -> None:
    for index, name in enumerate(hashes):
        pool.publish(owner, index, name)


def test_blocks_for_rounds_up():
    assert [blocks_for(n, 16) for n in (0, 1, 15, 16, 17, 32)] == [0, 1, 1, 1, 2, 2]


def test_a_chain_names_what_stands_before_it_and_the_tenant():
    one, two = names([1, 2, 3, 4, 5, 6, 7, 8]), names([9, 2, 3, 4, 5, 6, 7, 8])
    assert len(one) == 2 and one[0] != two[0] and one[1] != two[1]
    assert names([1, 2, 3, 4], salt=b"other") != one[:1]
    assert one[1] == chain_hash(one[0], [5, 6, 7, 8])


def test_hashes_are_extended_not_computed_again():
    hashes = names(list(range(8)))
    first_two = list(hashes)
    extend_hashes(hashes, b"s", list(range(13)), 13, 4)
    assert hashes == names(list(range(12))) and hashes[:2] == first_two


def test_a_published_prefix_is_shared_while_its_owner_lives_and_after():
    pool = BlockPool(8, 4)
    hashes = names(list(range(12)))
    assert pool.allocate(A, [], 3) == 0
    publish_all(pool, A, hashes)
    assert pool.allocate(B, hashes, 4) == 3
    assert pool.block_ids(B)[:3] == pool.block_ids(A)
    pool.free(A)
    pool.check_integrity()
    pool.free(B)
    assert (pool.num_free, pool.num_cached) == (5, 3)
    assert pool.allocate(C, hashes, 3) == 3
    pool.check_integrity()


def test_a_prefix_that_differs_in_its_first_block_shares_nothing():
    pool = BlockPool(8, 4)
    pool.allocate(A, [], 2)
    publish_all(pool, A, names(list(range(8))))
    assert pool.cached_blocks(names([5, *range(1, 8)])) == 0
    assert pool.cached_blocks(names([*range(4), 9, 9, 9, 9])) == 1


def test_cached_blocks_are_evicted_oldest_first_and_from_the_tail():
    pool = BlockPool(4, 4)
    first, second = names(list(range(8))), names(list(range(50, 58)))
    for owner, hashes in ((A, first), (B, second)):
        pool.allocate(owner, [], 2)
        publish_all(pool, owner, hashes)
    pool.free(A)
    pool.free(B)
    pool.allocate(C, [], 1)
    assert pool.cached_blocks(first) == 1 and pool.cached_blocks(second) == 2
    pool.check_integrity()


def test_room_counts_cached_blocks_but_not_those_that_would_be_shared():
    pool = BlockPool(4, 4)
    hashes = names(list(range(8)))
    pool.allocate(A, [], 2)
    publish_all(pool, A, hashes)
    pool.free(A)
    assert pool.has_room(hashes, 4) and pool.has_room([], 4)
    assert not pool.has_room([], 5) and not pool.has_room(hashes, 5)
    assert pool.has_room([], 3, reserve=1) and not pool.has_room([], 3, reserve=2)
    assert pool.allocate(B, hashes, 4) == 2
    assert pool.num_available == 0 and not pool.has_room([], 1)


def test_allocating_without_room_is_a_bug():
    pool = BlockPool(2, 4)
    with pytest.raises(AssertionError):
        pool.allocate(A, [], 3)


def test_a_leased_block_is_kept_and_can_still_be_shared():
    pool = BlockPool(4, 4)
    hashes = names(list(range(8)))
    pool.allocate(A, [], 2)
    publish_all(pool, A, hashes)
    pool.lease(A)
    pool.check_integrity()
    assert pool.num_available == 2 and not pool.has_room([], 3)
    assert pool.allocate(B, hashes, 3) == 2
    pool.free(B)
    assert pool.num_available == 2
    pool.free(A)
    pool.check_integrity()
    assert pool.num_available == 4


def test_the_same_content_computed_twice_keeps_one_name():
    pool = BlockPool(4, 4)
    hashes = names(list(range(4)))
    for owner in (A, B):
        pool.allocate(owner, [], 1)
        publish_all(pool, owner, hashes)
    pool.free(A)
    pool.free(B)
    assert (pool.num_free, pool.num_cached) == (3, 1)
    pool.check_integrity()


class PoolMachine(RuleBasedStateMachine):
    """Random work on a small pool over few distinct prompts, so that sharing is common."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12, 2)
        self.tables: dict[tuple[str, int], list[bytes]] = {}
        self.leased: set[tuple[str, int]] = set()
        self.number = 0

    @rule(ids=st.lists(st.integers(0, 1), min_size=1, max_size=10), extra=st.integers(0, 3))
    def allocate(self, ids: list[int], extra: int) -> None:
        hashes = names(ids, size=2)
        wanted = blocks_for(len(ids), 2) + extra
        if not self.pool.has_room(hashes, wanted):
            return
        self.number += 1
        owner = (f"r{self.number}", 1)
        known = self.pool.cached_blocks(hashes)
        assert self.pool.allocate(owner, hashes, wanted) == known
        assert len(self.pool.block_ids(owner)) == wanted
        self.tables[owner] = hashes

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.tables)))
        publish_all(self.pool, owner, self.tables[owner])

    @precondition(lambda self: set(self.tables) - self.leased)
    @rule(data=st.data())
    def lease(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(set(self.tables) - self.leased)))
        self.pool.lease(owner)
        self.leased.add(owner)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.tables)))
        self.pool.free(owner)
        del self.tables[owner]
        self.leased.discard(owner)

    @invariant()
    def blocks_are_conserved(self) -> None:
        self.pool.check_integrity()
        assert self.pool.num_owners == len(self.tables)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
