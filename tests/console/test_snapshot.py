"""The in-memory copy of the settings rows, and the price of busy time."""

import threading
from typing import Any

import pytest
from django.db import connection

from console import costs
from console.models import ApiKey, Model, SLOClassRow, Tenant
from console.models.tenants import CONCURRENCY_DEFAULT
from console.snapshot import EMPTY, Snapshot, SnapshotKeeper, tenant_salt
from tests.console import rows


@pytest.fixture
def keeper(transactional_db: None) -> Any:
    keeper = SnapshotKeeper(poll_s=0.01)
    yield keeper
    keeper.stop()


@pytest.mark.django_db
def test_a_snapshot_holds_what_requests_are_checked_against() -> None:
    tenant = rows.make_tenant(concurrency_max=3)
    minted = rows.make_key(tenant)
    rows.make_model(gpu_hour_usd=1.5, folder="/m")
    rows.make_tenant("gone", is_active=False)
    snapshot = Snapshot.load()
    assert list(snapshot.tenants) == ["acme"]
    facts = snapshot.tenants["acme"]
    assert (facts.name, facts.default_class, facts.concurrency_max) == ("Acme", "interactive", 3)
    assert snapshot.keys[minted.public_id].secret_hmac == minted.secret_hmac
    model = snapshot.models[rows.MODEL_ID]
    assert (model.folder, model.max_model_len, model.gpu_hour_usd, model.is_active) == (
        "/m",
        512,
        1.5,
        True,
    )
    assert snapshot.classes["interactive"].slo.ttft_s_p99 == 0.5
    assert snapshot.class_of_tier("batch") == snapshot.classes["batch"]
    assert snapshot.class_of_tier("gold") is None


@pytest.mark.django_db
def test_defaults_stand_in_for_what_is_not_set(settings: Any) -> None:
    tenant = rows.make_tenant()
    tenant.quota.delete()
    settings.GPU_HOUR_USD = 7.0
    rows.make_model()
    snapshot = Snapshot.load()
    assert snapshot.tenants["acme"].concurrency_max == CONCURRENCY_DEFAULT
    assert snapshot.models[rows.MODEL_ID].gpu_hour_usd == 7.0


def test_tenants_have_salts_of_their_own_that_stay(settings: Any) -> None:
    assert tenant_salt("a") == tenant_salt("a")
    assert tenant_salt("a") != tenant_salt("b")
    before = tenant_salt("a")
    settings.SLACKWATER_PLANE_SECRET = b"another server"
    assert tenant_salt("a") != before


@pytest.mark.django_db
def test_a_refresh_loads_only_what_changed() -> None:
    changes: list[Snapshot] = []
    keeper = SnapshotKeeper(on_change=changes.append)
    assert keeper.current is EMPTY
    assert keeper.age_s() == float("inf")
    tenant = rows.make_tenant()
    first = keeper.refresh()
    assert keeper.refresh() is first
    assert keeper.age_s() < 60
    for change in (
        lambda: Tenant.objects.filter(pk=tenant.pk).update(name="New"),
        lambda: rows.make_key(tenant),
        lambda: rows.make_model(),
        lambda: SLOClassRow.objects.filter(name="flex").update(itl_s_p99=0.4),
        lambda: tenant.quota.delete(),
        lambda: ApiKey.objects.all().delete(),
        lambda: Model.objects.get().delete(),
    ):
        before = keeper.current
        change()
        assert keeper.refresh() is not before
    assert len(changes) == 8


def test_the_thread_notices_a_change(keeper: SnapshotKeeper) -> None:
    rows.make_tenant()
    noticed = threading.Event()
    keeper.start()
    keeper._on_change = lambda snapshot: noticed.set()
    Tenant.objects.all().update(is_active=False)
    assert noticed.wait(20)
    assert keeper.current.tenants == {}


def test_the_last_good_snapshot_stays_while_the_database_is_away(keeper: SnapshotKeeper) -> None:
    rows.make_tenant()
    keeper.start()
    assert "acme" in keeper.current.tenants
    table = Tenant._meta.db_table
    with connection.cursor() as cursor:
        cursor.execute(f"ALTER TABLE {table} RENAME TO {table}_away")
    try:
        for _ in range(2000):
            if keeper.num_failures:
                break
            threading.Event().wait(0.01)
        assert keeper.num_failures > 0
        assert "acme" in keeper.current.tenants
    finally:
        keeper.stop()
        with connection.cursor() as cursor:
            cursor.execute(f"ALTER TABLE {table}_away RENAME TO {table}")


def test_dollars_follow_busy_time_and_price() -> None:
    assert costs.busy_usd(3600.0, 3.0) == 3.0
    assert costs.usd_per_million(3600.0, 3.0, 1_000_000) == 3.0
    assert costs.usd_per_million(1.8, 2.0, 1000) == pytest.approx(1.0)
    assert costs.usd_per_million(0.0, 2.0, 10) == 0.0
    assert costs.usd_per_million(5.0, 2.0, 0) is None


def test_negative_time_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        costs.busy_usd(-1.0, 3.0)
    with pytest.raises(AssertionError):
        costs.usd_per_million(1.0, 3.0, -1)
