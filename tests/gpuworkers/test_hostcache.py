"""The host tier: copies by name and of tails, its limit, and what may be evicted."""

import random

from gpuworkers.fake import FakeKV
from gpuworkers.hostcache import HostCache

A, B = ("a", 1), ("b", 1)


def filled(num_blocks: int = 32) -> FakeKV:
    kv = FakeKV(num_blocks, 4)
    for block_id in range(num_blocks):
        kv.store(block_id, 3, 1000 + block_id)
    return kv


def content(kv: FakeKV, block_id: int) -> list[bytes]:
    return [kv.read(layer, [block_id]) for layer in range(kv.num_layers)]


def names(*numbers: int) -> list[bytes]:
    return [b"n%d" % number for number in numbers]


def test_saved_blocks_come_back_into_any_blocks():
    kv = filled()
    host = HostCache(kv, 8)
    expected = [content(kv, block_id) for block_id in (3, 5)]
    host.save(A, names(1, 2), [3, 5])
    for block_id in (3, 5):
        kv.store(block_id, 3, 7)
    assert host.load(names(1, 2, 9), [20, 10, 11]) == 2
    assert [content(kv, 20), content(kv, 10)] == expected
    host.check_integrity()


def test_only_the_leading_blocks_are_loaded():
    host = HostCache(filled(), 8)
    host.save(A, names(2, 3), [2, 3])
    assert host.load(names(1, 2, 3), [10, 11, 12]) == 0
    assert host.load([], []) == 0


def test_two_sequences_share_one_copy_of_a_block():
    host = HostCache(filled(), 2)
    host.save(A, names(1), [1])
    host.save(B, names(1), [1])
    assert host.num_blocks == 1
    host.release(A)
    host.save(B, names(2), [2])
    host.check_integrity()
    host.save(A, names(3), [3])  # full of blocks that B holds
    assert host.load(names(3), [9]) == 0 and host.load(names(1, 2), [9, 10]) == 2


def test_at_the_limit_the_copy_unused_longest_gives_way_and_held_ones_never():
    host = HostCache(filled(), 3)
    host.save(A, names(1, 2), [1, 2])
    host.release(A)
    host.save(B, names(3), [3])
    assert host.load(names(1), [9]) == 1  # 2 is now the one unused longest
    host.save(B, names(4), [4])
    assert host.num_blocks == 3
    assert host.load(names(2), [9]) == 0
    assert [host.load(names(i), [9]) for i in (1, 3, 4)] == [1, 1, 1]
    host.check_integrity()


def test_a_tail_comes_back_once_and_only_where_it_begins():
    kv = filled()
    host = HostCache(kv, 4)
    expected = content(kv, 6)
    host.save_tail(A, 8, 3, 6)
    assert host.load_tail(A, 4, 7) == 0
    assert host.load_tail(A, 8, 7) == 0  # dropped: it would not fit any more
    host.save_tail(A, 8, 3, 6)
    assert host.load_tail(A, 8, 7) == 3
    assert content(kv, 7) == expected and host.num_blocks == 0
    assert host.load_tail(B, 0, 1) == 0


def test_without_room_nothing_is_kept():
    host = HostCache(filled(), 0)
    host.save(A, names(1), [1])
    host.save_tail(A, 4, 1, 2)
    assert host.num_blocks == 0 and host.load_tail(A, 4, 2) == 0
    host.release(A)
    host.check_integrity()


def test_any_order_of_calls_keeps_the_limit_and_the_contents():
    rng = random.Random(5)
    kv = filled(64)
    host = HostCache(kv, 6)
    expected = {name: content(kv, i) for i, name in enumerate(names(*range(20)))}
    owners = [(f"r{i}", 1) for i in range(4)]
    for _ in range(2000):
        owner = rng.choice(owners)
        first = rng.randrange(18)
        match rng.randrange(5):
            case 0 | 1:
                host.save(owner, names(first, first + 1), [first, first + 1])
            case 2:
                host.release(owner)
            case 3:
                host.save_tail(owner, 4 * first, 1 + rng.randrange(3), first)
            case _:
                count = host.load(names(first, first + 1), [40, 41])
                for index in range(count):
                    name = names(first + index)[0]
                    assert content(kv, 40 + index) == expected[name]
        host.check_integrity()
