"""KV of batch sequences in host memory: written as it is computed, copied back after preemption.

A full block is kept under its name in the hash chain, so that sequences with one prefix share it.
The block that a sequence is filling is kept for that sequence alone, when it is preempted. Blocks
of sequences in hand are never evicted; others are, the one unused longest first. Source: write-
through checkpoints as in ConServe, arXiv:2410.01228.
"""

from collections import OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from gpuworkers.blocks import Owner
from gpuworkers.kvstore import KVStore

LayerPieces = tuple[bytes, ...]  # one block, layer by layer


@dataclass(frozen=True, slots=True)
class _Tail:
    """The block that was being filled: tokens [start, start + count)."""

    start: int
    count: int
    pieces: LayerPieces


class HostCache:
    """Copies of at most `blocks_max` blocks of one KVStore; 0 keeps nothing."""

    def __init__(self, kv: KVStore, blocks_max: int) -> None:
        self._kv = kv
        self._blocks_max = blocks_max
        self._blocks: OrderedDict[bytes, LayerPieces] = OrderedDict()  # oldest use first
        self._tails: dict[Owner, _Tail] = {}
        self._held: dict[Owner, set[bytes]] = {}
        self._holders: dict[bytes, int] = {}  # sequences in hand that hold the block

    @property
    def num_blocks(self) -> int:
        """Blocks kept, tails included."""
        return len(self._blocks) + len(self._tails)

    def save(self, owner: Owner, names: Seq[bytes], block_ids: Seq[int]) -> None:
        """Keep full blocks for `owner`; those that find no room are left out."""
        fresh: list[tuple[bytes, int]] = []
        for name, block_id in zip(names, block_ids, strict=True):
            if name in self._blocks:
                self._blocks.move_to_end(name)
            elif self._make_room(len(fresh)):
                fresh.append((name, block_id))
            else:
                continue
            self._hold(owner, name)
        if fresh:
            pieces = self._read([block_id for _, block_id in fresh])
            self._blocks.update(zip((name for name, _ in fresh), pieces, strict=True))

    def save_tail(self, owner: Owner, start: int, count: int, block_id: int) -> None:
        """Keep tokens [start, start + count) of the block that `owner` was filling."""
        assert 0 < count < self._kv.block_tokens, count
        if self._make_room(0):
            self._tails[owner] = _Tail(start, count, self._read([block_id])[0])

    def load(self, names: Seq[bytes], block_ids: Seq[int]) -> int:
        """Copy the leading blocks that are kept into `block_ids`; returns how many."""
        count = 0
        while count < len(names) and names[count] in self._blocks:
            count += 1
        if count:
            for name in names[:count]:
                self._blocks.move_to_end(name)
            self._write([self._blocks[name] for name in names[:count]], list(block_ids[:count]))
        return count

    def load_tail(self, owner: Owner, start: int, block_id: int | None) -> int:
        """Copy the kept tail into block_id when it begins at `start`; returns its tokens. The
        copy is dropped either way."""
        tail = self._tails.pop(owner, None)
        if tail is None or tail.start != start or block_id is None:
            return 0
        self._write([tail.pieces], [block_id])
        return tail.count

    def release(self, owner: Owner) -> None:
        """The sequence has ended: its blocks may be evicted."""
        self._tails.pop(owner, None)
        for name in self._held.pop(owner, ()):
            self._holders[name] -= 1
            if not self._holders[name]:
                del self._holders[name]

    def _hold(self, owner: Owner, name: bytes) -> None:
        held = self._held.setdefault(owner, set())
        if name not in held:
            held.add(name)
            self._holders[name] = self._holders.get(name, 0) + 1

    def _make_room(self, num_coming: int) -> bool:
        """Room for one block more than the `num_coming` that are about to be kept?"""
        if self.num_blocks + num_coming < self._blocks_max:
            return True
        victim = next((name for name in self._blocks if name not in self._holders), None)
        if victim is None:
            return False
        del self._blocks[victim]
        return True

    def _read(self, block_ids: list[int]) -> list[LayerPieces]:
        size = self._kv.layer_block_bytes
        layers = [self._kv.read(layer, block_ids) for layer in range(self._kv.num_layers)]
        return [
            tuple(layer[i * size : (i + 1) * size] for layer in layers)
            for i in range(len(block_ids))
        ]

    def _write(self, blocks: list[LayerPieces], block_ids: list[int]) -> None:
        for layer in range(self._kv.num_layers):
            self._kv.write(layer, block_ids, b"".join(pieces[layer] for pieces in blocks))

    def check_integrity(self) -> None:
        """Assert the limit, and that every held block is kept and counted."""
        assert self.num_blocks <= self._blocks_max, (self.num_blocks, self._blocks_max)
        counts: dict[bytes, int] = {}
        for names in self._held.values():
            for name in names:
                counts[name] = counts.get(name, 0) + 1
        assert counts == self._holders, "holders differ from what sequences hold"
        assert all(name in self._blocks for name in counts), "a held block was evicted"
