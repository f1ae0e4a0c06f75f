"""The feeder: nothing lost, nothing repeated, never more in flight than allowed."""

import asyncio
import contextlib
import hashlib
import json
import os
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from channels.db import database_sync_to_async
from django.db import OperationalError
from django.utils import timezone

from console import batchclaims, batchlines
from console.apierrors import ApiError
from console.batchclaims import ATTEMPTS_MAX, LEASE, ClaimedLine
from console.batches import PAUSE_S_MAX, PAUSE_S_MIN, BatchFeeder
from console.generation import PLAIN, Refusal
from console.incarnation import is_dead, new_incarnation
from console.models import Batch, BatchLine, Tenant
from console.snapshot import Snapshot
from console.tokens import Tokenizers
from console.writer import FactWriter
from controlplane import domain, protocol
from controlplane.backfill import allot
from tests.console import rows
from tests.console.memoryserver import MODEL_ID, MemoryServer
from tests.factories import make_load

pytestmark = pytest.mark.django_db(transaction=True)

GUARD_S = 60.0
DEAD = f"{socket.gethostname()[:64]}:{os.getpid()}:1:dead0000"  # our process id, another start


def speak(assign: protocol.Assign) -> list[int]:
    """An output that depends on the prompt only, as greedy decoding does."""
    digest = hashlib.sha256(bytes(i % 256 for i in assign.prompt_ids)).hexdigest()
    return list(digest[:12].encode())


@pytest.fixture
def tenant(settings: Any, tmp_path: Path) -> Tenant:
    settings.SLACKWATER_VAR = tmp_path / "var"
    rows.make_model(MODEL_ID, max_model_len=1024)
    return rows.make_tenant()


@pytest.fixture
def writer() -> Iterator[FactWriter]:
    writer = FactWriter(period_s=0.001)
    writer.start()
    yield writer
    writer.stop()


def submit(tenant: Tenant, folder: Path, num_lines: int = 6, **body: Any) -> Batch:
    lines = [
        rows.line(f"c{index}", **{"model": MODEL_ID, "max_tokens": 32, "temperature": 0, **body})
        for index in range(num_lines)
    ]
    path = rows.write_lines(folder / "in.jsonl", lines)
    batch = rows.batchfiles.submit(tenant, path, "24h", timezone.now(), [MODEL_ID])
    assert isinstance(batch, Batch), batch
    return batch


