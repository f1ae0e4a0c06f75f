"""KV from a prefill worker to a decode worker, over one TCP connection for each transfer.

The decode worker connects and shows the one-time capability that the control plane issued to both.
The prefill worker answers when the prompt is computed: a fixed header, then layer after layer, each
with a checksum keyed by the capability, so that a stale or swapped piece fails like a damaged one.
Every size is checked against what the receiver reserved before anything is allocated. Layers are
read and written between two awaits of the event loop; the blocks belong to the transfer until the
other side has confirmed, failed, or the lease is over.
"""

import asyncio
import logging
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from controlplane import protocol
from gpuworkers import handoffwire
from gpuworkers.engine import Key
from gpuworkers.handoffwire import HandoffError
from gpuworkers.kvstore import KVStore

CONNECTIONS_MAX = 512  # accepted, most of them waiting for their prompt
READ_BYTES = 1 << 20  # taken from the socket before the reader is paused
TRANSFERS_MAX = 4  # sending at the same time
OFFERS_MAX = 1024
REQUEST_S_MAX = 5.0  # from the open socket to the whole request
EARLY_S_MAX = 2.0  # a peer may ask before our own Assign arrives
READY_S_MAX = 120.0  # the peer gives up earlier by its own timeout
SEND_S_MAX = 30.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Fetched:
    """A transfer that ended well. `seconds` runs from the header to the last layer."""

    first_ids: list[int]
    bytes: int
    seconds: float


@dataclass(slots=True)
class _Lease:
    """One prompt that a peer may fetch once."""

    key: Key
    digest: bytes  # of the capability
    tokens: int
    lease_s: float
    block_ids: list[int] = field(default_factory=list)
    first_ids: list[int] = field(default_factory=list)
    is_taken: bool = False
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    is_over: bool = False
    expiry: asyncio.TimerHandle | None = None


class HandoffServer:
    """The prefill side: keeps offers, serves each once, and says how it ended.

    `sent` is called when the peer has confirmed, `dropped` when the lease ran out or the transfer
    failed: both mean that the blocks may be freed. Event loop's thread only."""

    def __init__(
        self, kv: KVStore, sent: Callable[[Key], None], dropped: Callable[[Key], None]
    ) -> None:
        self._kv = kv
        self._sent = sent
        self._dropped = dropped
        self._by_key: dict[Key, _Lease] = {}
        self._by_digest: dict[bytes, _Lease] = {}
        self._early: dict[bytes, asyncio.Event] = {}
        self._sending = asyncio.Semaphore(TRANSFERS_MAX)
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self, host: str) -> str:
        """Listens on a free port of one interface; returns host:port for peers."""
        self._server = await asyncio.start_server(self._accepted, host, 0)
        port = self._server.sockets[0].getsockname()[1]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def close(self) -> None:
        """Stops listening and ends every transfer."""
        assert self._server is not None
        self._server.close()
        self.revoke_all()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def offer(self, key: Key, out: protocol.HandoffOut, tokens: int) -> bool:
        """The prompt of `key` will be fetched by whoever shows the capability; False when full
        or known already."""
        digest = handoffwire.digest_of(out.capability)
        if key in self._by_key or digest in self._by_digest or len(self._by_key) >= OFFERS_MAX:
            return False
        lease = _Lease(key, digest, tokens, out.lease_s)
        self._by_key[key] = self._by_digest[lease.digest] = lease
        if (early := self._early.get(lease.digest)) is not None:
            early.set()
        return True

    def ready(self, key: Key, block_ids: list[int], first_ids: list[int]) -> bool:
        """The prompt is computed: the lease begins. False when it was revoked meanwhile."""
        lease = self._by_key.get(key)
        if lease is None:
            return False
        lease.block_ids, lease.first_ids = block_ids, first_ids
        loop = asyncio.get_running_loop()
        lease.expiry = loop.call_later(lease.lease_s, self._end, lease, self._dropped)
        lease.ready.set()
        return True

    def revoke(self, key: Key) -> None:
        """Ends an offer whose blocks the caller frees by itself."""
        if (lease := self._by_key.get(key)) is not None:
            self._end(lease, None)

    def revoke_older(self, request_id: str, epoch: int) -> None:
        """Offers of earlier epochs of a request."""
        for key in [key for key in self._by_key if key[0] == request_id and key[1] < epoch]:
            self.revoke(key)

    def revoke_all(self) -> None:
        for key in list(self._by_key):
            self.revoke(key)

    def _end(self, lease: _Lease, report: Callable[[Key], None] | None) -> None:
        if lease.is_over:
            return
        lease.is_over = True
        if lease.expiry is not None:
            lease.expiry.cancel()
        del self._by_key[lease.key], self._by_digest[lease.digest]
        lease.ready.set()
        if report is not None:
            report(lease.key)

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if len(self._tasks) <= CONNECTIONS_MAX:
                await self._serve(reader, writer)
        except (OSError, asyncio.IncompleteReadError, HandoffError) as error:
            logger.info("handoff not sent reason=%r", error)
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(REQUEST_S_MAX):
            digest = await handoffwire.read_request(reader)
        lease = await self._claim(digest)
        if lease is not None:
            async with asyncio.timeout(READY_S_MAX):
                await lease.ready.wait()
        if lease is None or lease.is_over:
            writer.write(handoffwire.REFUSAL)
            await writer.drain()
            return
        try:
            async with asyncio.timeout(SEND_S_MAX), self._sending:
                await self._send(lease, writer)
                is_confirmed = await reader.readexactly(1) == handoffwire.ACK
        except (OSError, asyncio.IncompleteReadError):  # OSError includes TimeoutError
            self._end(lease, self._dropped)  # the capability is spent: nobody will come again
            raise
        self._end(lease, self._sent if is_confirmed else self._dropped)

    async def _claim(self, digest: bytes) -> _Lease | None:
        """The offer of this capability, once. Waits a little where it did not arrive yet."""
        if digest not in self._by_digest and digest not in self._early:
            self._early[digest] = asyncio.Event()
            try:
                async with asyncio.timeout(EARLY_S_MAX):
                    await self._early[digest].wait()
            except TimeoutError:
                return None
            finally:
                del self._early[digest]
        lease = self._by_digest.get(digest)
        if lease is None or lease.is_taken:
            return None
        lease.is_taken = True
        return lease

    async def _send(self, lease: _Lease, writer: asyncio.StreamWriter) -> None:
        kv = self._kv
        if lease.is_over:  # while others were sending
            raise HandoffError("refused", f"{lease.key} is over")
        writer.write(
            handoffwire.pack_header(
                kv, lease.digest, len(lease.block_ids), lease.tokens, lease.first_ids
            )
        )
        for layer in range(kv.num_layers):
            if lease.is_over:
                raise HandoffError("refused", f"{lease.key} ended in the middle")
            data = kv.read(layer, lease.block_ids)
            writer.write(data)
            writer.write(handoffwire.checksum(lease.digest, layer, data))
            await writer.drain()


