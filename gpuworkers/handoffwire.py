"""Bytes of a KV handoff, and what a receiver takes of them.

receiver: REQUEST, capability · sender: HEADER, checksum; per piece PIECE, checksum, and its bytes
where the carrier is the connection; trailer, checksum · receiver: ACK for each piece and for the
trailer. A piece is a run of blocks of one layer. Every checksum is keyed by the capability and by
its place in the transfer, so that a stale or swapped piece fails like a damaged one.
"""

import asyncio
import hashlib
import hmac
import struct
from dataclasses import dataclass

from controlplane.errors import SlackwaterError
from gpuworkers.kvstore import KVStore

MAGIC = b"SLACKKV\x01"
VERSION = 2
DTYPES = {"fp32": 1, "bf16": 2, "modelled": 3, "fp16": 4}
CARRIERS = {"tcp": 1, "shared": 2}
STATUS_OK, STATUS_REFUSED = 0, 1
CAPABILITY_BYTES_MAX = 512
FIRST_IDS_MAX = 16
PIECE_BYTES_MAX = 1 << 20  # of one piece, unless a single block is larger
PIECES_AHEAD_MAX = 4  # sent and not yet confirmed, of one transfer
CHECKSUM_BYTES = 16  # of HMAC-SHA-256, RFC 2104: twice as fast as BLAKE2b where SHA is in hardware
TOKEN_BYTES = 16
ACK = b"\x06"
IN_HEADER, IN_PIECE, IN_DATA, IN_TRAILER = b"h", b"p", b"d", b"t"  # what a checksum is of

# magic, version, capability bytes; shared memory: process (0 for none), descriptor, token
REQUEST = struct.Struct(f"<8sHHII{TOKEN_BYTES}s")
# magic, version, status, dtype, layers, layer block bytes, blocks, block tokens, tokens, carrier
HEADER = struct.Struct("<8sHBBIIIIIB")
PIECE = struct.Struct(f"<III{CHECKSUM_BYTES}s")  # layer, first block, blocks, checksum of the bytes
TRAILER = struct.Struct("<II")  # microseconds since the prompt was computed, first ids
REFUSAL = HEADER.pack(MAGIC, VERSION, STATUS_REFUSED, *[0] * 7)


class HandoffError(SlackwaterError):
    """No usable KV came; `reason` is one of HandoffFailed's."""

    permanent = False

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Place:
    """Where the receiver's shared memory is: descriptor of a process, and what it begins with."""

    process: int
    descriptor: int
    token: bytes


NOWHERE = Place(0, 0, bytes(TOKEN_BYTES))


@dataclass(frozen=True, slots=True)
class Piece:
    """Blocks [first, end) of a prompt in one layer."""

    layer: int
    first: int
    end: int


def digest_of(capability: str) -> bytes:
    return hashlib.blake2b(capability.encode(), digest_size=32, person=b"sw-handoff-key").digest()


def checksum(digest: bytes, kind: bytes, index: int, data: bytes | memoryview) -> bytes:
    """Of the header, the trailer, or piece `index` (its description or its bytes)."""
    key = digest + kind + index.to_bytes(4, "little")
    return hmac.digest(key, data, "sha256")[:CHECKSUM_BYTES]


def verify(digest: bytes, kind: bytes, index: int, data: bytes | memoryview, shown: bytes) -> None:
    """Raises HandoffError for what is not as the peer sent it."""
    if not hmac.compare_digest(checksum(digest, kind, index, data), shown):
        raise HandoffError("checksum", f"{kind.decode()}{index} is not what the peer sent")


