"""Rows and the rules of one row; the same on SQLite and PostgreSQL (test_models_services.py)."""

from datetime import timedelta
from typing import Any

import pytest
from django.core.exceptions import ValidationError
from django.db import IntegrityError, connection, transaction
from django.db.models import ProtectedError
from django.utils import timezone

from console.models import (
    Batch,
    BatchLine,
    File,
    Model,
    Quota,
    RequestRecord,
    SLOClassRow,
    Tenant,
    ensure_default_classes,
)
from console.models.fleet import DEFAULT_CLASSES
from console.models.tenants import CONCURRENCY_MAX
from controlplane.domain import SLOClass
from tests.console import rows

pytestmark = pytest.mark.django_db


def make_line(**values: Any) -> BatchLine:
    now = timezone.now()
    tenant = rows.make_tenant()
    file = File.objects.create(
        file_id="file-1", tenant=tenant, filename="f", purpose="batch", num_bytes=1, created_at=now
    )
    batch = Batch.objects.create(
        batch_id="batch_1",
        tenant=tenant,
        input_file=file,
        endpoint="/v1/completions",
        model_id=rows.MODEL_ID,
        completion_window="24h",
        num_lines=1,
        created_at=now,
        expires_at=now + timedelta(days=1),
    )
    fields = {"line_index": 0, "custom_id": "a", "model_id": rows.MODEL_ID, "body": {}}
    return BatchLine.objects.create(batch=batch, **{**fields, **values})


def test_an_installation_begins_with_the_four_shipped_classes() -> None:
    ensure_default_classes()  # the migration's rows are gone after a test that flushed
    found = {
        row.name: (row.rank, row.service_tier, row.ttft_s_p99, row.itl_s_p99, row.deadline_s)
        for row in SLOClassRow.objects.all()
    }
    assert found == {
        "interactive": (0, "priority", 0.5, 0.03, None),
        "standard": (1, "default", 2.0, 0.1, None),
        "flex": (2, "flex", 10.0, 0.2, None),
        "batch": (3, "batch", 86_400.0, 60.0, 86_400.0),
    }


def test_shipped_classes_are_valid_and_come_back_when_deleted_but_keep_edits() -> None:
    ensure_default_classes()
    for row in SLOClassRow.objects.all():
        row.full_clean()
    SLOClassRow.objects.filter(name="flex").delete()
    SLOClassRow.objects.filter(name="standard").update(ttft_s_p99=3.0)
    assert ensure_default_classes() == 1
    assert SLOClassRow.objects.count() == len(DEFAULT_CLASSES)
    assert SLOClassRow.objects.get(name="standard").ttft_s_p99 == 3.0


def test_a_class_reads_as_the_plane_wants_it() -> None:
    ensure_default_classes()
    assert SLOClassRow.objects.get(name="interactive").as_domain() == SLOClass(
        name="interactive", rank=0, ttft_s_p99=0.5, itl_s_p99=0.03, queue_s_max=30.0
    )


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"deadline_s": 60.0}, "deadline_s"),
        ({"is_batch": True}, "deadline_s"),
        ({"is_batch": True, "deadline_s": 60.0}, "service_tier"),
        ({"ttft_s_p99": 0.0}, "ttft_s_p99"),
        ({"itl_s_p99": 1e9}, "itl_s_p99"),
        ({"rank": 100}, "rank"),
        ({"name": "Has Space"}, "name"),
        ({"price_factor": -1.0}, "price_factor"),
        ({"service_tier": "gold"}, "service_tier"),
    ],
)
def test_an_impossible_class_is_refused(change: dict[str, Any], field: str) -> None:
    ensure_default_classes()
    row = SLOClassRow.objects.get(name="interactive")
    for name, value in change.items():
        setattr(row, name, value)
    with pytest.raises(ValidationError) as raised:
        row.full_clean()
    assert field in raised.value.message_dict


def test_a_tier_selects_one_class_only() -> None:
    ensure_default_classes()
    with pytest.raises(IntegrityError), transaction.atomic():
        SLOClassRow.objects.create(
            name="vip", rank=0, service_tier="priority", ttft_s_p99=1, itl_s_p99=1
        )


