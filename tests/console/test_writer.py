"""The writer thread: gathered facts, waited writes, and what happens when the database fails."""

import asyncio
import dataclasses
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from django.db import IntegrityError, OperationalError, connection

from console import writer as writer_module
from console.facts import PlanFact, RequestFact
from console.models import PlanRecord, RequestRecord, Tenant, Worker
from console.writer import CALLS_MAX, FactWriter, WorkerFact
from tests.console import rows

pytestmark = pytest.mark.django_db(transaction=True)

AT = datetime(2026, 11, 24, 12, tzinfo=UTC)


@pytest.fixture
def writer() -> Iterator[FactWriter]:
    writer = FactWriter(period_s=0.01)
    writer.start()
    yield writer
    writer.stop()


def fact(request_id: str, **values: Any) -> RequestFact:
    fields = dict.fromkeys((f.name for f in dataclasses.fields(RequestFact)), None)
    texts = ("key_id", "service_tier", "finish_reason", "error_code", "split")
    fields |= dict.fromkeys((*texts, "prefill_worker", "decode_worker"), "")
    numbers = ("prompt_tokens", "cached_tokens", "output_tokens", "failovers")
    fields |= dict.fromkeys((*numbers, "handoff_bytes", "handoff_recomputed_tokens"), 0)
    fields |= dict.fromkeys(("gpu_prefill_s", "gpu_decode_s"), 0.0)
    fields |= dict.fromkeys(("is_batch", "stream", "is_demo_history"), False)
    fields |= {
        "request_id": request_id,
        "tenant_id": "acme",
        "model_id": "m",
        "class_name": "interactive",
        "endpoint": "chat",
        "status": "completed",
        "arrived_at": AT,
        "e2e_ms": 12.5,
        "handoff_ms": 0.0,
        "decision": {"records": []},
    }
    return RequestFact(**{**fields, **values})


def test_the_columns_of_a_fact_are_those_of_its_row() -> None:
    for fact_type, row_type in ((RequestFact, RequestRecord), (PlanFact, PlanRecord)):
        columns = {field.name for field in row_type._meta.concrete_fields}
        names = {field.name for field in dataclasses.fields(fact_type)}
        assert names <= columns
        assert columns - names <= {"id", "is_demo_history"}


def test_facts_are_there_after_a_flush(writer: FactWriter) -> None:
    for index in range(700):
        writer.put(fact(f"r{index}"))
    writer.put(PlanFact(AT, "w1", "decode", "prefill", "planner", "more prompts"))
    asyncio.run(writer.flush())
    assert RequestRecord.objects.count() == 700
    row = RequestRecord.objects.get(request_id="r7")
    assert (row.e2e_ms, row.decision, row.arrived_at) == (12.5, {"records": []}, AT)
    assert PlanRecord.objects.get().reason == "more prompts"
    assert (writer.num_written, writer.num_waiting, writer.num_dropped) == (701, 0, 0)


def test_facts_are_written_without_anybody_waiting(writer: FactWriter) -> None:
    writer.put(fact("r1"))
    for _ in range(2000):
        if writer.num_written:
            break
        threading.Event().wait(0.01)
    assert RequestRecord.objects.filter(request_id="r1").exists()


def test_a_fact_that_comes_twice_is_stored_once(writer: FactWriter) -> None:
    writer.put(fact("r1", e2e_ms=1.0))
    writer.put(fact("r1", e2e_ms=2.0))
    asyncio.run(writer.flush())
    assert RequestRecord.objects.get().e2e_ms == 1.0


def test_the_ring_drops_the_oldest_at_its_maximum_and_counts() -> None:
    writer = FactWriter(facts_max=3)
    for index in range(5):
        writer.put(fact(f"r{index}"))
    assert (writer.num_waiting, writer.num_dropped) == (3, 2)
    writer.start()
    asyncio.run(writer.flush())
    writer.stop()
    assert set(RequestRecord.objects.values_list("request_id", flat=True)) == {"r2", "r3", "r4"}