def piece_blocks(kv: KVStore, num_blocks: int) -> int:
    """Most blocks of one piece, in a transfer of num_blocks."""
    return max(1, min(num_blocks, PIECE_BYTES_MAX // kv.layer_block_bytes))


def pack_request(capability: str, place: Place) -> bytes:
    shown = capability.encode()
    return (
        REQUEST.pack(MAGIC, VERSION, len(shown), place.process, place.descriptor, place.token)
        + shown
    )


async def read_request(reader: asyncio.StreamReader) -> tuple[bytes, Place]:
    """Digest of the capability that a peer shows, and its shared memory. Raises HandoffError."""
    magic, version, size, *place = REQUEST.unpack(await reader.readexactly(REQUEST.size))
    if magic != MAGIC or version != VERSION or not 0 < size <= CAPABILITY_BYTES_MAX:
        raise HandoffError("malformed", f"request of version {version}, {size} bytes")
    capability = await reader.readexactly(size)
    return digest_of(capability.decode("utf-8", "replace")), Place(*place)


def pack_header(kv: KVStore, digest: bytes, num_blocks: int, tokens: int, carrier: str) -> bytes:
    """What precedes the pieces, its checksum included."""
    header = HEADER.pack(
        MAGIC, VERSION, STATUS_OK, DTYPES[kv.dtype_name], kv.num_layers, kv.layer_block_bytes,
        num_blocks, kv.block_tokens, tokens, CARRIERS[carrier],
    )  # fmt: skip
    return header + checksum(digest, IN_HEADER, 0, header)


async def read_header(
    reader: asyncio.StreamReader, digest: bytes, kv: KVStore, num_blocks: int, tokens: int
) -> str:
    """The carrier, from a header that describes exactly what we reserved. Raises HandoffError."""
    header = await reader.readexactly(HEADER.size)
    magic, version, status, *shape, carrier = HEADER.unpack(header)
    if magic != MAGIC or version != VERSION:
        raise HandoffError("malformed", f"header of version {version}")
    if status != STATUS_OK:
        raise HandoffError("refused", "the peer does not know the capability, or it was used")
    dtype = DTYPES[kv.dtype_name]
    ours = [dtype, kv.num_layers, kv.layer_block_bytes, num_blocks, kv.block_tokens, tokens]
    name = next((name for name, number in CARRIERS.items() if number == carrier), None)
    if shape != ours or name is None:
        raise HandoffError("malformed", f"shape {shape}, reserved {ours}, carrier {carrier}")
    verify(digest, IN_HEADER, 0, header, await reader.readexactly(CHECKSUM_BYTES))
    return name


def pack_piece(digest: bytes, index: int, piece: Piece, data: bytes) -> bytes:
    """What precedes the bytes of the index-th piece."""
    shown = checksum(digest, IN_DATA, index, data)
    head = PIECE.pack(piece.layer, piece.first, piece.end - piece.first, shown)
    return head + checksum(digest, IN_PIECE, index, head)


async def read_piece(
    reader: asyncio.StreamReader, digest: bytes, index: int
) -> tuple[Piece, bytes]:
    """The next piece and the checksum of its bytes. Raises HandoffError."""
    head = await reader.readexactly(PIECE.size)
    verify(digest, IN_PIECE, index, head, await reader.readexactly(CHECKSUM_BYTES))
    layer, first, count, shown = PIECE.unpack(head)
    return Piece(layer, first, first + count), shown


def pack_trailer(digest: bytes, after_s: float, first_ids: list[int]) -> bytes:
    """What follows the pieces: how long after the prompt, and the ids sampled at its end; none
    where the request ended with its prompt."""
    trailer = TRAILER.pack(min(int(after_s * 1e6), (1 << 32) - 1), len(first_ids))
    trailer += struct.pack(f"<{len(first_ids)}I", *first_ids)
    return trailer + checksum(digest, IN_TRAILER, 0, trailer)


async def read_trailer(reader: asyncio.StreamReader, digest: bytes) -> tuple[float, list[int]]:
    """Seconds between the computed prompt and the trailer, and the first ids. Raises
    HandoffError."""
    trailer = await reader.readexactly(TRAILER.size)
    after_us, count = TRAILER.unpack(trailer)
    if count > FIRST_IDS_MAX:
        raise HandoffError("malformed", f"{count} first ids")
    trailer += await reader.readexactly(4 * count)
    verify(digest, IN_TRAILER, 0, trailer, await reader.readexactly(CHECKSUM_BYTES))
    if count == 0:
        raise HandoffError("refused", "the request ended with its prompt")
    return after_us / 1e6, list(struct.unpack_from(f"<{count}I", trailer, TRAILER.size))
