"""KV over the wire: what is sent arrives, and nothing else is taken."""

import asyncio
import contextlib
import itertools
import struct
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from controlplane import protocol
from gpuworkers import handoff, handoffwire
from gpuworkers.engine import Key
from gpuworkers.fake import FakeKV
from gpuworkers.handoff import HandoffServer
from gpuworkers.handoffcarrier import Segments
from gpuworkers.handofffetch import Fetched, fetch
from gpuworkers.handoffwire import (
    CHECKSUM_BYTES,
    HEADER,
    MAGIC,
    NOWHERE,
    PIECE,
    REQUEST,
    TRAILER,
    VERSION,
    HandoffError,
    Piece,
)
from tests.gpuworkers.flipproxy import FlipProxy

KEY = ("r", 1)
CAPABILITY = "one-time"
TOKENS = 40  # three blocks of 16
SOURCE_BLOCKS, OWN_BLOCKS = [5, 2, 7], [0, 6, 3]
HEADER_BYTES = HEADER.size + CHECKSUM_BYTES
HEAD_BYTES = PIECE.size + CHECKSUM_BYTES
LAYER_BYTES = 3 * FakeKV.layer_block_bytes
TRAILER_AT = HEADER_BYTES + 2 * (HEAD_BYTES + LAYER_BYTES)
NO_SEGMENTS = Segments(0)


class Sender:
    """A prefill side with one computed prompt."""

    def __init__(self) -> None:
        self.kv = FakeKV(8, 16)
        for layer in range(self.kv.num_layers):
            data = bytes((layer * 100 + i) % 256 for i in range(8 * self.kv.layer_block_bytes))
            self.kv.write(layer, list(range(8)), data)
        self.sent: list[Key] = []
        self.dropped: list[Key] = []
        self.server = HandoffServer(self.kv, self.sent.append, self.dropped.append)
        self.address = ""

    def offer(self, key: Key = KEY, capability: str = CAPABILITY, lease_s: float = 30.0) -> bool:
        return self.server.offer(key, protocol.HandoffOut(capability, lease_s), TOKENS)

    def ready(self, key: Key = KEY) -> bool:
        return self.server.ready(key, SOURCE_BLOCKS, [104])


@pytest.fixture
async def sender() -> AsyncIterator[Sender]:
    sender = Sender()
    sender.address = await sender.server.start("127.0.0.1")
    yield sender
    await sender.server.close()


def fetching(
    address: str,
    kv: FakeKV,
    capability: str = CAPABILITY,
    timeout_s: float = 20.0,
    segments: Segments = NO_SEGMENTS,
) -> Awaitable[Fetched]:
    source = protocol.HandoffIn(address, capability, timeout_s)
    return fetch(source, kv, OWN_BLOCKS, TOKENS, segments)


async def reason_of(transfer: Awaitable[Fetched]) -> str:
    with pytest.raises(HandoffError) as caught:
        await transfer
    return caught.value.reason


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.01)


async def test_blocks_arrive_in_the_receivers_own_blocks(sender: Sender) -> None:
    kv = FakeKV(8, 16)
    sender.offer()
    sender.ready()
    fetched = await fetching(sender.address, kv)
    assert fetched.first_ids == [104] and fetched.bytes == 2 * LAYER_BYTES
    for layer in range(2):
        assert kv.read(layer, OWN_BLOCKS) == sender.kv.read(layer, SOURCE_BLOCKS)
        assert kv.read(layer, [1, 2, 4, 5, 7]) == bytes(5 * kv.layer_block_bytes)
    await until(lambda: sender.sent == [KEY])
    assert sender.dropped == []


async def test_peer_may_come_before_the_offer_and_before_the_prompt_is_ready(
    sender: Sender,
) -> None:
    transfer = asyncio.ensure_future(fetching(sender.address, FakeKV(8, 16)))
    await asyncio.sleep(0.05)
    sender.offer()
    await asyncio.sleep(0.05)
    assert not transfer.done()
    sender.ready()
    assert (await transfer).first_ids == [104]


async def test_unknown_capability_is_refused(sender: Sender) -> None:
    sender.offer()
    sender.ready()
    assert await reason_of(fetching(sender.address, FakeKV(8, 16), "guessed")) == "refused"
    assert (await fetching(sender.address, FakeKV(8, 16))).first_ids == [104]


async def test_capability_works_once(sender: Sender) -> None:
    sender.offer()
    sender.ready()
    await fetching(sender.address, FakeKV(8, 16))
    assert await reason_of(fetching(sender.address, FakeKV(8, 16))) == "refused"