def test_a_refused_fact_does_not_keep_the_others_out(writer: FactWriter) -> None:
    writer.put(fact("good"))
    writer.put(fact("bad", status=None))
    writer.put(fact("fine"))
    asyncio.run(writer.flush())
    assert set(RequestRecord.objects.values_list("request_id", flat=True)) == {"good", "fine"}
    assert (writer.num_refused, writer.num_written) == (1, 2)


def test_a_call_gives_its_result_after_the_commit(writer: FactWriter) -> None:
    def make(slug: str) -> int:
        return rows.make_tenant(slug).pk

    primary_key = asyncio.run(writer.call(make, "acme"))
    assert Tenant.objects.get(slug="acme").pk == primary_key


def test_a_failed_call_undoes_its_own_writes_only(writer: FactWriter) -> None:
    def spoil() -> None:
        rows.make_tenant("half")
        raise IntegrityError("spoilt")

    async def together() -> list[Any]:
        return await asyncio.gather(
            writer.call(rows.make_tenant, "one"),
            writer.call(spoil),
            writer.call(rows.make_tenant, "two"),
            return_exceptions=True,
        )

    writer.put(fact("r1"))
    outcomes = asyncio.run(together())
    assert isinstance(outcomes[1], IntegrityError)
    assert set(Tenant.objects.values_list("slug", flat=True)) == {"one", "two"}
    assert RequestRecord.objects.count() == 1


def test_a_call_that_nobody_awaits_any_more_is_not_run() -> None:
    writer = FactWriter()

    async def give_up() -> None:
        task = asyncio.create_task(writer.call(rows.make_tenant, "late"))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(give_up())
    writer.start()
    asyncio.run(writer.flush())
    writer.stop()
    assert not Tenant.objects.exists()


def test_waiting_calls_have_a_maximum() -> None:
    writer = FactWriter()

    async def crowd() -> None:
        tasks = [asyncio.create_task(writer.flush()) for _ in range(CALLS_MAX)]
        await asyncio.sleep(0)
        with pytest.raises(OperationalError, match=str(CALLS_MAX)):
            await writer.flush()
        writer.start()
        await asyncio.gather(*tasks)

    asyncio.run(crowd())
    writer.stop()


def test_facts_wait_while_the_database_is_away(writer: FactWriter) -> None:
    writer_module.RETRY_S, retry_s = 0.01, writer_module.RETRY_S
    table = RequestRecord._meta.db_table
    lost = OperationalError("the database went away")

    def fail() -> None:
        raise lost

    try:
        writer.put(fact("r1"))
        with pytest.raises(OperationalError):
            asyncio.run(writer.call(fail))
        writer.put(fact("r2"))
        asyncio.run(writer.flush())
    finally:
        writer_module.RETRY_S = retry_s
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT request_id FROM {table} ORDER BY id")
        assert [row[0] for row in cursor.fetchall()] == ["r1", "r2"]
    assert writer.num_dropped == 0


def test_stopping_writes_what_is_there_and_then_takes_nothing(writer: FactWriter) -> None:
    writer.put(fact("last"))
    writer.stop()
    assert RequestRecord.objects.filter(request_id="last").exists()
    with pytest.raises(OperationalError, match="stopped"):
        asyncio.run(writer.flush())


def test_a_worker_has_one_row_that_follows_it(writer: FactWriter) -> None:
    later = AT.replace(hour=13)
    writer.put(WorkerFact("a", "w1", "decode", "native", "cpu", "live", AT))
    writer.put(WorkerFact("a", "w2", "prefill", "native", "cpu", "lost", later))
    asyncio.run(writer.flush())
    row = Worker.objects.get()
    assert (row.worker_id, row.role, row.status) == ("w2", "prefill", "lost")
    assert (row.joined_at, row.heard_at) == (AT, later)