async def fetch(
    source: protocol.HandoffIn, kv: KVStore, block_ids: list[int], tokens: int
) -> Fetched:
    """Fetch the KV of `tokens` tokens into our blocks. Raises HandoffError; blocks may then hold
    parts of a transfer. A caller that cancels may reuse the blocks at once."""
    host, port = _host_port(source.address)
    writer = None
    try:
        async with asyncio.timeout(source.timeout_s):
            reader, writer = await asyncio.open_connection(host, port, limit=READ_BYTES)
            return await _fetch(reader, writer, source.capability, kv, block_ids, tokens)
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


async def _fetch(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    capability: str,
    kv: KVStore,
    block_ids: list[int],
    tokens: int,
) -> Fetched:
    shown = capability.encode()
    digest = handoffwire.digest_of(capability)
    writer.write(
        handoffwire.REQUEST.pack(handoffwire.MAGIC, handoffwire.VERSION, len(shown)) + shown
    )
    header = await reader.readexactly(handoffwire.HEADER.size)
    started_at_s = asyncio.get_running_loop().time()
    num_first_ids = handoffwire.check_header(header, kv, len(block_ids), tokens)
    header += await reader.readexactly(4 * num_first_ids)
    handoffwire.verify(digest, -1, header, await reader.readexactly(handoffwire.CHECKSUM_BYTES))
    layer_bytes = kv.layer_block_bytes * len(block_ids)
    for layer in range(kv.num_layers):
        data = await reader.readexactly(layer_bytes)
        handoffwire.verify(
            digest, layer, data, await reader.readexactly(handoffwire.CHECKSUM_BYTES)
        )
        try:
            kv.write(layer, block_ids, data)
        except ValueError as error:  # correctly sent, yet no KV: values that are not finite
            raise HandoffError("malformed", str(error)) from None
    seconds = asyncio.get_running_loop().time() - started_at_s
    writer.write(handoffwire.ACK)
    await writer.drain()
    first_ids = list(struct.unpack_from(f"<{num_first_ids}I", header, handoffwire.HEADER.size))
    return Fetched(first_ids, kv.num_layers * layer_bytes, seconds)
