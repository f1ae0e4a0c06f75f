"""`/api/v1/`: each resource works, and refuses wrong methods, bad input, strangers and excess."""

import asyncio
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import User
from django.test import Client
from drf_spectacular.generators import SchemaGenerator
from drf_spectacular.validation import validate_schema

from console import state
from console.auth import verify
from console.models import ApiKey, ApiToken, Model, Quota, SLOClassRow, Tenant
from console.models.tenants import CONCURRENCY_MAX
from console.snapshot import Snapshot, SnapshotKeeper
from controlplane import domain
from controlplane.config import ControlPlaneConfig
from controlplane.plane import ControlPlane
from tests import factories
from tests.console import rows

pytestmark = pytest.mark.django_db
RESOURCES = ("tenants", "keys", "slo-classes", "quotas", "models", "workers")


class Api:
    """A client with an operator's token."""

    def __init__(self, token: str = "") -> None:
        self.client = Client(headers={"host": "localhost"})
        if token:
            self.client.defaults["HTTP_AUTHORIZATION"] = f"Bearer {token}"

    def __call__(self, method: str, path: str, body: Any = None) -> Any:
        call = getattr(self.client, method)
        if body is None:
            return call(f"/api/v1/{path}")
        return call(f"/api/v1/{path}", body, content_type="application/json")


@pytest.fixture
def api() -> Api:
    rows.ensure_default_classes()
    return Api(rows.make_token(rows.make_operator()))


def problem(response: Any) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert body["status"] == response.status_code
    assert {"type", "title", "detail", "code"} <= set(body)
    return body


@pytest.mark.parametrize("name", RESOURCES)
def test_a_stranger_gets_401_and_a_tenant_key_opens_nothing(name: str) -> None:
    response = Api()("get", f"{name}/")
    assert response.status_code == 401
    assert response.headers["www-authenticate"].startswith("Bearer")
    assert problem(response)["code"] == "not_authenticated"
    minted = rows.make_key(rows.make_tenant())
    assert Api(minted.text)("get", f"{name}/").status_code == 401
    assert Api("op-sw-é")("get", f"{name}/").status_code == 401


@pytest.mark.parametrize("name", RESOURCES)
def test_a_user_who_is_no_operator_gets_403(name: str) -> None:
    user = User.objects.create_user("eve")
    assert problem(Api(rows.make_token(user))("get", f"{name}/"))["status"] == 403


def test_a_revoked_token_is_refused_at_once(api: Api) -> None:
    assert api("get", "tenants/").status_code == 200
    ApiToken.objects.update(is_active=False)
    assert api("get", "tenants/").status_code == 401


@pytest.mark.parametrize("name", RESOURCES)
def test_wrong_methods_are_405(api: Api, name: str) -> None:
    assert problem(api("put", f"{name}/", {}))["code"] == "method_not_allowed"
    assert api("delete", f"{name}/").status_code == 405


def test_a_session_needs_the_csrf_token() -> None:
    rows.ensure_default_classes()
    client = Client(enforce_csrf_checks=True, headers={"host": "localhost"})
    client.force_login(rows.make_operator())
    assert client.get("/api/v1/tenants/").status_code == 200
    response = client.post("/api/v1/tenants/", {}, content_type="application/json")
    assert response.status_code == 403


def test_a_tenant_is_made_changed_and_switched_off(api: Api) -> None:
    made = api(
        "post",
        "tenants/",
        {"slug": "beta", "name": "Beta", "default_class": "standard", "concurrency_max": 7},
    )
    assert made.status_code == 201
    assert made.json()["concurrency_max"] == 7
    changed = api("patch", "tenants/beta/", {"is_active": False, "concurrency_max": 9})
    assert changed.status_code == 200
    assert api("get", "tenants/beta/").json() | {"created_at": "", "updated_at": ""} == {
        "slug": "beta",
        "name": "Beta",
        "default_class": "standard",
        "is_active": False,
        "weight": 1.0,
        "concurrency_max": 9,
        "created_at": "",
        "updated_at": "",
    }
    assert api("delete", "tenants/beta/").status_code == 405
    entries = LogEntry.objects.order_by("pk").values_list("change_message", flat=True)
    assert [entry.split(" ")[0] for entry in entries] == ["created", "changed"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "slug"),
        ({"slug": "Bad Slug"}, "slug"),
        ({"slug": "acme"}, "slug"),
        ({"slug": "beta", "default_class": "batch"}, "default_class"),
        ({"slug": "beta", "default_class": "gold"}, "default_class"),
        ({"slug": "beta", "concurrency_max": CONCURRENCY_MAX + 1}, "concurrency_max"),
        ({"slug": "beta", "concurrency_max": 0}, "concurrency_max"),
        ({"slug": "beta", "is_admin": True}, "is_admin"),
    ],
)
def test_a_bad_tenant_is_refused_by_field(api: Api, body: dict[str, Any], field: str) -> None:
    rows.make_tenant()
    response = api("post", "tenants/", {"name": "B", "default_class": "standard", **body})
    assert response.status_code == 400
    assert field in problem(response)["errors"]
    assert Tenant.objects.count() == 1


