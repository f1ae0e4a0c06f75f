"""Which worker holds which prefix: matches, generations, bounds, tiers."""

import hashlib
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.prefixes import STAMP_BITS, Hit, PrefixIndex, with_holder


def names(*numbers: int) -> tuple[bytes, ...]:
    """As of hash chains: equal numbers stand for equal chains up to there."""
    return tuple(number.to_bytes(8, "big") * 4 for number in numbers)


def prefix_index(blocks_max: int = 100, holders_max: int = 8, **sizes) -> PrefixIndex:
    index = PrefixIndex(blocks_max, holders_max)
    for worker_id in ("w1", "w2", "w3"):
        index.join(worker_id, sizes.get("device", 10_000), sizes.get("host", 0))
    return index


def on_device(index: PrefixIndex, chain: Sequence[bytes]) -> dict[str, int]:
    found = index.matched(chain)
    assert all(hit.host_blocks == 0 for hit in found.values())
    return {worker_id: hit.device_blocks for worker_id, hit in found.items()}


def test_prefix_is_matched_up_to_the_first_block_that_is_missing():
    index = prefix_index()
    index.insert("w1", names(1, 2, 3))
    index.insert("w2", names(1))
    assert on_device(index, names(1, 2, 3, 4)) == {"w1": 3, "w2": 1}
    assert on_device(index, names(9, 1)) == {} == on_device(index, names())


def test_prefix_index_forgets_what_was_not_routed_for_a_generation():
    index = prefix_index(blocks_max=8)
    index.insert("w1", names(1, 2, 3))
    index.insert("w1", names(11, 12, 13))
    assert on_device(index, names(1, 2, 3)) == {"w1": 3} and on_device(
        index, names(11, 12, 13)
    ) == {"w1": 3}
    index.insert("w1", names(1, 2, 3))
    index.insert("w1", names(21, 22, 23))
    assert len(index) <= 8
    assert on_device(index, names(1, 2, 3)) == {"w1": 3} and on_device(index, names(11)) == {}


def test_prefix_index_keeps_the_beginning_of_a_chain_that_is_too_long_for_it():
    index = prefix_index(blocks_max=8)
    index.insert("w1", names(*range(10)))
    assert on_device(index, names(*range(10))) == {"w1": 4} and len(index) == 4


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["w1", "w2", "w3"]), st.integers(0, 5), st.integers(1, 9)))
)
def test_prefix_index_never_exceeds_its_bound_and_a_match_is_a_prefix(routed):
    index = prefix_index(blocks_max=20, holders_max=2)
    for worker_id, chain, length in routed:
        blocks = [10 * chain + step for step in range(length)]
        index.insert(worker_id, names(*blocks))
        assert len(index) <= 20
        found = on_device(index, names(*blocks))
        assert found[worker_id] == length
        assert all(1 <= depth <= length for depth in found.values())


class PlainIndex:
    """The same by the book: every block in one of two dictionaries, with its holders."""

    def __init__(self, blocks_max: int) -> None:
        self.generation_max = blocks_max // 2
        self.young: dict[bytes, set[str]] = {}
        self.old: dict[bytes, set[str]] = {}

    def insert(self, worker_id: str, hashes: list[bytes]) -> None:
        hashes = hashes[: self.generation_max]
        if len(self.young) + len(hashes) > self.generation_max:
            self.old, self.young = self.young, {}
        for name in hashes:
            self.young[name] = self.holders(name) | {worker_id}

    def holders(self, name: bytes) -> set[str]:
        return self.young.get(name) or self.old.get(name) or set()

    def matched(self, hashes: list[bytes]) -> dict[str, int]:
        depths: dict[str, int] = {}
        for depth, name in enumerate(hashes):
            for worker_id in self.holders(name):
                if depths.get(worker_id, 0) == depth:
                    depths[worker_id] = depth + 1
        return depths


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["w1", "w2", "w3"]), st.lists(st.integers(0, 1), max_size=9)),
        max_size=40,
    ),
    st.sampled_from([16, 40, 1000]),
)
def test_segments_find_what_one_entry_per_block_would_find(routed, blocks_max):
    """Chains that branch everywhere, in a tree of two children."""
    index, plain = prefix_index(blocks_max), PlainIndex(blocks_max)
    for worker_id, path in routed:
        chain = [hashlib.sha256(bytes(path[: end + 1])).digest() for end in range(len(path))]
        assert on_device(index, chain) == plain.matched(chain)
        index.insert(worker_id, chain)
        plain.insert(worker_id, chain)
        assert len(index) <= blocks_max


def test_prefix_block_remembers_its_newest_holders_only():
    index = prefix_index(holders_max=2)
    for worker_id in ("w1", "w2", "w3"):
        index.insert(worker_id, names(1))
    assert on_device(index, names(1)) == {"w2": 1, "w3": 1}


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 6)), min_size=1, max_size=80),
    st.integers(1, 4),
)
def test_holders_of_a_segment_are_bounded_and_the_newest_are_kept(visits, holders_max):
    holders: tuple = ()
    for slot, reach in visits:
        holders = with_holder(holders, slot << STAMP_BITS, reach, holders_max)
        assert holders[0] == (slot << STAMP_BITS, reach, 0)
    assert len(holders) <= 6 * holders_max
    for deepest in range(1, 7):
        newest = dict.fromkeys(slot for slot, reach in reversed(visits) if reach >= deepest)
        kept = {item.code >> STAMP_BITS for item in holders if item.reach >= deepest}
        assert kept >= set(list(newest)[:holders_max])


def test_many_who_share_a_beginning_do_not_push_out_who_holds_more():
    index = prefix_index(holders_max=2)
    index.insert("w1", names(1, 2, 3))
    index.insert("w2", names(1))
    index.insert("w3", names(1))
    assert on_device(index, names(1, 2, 3)) == {"w1": 3, "w2": 1, "w3": 1}
    index.insert("w2", names(1, 2, 3))
    index.insert("w3", names(1, 2, 3))
    assert on_device(index, names(1, 2, 3)) == {"w2": 3, "w3": 3}


def test_blocks_move_to_the_host_tier_and_leave_it_as_others_are_routed():
    index = PrefixIndex(100_000, 8)
    index.join("w1", device_blocks=512, host_blocks=512)
    index.insert("w1", names(1, 2))
    seen = []
    for turn in range(6):
        seen.append(index.matched(names(1, 2)).get("w1"))
        index.insert("w1", names(*range(1000 * turn + 1000, 1000 * turn + 1300)))
    assert seen[0] == seen[1] == Hit(2, 0)
    assert Hit(0, 2) in seen and seen[-1] is None


def test_worker_that_left_is_found_nowhere_and_its_slot_starts_clean():
    index = prefix_index()
    index.insert("w1", names(1))
    index.leave("w1")
    assert on_device(index, names(1)) == {}
    index.join("w4", 10_000, 0)
    assert on_device(index, names(1)) == {}
    index.insert("w4", names(1))
    assert on_device(index, names(1)) == {"w4": 1}
