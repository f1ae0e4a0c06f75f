"""Paged allocation of KV blocks with prefix reuse; pure bookkeeping, no arrays.

A block is in exactly one state: free (no content), owned (some sequence uses it), leased (only a
handoff still needs it) or cached (nobody uses it, its content can be found by its hash). Cached
blocks that only batch sequences used are evicted before all others, then the ones unused longest.
Conservation law, checked by `check_integrity`: free + owned + leased + cached == total.
"""

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Sequence as Seq

Owner = tuple[str, int]  # request id and epoch


def chain_hash(previous: bytes, token_ids: Seq[int]) -> bytes:
    """Name of one full block: SHA-256 over the name before it (the tenant's salt for the first)."""
    return hashlib.sha256(previous + struct.pack(f"<{len(token_ids)}I", *token_ids)).digest()


def extend_hashes(
    hashes: list[bytes], salt: bytes, token_ids: Seq[int], num_tokens: int, block_tokens: int
) -> None:
    """Append to `hashes` the names of the full blocks of token_ids[:num_tokens] it lacks."""
    for index in range(len(hashes), num_tokens // block_tokens):
        previous = hashes[-1] if hashes else salt
        start = index * block_tokens
        hashes.append(chain_hash(previous, token_ids[start : start + block_tokens]))


def blocks_for(num_tokens: int, block_tokens: int) -> int:
    """Blocks that hold num_tokens tokens."""
    return -(-num_tokens // block_tokens)


class BlockPool:
    """Owner of every block of one KV cache."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        assert num_blocks > 0 and block_tokens > 0, (num_blocks, block_tokens)
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._free = list(range(num_blocks - 1, -1, -1))
        self._users = [0] * num_blocks  # sequences that use the block
        self._lessees = [0] * num_blocks  # handoffs that need it
        self._names: list[bytes | None] = [None] * num_blocks
        self._by_name: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._cached_batch: OrderedDict[int, None] = OrderedDict()  # only batch used these
        self._is_online = [False] * num_blocks  # an online sequence used the content
        self._tables: dict[Owner, list[int]] = {}
        self._leases: set[Owner] = set()

    # --- questions

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached) + len(self._cached_batch)

    @property
    def num_available(self) -> int:
        """Blocks that an allocation can get: free ones and cached ones."""
        return len(self._free) + self.num_cached

    @property
    def num_owners(self) -> int:
        return len(self._tables)

    def num_held(self, owner: Owner) -> int:
        """Blocks in the table of `owner`, shared ones included; 0 when it has none."""
        return len(self._tables.get(owner, ()))

    def block_ids(self, owner: Owner) -> list[int]:
        """The table of `owner` in token order (a copy)."""
        return list(self._tables[owner])

    def cached_blocks(self, hashes: Seq[bytes]) -> int:
        """How many leading blocks of the chain can be reused."""
        count = 0
        for name in hashes:
            if name not in self._by_name:
                break
            count += 1
        return count

    def has_room(self, hashes: Seq[bytes], num_blocks: int, reserve: int = 0) -> bool:
        """Can `allocate` with these arguments succeed and leave `reserve` blocks available?"""
        shared = [self._by_name[name] for name in hashes[: self.cached_blocks(hashes)]]
        taken_from_cache = sum(self._is_cached(block_id) for block_id in shared)
        return num_blocks - len(shared) + taken_from_cache + reserve <= self.num_available

    def _is_cached(self, block_id: int) -> bool:
        return block_id in self._cached or block_id in self._cached_batch

    # --- effects

    def allocate(
        self, owner: Owner, hashes: Seq[bytes], num_blocks: int, is_batch: bool = False
    ) -> int:
        """Give `owner` a table of `num_blocks` blocks; returns how many of them hold the prefix.

        `hashes` names the blocks whose content may be reused, at most num_blocks.
        The caller has asked `has_room`."""
        assert owner not in self._tables, owner
        assert len(hashes) <= num_blocks, (len(hashes), num_blocks)
        assert self.has_room(hashes, num_blocks), (owner, num_blocks, self.num_available)
        shared = [self._by_name[name] for name in hashes[: self.cached_blocks(hashes)]]
        for block_id in shared:  # before any eviction, which could take them
            self._cached.pop(block_id, None)
            self._cached_batch.pop(block_id, None)
            self._users[block_id] += 1
            self._is_online[block_id] |= not is_batch
        fresh = [self._take(is_batch) for _ in range(num_blocks - len(shared))]
        self._tables[owner] = shared + fresh
        return len(shared)

    def grow(self, owner: Owner, num_blocks: int) -> list[int]:
        """Append fresh blocks to the table of a batch owner; the caller has asked num_available."""
        assert num_blocks <= self.num_available, (owner, num_blocks, self.num_available)
        fresh = [self._take(is_batch=True) for _ in range(num_blocks)]
        self._tables[owner] += fresh
        return fresh

    def _take(self, is_batch: bool) -> int:
        if self._free:
            block_id = self._free.pop()
        else:
            block_id, _ = (self._cached_batch or self._cached).popitem(last=False)
            name = self._names[block_id]
            assert name is not None, block_id
            del self._by_name[name]
            self._names[block_id] = None
        self._users[block_id] = 1
        self._is_online[block_id] = not is_batch
        return block_id

    def publish(self, owner: Owner, index: int, name: bytes) -> None:
        """Block `index` of the owner's table is full and final: others may share it by `name`."""
        block_id = self._tables[owner][index]
        if self._names[block_id] is None and name not in self._by_name:
            self._names[block_id] = name
            self._by_name[name] = block_id

    def lease(self, owner: Owner) -> None:
        """From now on the owner's blocks are kept for a handoff only."""
        assert owner not in self._leases, owner
        self._leases.add(owner)
        for block_id in self._tables[owner]:
            self._users[block_id] -= 1
            self._lessees[block_id] += 1

    def free(self, owner: Owner) -> None:
        """Take the owner's table away; named blocks stay in the cache, last ones evicted first."""
        counts = self._lessees if owner in self._leases else self._users
        self._leases.discard(owner)
        for block_id in reversed(self._tables.pop(owner)):
            counts[block_id] -= 1
            if self._users[block_id] or self._lessees[block_id]:
                continue
            if self._names[block_id] is None:
                self._free.append(block_id)
            elif self._is_online[block_id]:
                self._cached[block_id] = None
            else:
                self._cached_batch[block_id] = None

    def check_integrity(self) -> None:
        """Assert the conservation law and that every count agrees with the tables."""
        users, lessees = [0] * self.num_blocks, [0] * self.num_blocks
        for owner, table in self._tables.items():
            assert len(set(table)) == len(table), f"{owner} holds a block twice: {table}"
            for block_id in table:
                (lessees if owner in self._leases else users)[block_id] += 1
        assert users == self._users and lessees == self._lessees, "counts differ from tables"
        owned = sum(count > 0 for count in users)
        leased = sum(lessees[i] > 0 and users[i] == 0 for i in range(self.num_blocks))
        total = self.num_free + owned + leased + self.num_cached
        assert total == self.num_blocks, (
            f"free {self.num_free} + owned {owned} + leased {leased} + cached {self.num_cached}"
            f" != {self.num_blocks}"
        )
        idle = set(self._free) | set(self._cached) | set(self._cached_batch)
        assert len(idle) == self.num_available, "a block is idle twice"
        assert all(users[i] == lessees[i] == 0 for i in idle), "an idle block is in use"
        assert all(self._names[i] is None for i in self._free), "a free block has a name"
        assert {n: i for i, n in enumerate(self._names) if n is not None} == self._by_name
