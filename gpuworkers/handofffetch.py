"""KV from a prefill worker to a decode worker: the decode side, one connection for each transfer.

Every size is checked against what was reserved before anything is read or allocated.
"""

import asyncio
from dataclasses import dataclass

from controlplane import protocol
from gpuworkers import handoffwire
from gpuworkers.handoffcarrier import Segment, Segments, inlet_of
from gpuworkers.handoffwire import NOWHERE, HandoffError, Piece
from gpuworkers.kvstore import KVStore

READ_BYTES = 1 << 20  # taken from the socket before the reader is paused


@dataclass(frozen=True, slots=True)
class Fetched:
    """A transfer that ended well. `seconds` passed after the prompt was computed."""

    first_ids: list[int]
    bytes: int
    seconds: float
    carrier: str


async def fetch(
    source: protocol.HandoffIn,
    kv: KVStore,
    block_ids: list[int],
    tokens: int,
    segments: Segments,
) -> Fetched:
    """Fetch the KV of `tokens` tokens into our blocks. Raises HandoffError; blocks may then hold
    parts of a transfer. A caller that cancels may reuse the blocks at once."""
    host, port = _host_port(source.address)
    slot_bytes = handoffwire.piece_blocks(kv, len(block_ids)) * kv.layer_block_bytes
    writer = None
    try:
        async with asyncio.timeout(source.timeout_s):
            reader, writer = await asyncio.open_connection(host, port, limit=READ_BYTES)
            with segments.opened(slot_bytes) as segment:
                transfer = _Transfer(source.capability, kv, block_ids, segment, reader, writer)
                return await transfer.run(tokens)
    except TimeoutError:
        raise HandoffError("timeout", f"nothing usable within {source.timeout_s} s") from None
    except asyncio.IncompleteReadError as error:
        raise HandoffError("unreachable", f"peer gone: {error}") from None
    except OSError as error:
        raise HandoffError("unreachable", f"{source.address}: {error}") from None
    finally:
        if writer is not None:
            writer.close()


def _host_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise HandoffError("unreachable", f"{address!r} is no address")
    return host.strip("[]"), int(port)


@dataclass(slots=True)
class _Transfer:
    capability: str
    kv: KVStore
    block_ids: list[int]
    segment: Segment | None
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def run(self, tokens: int) -> Fetched:
        kv, reader, num_blocks = self.kv, self.reader, len(self.block_ids)
        digest = handoffwire.digest_of(self.capability)
        place = NOWHERE if self.segment is None else self.segment.place
        self.writer.write(handoffwire.pack_request(self.capability, place))
        carrier = await handoffwire.read_header(reader, digest, kv, num_blocks, tokens)
        inlet = inlet_of(carrier, self.segment, reader)
        arrived = [0] * kv.num_layers  # leading blocks of each layer that are in place
        index = 0
        while any(count < num_blocks for count in arrived):
            piece, shown = await handoffwire.read_piece(reader, digest, index)
            self._check(piece, arrived)
            num_bytes = (piece.end - piece.first) * kv.layer_block_bytes
            data = await inlet.get(index, num_bytes)
            handoffwire.verify(digest, handoffwire.IN_DATA, index, data, shown)
            try:
                kv.write(piece.layer, self.block_ids[piece.first : piece.end], data)
            except ValueError as error:  # correctly sent, yet no KV: values that are not finite
                raise HandoffError("malformed", str(error)) from None
            arrived[piece.layer] = piece.end
            index += 1
            self.writer.write(handoffwire.ACK)
        seconds, first_ids = await handoffwire.read_trailer(reader, digest)
        self.writer.write(handoffwire.ACK)
        await self.writer.drain()
        total = kv.num_layers * num_blocks * kv.layer_block_bytes
        return Fetched(first_ids, total, seconds, carrier)

    def _check(self, piece: Piece, arrived: list[int]) -> None:
        """A piece goes on where its layer ended, and is no larger than agreed."""
        num_blocks = len(self.block_ids)
        blocks_max = handoffwire.piece_blocks(self.kv, num_blocks)
        is_next = piece.layer < len(arrived) and piece.first == arrived[piece.layer]
        if not is_next or not piece.first < piece.end <= min(num_blocks, piece.first + blocks_max):
            raise HandoffError("malformed", f"{piece} after {arrived}")
