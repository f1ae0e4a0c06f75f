"""KV leaves layer by layer and chunk by chunk, through the connection or through shared memory."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from controlplane import protocol
from gpuworkers import handoff, handoffcarrier, handoffwire, runner
from gpuworkers.driver import ThreadDriver
from gpuworkers.engine import Engine, EngineConfig
from gpuworkers.fake import FakeKV
from gpuworkers.handoff import HandoffServer
from gpuworkers.handoffcarrier import Segment, Segments, SharedOutlet
from gpuworkers.handofffetch import Fetched, fetch
from gpuworkers.handoffwire import Place
from tests import skips
from tests.gpuworkers.enginekit import BATCH, EngineBench, ScriptedKV, ScriptedRunner, assign
from tests.gpuworkers.stubconsole import StubConsole
from tests.gpuworkers.stubconsole import assign as assign_to
from tests.gpuworkers.test_handoff import (
    CAPABILITY,
    HEAD_BYTES,
    HEADER_BYTES,
    KEY,
    OWN_BLOCKS,
    SOURCE_BLOCKS,
    FlipProxy,
    Sender,
    fetching,
    peer_sending,
    reason_of,
    until,
)
from tests.gpuworkers.test_server import running, send_pair
from tests.gpuworkers.test_server_torch import SAMPLINGS, TINY, torch_engine, undisturbed
from tests.gpuworkers.tinyllama import write_tiny

CARRIERS = ["tcp", "shared"]
LAYERS = range(2)
HANG_S = 20.0


def segments_for(carrier: str) -> Segments:
    """Room for shared memory, or none at all."""
    if carrier == "shared" and not Path("/proc/self/fd").exists():
        skips.missing("/proc")
    return Segments(1 if carrier == "shared" else 0)


@pytest.fixture
async def sender() -> AsyncIterator[Sender]:
    sender = Sender()
    sender.address = await sender.server.start("127.0.0.1")
    sender.offer()
    yield sender
    await sender.server.close()


def fetch_task(
    sender: Sender, kv: FakeKV, carrier: str, address: str = ""
) -> asyncio.Task[Fetched]:
    segments = segments_for(carrier)
    return asyncio.ensure_future(fetching(address or sender.address, kv, segments=segments))


def is_there(sender: Sender, kv: FakeKV, layer: int, num_blocks: int = 3) -> bool:
    """Do the leading blocks of a layer have what was sent, and the others nothing?"""
    rest = bytes((3 - num_blocks) * kv.layer_block_bytes)
    sent = sender.kv.read(layer, SOURCE_BLOCKS[:num_blocks])
    return kv.read(layer, OWN_BLOCKS) == sent + rest


# --- what leaves when


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_each_carrier_brings_the_same_blocks(sender: Sender, carrier: str) -> None:
    kv = FakeKV(8, 16)
    sender.ready()
    fetched = await fetch_task(sender, kv, carrier)
    assert (fetched.first_ids, fetched.carrier) == ([104], carrier)
    assert all(is_there(sender, kv, layer) for layer in LAYERS)
    assert kv.read(0, [1, 2, 4, 5, 7]) == bytes(5 * kv.layer_block_bytes)
    await until(lambda: sender.sent == [KEY])


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_a_layer_arrives_before_the_next_one_is_computed(
    sender: Sender, carrier: str
) -> None:
    kv = FakeKV(8, 16)
    transfer = fetch_task(sender, kv, carrier)
    sender.server.advance(KEY, SOURCE_BLOCKS, range(1), 3, 0.0)
    await until(lambda: is_there(sender, kv, 0))
    assert is_there(sender, kv, 1, 0) and not transfer.done()
    sender.server.advance(KEY, SOURCE_BLOCKS, range(1, 2), 3, 0.0)
    await until(lambda: is_there(sender, kv, 1))
    assert not transfer.done()  # the first id is not there yet
    sender.ready()
    assert (await transfer).first_ids == [104]


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_chunks_arrive_before_the_next_one_is_computed(sender: Sender, carrier: str) -> None:
    kv = FakeKV(8, 16)
    transfer = fetch_task(sender, kv, carrier)
    for num_blocks in (1, 2):
        sender.server.advance(KEY, SOURCE_BLOCKS, LAYERS, num_blocks, 0.0)
        await until(lambda n=num_blocks: all(is_there(sender, kv, layer, n) for layer in LAYERS))
    sender.server.advance(KEY, SOURCE_BLOCKS, range(1), 3, 0.0)
    sender.ready()
    await transfer
    assert all(is_there(sender, kv, layer) for layer in LAYERS)
    left = [(d.layer, d.first, d.end) for d in sender.server.departures]
    assert left == [(0, 0, 1), (1, 0, 1), (0, 1, 2), (1, 1, 2), (0, 2, 3), (1, 2, 3)]


async def test_a_peer_that_comes_late_gets_what_became_final_before(sender: Sender) -> None:
    kv = FakeKV(8, 16)
    sender.server.advance(KEY, SOURCE_BLOCKS, LAYERS, 1, 0.0)
    sender.server.advance(KEY, SOURCE_BLOCKS, range(1), 2, 0.0)
    transfer = fetch_task(sender, kv, "tcp")
    await until(lambda: is_there(sender, kv, 0, 2) and is_there(sender, kv, 1, 1))
    sender.ready()
    await transfer
    assert all(is_there(sender, kv, layer) for layer in LAYERS)


async def test_times_of_the_latest_departures_are_kept_up_to_the_maximum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(handoff, "DEPARTURES_KEPT_MAX", 1)
    sender = Sender()
    sender.address = await sender.server.start("127.0.0.1")
    sender.offer()
    sender.ready()
    await fetch_task(sender, FakeKV(8, 16), "tcp")
    assert [(d.layer, d.end) for d in sender.server.departures] == [(1, 3)]
    await sender.server.close()


def hook_calls(bench: EngineBench) -> list[tuple[int, int, int]]:
    """(first layer, layers, leading blocks that are final), as the engine tells them."""
    calls = []

    def heard(key, block_ids, layers, num_blocks) -> None:
        assert block_ids == bench.engine.blocks_of(*key)
        calls.append((layers.start, len(layers), num_blocks))

    bench.engine.layer_listener = heard
    return calls


class LayeredBench(EngineBench):
    """A runner that says at once that each layer is written."""

    def __init__(self, block_tokens: int = 16, **policy: int) -> None:
        scripted = ScriptedRunner()
        scripted.kv = ScriptedKV(64, block_tokens)
        super().__init__(scripted, EngineConfig(policy=protocol.Policy(**policy)))
        run = self.runner.run

        def layered(plan, layer_written=None):
            for layer in range(self.runner.kv.num_layers if layer_written else 0):
                layer_written(layer)
            return run(plan)

        self.runner.run = layered


def test_each_chunk_tells_its_full_blocks_and_the_last_one_all() -> None:
    bench = LayeredBench(chunk_tokens_max=32)
    calls = hook_calls(bench)
    bench.assign("r", 70, 8, stage="prefill")
    bench.run_dry()
    first, second = [(0, 1, 2), (1, 1, 2)], [(0, 2, 2), (0, 1, 4), (1, 1, 4)]
    assert calls == [*first, *second, (0, 2, 4), (0, 1, 5), (1, 1, 5)]


def test_a_block_that_the_next_chunk_goes_on_filling_is_told_with_that_chunk() -> None:
    bench = LayeredBench(block_tokens=64, chunk_tokens_max=48)
    calls = hook_calls(bench)
    bench.assign("r", 150, 8, stage="prefill")
    bench.run_dry()
    assert [end for start, count, end in calls if (start, count) == (0, 1)] == [0, 1, 2, 3]
    assert [end for start, count, end in calls if count == 2] == [1, 2]


def test_blocks_of_the_prefix_cache_are_told_before_the_step() -> None:
    bench = LayeredBench()
    bench.assign("before", 70, 1)
    bench.run_dry()
    calls = hook_calls(bench)
    bench.assign("r", 70, 8, stage="prefill")
    bench.step()
    assert calls == [(0, 2, 4), (0, 1, 5), (1, 1, 5)]


def test_nothing_is_told_of_prompts_that_stay_or_can_be_preempted() -> None:
    bench = LayeredBench()
    calls = hook_calls(bench)
    bench.assign("stays", 70, 4)
    bench.assign("batch", 70, 4, stage="prefill", targets=BATCH)
    bench.step()
    bench.step()
    assert calls == []


# --- a transfer that ends in the middle


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_a_prompt_that_ends_in_the_middle_ends_the_transfer(
    sender: Sender, carrier: str
) -> None:
    kv = FakeKV(8, 16)
    transfer = fetch_task(sender, kv, carrier)
    sender.server.advance(KEY, SOURCE_BLOCKS, range(1), 3, 0.0)
    await until(lambda: is_there(sender, kv, 0))
    sender.server.revoke(KEY)
    assert await reason_of(transfer) == "unreachable"
    assert sender.sent == sender.dropped == []


async def test_a_request_that_ends_with_its_prompt_refuses_what_it_sent(sender: Sender) -> None:
    transfer = fetch_task(sender, FakeKV(8, 16), "tcp")
    sender.server.advance(KEY, SOURCE_BLOCKS, LAYERS, 3, 0.0)
    await until(lambda: len(sender.server.departures) == 2)
    sender.server.revoke(KEY)
    assert await reason_of(transfer) == "refused"


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_a_peer_that_goes_while_the_prompt_is_computed_drops_it_at_once(
    sender: Sender, carrier: str
) -> None:
    transfer = fetch_task(sender, FakeKV(8, 16), carrier)
    sender.server.advance(KEY, SOURCE_BLOCKS, range(1), 3, 0.0)
    await until(lambda: len(sender.server.departures) == 1)
    transfer.cancel()
    await until(lambda: sender.dropped == [KEY])
    assert not sender.ready()


async def test_damage_on_the_way_is_found_in_the_piece_where_it_happened(sender: Sender) -> None:
    flip_at = HEADER_BYTES + HEAD_BYTES + 3
    kv = FakeKV(8, 16)
    async with FlipProxy(sender.address, flip_at=flip_at) as proxy:
        transfer = fetch_task(sender, kv, "tcp", proxy.address)
        sender.server.advance(KEY, SOURCE_BLOCKS, range(1), 3, 0.0)
        assert await reason_of(transfer) == "checksum"
    await until(lambda: sender.dropped == [KEY])
    assert is_there(sender, kv, 0, 0)


# --- shared memory


async def test_damage_in_shared_memory_is_a_checksum_failure(
    sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = SharedOutlet.put

    def damaged(self: SharedOutlet, index: int, head: bytes, data: bytes) -> None:
        put(self, index, head, bytes([data[0] ^ 1]) + data[1:])

    monkeypatch.setattr(SharedOutlet, "put", damaged)
    sender.ready()
    assert await reason_of(fetch_task(sender, FakeKV(8, 16), "shared")) == "checksum"
    await until(lambda: sender.dropped == [KEY])


async def test_shared_memory_is_closed_after_every_transfer(sender: Sender) -> None:
    segments = segments_for("shared")
    sender.ready()
    fetched = await fetching(sender.address, FakeKV(8, 16), segments=segments)
    assert fetched.carrier == "shared" and segments.num_open == 0
    await until(lambda: sender.sent == [KEY])
    assert own_segments() == []


def own_segments() -> list[str]:
    """Shared memory of ours that this process has open or mapped."""
    links = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        except FileNotFoundError:
            continue  # the listing's own
    found = [*links, *Path("/proc/self/maps").read_text().splitlines()]
    return [line for line in found if handoffcarrier.SEGMENT_NAME in line]


async def test_transfers_over_the_maximum_of_segments_use_the_connection(sender: Sender) -> None:
    segments = segments_for("shared")
    sender.ready()
    with segments.opened(16) as segment:
        assert segment is not None
        fetched = await fetching(sender.address, FakeKV(8, 16), segments=segments)
    assert fetched.carrier == "tcp"


@pytest.mark.parametrize(
    ("process", "descriptor", "token"),
    [(1 << 22, 3, None), (0, 9999, None), (0, None, bytes(16)), (0, 0, None)],
    ids=["no such process", "no such descriptor", "another's memory", "no memory at all"],
)
async def test_a_place_that_is_not_as_told_means_the_connection(
    process: int, descriptor: int | None, token: bytes | None
) -> None:
    with segments_for("shared").opened(64) as segment:
        told = segment.place
        place = Place(
            process or told.process,
            told.descriptor if descriptor is None else descriptor,
            token or told.token,
        )
        assert handoffcarrier.attach(place, 64, None).carrier == "tcp"
        assert handoffcarrier.attach(told, 63, None).carrier == "tcp"  # of another size
        outlet = handoffcarrier.attach(told, 64, None)
        assert outlet.carrier == "shared"
        outlet.close()


def test_shared_memory_cannot_shrink_under_the_sender() -> None:
    with segments_for("shared").opened(64) as segment:
        descriptor = os.open(f"/proc/self/fd/{segment.place.descriptor}", os.O_RDWR)
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, 0)
        os.close(descriptor)


async def test_shared_memory_that_was_not_offered_is_refused() -> None:
    kv = FakeKV(8, 16)
    header = handoffwire.pack_header(kv, handoffwire.digest_of(CAPABILITY), 3, 40, "shared")
    async with peer_sending(header) as address:
        assert await reason_of(fetching(address, kv)) == "malformed"


def test_slots_hold_as_many_pieces_as_may_be_on_their_way() -> None:
    segments_for("shared")
    segment = Segment(8)
    outlet = handoffcarrier.attach(segment.place, 8, NoConnection())
    for index in range(2, 2 + handoffwire.PIECES_AHEAD_MAX):
        outlet.put(index, b"", bytes([index] * 8))
    for index in range(2, 2 + handoffwire.PIECES_AHEAD_MAX):
        assert asyncio.run(segment.get(index, 8)) == bytes([index] * 8)
    outlet.close()
    segment.close()


class NoConnection:
    """Where a test looks at the memory only."""

    def write(self, data: bytes) -> None:
        assert data == b""


# --- with a real model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("layers"), num_hidden_layers=6)


@pytest.mark.parametrize("carrier", CARRIERS)
async def test_layer_i_leaves_before_layer_i_plus_2_is_computed(folder: Path, carrier: str) -> None:
    """A real forward pass in its own thread, in three chunks. It waits before layer i + 2 until
    layer i has left; were layers kept back until the prompt is computed, it would wait for ever.
    The order is then read from the recorded times."""
    source_runner, facts, _, model = runner.load(folder, "tiny", dtype="fp32", kv_tokens=1024)
    target, *_ = runner.load(folder, "tiny", dtype="fp32", kv_tokens=1024)
    policy = protocol.Policy(chunk_tokens_max=32)
    engine = Engine(source_runner, EngineConfig(policy=policy), model, facts, "prefill")
    loop = asyncio.get_running_loop()
    server = HandoffServer(source_runner.kv, [].append, [].append)
    address = await server.start("127.0.0.1")
    num_left = threading.Semaphore(2)  # layers that the computation may be ahead

    def layers_final(key, block_ids, layers, num_blocks) -> None:
        if len(layers) == 1:
            assert num_left.acquire(timeout=HANG_S), f"layer {layers.start - 2} does not leave"
        loop.call_soon_threadsafe(server.advance, key, block_ids, layers, num_blocks, loop.time())

    engine.layer_listener = layers_final
    ids = [(7 * i) % 500 + 3 for i in range(70)]
    own = [9, 8, 7, 6, 5]
    engine.assign(assign("r", ids, 8, stage="prefill"), loop.time())
    server.offer(KEY, protocol.HandoffOut(CAPABILITY), len(ids))
    into = protocol.HandoffIn(address, CAPABILITY, HANG_S)
    transfer = asyncio.ensure_future(fetch(into, target.kv, own, len(ids), segments_for(carrier)))
    steps = loop.run_in_executor(None, run_until_ready, engine, loop)
    seen = 0
    while not steps.done():
        await asyncio.sleep(0.001)
        for _ in range(len(server.departures) - seen):
            num_left.release()
        seen = len(server.departures)
    await steps
    assert server.ready(KEY, engine.blocks_of(*KEY), engine.first_ids(*KEY))
    fetched = await transfer
    assert (fetched.first_ids, fetched.carrier) == (engine.first_ids(*KEY), carrier)
    for layer in range(6):
        sent = source_runner.kv.read(layer, engine.blocks_of(*KEY))
        assert target.kv.read(layer, own) == sent and any(sent)
    departures = list(server.departures)
    assert [(d.layer, d.end) for d in departures] == [(i, n) for n in (2, 4, 5) for i in range(6)]
    for earlier, later in zip(departures, departures[2:], strict=False):
        assert earlier.final_at_s <= earlier.left_at_s < later.final_at_s, (earlier, later)
    await server.close()


def run_until_ready(engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
    while not engine.step(loop.time(), loop.time).ready:
        pass


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "seeded"])
async def test_output_of_a_chunked_prompt_with_a_cached_prefix_is_the_same_with_handoff(
    folder: Path, carrier: str, sampling: protocol.Sampling
) -> None:
    """The first blocks come from the prefix cache of the sender, the last one is partial."""
    prompt = [(7 * i) % 500 + 3 for i in range(70)]
    alone = await undisturbed(folder, sampling)
    engines = torch_engine(folder, "prefill"), torch_engine(folder, "decode")
    async with StubConsole() as console:
        console.policy = protocol.Policy(chunk_tokens_max=24)
        async with running(console, *engines, driver=ThreadDriver) as workers:
            workers[1]._segments = segments_for(carrier)
            await console.send("w1", assign_to("before", prompt[:40], 1, **TINY))
            await console.finished("before")
            await send_pair(console, prompt, 24, sampling=sampling, **TINY)
            assert await console.finished("r") == alone
            reports = [r for r in console.reports("r") if r.prefill_tokens]
            assert max(r.cached_tokens for r in reports) == 32 and len(reports) > 1
            departures = workers[0]._handoffs.departures
            assert {d.first for d in departures} > {0}
            assert console.of(protocol.HandoffDone, "r")
