"""KV from a prefill worker to a decode worker: the prefill side.

The decode worker connects (handofffetch.py) and shows the one-time capability that the control
plane issued to both. The prefill worker answers with a header as soon as a part of the prompt is
final in some layer, and from then on sends what becomes final while later layers and chunks are
computed (handofflayers.py): of a computed prompt only the last layers are still to leave. Last come
the ids sampled at its end; without them nothing of what came before is used. Blocks are read
between two awaits of the event loop and belong to the transfer until the other side has confirmed,
failed, or the lease is over. A prompt that ends with its first id frees its blocks at once: it gets
no trailer, so what is read of them then is of no use to anybody.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable

from controlplane import protocol
from gpuworkers import handoffcarrier, handoffwire
from gpuworkers.blocks import blocks_for
from gpuworkers.handofflease import Departure, Lease
from gpuworkers.handoffwire import HandoffError, Place
from gpuworkers.kvstore import KVStore
from gpuworkers.reports import Key

CONNECTIONS_MAX = 512  # accepted, most of them waiting for their prompt
TRANSFERS_MAX = 4  # with pieces on their way at the same time
OFFERS_MAX = 1024
REQUEST_S_MAX = 5.0  # from the open socket to the whole request
EARLY_S_MAX = 2.0  # a peer may ask before our own Assign arrives
READY_S_MAX = 120.0  # without news of the prompt; the peer gives up earlier by its own timeout
SEND_S_MAX = 30.0  # for pieces that are final
DEPARTURES_KEPT_MAX = 4096

logger = logging.getLogger(__name__)


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
        self.departures: deque[Departure] = deque(maxlen=DEPARTURES_KEPT_MAX)  # of all transfers
        self._by_key: dict[Key, Lease] = {}
        self._by_digest: dict[bytes, Lease] = {}
        self._early: dict[bytes, asyncio.Event] = {}
        self._sending = asyncio.Semaphore(TRANSFERS_MAX)
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    def serve_from(self, kv: KVStore) -> None:
        """Another model's KV; no transfer outlives the former one's."""
        self.revoke_all()
        self._kv = kv

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
        num_blocks = blocks_for(tokens, self._kv.block_tokens)
        lease = Lease(key, digest, tokens, out.lease_s, self._kv.num_layers, num_blocks)
        self._by_key[key] = self._by_digest[lease.digest] = lease
        if (early := self._early.get(lease.digest)) is not None:
            early.set()
        return True

    def advance(
        self, key: Key, block_ids: list[int], layers: range, num_blocks: int, at_s: float
    ) -> None:
        """The leading num_blocks of the prompt's blocks are final in these layers."""
        if (lease := self._by_key.get(key)) is not None:
            lease.advance(block_ids, layers, num_blocks, at_s)

    def ready(self, key: Key, block_ids: list[int], first_ids: list[int]) -> bool:
        """The prompt is computed: the lease begins. False when it was revoked meanwhile."""
        lease = self._by_key.get(key)
        if lease is None:
            return False
        loop = asyncio.get_running_loop()
        lease.advance(block_ids, range(self._kv.num_layers), len(block_ids), loop.time())
        lease.finish(first_ids, loop.time())
        lease.expiry = loop.call_later(lease.lease_s, self._end, lease, self._dropped)
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

    def _end(self, lease: Lease, report: Callable[[Key], None] | None) -> None:
        if lease.is_over:
            return
        lease.end()
        del self._by_key[lease.key], self._by_digest[lease.digest]
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
            digest, place = await handoffwire.read_request(reader)
        lease = await self._claim(digest)
        if lease is None:
            writer.write(handoffwire.REFUSAL)
            await writer.drain()
            return
        watch = asyncio.create_task(lease.watch(reader))
        try:
            await self._send(lease, place, writer)
        except (OSError, HandoffError):  # OSError includes TimeoutError
            self._end(lease, self._dropped)  # the capability is spent: nobody will come again
            raise
        finally:
            watch.cancel()
            await asyncio.wait([watch])
        self._end(lease, self._sent)

    async def _claim(self, digest: bytes) -> Lease | None:
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

    async def _send(self, lease: Lease, place: Place, writer: asyncio.StreamWriter) -> None:
        """Returns when the peer has confirmed all of it. Raises HandoffError and OSError."""
        kv = self._kv
        try:
            async with asyncio.timeout(READY_S_MAX):
                await lease.until(lambda: lease.has_piece)
        except HandoffError:
            writer.write(handoffwire.REFUSAL)
            raise
        blocks_max = handoffwire.piece_blocks(kv, lease.num_blocks)
        outlet = handoffcarrier.attach(place, blocks_max * kv.layer_block_bytes, writer)
        try:
            writer.write(
                handoffwire.pack_header(
                    kv, lease.digest, lease.num_blocks, lease.tokens, outlet.carrier
                )
            )
            try:
                while not lease.has_left:
                    async with asyncio.timeout(READY_S_MAX):
                        await lease.until(lambda: lease.has_piece)
                    async with asyncio.timeout(SEND_S_MAX), self._sending:
                        await self._send_final(lease, outlet, writer, blocks_max)
                async with asyncio.timeout(READY_S_MAX):
                    await lease.until(lambda: bool(lease.first_ids))
            except HandoffError:
                if lease.has_left:  # the peer waits for the trailer, confirmed or not
                    writer.write(handoffwire.pack_trailer(lease.digest, 0.0, []))
                raise
            async with asyncio.timeout(SEND_S_MAX):
                after_s = asyncio.get_running_loop().time() - lease.ready_at_s
                writer.write(handoffwire.pack_trailer(lease.digest, after_s, lease.first_ids))
                await writer.drain()
                await lease.until(lambda: lease.num_acks > lease.num_sent)
        finally:
            outlet.close()
        lags_s = [d.left_at_s - d.final_at_s for d in self.departures if d.key == lease.key]
        logger.info(
            "handoff sent request=%s epoch=%d carrier=%s pieces=%d lag_ms_max=%.1f after_ms=%.1f",
            *lease.key, outlet.carrier, lease.num_sent, 1e3 * max(lags_s, default=0.0),
            1e3 * after_s,
        )  # fmt: skip

    async def _send_final(
        self,
        lease: Lease,
        outlet: handoffcarrier.Outlet,
        writer: asyncio.StreamWriter,
        blocks_max: int,
    ) -> None:
        """Sends what is final until nothing is left of it and all is confirmed."""

        def may_send() -> bool:
            ahead = lease.num_sent - lease.num_acks
            return lease.has_piece and ahead < handoffwire.PIECES_AHEAD_MAX

        def is_done() -> bool:
            return not lease.has_piece and lease.num_acks == lease.num_sent

        while True:
            await lease.until(lambda: may_send() or is_done())
            if is_done():
                return
            piece, final_at_s = lease.take(blocks_max)
            data = self._kv.read(piece.layer, lease.block_ids[piece.first : piece.end])
            head = handoffwire.pack_piece(lease.digest, lease.num_sent, piece, data)
            outlet.put(lease.num_sent, head, data)
            lease.num_sent += 1
            await writer.drain()
            left_at_s = asyncio.get_running_loop().time()
            self.departures.append(
                Departure(lease.key, piece.layer, piece.first, piece.end, final_at_s, left_at_s)
            )