async def test_second_peer_with_the_same_capability_is_refused_while_the_first_waits(
    sender: Sender,
) -> None:
    sender.offer()
    first = asyncio.ensure_future(fetching(sender.address, FakeKV(8, 16)))
    await asyncio.sleep(0.05)
    assert await reason_of(fetching(sender.address, FakeKV(8, 16))) == "refused"
    sender.ready()
    assert (await first).first_ids == [104]


async def test_revoked_offer_is_refused_even_to_a_peer_that_waits(sender: Sender) -> None:
    sender.offer()
    waiting = asyncio.ensure_future(fetching(sender.address, FakeKV(8, 16)))
    await asyncio.sleep(0.05)
    sender.server.revoke(KEY)
    assert await reason_of(waiting) == "refused"
    assert sender.sent == sender.dropped == []  # who revokes frees the blocks
    assert not sender.ready()


@pytest.mark.parametrize(
    "offset",
    [
        HEADER_BYTES - 1,  # checksum of the header
        HEADER_BYTES,  # which layer
        HEADER_BYTES + 8,  # how many blocks
        HEADER_BYTES + PIECE.size - 1,  # checksum of the bytes
        HEADER_BYTES + HEAD_BYTES - 1,  # checksum of both
        HEADER_BYTES + HEAD_BYTES,  # first byte of the first layer
        TRAILER_AT - 1,  # last byte of the last layer
        TRAILER_AT,  # seconds
        TRAILER_AT + TRAILER.size,  # first id
        TRAILER_AT + TRAILER.size + 4,  # checksum of both
    ],
)
async def test_one_flipped_bit_anywhere_behind_the_shape_is_a_checksum_failure(
    sender: Sender, offset: int
) -> None:
    sender.offer()
    sender.ready()
    async with FlipProxy(sender.address, flip_at=offset) as proxy:
        assert await reason_of(fetching(proxy.address, FakeKV(8, 16))) == "checksum"
    await until(lambda: sender.dropped == [KEY])
    assert sender.sent == []


@pytest.mark.parametrize("offset", range(4, HEADER.size))
async def test_one_flipped_bit_in_the_shape_is_never_taken(sender: Sender, offset: int) -> None:
    sender.offer()
    sender.ready()
    kv = FakeKV(8, 16)
    async with FlipProxy(sender.address, flip_at=offset) as proxy:
        reason = await reason_of(fetching(proxy.address, kv))
    assert reason in ("malformed", "refused", "checksum")
    assert kv.read(0, OWN_BLOCKS) == bytes(LAYER_BYTES)


@pytest.mark.parametrize(
    "cut_at", [0, HEADER.size - 1, HEADER_BYTES, HEADER_BYTES + HEAD_BYTES, TRAILER_AT]
)
async def test_peer_that_dies_in_the_middle_is_unreachable(sender: Sender, cut_at: int) -> None:
    sender.offer()
    sender.ready()
    async with FlipProxy(sender.address, cut_at=cut_at) as proxy:
        assert await reason_of(fetching(proxy.address, FakeKV(8, 16))) == "unreachable"
    await until(lambda: sender.dropped == [KEY])


async def test_receiver_that_dies_in_the_middle_lets_the_sender_free(sender: Sender) -> None:
    sender.offer()
    reader, writer = await asyncio.open_connection(*sender.address.split(":"))
    writer.write(handoffwire.pack_request(CAPABILITY, NOWHERE))
    sender.ready()
    await reader.readexactly(HEADER_BYTES)
    writer.close()
    await until(lambda: sender.dropped == [KEY])
    assert sender.sent == []


async def test_lease_runs_out_when_nobody_comes(sender: Sender) -> None:
    sender.offer(lease_s=0.05)
    await asyncio.sleep(0.1)
    assert sender.dropped == []  # it begins when the prompt is ready
    sender.ready()
    await until(lambda: sender.dropped == [KEY])
    assert await reason_of(fetching(sender.address, FakeKV(8, 16))) == "refused"


async def test_lease_that_ends_during_a_transfer_stops_it(sender: Sender) -> None:
    sender.offer(lease_s=0.2)
    sender.ready()
    async with FlipProxy(sender.address, stall_at=HEADER_BYTES) as proxy:
        transfer = asyncio.ensure_future(fetching(proxy.address, FakeKV(8, 16), timeout_s=1.0))
        await until(lambda: sender.dropped == [KEY])
        assert await reason_of(transfer) == "timeout"
    assert sender.sent == []