class Lane:
    """A feeder beside a serving path in memory."""

    def __init__(self, writer: FactWriter, snapshot: Snapshot, **options: Any) -> None:
        self.server = MemoryServer(num_workers=options.pop("num_workers", 1), snapshot=snapshot)
        for worker in self.server.workers:
            worker.script = options.pop("script", speak)
        keeper = SimpleNamespace(current=snapshot)
        gateway = options.pop("gateway", self.server.gateway)
        self.feeder = BatchFeeder(
            gateway, self.server.fleet, writer, keeper, Tokenizers(), poll_s=0.01, **options
        )

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(GUARD_S):
            while not is_so():
                await self.tick()

    async def until_rows(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(GUARD_S):
            while not await database_sync_to_async(is_so)():
                await self.tick()

    async def tick(self) -> None:
        for worker in self.server.workers:
            self.server.fleet.received(worker.name, protocol.Heartbeat(make_load(), 0.0))
        self.server.fleet.tick()
        await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def feeding(lane: Lane) -> AsyncIterator[Lane]:
    task = asyncio.create_task(lane.feeder.run())
    try:
        yield lane
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def run_to_the_end(writer: FactWriter, batch: Batch, **options: Any) -> Lane:
    snapshot = Snapshot.load()

    async def run() -> Lane:
        async with feeding(Lane(writer, snapshot, **options)) as lane:
            await lane.until_rows(lambda: is_ended(batch))
            return lane

    return asyncio.run(run())


def is_ended(batch: Batch) -> bool:
    batch.refresh_from_db()
    return batch.ended_at is not None


def texts(batch: Batch) -> dict[str, str]:
    """custom_id -> text of the output file; every id at most once."""
    assert batch.output_file is not None
    found = {}
    for raw in Path(batch.output_file.path).read_text().splitlines():
        line = json.loads(raw)
        assert line["custom_id"] not in found, "a custom_id twice"
        found[line["custom_id"]] = line["response"]["body"]["choices"][0]["message"]["content"]
    return found


def test_every_line_is_answered_once_in_the_batch_class(
    tenant: Tenant, writer: FactWriter, tmp_path: Path
) -> None:
    batch = submit(tenant, tmp_path, 20)
    lane = run_to_the_end(writer, batch)
    assert batch.status == "completed"
    assert set(texts(batch)) == {f"c{index}" for index in range(20)}
    assert len(set(texts(batch).values())) == 20
    assigned = lane.server.worker.assigned
    assert len(assigned) == 20
    assert all(assign.targets.is_batch for assign in assigned)
    facts = lane.server.request_facts()
    assert {(fact.endpoint, fact.service_tier, fact.is_batch) for fact in facts} == {
        ("batch", "batch", True)
    }
    line = BatchLine.objects.get(custom_id="c3")
    assert (line.attempts, line.claimed_by, line.error) == (1, "", None)
    assert line.request_id in {fact.request_id for fact in facts}


def test_an_answer_has_the_shape_of_openai(
    tenant: Tenant, writer: FactWriter, tmp_path: Path
) -> None:
    batch = submit(tenant, tmp_path, 1)
    run_to_the_end(writer, batch)
    assert batch.output_file is not None
    row = json.loads(Path(batch.output_file.path).read_text())
    assert (row["error"], row["response"]["status_code"]) == (None, 200)
    body = row["response"]["body"]
    assert body["object"] == "chat.completion"
    assert body["service_tier"] == "batch"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == 12


def test_no_more_lines_are_in_flight_than_allowed(
    tenant: Tenant, writer: FactWriter, tmp_path: Path
) -> None:
    batch = submit(tenant, tmp_path, 9)
    snapshot = Snapshot.load()

    async def run() -> None:
        lane = Lane(writer, snapshot, lines_max=4)
        lane.server.worker.gate = gate = asyncio.Event()
        async with feeding(lane):
            await lane.until(lambda: len(lane.server.worker.assigned) == 4)
            for _ in range(20):
                lane.feeder.wake()
                await asyncio.sleep(0.005)
            assert lane.feeder.num_in_flight == 4
            assert len(lane.server.worker.assigned) == 4
            gate.set()
            await lane.until_rows(lambda: is_ended(batch))

    asyncio.run(run())
    assert len(texts(batch)) == 9


@pytest.mark.parametrize("num_done", [0, 1, 4, 7, 9])
def test_a_killed_server_loses_and_repeats_nothing(
    tenant: Tenant, writer: FactWriter, tmp_path: Path, num_done: int
) -> None:
    undisturbed = submit(tenant, tmp_path, 10)
    run_to_the_end(writer, undisturbed)
    batch = submit(tenant, tmp_path, 10)
    snapshot = Snapshot.load()

    async def run_and_die() -> None:
        own_writer = FactWriter(period_s=0.001)
        own_writer.start()
        lane = Lane(own_writer, snapshot, lines_max=3)
        lane.feeder.incarnation = DEAD
        worker, send = lane.server.worker, lane.server.worker.send

        def hold(message: Any) -> None:
            if isinstance(message, protocol.Assign) and len(worker.assigned) >= num_done:
                return  # the later ones are under way when the server dies
            send(message)

        worker.send = hold  # type: ignore[method-assign]
        num_claimed = min(3, 10 - num_done)
        async with feeding(lane):
            await lane.until_rows(
                lambda: (
                    batch.counts()["completed"] == num_done
                    and batch.counts()["claimed"] == num_claimed
                )
            )
            own_writer.stop()  # from here on nothing reaches the database, as after a kill

    asyncio.run(run_and_die())
    done = set(batch.lines.filter(status="completed").values_list("custom_id", flat=True))
    claimed = batch.lines.filter(status="claimed", claimed_by=DEAD).count()
    assert len(done) + claimed + batch.lines.filter(status="pending").count() == 10

    lane = run_to_the_end(writer, batch)
    assert batch.status == "completed"
    assert texts(batch) == texts(undisturbed)
    assert len(lane.server.worker.assigned) == 10 - len(done)  # nothing finished is repeated


def take(incarnation: str, now: Any, lines: int = 8) -> tuple[ClaimedLine, ...]:
    """As many lines as asked for, earliest deadline first."""
    found = batchclaims.look({}, lines, now)
    return batchclaims.claim(allot(found.open, lines, is_tight=True), incarnation, now)


def test_lines_of_a_living_run_are_left_alone(tenant: Tenant, tmp_path: Path) -> None:
    batch, now = submit(tenant, tmp_path, 2), timezone.now()
    living = new_incarnation()
    assert len(take(living, now)) == 2
    assert batchclaims.release_dead("other", now) == 0
    assert batchclaims.renew(living, now + timedelta(seconds=30)) == 2
    assert batchclaims.release_dead("other", now + LEASE) == 0
    assert batchclaims.release_dead("other", now + LEASE + timedelta(seconds=31)) == 2
    assert batch.counts()["pending"] == 2


def test_a_run_that_lost_its_lease_cannot_store_its_result(tenant: Tenant, tmp_path: Path) -> None:
    submit(tenant, tmp_path, 1)
    now = timezone.now()
    stalled, other = "elsewhere:1:1:aaaa", "elsewhere:1:1:bbbb"
    [line] = take(stalled, now)
    assert batchclaims.release_dead(other, now + LEASE) == 1
    [again] = take(other, now)
    assert (again.line_pk, again.attempts) == (line.line_pk, 2)
    assert not BatchLine.finish(line.line_pk, stalled, "completed", response={"by": "stalled"})
    assert not batchclaims.release(line.line_pk, stalled, 0)
    assert BatchLine.finish(line.line_pk, other, "completed", response={"by": "other"})
    assert BatchLine.objects.get().response == {"by": "other"}


def test_two_feeders_share_the_lines(tenant: Tenant, writer: FactWriter, tmp_path: Path) -> None:
    batch = submit(tenant, tmp_path, 24)
    snapshot = Snapshot.load()

    async def run() -> list[Lane]:
        one, two = (Lane(writer, snapshot, lines_max=3) for _ in range(2))
        async with feeding(one), feeding(two):
            await one.until_rows(lambda: is_ended(batch))
        return [one, two]

    lanes = asyncio.run(run())
    assert len(texts(batch)) == 24
    assert sum(len(lane.server.worker.assigned) for lane in lanes) == 24


def test_the_earliest_deadline_runs_first(tenant: Tenant, tmp_path: Path) -> None:
    late = submit(tenant, tmp_path, 2)
    soon = submit(tenant, tmp_path, 2)
    now = timezone.now()
    Batch.objects.filter(pk=soon.pk).update(expires_at=now + timedelta(hours=1))
    assert take("r", now, 0) == ()
    assert [line.batch_pk for line in take("r", now, 3)] == [soon.pk, soon.pk, late.pk]


def test_neighbours_by_prefix_are_claimed_together(tenant: Tenant, tmp_path: Path) -> None:
    batch = submit(tenant, tmp_path, 4)
    for index, key in enumerate(("b", "a", "b", "a")):
        batch.lines.filter(line_index=index).update(prefix_key=key)
    claimed = take("r", timezone.now(), 3)
    assert [line.custom_id for line in claimed] == ["c1", "c3", "c0"]


def test_a_stopped_server_gives_its_lines_back_untried(
    tenant: Tenant, writer: FactWriter, tmp_path: Path
) -> None:
    batch = submit(tenant, tmp_path, 5)
    snapshot = Snapshot.load()

    async def run() -> Lane:
        lane = Lane(writer, snapshot, lines_max=3)
        lane.server.worker.gate = asyncio.Event()
        async with feeding(lane):
            await lane.until(lambda: len(lane.server.worker.assigned) == 3)
        return lane

    lane = asyncio.run(run())
    assert batch.counts()["pending"] == 5
    assert set(batch.lines.values_list("attempts", "claimed_by")) == {(0, "")}
    assert lane.feeder.num_in_flight == 0
    assert len(lane.server.worker.cancelled) == 3


def test_lines_wait_for_a_worker(tenant: Tenant, writer: FactWriter, tmp_path: Path) -> None:
    batch = submit(tenant, tmp_path, 3)
    snapshot = Snapshot.load()

    async def run() -> None:
        lane = Lane(writer, snapshot)
        worker = lane.server.worker
        worker.die()
        async with feeding(lane):
            await asyncio.sleep(0.2)
            assert await database_sync_to_async(batch.lines.filter(status="completed").count)() == 0
            worker.join()
            await lane.until_rows(lambda: is_ended(batch))

    asyncio.run(run())
    assert batch.status == "completed"
    assert len(texts(batch)) == 3


def test_a_line_that_can_never_run_fails_and_the_others_go_on(
    tenant: Tenant, writer: FactWriter, tmp_path: Path
) -> None:
    batch = submit(tenant, tmp_path, 3)
    BatchLine.objects.filter(custom_id="c1").update(body={"model": MODEL_ID, "colour": "red"})
    run_to_the_end(writer, batch)
    assert batch.status == "completed"
    assert set(texts(batch)) == {"c0", "c2"}
    assert batch.error_file is not None
    row = json.loads(Path(batch.error_file.path).read_text())
    assert (row["custom_id"], row["response"]["status_code"]) == ("c1", 400)
    assert row["error"]["code"] == row["response"]["body"]["error"]["code"]


def test_a_window_that_ends_keeps_what_was_done(
    tenant: Tenant, writer: FactWriter, tmp_path: Path
) -> None:
    batch = submit(tenant, tmp_path, 3)
    first = batch.lines.order_by("pk")[0]
    answer = {"status_code": 200, "body": {"choices": [{"message": {"content": "done"}}]}}
    BatchLine.objects.filter(pk=first.pk).update(status="completed", response=answer)
    Batch.objects.update(expires_at=timezone.now())
    lane = run_to_the_end(writer, batch)
    assert batch.status == "expired"
    assert texts(batch) == {"c0": "done"}
    assert batch.counts()["expired"] == 2
    assert lane.server.worker.assigned == []


def test_a_cancelled_batch_stops_the_lines_in_hand(
    tenant: Tenant, writer: FactWriter, tmp_path: Path
) -> None:
    batch = submit(tenant, tmp_path, 6)
    snapshot = Snapshot.load()

    async def run() -> Lane:
        lane = Lane(writer, snapshot, lines_max=2)
        lane.server.worker.gate = asyncio.Event()
        async with feeding(lane):
            await lane.until(lambda: len(lane.server.worker.assigned) == 2)
            cancel = database_sync_to_async(batchclaims.cancel)
            assert await cancel(batch.batch_id, timezone.now())
            assert not await cancel(batch.batch_id, timezone.now())
            await lane.until_rows(lambda: is_ended(batch))
        return lane

    lane = asyncio.run(run())
    assert batch.status == "cancelled"
    assert batch.counts()["cancelled"] == 6
    assert len(lane.server.worker.cancelled) == 2
    assert not batchclaims.cancel("batch_none", timezone.now())


class BrokenGateway:
    """Raises for one prompt, as a bug in our own code would."""

    def __init__(self, good: Any) -> None:
        self.calls: Counter[str] = Counter()
        self.good = good

    async def collect(self, spec: Any) -> Any:
        text = bytes(i for i in spec.prompt_ids if i < 256).decode()
        custom_id = "c1" if "say c1" in text else "other"
        self.calls[custom_id] += 1
        if custom_id == "c1":
            raise RuntimeError("a bug")
        return await self.good.collect(spec)


def test_a_bug_in_one_line_ends_that_line_after_three_runs(
    tenant: Tenant, writer: FactWriter, tmp_path: Path
) -> None:
    batch = submit(tenant, tmp_path, 3)
    snapshot = Snapshot.load()

    async def run() -> BrokenGateway:
        lane = Lane(writer, snapshot)
        gateway = BrokenGateway(lane.server.gateway)
        lane.feeder._gateway = gateway  # type: ignore[assignment]
        async with feeding(lane):
            await lane.until_rows(lambda: is_ended(batch))
        assert lane.feeder.num_failed_runs == ATTEMPTS_MAX
        return gateway

    gateway = asyncio.run(run())
    assert gateway.calls == {"c1": ATTEMPTS_MAX, "other": 2}
    assert set(texts(batch)) == {"c0", "c2"}
    assert BatchLine.objects.get(custom_id="c1").error["code"] == "internal_error"


class FlakyWriter(FactWriter):
    """A writer whose database is away at every third call."""

    calls = 0

    async def call(self, function: Any, *args: Any) -> Any:
        self.calls += 1
        if self.calls % 3 == 0:
            raise OperationalError("the database is away")
        return await super().call(function, *args)


def test_results_wait_for_the_database(tenant: Tenant, tmp_path: Path) -> None:
    batch = submit(tenant, tmp_path, 6)
    writer = FlakyWriter(period_s=0.001)
    writer.start()
    lane = run_to_the_end(writer, batch, lines_max=2)
    writer.stop()
    assert len(texts(batch)) == 6
    assert len(lane.server.worker.assigned) == 6


def test_a_pause_doubles_up_to_its_maximum(writer: FactWriter) -> None:
    feeder = BatchFeeder(None, None, writer, None, None)  # type: ignore[arg-type]
    pauses = []
    for _ in range(8):
        feeder._pause("m")
        pauses.append(feeder._pause_s["m"])
    assert pauses[0] == 2 * PAUSE_S_MIN
    assert pauses[-1] == PAUSE_S_MAX


# --- one line --------------------------------------------------------------------------------


def claimed(**changes: Any) -> ClaimedLine:
    fields = {
        "line_pk": 1,
        "batch_pk": 1,
        "batch_id": "batch_1",
        "tenant_id": "acme",
        "custom_id": "a",
        "model_id": MODEL_ID,
        "url": "/v1/completions",
        "body": {"model": MODEL_ID, "prompt": "Hi"},
        "attempts": 1,
    }
    return ClaimedLine(**{**fields, **changes})


def test_a_line_without_a_seed_draws_from_its_identity(tenant: Tenant) -> None:
    snapshot, tokenizers = Snapshot.load(), Tokenizers()

    def seed(**changes: Any) -> int:
        spec = batchlines.spec_of_line(claimed(**changes), snapshot, tokenizers)
        assert not isinstance(spec, ApiError)
        assert (spec.is_batch, spec.is_seeded, spec.slo.name) == (True, True, "batch")
        return spec.sampling.seed

    assert seed() == seed()
    assert seed() != seed(custom_id="b")
    assert seed(body={"model": MODEL_ID, "prompt": "Hi", "seed": 7}) == 7


def test_a_line_of_a_tenant_that_is_gone_fails(tenant: Tenant) -> None:
    error = batchlines.spec_of_line(claimed(tenant_id="gone"), Snapshot.load(), Tokenizers())
    assert isinstance(error, ApiError)
    assert error.status == 403


@pytest.mark.parametrize(
    ("code", "is_kept"),
    [("queue_full", True), ("no_worker", True), ("draining", True), ("prompt_too_long", False)],
)
def test_what_time_can_heal_keeps_the_line_pending(code: str, is_kept: bool) -> None:
    refusal = Refusal(domain.Rejected(code, "why", 1.0))
    answer = batchlines.of_outcome(claimed(), PLAIN, refusal)
    assert isinstance(answer, batchlines.NotNow) == is_kept


# --- runs of processes -----------------------------------------------------------------------


def test_this_run_is_alive_and_an_earlier_one_is_dead() -> None:
    mine = new_incarnation()
    assert not is_dead(mine)
    assert is_dead(DEAD)
    host, _, _, chance = mine.split(":")
    assert is_dead(f"{host}:{2**22 + 1}:5:{chance}")
    assert not is_dead(f"elsewhere:{2**22 + 1}:5:{chance}")
    assert new_incarnation() != mine


def test_a_held_lane_takes_no_line_until_it_is_released(
    tenant: Tenant, writer: FactWriter, tmp_path: Path
) -> None:
    batch = submit(tenant, tmp_path)
    snapshot = Snapshot.load()

    async def run() -> int:
        lane = Lane(writer, snapshot)
        lane.feeder.hold()
        async with feeding(lane):
            for _ in range(20):
                await lane.tick()
            num_taken_while_held = lane.feeder.num_in_flight
            lane.feeder.release()
            await lane.until_rows(lambda: is_ended(batch))
            return num_taken_while_held

    assert asyncio.run(run()) == 0
    assert Counter(line.status for line in BatchLine.objects.all()) == {"completed": 6}
