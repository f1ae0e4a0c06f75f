"""Layers leave while later ones are computed, through the connection or through shared memory."""

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator

import pytest

from controlplane import protocol
from gpuworkers import handoffcarrier, handoffwire, runner
from gpuworkers.engine import Engine, EngineConfig
from gpuworkers.handoff import Fetched, HandoffServer, fetch
from gpuworkers.handoffcarrier import NO_HOST, SharedInlet, SharedOutlet, host_identity
from gpuworkers.handoffwire import HandoffError
from tests.gpuworkers.enginekit import assign
from tests.gpuworkers.flipproxy import FlipProxy
from tests.gpuworkers.test_handoff import (
    CAPABILITY,
    HEADER_BYTES,
    KEY,
    OWN_BLOCKS,
    SOURCE_BLOCKS,
    TOKENS,
    FakeKV,
    Sender,
    reason_of,
    until,
)
from tests.gpuworkers.tinyllama import write_tiny

CARRIERS = {"tcp": NO_HOST, "shared": host_identity()}
needs_sharing = pytest.mark.skipif(host_identity() == NO_HOST, reason="no memfd or /proc here")


@pytest.fixture
async def sender() -> AsyncIterator[Sender]:
    sender = Sender()
    sender.address = await sender.server.start("127.0.0.1")
    sender.offer()
    yield sender
    await sender.server.close()


def fetching(sender: Sender, kv, host: bytes, address: str = "") -> "asyncio.Task[Fetched]":
    source = protocol.HandoffIn(address or sender.address, CAPABILITY, 20.0)
    return asyncio.ensure_future(fetch(source, kv, OWN_BLOCKS, TOKENS, host))


@needs_sharing
@pytest.mark.parametrize("carrier", CARRIERS)
async def test_each_carrier_brings_the_same_blocks(sender: Sender, carrier: str) -> None:
    kv = FakeKV(8, 16)
    sender.ready()
    fetched = await fetching(sender, kv, CARRIERS[carrier])
    assert fetched.first_ids == [104]
    for layer in range(2):
        assert kv.read(layer, OWN_BLOCKS) == sender.kv.read(layer, SOURCE_BLOCKS)
    await until(lambda: sender.sent == [KEY])
    assert [sent.carrier for sent in sender.server.sent_layers] == [carrier]


async def test_a_peer_of_another_host_gets_the_connection(sender: Sender) -> None:
    sender.ready()
    await fetching(sender, FakeKV(8, 16), b"another host 16b")
    assert sender.server.sent_layers[0].carrier == "tcp"