async def test_receiver_gives_up_after_its_timeout(sender: Sender) -> None:
    sender.offer()
    transfer = fetching(sender.address, FakeKV(8, 16), timeout_s=0.05)
    assert await reason_of(transfer) == "timeout"


@pytest.mark.parametrize(
    "address", ["127.0.0.1:1", "127.0.0.1:none", "127.0.0.1:99999", "", ":", "127.0.0.1:0", ":5"]
)
async def test_address_that_leads_nowhere_is_unreachable(address: str) -> None:
    assert await reason_of(fetching(address, FakeKV(8, 16))) == "unreachable"


def header(**changes: int) -> bytes:
    fields = {
        "version": VERSION, "status": 0, "dtype": 3, "layers": 2, "layer_block_bytes": 16,
        "blocks": 3, "block_tokens": 16, "tokens": TOKENS, "carrier": 1,
    } | changes  # fmt: skip
    return HEADER.pack(MAGIC, *fields.values())


@pytest.mark.parametrize(
    "wrong",
    [
        b"GET / HTTP/1.1\r\n" * 4,
        header(version=VERSION + 1),
        header(dtype=1),
        header(layers=2**32 - 1),
        header(layer_block_bytes=2**32 - 1),
        header(blocks=2**32 - 1),
        header(blocks=2),
        header(block_tokens=64),
        header(tokens=TOKENS + 1),
        header(carrier=0),
        header(carrier=3),
    ],
    ids=range(11),
)
async def test_header_of_another_shape_is_refused_before_anything_else_is_read(
    wrong: bytes,
) -> None:
    """The peer sends nothing behind the header: waiting for more would end in a timeout."""
    async with peer_sending(wrong) as address:
        assert await reason_of(fetching(address, FakeKV(8, 16))) == "malformed"


@contextlib.asynccontextmanager
async def peer_sending(answer: bytes) -> AsyncIterator[str]:
    """A listener that gives `answer` to everyone and then stays silent."""

    ended = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        with contextlib.suppress(OSError):
            await reader.read()
        writer.close()
        ended.set()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with asyncio.timeout(20):
        await ended.wait()
    server.close()


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x00" * REQUEST.size,
        REQUEST.pack(MAGIC, VERSION + 1, 8, 0, 0, b"") + b"one-time",
        REQUEST.pack(MAGIC, VERSION, 0, 0, 0, b""),
        REQUEST.pack(MAGIC, VERSION, handoffwire.CAPABILITY_BYTES_MAX + 1, 0, 0, b""),
    ],
)
async def test_malformed_request_is_closed_without_an_answer(
    sender: Sender, request_bytes: bytes
) -> None:
    reader, writer = await asyncio.open_connection(*sender.address.split(":"))
    writer.write(request_bytes)
    async with asyncio.timeout(20):
        assert await reader.read() == b""
    writer.close()


async def test_request_that_is_not_utf8_is_refused(sender: Sender) -> None:
    reader, writer = await asyncio.open_connection(*sender.address.split(":"))
    writer.write(REQUEST.pack(MAGIC, VERSION, 4, 0, 0, b"") + b"\xff\xfe\xfd\xfc")
    async with asyncio.timeout(20):
        answer = await reader.readexactly(HEADER.size)
    assert HEADER.unpack(answer)[2] == handoffwire.STATUS_REFUSED
    writer.close()


async def test_offers_over_the_maximum_are_not_kept(sender: Sender) -> None:
    for number in range(handoff.OFFERS_MAX):
        assert sender.offer((f"r{number}", 1), f"capability{number}")
    assert not sender.offer(("one too many", 1), "another")
    sender.server.revoke(("r0", 1))
    assert sender.offer(("now there is room", 1), "another")


async def test_offer_that_comes_twice_stays_one(sender: Sender) -> None:
    assert sender.offer() and not sender.offer()
    assert not sender.offer(("another request", 1), CAPABILITY)
    sender.server.revoke(KEY)
    assert sender.offer()


async def test_older_epochs_are_revoked_and_newer_ones_stay(sender: Sender) -> None:
    for epoch in (1, 2, 3):
        sender.offer(("r", epoch), f"capability{epoch}")
    sender.offer(("other", 1), "capability of other")
    sender.server.revoke_older("r", 3)
    assert [sender.ready(key) for key in [("r", 1), ("r", 2), ("r", 3), ("other", 1)]] == [
        False, False, True, True,
    ]  # fmt: skip