@pytest.mark.parametrize("slug", ["", "Acme", "-acme", "a b", "a/b", "x" * 65, "a\n"])
def test_a_slug_that_could_not_stand_in_a_url_is_refused(slug: str) -> None:
    tenant = rows.make_tenant()
    tenant.slug = slug
    with pytest.raises(ValidationError):
        tenant.full_clean()


def test_the_default_class_of_a_tenant_cannot_be_deleted() -> None:
    tenant = rows.make_tenant()
    with pytest.raises(ProtectedError):
        tenant.default_class.delete()


@pytest.mark.parametrize("limit", [0, CONCURRENCY_MAX + 1])
def test_a_quota_outside_its_bounds_is_refused(limit: int) -> None:
    quota = Quota(tenant=rows.make_tenant(), concurrency_max=limit)
    with pytest.raises(ValidationError):
        quota.full_clean()
    Quota.objects.all().delete()
    Quota(tenant=Tenant.objects.get(), concurrency_max=CONCURRENCY_MAX).full_clean()


def test_a_model_id_may_look_like_a_hub_name() -> None:
    Model(model_id="HuggingFaceTB/SmolLM2-135M", max_model_len=16).full_clean()
    for bad in ("../x", "x/", "a b", "<img>"):
        with pytest.raises(ValidationError):
            Model(model_id=bad, max_model_len=16).full_clean()


def test_a_bulk_update_moves_the_time_of_change() -> None:
    tenant = rows.make_tenant()
    Tenant.objects.filter(pk=tenant.pk).update(name="New")
    assert Tenant.objects.get().updated_at > tenant.updated_at


def test_a_request_is_stored_once() -> None:
    fields = {"tenant_id": "a", "model_id": "m", "class_name": "c", "arrived_at": timezone.now()}
    RequestRecord.objects.create(request_id="r1", **fields)
    with pytest.raises(IntegrityError), transaction.atomic():
        RequestRecord.objects.create(request_id="r1", **fields)


def test_a_line_is_claimed_by_one_and_finished_by_its_holder_only() -> None:
    line, until = make_line(), timezone.now() + timedelta(minutes=1)
    assert BatchLine.claim(line.pk, "one", until)
    assert not BatchLine.claim(line.pk, "two", until)
    assert not BatchLine.finish(line.pk, "two", "completed", response={"n": 2})
    assert BatchLine.finish(line.pk, "one", "completed", response={"n": 1})
    assert not BatchLine.finish(line.pk, "one", "failed")
    line.refresh_from_db()
    assert (line.status, line.response, line.attempts, line.claimed_by) == (
        "completed",
        {"n": 1},
        1,
        "",
    )
    assert not BatchLine.claim(line.pk, "two", until)


def test_a_custom_id_is_in_a_batch_once() -> None:
    line = make_line()
    with pytest.raises(IntegrityError), transaction.atomic():
        BatchLine.objects.create(
            batch=line.batch, line_index=1, custom_id="a", model_id="m", body={}
        )


def test_a_batch_moves_only_from_the_status_it_is_in() -> None:
    batch = make_line().batch
    assert Batch.move(batch.pk, ("in_progress",), "cancelling")
    assert not Batch.move(batch.pk, ("in_progress",), "completed")
    batch.refresh_from_db()
    assert batch.status == "cancelling"


def test_counts_name_every_status() -> None:
    batch = make_line(status="failed").batch
    assert batch.counts() == {
        "pending": 0,
        "claimed": 0,
        "completed": 0,
        "failed": 1,
        "cancelled": 0,
        "expired": 0,
    }


def test_sqlite_begins_transactions_immediately_and_writes_ahead() -> None:
    if connection.vendor == "sqlite":
        assert connection.transaction_mode == "IMMEDIATE"
        with connection.cursor() as cursor:
            mode = cursor.execute("PRAGMA journal_mode").fetchone()[0]
        assert mode == "wal"
