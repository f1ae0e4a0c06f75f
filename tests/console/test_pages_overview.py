"""Overview: empty it shows the first steps, live it shows what the frame says."""

import json
import re
from datetime import timedelta

import pytest
from django.utils import timezone

from console import livefeed, state
from console.models import Model, PlanRecord
from console.models.fleet import ensure_default_classes
from console.pages import overview
from tests.console.pagecast import client_of, make_record
from tests.console.pageserver import PageServer

pytestmark = pytest.mark.django_db


@pytest.fixture
def operator():
    ensure_default_classes()
    return client_of()


@pytest.fixture
def server(monkeypatch):
    made = PageServer()
    monkeypatch.setattr(state, "current", made.state)
    yield made
    made.close()


def page(client, part=""):
    return client.get("/", {"part": part} if part else {}).content.decode()


def test_an_empty_console_shows_a_tile_per_class_without_data(operator):
    text = page(operator)
    assert re.findall(r'data-class="(\w+)"', text) == ["interactive", "standard", "flex", "batch"]
    assert text.count("tile is-no_data") == 4
    assert "No worker has joined" in text


def test_the_first_steps_end_with_a_command_that_can_be_copied(operator):
    Model.objects.create(model_id="tiny", max_model_len=64)
    text = page(operator)
    assert "First steps" in text and 'data-copy="step-request"' in text
    assert "curl -N http://localhost/v1/chat/completions" in text
    assert "$SLACKWATER_KEY" in text and "&quot;model&quot;: &quot;tiny&quot;" in text


def test_the_first_steps_hide_when_all_are_done(operator, server):
    Model.objects.create(model_id="tiny", max_model_len=64)
    make_record()
    text = page(operator, "checklist")
    assert " hidden" in text and "<h2>" not in text


def test_demo_history_is_no_first_request(operator, server):
    Model.objects.create(model_id="tiny", max_model_len=64)
    make_record(is_demo_history=True)
    assert "First steps" in page(operator, "checklist")


def test_the_worker_strip_shows_role_status_and_kv_of_each_worker(operator, server):
    text = page(operator, "strip")
    assert re.findall(r'chip role-(\w+)"', text) == ["prefill", "decode"]
    assert 'data-live-bar="workers/w1/kv_used_ratio"' in text
    assert text.count('data-live-status="workers/') == 2


def test_tiles_show_what_was_measured_against_the_target(operator, server):
    async def observe():
        for ttft_s in (0.2, 0.3, 0.9):
            server.memory.live.observe_ttft("interactive", ttft_s)
        (await livefeed.feed_of(server.state)).sample()

    server.do(observe)
    text = page(operator, "tiles")
    tile = text[text.index('data-class="interactive"') :]
    tile = tile[: tile.index("</article>")]
    assert "status is-missed" in tile and ">missed<" in tile
    assert ">500 ms</td>" in tile and 'data-live="classes/interactive/ttft_ms_p99"' in tile
    assert re.search(r'<rect width="100.0%"', tile)


def test_a_note_of_a_class_is_shown_beside_its_name(operator):
    overview.SLOClassRow.objects.filter(name="interactive").update(note="scaled for this device")
    assert "scaled for this device" in page(operator, "tiles")


def test_live_tiles_never_show_demo_history(operator, server):
    for index in range(5):
        make_record(f"demo-{index}", is_demo_history=True)
    text = page(operator)
    assert re.search(r'data-counter="requests_total">0<', text)
    assert text.count("tile is-no_data") == 4


def test_role_changes_of_the_demo_history_stay_out_of_the_overview(operator):
    plan = {"worker_id": "w1", "role_before": "prefill", "role_after": "decode", "by": "planner"}
    at = timezone.now() - timedelta(minutes=2)
    PlanRecord.objects.create(at=at, reason="long prompts ended", **plan)
    PlanRecord.objects.create(at=at, reason="only a demo", is_demo_history=True, **plan)
    text = page(operator, "plans")
    assert "long prompts ended" in text and "2 min ago" in text and "only a demo" not in text


def test_an_unknown_part_is_the_whole_page(operator):
    assert "<html" in page(operator, "nonsense")


def test_the_traces_of_the_page_are_as_many_as_the_values_of_a_frame(operator, server):
    text = page(operator)
    traces = re.search(r'data-chart="promise".*?data-traces="([^"]*)"', text)[1]
    frame = server.do(livefeed.newest, server.state)
    assert len(json.loads(traces.replace("&quot;", '"'))) == len(frame["charts"]["promise"]) == 6


def test_the_history_of_the_charts_is_not_cached(operator, server):
    response = operator.get("/live/history")
    assert response["cache-control"] == "no-store"
    assert set(response.json()) == {"seq", "t", "charts"}


def test_without_a_server_the_history_is_empty(operator):
    assert operator.get("/live/history").json() == {"seq": 0, "t": [], "charts": {}}