async def test_transfers_beyond_the_maximum_wait_for_a_place(sender: Sender) -> None:
    count = handoff.TRANSFERS_MAX + 2
    for number in range(count):
        sender.offer((f"r{number}", 1), f"capability{number}")
        sender.ready((f"r{number}", 1))
    async with contextlib.AsyncExitStack() as stack:
        proxies = [
            await stack.enter_async_context(FlipProxy(sender.address, stall_at=HEADER_BYTES))
            for _ in range(count)
        ]
        transfers = [
            asyncio.ensure_future(fetching(proxy.address, FakeKV(8, 16), f"capability{number}"))
            for number, proxy in enumerate(proxies)
        ]
        await until(lambda: sum(p.stalled.is_set() for p in proxies) == handoff.TRANSFERS_MAX)
        await asyncio.sleep(0.05)
        assert sum(proxy.stalled.is_set() for proxy in proxies) == handoff.TRANSFERS_MAX
        for proxy in proxies:
            proxy.go_on.set()
        assert len(await asyncio.gather(*transfers)) == count
    await until(lambda: len(sender.sent) == count)


async def test_checksums_fit_one_place_of_one_transfer_only() -> None:
    ours, theirs = handoffwire.digest_of("a"), handoffwire.digest_of("b")
    data = struct.pack("<4Q", *range(4))
    kinds = (handoffwire.IN_HEADER, handoffwire.IN_PIECE, handoffwire.IN_DATA)
    places = list(itertools.product((ours, theirs), kinds, (0, 1)))
    assert len({handoffwire.checksum(*place, data) for place in places}) == len(places) == 12


def pieces(*sent: Piece) -> bytes:
    """A good header and these pieces, correctly signed."""
    kv, digest = FakeKV(8, 16), handoffwire.digest_of(CAPABILITY)
    answer = handoffwire.pack_header(kv, digest, 3, TOKENS, "tcp")
    for index, piece in enumerate(sent):
        data = bytes(max(0, piece.end - piece.first) * kv.layer_block_bytes)
        answer += handoffwire.pack_piece(digest, index, piece, data) + data
    return answer


@pytest.mark.parametrize(
    "sent",
    [
        (Piece(2, 0, 3),),  # no such layer
        (Piece(0, 1, 3),),  # begins in the middle
        (Piece(0, 0, 4),),  # goes beyond the prompt
        (Piece(0, 0, 0),),  # moves nothing
        (Piece(0, 0, 2), Piece(0, 0, 3)),  # comes twice
        (Piece(0, 0, 3), Piece(0, 3, 4)),
    ],
)
async def test_piece_that_does_not_go_on_where_its_layer_ended_is_refused(
    sent: tuple[Piece, ...],
) -> None:
    async with peer_sending(pieces(*sent)) as address:
        assert await reason_of(fetching(address, FakeKV(8, 16))) == "malformed"


async def test_piece_over_the_maximum_is_refused_before_its_bytes_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answer = pieces(Piece(0, 0, 3))
    monkeypatch.setattr(handoffwire, "PIECE_BYTES_MAX", 2 * FakeKV.layer_block_bytes)
    async with peer_sending(answer[:-LAYER_BYTES]) as address:
        assert await reason_of(fetching(address, FakeKV(8, 16))) == "malformed"


async def test_layer_over_the_maximum_of_a_piece_leaves_in_several(
    sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handoffwire, "PIECE_BYTES_MAX", 2 * FakeKV.layer_block_bytes)
    kv = FakeKV(8, 16)
    sender.offer()
    sender.ready()
    await fetching(sender.address, kv)
    assert all(kv.read(i, OWN_BLOCKS) == sender.kv.read(i, SOURCE_BLOCKS) for i in range(2))
    left = [(d.layer, d.first, d.end) for d in sender.server.departures]
    assert left == [(0, 0, 2), (0, 2, 3), (1, 0, 2), (1, 2, 3)]


async def test_no_more_pieces_are_on_their_way_than_the_maximum(
    sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handoffwire, "PIECE_BYTES_MAX", FakeKV.layer_block_bytes)
    sender.offer()
    sender.ready()  # six pieces
    reader, writer = await asyncio.open_connection(*sender.address.split(":"))
    writer.write(handoffwire.pack_request(CAPABILITY, NOWHERE))
    piece_bytes = HEAD_BYTES + FakeKV.layer_block_bytes
    await reader.readexactly(HEADER_BYTES + handoffwire.PIECES_AHEAD_MAX * piece_bytes)
    await asyncio.sleep(0.05)
    assert len(sender.server.departures) == handoffwire.PIECES_AHEAD_MAX
    writer.write(handoffwire.ACK)
    await reader.readexactly(piece_bytes)
    writer.write(b"\x15")  # anything else ends the transfer
    await until(lambda: sender.dropped == [KEY])
    writer.close()
