"""Workers: joining, previews of orders, orders that reach the plane, and what is audited."""

import dataclasses
import re

import pytest
from django.contrib.admin.models import LogEntry
from django.template.loader import render_to_string

from console import jointokens, livesocket, state, workerview
from console.models import Model
from console.pages import workers
from console.transport import MemoryLink
from controlplane import domain, protocol
from tests.console.pagecast import client_of, make_plan
from tests.console.pageserver import PageServer
from tests.factories import make_hello, make_load

pytestmark = pytest.mark.django_db


@pytest.fixture
def server(monkeypatch):
    made = PageServer(("prefill", "decode"))
    monkeypatch.setattr(state, "current", made.state)
    yield made
    made.close()


def make_view(role="prefill", status="live", worker_id="w1", requests=3):
    hello = make_hello(role)
    return domain.WorkerView(
        worker_id=worker_id,
        epoch=1,
        name=worker_id,
        engine="fake",
        engine_version="0",
        role=role,
        status=status,
        device=hello.device,
        models=tuple(hello.models),
        block_tokens=16,
        num_blocks=100,
        handoff_address=None,
        heard_ago_s=0.1,
        load=None,
        requests=requests,
        exception="",
    )


def test_the_table_names_each_worker_with_its_orders(operator, server):
    text = operator.get("/workers/").content.decode()
    assert re.findall(r'<tr id="(w\d)"', text) == ["w1", "w2"]
    assert "/workers/w1/role/" in text and "/workers/w2/drain/" in text
    assert "2 workers known to the control plane" in text


def test_a_worker_that_has_not_reported_has_no_data(operator):
    (row,) = workers.rows(domain.ClusterView((make_view(),), (), (), ()))
    assert row["kv_used_ratio"] is None and row["load"] is None


def test_the_rows_alone_are_a_part(operator, server):
    text = operator.get("/workers/", {"part": "rows"}).content.decode()
    assert "<html" not in text and text.count("<tr id=") == 2


# --- one ---


def test_the_page_of_a_worker_shows_what_it_is_and_spends(operator, server):
    make_plan(worker_id="w1", reason="long prompts ended")
    response = operator.get("/workers/w1/")
    text = response.content.decode()
    assert [row["name"] for row in response.context["gpu"]][-1] == "idle"
    assert "long prompts ended" in text and "/workers/w1/role/" in text
    assert "topics=overview,worker&amp;worker=w1" in text
    assert "[&quot;workers/w1/step_ms&quot;, &quot;workers/w1/predicted_ms&quot;]" in text
    assert "Nothing placed on it" in text


def test_a_worker_that_is_not_here_has_no_page(operator, server):
    assert operator.get("/workers/w9/").status_code == 404


def test_what_the_socket_sends_of_a_worker_needs_no_query(server, django_assert_num_queries):
    async def read():
        return [livesocket.PARTS["worker"](server.state, {"worker": w}) for w in ("w1", "w9")]

    with django_assert_num_queries(0):
        here, gone = [render_to_string(*found) for found in server.do(read)]
    assert here.strip().startswith('<div id="worker-now" hx-swap-oob="innerHTML">')
    assert "not here any more" in gone


def test_predicted_and_measured_steps_are_compared():
    load = dataclasses.replace(make_view(), load=make_load(predicted_s=0.05))
    assert workerview.step_error(load) == 0.0
    assert workerview.step_error(make_view()) is None


def test_the_page_waits_for_a_worker_and_says_why_one_was_refused(operator, server):
    assert "Waiting for c9 to dial in" in operator.get("/workers/add/c9/").content.decode()

    async def knock():
        fleet = server.state.fleet
        fleet.connected("x", MemoryLink())
        fleet.received("x", make_hello(name="c9", token="not one of ours"))

    server.do(knock)
    text = operator.get("/workers/add/c9/").content.decode()
    assert "c9 was refused: " in text and 'hx-trigger="every 2s"' in text
    joined = operator.get("/workers/add/c1/").content.decode()
    assert "c1 has joined as w2" in joined and "hx-trigger" not in joined


# --- add ---


def test_add_worker_gives_a_command_whose_token_lets_one_worker_in(operator):
    Model.objects.create(model_id="tiny", folder="/models/tiny", max_model_len=64)
    form = {"name": "gpu-1", "role": "decode", "device": "cpu", "engine": "native"}
    text = operator.post("/workers/add/", form).content.decode()
    command = re.search(r'<pre id="join"[^>]*>(.*?)</pre>', text, re.S)[1]
    assert "--join ws://localhost/ws/worker" in command
    assert "--name gpu-1 --role decode --device cpu --engine native" in command
    assert "--model /models/tiny --model-id tiny" in command
    token = re.search(r"--token (\S+)", command)[1]
    spent = jointokens.SpentTokens()
    assert spent.refusal(token) == ""
    spent.spend(token)
    assert "used before" in spent.refusal(token)