@needs_sharing
async def test_a_transfer_too_large_for_shared_memory_gets_the_connection(
    sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpuworkers.handoff.SHARED_BYTES_MAX", 1)
    sender.ready()
    await fetching(sender, FakeKV(8, 16), host_identity())
    assert sender.server.sent_layers[0].carrier == "tcp"


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_a_layer_arrives_before_the_next_one_is_computed(
    sender: Sender, carrier: str
) -> None:
    kv = FakeKV(8, 16)
    transfer = fetching(sender, kv, CARRIERS[carrier])
    server = sender.server
    server.layer_computed(KEY, SOURCE_BLOCKS, 0.0)
    await until(lambda: kv.read(0, OWN_BLOCKS) == sender.kv.read(0, SOURCE_BLOCKS))
    assert kv.read(1, OWN_BLOCKS) == bytes(3 * kv.layer_block_bytes) and not transfer.done()
    server.layer_computed(KEY, SOURCE_BLOCKS, 0.0)
    await until(lambda: kv.read(1, OWN_BLOCKS) == sender.kv.read(1, SOURCE_BLOCKS))
    assert not transfer.done()  # the first id is not there yet
    sender.ready()
    assert (await transfer).first_ids == [104]


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_a_prompt_that_ends_in_the_middle_ends_the_transfer(
    sender: Sender, carrier: str
) -> None:
    kv = FakeKV(8, 16)
    transfer = fetching(sender, kv, CARRIERS[carrier])
    sender.server.layer_computed(KEY, SOURCE_BLOCKS, 0.0)
    await until(lambda: kv.read(0, OWN_BLOCKS) != bytes(3 * kv.layer_block_bytes))
    sender.server.revoke(KEY)
    assert await reason_of(transfer) == "unreachable"
    assert sender.sent == sender.dropped == []


async def test_a_peer_that_dies_in_the_middle_drops_the_prompt_before_it_is_ready(
    sender: Sender,
) -> None:
    async with FlipProxy(sender.address, cut_at=HEADER_BYTES + 3) as proxy:
        transfer = fetching(sender, FakeKV(8, 16), NO_HOST, proxy.address)
        sender.server.layer_computed(KEY, SOURCE_BLOCKS, 0.0)
        assert await reason_of(transfer) == "unreachable"
        sender.server.layer_computed(KEY, SOURCE_BLOCKS, 0.0)
        await until(lambda: not sender.ready() or sender.dropped == [KEY])
    await until(lambda: sender.dropped == [KEY])


@needs_sharing
async def test_damage_in_shared_memory_is_a_checksum_failure(
    sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = SharedOutlet.put

    async def damaged(self: SharedOutlet, layer: int, data: bytes) -> None:
        await put(self, layer, bytes([data[0] ^ 1]) + data[1:])

    monkeypatch.setattr(SharedOutlet, "put", damaged)
    sender.ready()
    assert await reason_of(fetching(sender, FakeKV(8, 16), host_identity())) == "checksum"
    await until(lambda: sender.dropped == [KEY])


@needs_sharing
async def test_shared_memory_is_closed_after_every_transfer(sender: Sender) -> None:
    before = len(os.listdir("/proc/self/fd"))
    sender.ready()
    await fetching(sender, FakeKV(8, 16), host_identity())
    await until(lambda: sender.sent == [KEY])
    await until(lambda: len(os.listdir("/proc/self/fd")) <= before)


@needs_sharing
async def test_a_place_that_is_not_what_was_said_is_refused() -> None:
    reader = asyncio.StreamReader()
    outlet = SharedOutlet(2, 8)
    for place, reason in (((2**22 + 1, 3), "unreachable"), ((os.getpid(), 9999), "unreachable")):
        with pytest.raises(HandoffError) as caught:
            SharedInlet(place, 2, 8, reader)
        assert caught.value.reason == reason
    with pytest.raises(HandoffError) as caught:
        SharedInlet(outlet.place, 2, 9, reader)
    assert caught.value.reason == "malformed"
    outlet.close()


async def test_shared_memory_that_was_not_asked_for_is_refused(sender: Sender) -> None:
    sender.server._host = NO_HOST[:-1] + b"\x01"
    header = handoffwire.pack_header(
        sender.kv, handoffwire.digest_of(CAPABILITY), 3, TOKENS, "shared", (os.getpid(), 0)
    )

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(header)
        await reader.read()
        writer.close()

    peer = await asyncio.start_server(serve, "127.0.0.1", 0)
    address = f"127.0.0.1:{peer.sockets[0].getsockname()[1]}"
    assert await reason_of(fetching(sender, FakeKV(8, 16), NO_HOST, address)) == "malformed"
    peer.close()


def test_processes_of_one_host_have_one_identity() -> None:
    assert host_identity() == host_identity()
    assert (
        len(host_identity())
        == len(NO_HOST)
        == handoffcarrier.hashlib.blake2b(digest_size=16).digest_size
    )


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_layer_i_leaves_before_layer_i_plus_2_is_computed(tmp_path, carrier: str) -> None:
    """A real forward pass in its own thread; each layer takes long enough to be told apart."""
    folder = write_tiny(tmp_path, num_hidden_layers=8)
    loaded, facts, _, model = runner.load(folder, "tiny", dtype="fp32", kv_tokens=1024)
    target, *_ = runner.load(folder, "tiny", dtype="fp32", kv_tokens=1024)
    engine = Engine(loaded, EngineConfig(), model, facts, "prefill")
    loop = asyncio.get_running_loop()
    ended: list[tuple[str, int]] = []
    server = HandoffServer(loaded.kv, ended.append, ended.append)
    address = await server.start("127.0.0.1")

    def written(key, block_ids, layer) -> None:
        loop.call_soon_threadsafe(server.layer_computed, key, block_ids, loop.time())
        time.sleep(0.03)  # a layer of a model worth handing over

    engine.layer_listener = written
    ids = [(7 * i) % 500 + 3 for i in range(70)]
    engine.assign(assign("r", ids, 8, stage="prefill"), loop.time())
    server.offer(KEY, protocol.HandoffOut(CAPABILITY), len(ids))
    source = protocol.HandoffIn(address, CAPABILITY, 20.0)
    transfer = asyncio.ensure_future(
        fetch(source, target.kv, [9, 8, 7, 6, 5], len(ids), CARRIERS[carrier])
    )
    thread = threading.Thread(target=lambda: engine.step(loop.time(), loop.time))
    thread.start()
    while thread.is_alive():
        await asyncio.sleep(0.001)
    server.ready(KEY, engine.blocks_of(*KEY), engine.first_ids(*KEY))
    fetched = await transfer
    assert fetched.first_ids == engine.first_ids(*KEY)
    for layer in range(8):
        source_blocks = engine.blocks_of(*KEY)
        assert (
            target.kv.read(layer, [9, 8, 7, 6, 5])[:64] == loaded.kv.read(layer, source_blocks)[:64]
        )
    (sent,) = server.sent_layers
    assert len(sent.computed_at_s) == len(sent.left_at_s) == 8
    early = [
        left < later for left, later in zip(sent.left_at_s, sent.computed_at_s[2:], strict=False)
    ]
    assert all(early), (sent.computed_at_s, sent.left_at_s)
    await server.close()