@pytest.mark.parametrize("raw", ["{", "[]", '"x"', "null", '{"slug": NaN}', "\x00"])
def test_a_body_that_is_no_object_is_400(api: Api, raw: str) -> None:
    response = api("post", "tenants/", raw)
    assert response.status_code == 400
    problem(response)


def test_another_content_type_is_415(api: Api) -> None:
    response = api.client.post("/api/v1/tenants/", {"slug": "x"})
    assert problem(response)["status"] == 415


def test_a_key_is_shown_in_the_answer_to_its_creation_only(api: Api) -> None:
    rows.make_tenant()
    made = api("post", "keys/", {"tenant": "acme", "name": "ci"})
    assert made.status_code == 201
    text = made.json()["key"]
    assert verify(Snapshot.load(), text) is not None
    secret = text.split("-")[3]
    one = api("get", f"keys/{made.json()['public_id']}/")
    for response in (one, api("get", "keys/")):
        assert secret not in response.content.decode()
        assert "hmac" not in response.content.decode()


def test_a_key_is_revoked_and_keeps_its_tenant(api: Api) -> None:
    rows.make_tenant("other")
    minted = rows.make_key(rows.make_tenant())
    path = f"keys/{minted.public_id}/"
    assert api("patch", path, {"tenant": "other"}).status_code == 400
    assert api("patch", path, {"public_id": "AAAAAAAA", "is_active": False}).status_code == 200
    assert ApiKey.objects.get().public_id == minted.public_id
    assert verify(Snapshot.load(), minted.text) is None
    assert api("patch", path, {"expires_at": "2020-01-01T00:00:00Z"}).status_code == 400
    assert api("get", "keys/ZZZZZZZZ/").status_code == 404


def test_a_class_speaks_milliseconds_and_stores_seconds(api: Api) -> None:
    shown = api("get", "slo-classes/interactive/").json()
    assert (shown["ttft_ms_p99"], shown["itl_ms_p99"], shown["deadline_ms"]) == (500.0, 30.0, None)
    response = api("patch", "slo-classes/interactive/", {"ttft_ms_p99": 750})
    assert (response.status_code, response.json()["ttft_ms_p99"]) == (200, 750.0)
    assert SLOClassRow.objects.get(name="interactive").ttft_s_p99 == 0.75


@pytest.mark.parametrize(
    "change",
    [
        {"ttft_ms_p99": 0},
        {"itl_ms_p99": "soon"},
        {"ttft_ms_p99": 1e12},
        {"deadline_ms": 1000},
        {"is_batch": True},
        {"service_tier": "flex"},
        {"name": "new"},
    ],
)
def test_an_impossible_class_is_400(api: Api, change: dict[str, Any]) -> None:
    response = api("patch", "slo-classes/interactive/", change)
    assert response.status_code == 400, response.json()
    problem(response)


def test_a_class_in_use_stays(api: Api) -> None:
    rows.make_tenant()
    response = api("delete", "slo-classes/interactive/")
    assert (response.status_code, problem(response)["code"]) == (422, "in_use")
    assert api("delete", "slo-classes/flex/").status_code == 204
    assert not SLOClassRow.objects.filter(name="flex").exists()
    assert LogEntry.objects.get().object_repr == "flex"


def test_a_quota_is_changed_within_its_bounds(api: Api) -> None:
    rows.make_tenant()
    assert api("patch", "quotas/acme/", {"concurrency_max": 2}).status_code == 200
    assert Quota.objects.get().concurrency_max == 2
    too_much = api("patch", "quotas/acme/", {"concurrency_max": CONCURRENCY_MAX + 1})
    assert too_much.status_code == 400
    assert api("get", "quotas/").json()["results"][0]["tenant"] == "acme"
    assert api("post", "quotas/", {}).status_code == 405
    assert api("get", "quotas/nobody/").status_code == 404


def test_a_model_with_a_slash_in_its_name_is_reached(api: Api) -> None:
    body = {"model_id": "org/Small-1B", "max_model_len": 4096, "gpu_hour_usd": 2.5}
    assert api("post", "models/", body).status_code == 201
    assert api("get", "models/org/Small-1B/").json()["gpu_hour_usd"] == 2.5
    assert api("patch", "models/org/Small-1B/", {"is_active": False}).status_code == 200
    assert api("patch", "models/org/Small-1B/", {"max_model_len": 1}).status_code == 400
    assert api("delete", "models/org/Small-1B/").status_code == 204
    assert not Model.objects.exists()


def test_pages_hold_at_most_200_rows(api: Api) -> None:
    Model.objects.bulk_create(Model(model_id=f"m{i:03d}", max_model_len=64) for i in range(203))
    assert len(api("get", "models/").json()["results"]) == 50
    page = api("get", "models/?page_size=100000").json()
    assert (len(page["results"]), page["count"]) == (200, 203)
    assert api("get", "models/?page=99").status_code == 404


