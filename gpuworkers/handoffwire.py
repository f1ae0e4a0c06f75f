"""Bytes of a KV handoff: request, header, checksums, and what a receiver takes of them."""

import asyncio
import hashlib
import struct

from controlplane.errors import SlackwaterError
from gpuworkers.kvstore import KVStore

MAGIC = b"SLACKKV\x01"
VERSION = 1
DTYPES = {"fp32": 1, "bf16": 2, "modelled": 3, "fp16": 4}
STATUS_OK, STATUS_REFUSED = 0, 1
CAPABILITY_BYTES_MAX = 512
FIRST_IDS_MAX = 16
LAYER_BYTES_MAX = 1 << 28  # what one side holds of a transfer at a time
CHECKSUM_BYTES = 16  # blake2b-128
ACK = b"\x06"

REQUEST = struct.Struct("<8sHH")  # magic, version, capability bytes
# magic, version, status, dtype, layers, layer block bytes, blocks, block tokens, tokens, first ids
HEADER = struct.Struct("<8sHBBIIIIII")
REFUSAL = HEADER.pack(MAGIC, VERSION, STATUS_REFUSED, 0, 0, 0, 0, 0, 0, 0)


class HandoffError(SlackwaterError):
    """No usable KV came; `reason` is one of HandoffFailed's."""

    permanent = False

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def digest_of(capability: str) -> bytes:
    return hashlib.blake2b(capability.encode(), digest_size=32, person=b"sw-handoff-key").digest()


def checksum(digest: bytes, layer: int, data: bytes | memoryview) -> bytes:
    """Of one layer; the header counts as layer -1."""
    person = b"sw-kv" + layer.to_bytes(4, "little", signed=True)
    return hashlib.blake2b(data, digest_size=CHECKSUM_BYTES, key=digest, person=person).digest()


def pack_header(
    kv: KVStore, digest: bytes, blocks: int, tokens: int, first_ids: list[int]
) -> bytes:
    """What precedes the layers, its checksum included."""
    header = HEADER.pack(
        MAGIC, VERSION, STATUS_OK, DTYPES[kv.dtype_name], kv.num_layers, kv.layer_block_bytes,
        blocks, kv.block_tokens, tokens, len(first_ids),
    )  # fmt: skip
    header += struct.pack(f"<{len(first_ids)}I", *first_ids)
    return header + checksum(digest, -1, header)


async def read_request(reader: asyncio.StreamReader) -> bytes:
    """Digest of the capability that a peer shows. Raises HandoffError."""
    magic, version, size = REQUEST.unpack(await reader.readexactly(REQUEST.size))
    if magic != MAGIC or version != VERSION or not 0 < size <= CAPABILITY_BYTES_MAX:
        raise HandoffError("malformed", f"request of version {version}, {size} bytes")
    capability = await reader.readexactly(size)
    return digest_of(capability.decode("utf-8", "replace"))


def check_header(header: bytes, kv: KVStore, blocks: int, tokens: int) -> int:
    """Number of first ids in a header that describes exactly what we reserved."""
    magic, version, status, *shape, first_ids = HEADER.unpack(header)
    if magic != MAGIC or version != VERSION:
        raise HandoffError("malformed", f"header of version {version}")
    if status != STATUS_OK:
        raise HandoffError("refused", "the peer does not know the capability, or it was used")
    dtype = DTYPES[kv.dtype_name]
    ours = [dtype, kv.num_layers, kv.layer_block_bytes, blocks, kv.block_tokens, tokens]
    if shape != ours:
        raise HandoffError("malformed", f"shape {shape}, reserved {ours}")
    if not 0 < first_ids <= FIRST_IDS_MAX or blocks * kv.layer_block_bytes > LAYER_BYTES_MAX:
        raise HandoffError("malformed", f"{first_ids} first ids, {blocks} blocks")
    return int(first_ids)


def verify(digest: bytes, layer: int, data: bytes, shown: bytes) -> None:
    """Raises HandoffError for a piece that is not what the peer sent."""
    if checksum(digest, layer, data) != shown:
        raise HandoffError("checksum", f"layer {layer} is not what the peer sent")