def test_the_command_for_a_modelled_worker_names_no_model_folder(operator):
    form = {"name": "f", "role": "mixed", "device": "cpu", "engine": "fake"}
    text = operator.post("/workers/add/", form).content.decode()
    assert "--engine fake" in text and "--model " not in text


def test_making_a_token_is_audited_without_the_token(operator):
    form = {"name": "gpu-1", "role": "mixed", "device": "cpu", "engine": "fake"}
    operator.post("/workers/add/", form)
    entry = LogEntry.objects.get()
    assert (entry.object_repr, entry.change_message) == ("gpu-1", "made a join token")


@pytest.mark.parametrize(
    "change",
    [
        {"name": ""},
        {"name": "a b"},
        {"name": "a;rm -rf"},
        {"name": "x" * 65},
        {"role": "boss"},
        {"engine": "other"},
        {"device": "tpu"},
    ],
)
def test_a_wrong_field_makes_no_token(operator, change):
    form = {"name": "gpu-1", "role": "mixed", "device": "cpu", "engine": "fake"} | change
    response = operator.post("/workers/add/", form)
    assert response.status_code == 200 and "--token" not in response.content.decode()
    assert not LogEntry.objects.exists()


# --- flip ---


def test_a_flip_is_previewed_and_nothing_is_sent(operator, server):
    text = operator.get("/workers/w1/role/").content.decode()
    assert "What this will do" in text and '<option value="decode" selected>' in text
    assert "No other live worker has the role prefill" in text
    assert cluster_roles(server) == {"w1": "prefill", "w2": "decode"}


def test_a_flip_reaches_the_worker_and_is_audited(operator, server):
    sent = capture(server, "c0")
    response = operator.post("/workers/w1/role/", {"role": "decode"})
    assert response.status_code == 302 and response["location"] == "/workers/?ordered=w1"
    assert sent == [protocol.SetRole("decode")]
    assert LogEntry.objects.get().change_message == "role prefill → decode"
    assert "role prefill → decode ordered" in operator.get("/workers/").content.decode()


def test_a_role_that_does_not_exist_is_refused(operator, server):
    sent = capture(server, "c0")
    response = operator.post("/workers/w1/role/", {"role": "boss"})
    assert response.status_code == 200 and "Select a valid choice" in response.content.decode()
    assert sent == []


def test_a_drain_is_previewed_and_then_reaches_the_worker(operator, server):
    sent = capture(server, "c1")
    assert "takes nothing new" in operator.get("/workers/w2/drain/").content.decode()
    assert sent == []
    operator.post("/workers/w2/drain/")
    assert sent == [protocol.Drain()]
    assert LogEntry.objects.get().change_message == "drain"


@pytest.mark.parametrize("order", ["role", "drain"])
def test_an_unknown_worker_is_not_found(operator, server, order):
    assert operator.post(f"/workers/w9/{order}/", {"role": "decode"}).status_code == 404


@pytest.mark.parametrize("order", ["role", "drain"])
def test_an_order_needs_the_csrf_token(server, order):
    client = client_of()
    client.handler.enforce_csrf_checks = True
    assert client.post(f"/workers/w1/{order}/", {"role": "decode"}).status_code == 403


@pytest.mark.parametrize("order", ["role", "drain"])
def test_a_user_who_is_no_operator_orders_nothing(server, order):
    sent = capture(server, "c0")
    client = client_of("eve", is_staff=False)
    assert client.post(f"/workers/w1/{order}/", {"role": "decode"}).status_code == 403
    assert sent == []


@pytest.mark.parametrize(
    ("role", "peers", "warned"),
    [
        ("decode", [], ["prefill"]),
        ("prefill", [], ["decode"]),
        ("mixed", [], []),
        ("decode", [("prefill", "live")], []),
        ("decode", [("prefill", "lost")], ["prefill"]),
        ("decode", [("mixed", "live")], []),
    ],
)
def test_the_preview_warns_when_a_role_loses_its_last_live_worker(role, peers, warned):
    others = [make_view(r, s, f"w{i + 2}") for i, (r, s) in enumerate(peers)]
    effects = workers.flip_effects(make_view("mixed"), role, others)
    assert effects[0].startswith("3 request(s)")
    assert [line.split("role ")[1].split(":")[0] for line in effects[2:]] == warned


def capture(server, name):
    """What the named worker is sent from now on."""
    sent = []
    worker = next(w for w in server.memory.workers if w.name == name)
    worker.send = sent.append
    return sent


def cluster_roles(server):
    async def read():
        return {worker.worker_id: worker.role for worker in server.state.fleet.view().workers}

    return server.do(read)