# --- workers ---------------------------------------------------------------------------------


class PlaneFleet:
    """A real ControlPlane behind the part of the fleet that orders go through."""

    def __init__(self) -> None:
        self.plane = ControlPlane(ControlPlaneConfig(), b"secret of this test")
        self.handle(domain.WorkerHello("c1", factories.make_hello("decode", name="<b>a</b>")))

    def handle(self, event: domain.Event) -> None:
        self.plane.handle(event, 1.0, lambda: 0.5)

    def view(self) -> domain.ClusterView:
        return self.plane.view(1.0)


@pytest.fixture
def fleet() -> Iterator[PlaneFleet]:
    """A server state whose loop runs in a thread, with one worker in its plane."""
    fleet, loop = PlaneFleet(), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = SimpleNamespace(fleet=fleet, loop=loop, snapshot=SnapshotKeeper())
    server.call = lambda *args, **options: state.ServerState.call(server, *args, **options)
    state.current = server
    yield fleet
    state.current = None
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.mark.parametrize("path", ["workers/", "workers/w1/"])
def test_without_a_control_plane_workers_are_503(api: Api, path: str) -> None:
    response = api("get", path)
    assert (response.status_code, problem(response)["code"]) == (503, "unavailable")


def test_workers_are_shown_as_the_plane_sees_them(api: Api, fleet: PlaneFleet) -> None:
    [worker] = api("get", "workers/").json()["results"]
    assert worker == api("get", "workers/w1/").json()
    assert (worker["worker_id"], worker["name"], worker["role"], worker["status"]) == (
        "w1",
        "<b>a</b>",
        "decode",
        "live",
    )
    assert worker["models"] == ["smollm2-135m"]
    assert api("get", "workers/w9/").status_code == 404


def test_a_role_is_ordered_in_the_operators_name(api: Api, fleet: PlaneFleet) -> None:
    response = api("post", "workers/w1/role/", {"role": "prefill"})
    assert response.status_code == 202
    assert api("post", "workers/w1/role/", {"role": "king"}).status_code == 400
    assert api("get", "workers/w1/role/").status_code == 405
    assert api("post", "workers/w9/role/", {"role": "prefill"}).status_code == 404
    assert [plan.by for plan in fleet.view().plans] == ["olga"]


def test_a_worker_is_drained(api: Api, fleet: PlaneFleet) -> None:
    response = api("post", "workers/w1/drain/")
    assert (response.status_code, response.json()["status"]) == (202, "draining")
    assert api("post", "workers/w9/drain/").status_code == 404


def test_the_planner_is_put_in_shadow_mode_and_its_change_is_rolled_back(
    api: Api, fleet: PlaneFleet
) -> None:
    assert api("post", "workers/planner/", {"mode": "shadow"}).json() == {"mode": "shadow"}
    assert fleet.view().planner_mode == "shadow"
    assert api("post", "workers/planner/", {"mode": "wild"}).status_code == 400
    assert api("get", "workers/planner/").status_code in (404, 405)
    undone = api("post", "workers/rollback/")
    assert undone.status_code == 202 and [item["worker_id"] for item in undone.json()] == ["w1"]
    assert fleet.view().plans == (), "nothing of the planner's stood"


def test_a_change_is_in_force_in_this_process_at_once(api: Api, fleet: PlaneFleet) -> None:
    made = api("post", "tenants/", {"slug": "beta", "name": "Beta", "default_class": "standard"})
    assert made.status_code == 201
    assert "beta" in state.current.snapshot.current.tenants


# --- schema ----------------------------------------------------------------------------------


def test_the_schema_is_valid_and_names_every_resource() -> None:
    schema = SchemaGenerator(api_version="v1").get_schema(request=None, public=True)
    validate_schema(schema)
    for name in RESOURCES:
        assert f"/api/v1/{name}/" in schema["paths"]
    created = schema["paths"]["/api/v1/keys/"]["post"]["responses"]["201"]
    assert created["content"]["application/json"]["schema"]["$ref"].endswith("/NewKey")
    assert schema["components"]["securitySchemes"]["operatorToken"]["scheme"] == "bearer"


def test_schema_and_documentation_are_for_operators(api: Api) -> None:
    assert Api()("get", "schema/").status_code == 401
    assert api("get", "schema/").status_code == 200
    browser = Client(headers={"host": "localhost"})
    assert browser.get("/api/").headers["location"] == "/api/v1/docs/"
    assert browser.get("/api/v1/docs/").headers["location"].startswith("/admin/login/")
    browser.force_login(User.objects.get())
    page = browser.get("/api/v1/docs/")
    assert page.status_code == 200
    assert b"<style" not in page.content
    assert b"<script>" not in page.content
    script = browser.get("/api/v1/docs/?script=")
    assert script.headers["content-type"].startswith("application/javascript")
    assert b"/api/v1/schema/" in script.content
