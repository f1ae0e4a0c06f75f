"""The KV arrays of a worker as bytes: the seam that handoff and the host tier copy through."""

from typing import Protocol


class KVStore(Protocol):
    """Implemented by kvcache.py (torch) and fake.py (modelled)."""

    num_layers: int
    num_blocks: int
    block_tokens: int
    layer_block_bytes: int  # one layer's block: 2 · kv_heads · block_tokens · head_dim · itemsize
    dtype_name: str

    def read(self, layer: int, block_ids: list[int]) -> bytes:
        """Blocks of one layer, concatenated; each is one contiguous piece, K then V."""
        ...

    def write(self, layer: int, block_ids: list[int], data: bytes | memoryview) -> None:
        """Overwrite blocks of one layer. Raises ValueError on a wrong size."""
        ...
