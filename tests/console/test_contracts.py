"""Contracts as rows: what the plane gets, what may not be promised, spend over a restart."""

import asyncio
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from django.core.exceptions import ValidationError
from django.test import Client
from django.urls import reverse

from console import contracts, state
from console.contracts import ContractFeed
from console.models import ContractRow, RequestRecord, SLOClassRow
from console.snapshot import Snapshot, SnapshotKeeper
from controlplane import domain
from controlplane.config import ControlPlaneConfig
from controlplane.plane import ControlPlane
from tests import factories
from tests.console import rows

pytestmark = pytest.mark.django_db

NOVEMBER = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
DECEMBER = datetime(2026, 12, 1, 0, 0, tzinfo=UTC)


def make_contract(**values: object) -> ContractRow:
    tenant = rows.make_tenant()
    defaults = {
        "tenant": tenant,
        "model": rows.make_model(factories.MODEL.model_id),
        "slo_class": SLOClassRow.objects.get(name="interactive"),
        "requests_per_min": 60,
        "tokens_per_min": 600,
        "concurrency_max": 4,
        "over_limit": "surplus",
        "when_late": "reject",
    }
    return ContractRow.objects.create(**defaults | values)


def test_the_plane_gets_contracts_with_their_period_once_and_again_when_the_month_turns() -> None:
    make_contract(budget_tokens=1000)
    snapshot, feed = Snapshot.load(), ContractFeed()
    first = feed.start(snapshot, NOVEMBER)
    (contract,) = first.contracts
    assert contract.key == ("acme", factories.MODEL.model_id, "interactive")
    assert (contract.period, contract.when_late, contract.itl_s) == ("2026-11", "reject", 0.03)
    assert feed.next(snapshot, NOVEMBER) is None
    again = feed.next(snapshot, DECEMBER)
    assert again is not None and again.contracts[0].period == "2026-12"


def test_what_this_month_already_used_counts_after_a_restart() -> None:
    make_contract(usd_per_million_prompt=1.0, usd_per_million_output=2.0)
    facts = {
        "tenant_id": "acme",
        "model_id": factories.MODEL.model_id,
        "class_name": "interactive",
        "decode_worker": "w1",
        "prompt_tokens": 100,
        "output_tokens": 10,
        "status": "completed",
        "arrived_at": NOVEMBER,
    }
    other = {"status": "failed"}, {"decode_worker": ""}, {"tenant_id": "b"}, {"class_name": "flex"}
    before = {"arrived_at": NOVEMBER.replace(month=10)}
    for index, changed in enumerate(({}, *other, before)):
        RequestRecord.objects.create(request_id=f"r{index}", **facts | changed)
    (spent,) = ContractFeed().start(Snapshot.load(), NOVEMBER).spent
    assert spent.tokens == 110 and spent.usd == pytest.approx(120e-6)


def test_fewer_tokens_than_requests_are_refused() -> None:
    row = make_contract()
    row.tokens_per_min = 59
    with pytest.raises(ValidationError):
        row.full_clean()


class PlaneFleet:
    """A real ControlPlane with one worker behind the calls that the form makes."""

    def __init__(self) -> None:
        self.plane = ControlPlane(ControlPlaneConfig(), b"secret of this test")
        hello = domain.WorkerHello("c1", factories.make_hello("decode"))
        self.plane.handle(hello, 1.0, lambda: 0.5)
        self.preview = self.plane.preview


@pytest.fixture
def server() -> Iterator[SimpleNamespace]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = SimpleNamespace(fleet=PlaneFleet(), loop=loop, snapshot=SnapshotKeeper())
    server.call = lambda *args, **options: state.ServerState.call(server, *args, **options)
    state.current = server
    yield server
    state.current = None
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def form_of(row: ContractRow, **changed: object) -> dict[str, object]:
    names = ("requests_per_min", "tokens_per_min", "concurrency_max", "attainment", "over_limit")
    more = ("when_late", "usd_per_million_prompt", "usd_per_million_output")
    return {name: getattr(row, name) for name in names + more} | changed


def test_a_promise_that_the_workers_cannot_keep_is_refused_with_the_numbers(
    client: Client, server: SimpleNamespace
) -> None:
    SLOClassRow.objects.filter(name="interactive").update(itl_s_p99=0.2)
    row = make_contract()
    SLOClassRow.objects.filter(name="interactive").update(itl_s_p99=0.2)
    client.force_login(rows.make_operator())
    client.defaults["HTTP_HOST"] = "localhost"
    url = reverse("admin:console_contractrow_change", args=[row.pk])
    refused = client.post(url, form_of(row, tokens_per_min=90_000))
    assert refused.status_code == 200
    assert b"GPU-s/s" in refused.content and b"1 workers give 1.00" in refused.content
    assert ContractRow.objects.get().tokens_per_min == 600
    taken = client.post(url, form_of(row, tokens_per_min=700), follow=True)
    assert b"contracts need" in taken.content and b"live workers give" in taken.content
    assert ContractRow.objects.get().tokens_per_min == 700


def test_without_a_server_nothing_is_weighed(client: Client) -> None:
    row = make_contract()
    client.force_login(rows.make_operator())
    client.defaults["HTTP_HOST"] = "localhost"
    url = reverse("admin:console_contractrow_change", args=[row.pk])
    assert client.post(url, form_of(row, tokens_per_min=90_000)).status_code == 302
    assert contracts.changed(row, Snapshot.load())[0].tokens_per_min == 600
