"""Which worker holds which prefix blocks, as far as routing has caused it; bounded, oldest out.

The index predicts: a worker that has evicted a block computes it again, and only a prediction was
wrong. Names of blocks are salted per tenant, so the index cannot match across tenants.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class PrefixIndex:
    blocks_max: int
    holders_max: int
    _holders: OrderedDict[bytes, dict[str, None]] = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        return len(self._holders)

    def insert(self, worker_id: str, hashes: Sequence[bytes]) -> None:
        """The worker will hold these blocks once it has computed or received them."""
        for name in reversed(hashes):  # the first block of a chain is dropped last
            holders = self._holders.setdefault(name, {})
            self._holders.move_to_end(name)
            holders.pop(worker_id, None)
            holders[worker_id] = None
            if len(holders) > self.holders_max:
                del holders[next(iter(holders))]
        while len(self._holders) > self.blocks_max:
            self._holders.popitem(last=False)

    def matched(self, hashes: Sequence[bytes]) -> dict[str, int]:
        """Leading blocks that each worker holds; workers without the first are absent."""
        counts: dict[str, int] = {}
        for index, name in enumerate(hashes):
            holders = self._holders.get(name)
            if holders is None:
                break
            still = [worker for worker in holders if counts.get(worker, 0) == index]
            if not still:
                break
            for worker in still:
                counts[worker] = index + 1
        return counts
