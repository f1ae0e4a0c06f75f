"""Bytes of a KV handoff: request, header, checksums, and what a receiver takes of them.

receiver: REQUEST, capability. sender: HEADER, checksum; per layer its bytes (where the carrier is
the connection) and a checksum; trailer with the first ids, checksum. receiver: ACK.
"""

import asyncio
import hashlib
import struct

from controlplane.errors import SlackwaterError
from gpuworkers.kvstore import KVStore

MAGIC = b"SLACKKV\x01"
VERSION = 2
DTYPES = {"fp32": 1, "bf16": 2, "modelled": 3, "fp16": 4}
STATUS_OK, STATUS_REFUSED = 0, 1
CAPABILITY_BYTES_MAX = 512
FIRST_IDS_MAX = 16
LAYER_BYTES_MAX = 1 << 28  # what one side holds of a transfer at a time
CHECKSUM_BYTES = 16  # blake2b-128
ACK = b"\x06"

CARRIERS = {"tcp": 1, "shared": 2}
HEADER_LAYER, TRAILER_LAYER = -1, -2  # as which the checksum counts them

REQUEST = struct.Struct("<8sHH16s")  # magic, version, capability bytes, host identity
# magic, version, status, dtype, layers, layer block bytes, blocks, block tokens, tokens,
# carrier, process and descriptor of shared memory
HEADER = struct.Struct("<8sHBBIIIIIBII")
REFUSAL = HEADER.pack(MAGIC, VERSION, STATUS_REFUSED, *[0] * 9)


class HandoffError(SlackwaterError):
    """No usable KV came; `reason` is one of HandoffFailed's."""

    permanent = False

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def digest_of(capability: str) -> bytes:
    return hashlib.blake2b(capability.encode(), digest_size=32, person=b"sw-handoff-key").digest()


def checksum(digest: bytes, layer: int, data: bytes | memoryview) -> bytes:
    """Of one layer, the header or the trailer."""
    person = b"sw-kv" + layer.to_bytes(4, "little", signed=True)
    return hashlib.blake2b(data, digest_size=CHECKSUM_BYTES, key=digest, person=person).digest()


def pack_header(
    kv: KVStore, digest: bytes, blocks: int, tokens: int, carrier: str, place: tuple[int, int]
) -> bytes:
    """What precedes the layers, its checksum included."""
    header = HEADER.pack(
        MAGIC, VERSION, STATUS_OK, DTYPES[kv.dtype_name], kv.num_layers, kv.layer_block_bytes,
        blocks, kv.block_tokens, tokens, CARRIERS[carrier], *place,
    )  # fmt: skip
    return header + checksum(digest, HEADER_LAYER, header)


def pack_trailer(digest: bytes, first_ids: list[int]) -> bytes:
    """What follows the layers: the ids sampled at the end of the prompt."""
    trailer = struct.pack(f"<{1 + len(first_ids)}I", len(first_ids), *first_ids)
    return trailer + checksum(digest, TRAILER_LAYER, trailer)


async def read_trailer(reader: asyncio.StreamReader, digest: bytes) -> list[int]:
    """The first ids. Raises HandoffError."""
    trailer = await reader.readexactly(4)
    (count,) = struct.unpack("<I", trailer)
    if not 0 < count <= FIRST_IDS_MAX:
        raise HandoffError("malformed", f"{count} first ids")
    trailer += await reader.readexactly(4 * count)
    verify(digest, TRAILER_LAYER, trailer, await reader.readexactly(CHECKSUM_BYTES))
    return list(struct.unpack_from(f"<{count}I", trailer, 4))


async def read_request(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Digest of the capability that a peer shows, and its host. Raises HandoffError."""
    magic, version, size, host = REQUEST.unpack(await reader.readexactly(REQUEST.size))
    if magic != MAGIC or version != VERSION or not 0 < size <= CAPABILITY_BYTES_MAX:
        raise HandoffError("malformed", f"request of version {version}, {size} bytes")
    capability = await reader.readexactly(size)
    return digest_of(capability.decode("utf-8", "replace")), host


def check_header(
    header: bytes, kv: KVStore, blocks: int, tokens: int
) -> tuple[str, tuple[int, int]]:
    """Carrier and place named by a header that describes exactly what we reserved."""
    magic, version, status, *shape, carrier, process, descriptor = HEADER.unpack(header)
    if magic != MAGIC or version != VERSION:
        raise HandoffError("malformed", f"header of version {version}")
    if status != STATUS_OK:
        raise HandoffError("refused", "the peer does not know the capability, or it was used")
    dtype = DTYPES[kv.dtype_name]
    ours = [dtype, kv.num_layers, kv.layer_block_bytes, blocks, kv.block_tokens, tokens]
    if shape != ours:
        raise HandoffError("malformed", f"shape {shape}, reserved {ours}")
    name = next((name for name, number in CARRIERS.items() if number == carrier), None)
    if name is None or blocks * kv.layer_block_bytes > LAYER_BYTES_MAX:
        raise HandoffError("malformed", f"carrier {carrier}, {blocks} blocks")
    return name, (process, descriptor)


def verify(digest: bytes, layer: int, data: bytes, shown: bytes) -> None:
    """Raises HandoffError for a piece that is not what the peer sent."""
    if checksum(digest, layer, data) != shown:
        raise HandoffError("checksum", f"layer {layer} is not what the peer sent")
