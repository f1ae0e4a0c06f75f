"""Models: their workers, price and code; a retired one leaves the gateway's snapshot."""

import json

import pytest

from console import state
from console.models import AuditEvent, Model
from tests.console.memoryserver import MODEL_ID
from tests.console.pageserver import PageServer

pytestmark = pytest.mark.django_db


@pytest.fixture
def server(monkeypatch):
    made = PageServer(("mixed",))
    monkeypatch.setattr(state, "current", made.state)
    yield made
    made.close()


def test_without_models_the_next_step_is_a_worker(operator):
    text = operator.get("/models/").content.decode()
    assert "No model yet" in text and "/workers/add/" in text


def test_a_model_names_its_workers_its_price_and_how_to_call_it(operator, server):
    Model.objects.create(model_id=MODEL_ID, max_model_len=512, gpu_hour_usd=3.25)
    Model.objects.create(model_id="unserved", max_model_len=64)
    text = operator.get("/models/").content.decode()
    assert "2 models" in text and "$3.25" in text and "GPU_HOUR_USD" in text
    assert text.count('href="/workers/#w1"') == 1
    assert text.count("http://localhost/v1") >= 6 and '"unserved"' in text.replace("&quot;", '"')


def test_a_retired_model_is_audited_and_leaves_the_gateway(operator, server):
    model = Model.objects.create(model_id=MODEL_ID, max_model_len=512)
    operator.post(f"/models/{model.pk}/", {"max_model_len": 512, "gpu_hour_usd": 2})
    facts = server.state.snapshot.current.models[MODEL_ID]
    assert not facts.is_active and facts.gpu_hour_usd == 2
    event = AuditEvent.objects.get()
    assert event.words == "gpu_hour_usd None → 2.0, is_active True → False"
    assert json.loads(event.before)["is_active"] is True


@pytest.mark.parametrize("change", [{"max_model_len": 0}, {"gpu_hour_usd": -1}])
def test_wrong_values_change_nothing(operator, change):
    model = Model.objects.create(model_id=MODEL_ID, max_model_len=512)
    form = {"max_model_len": 512, "is_active": "on"} | change
    assert operator.post(f"/models/{model.pk}/", form).status_code == 200
    assert not AuditEvent.objects.exists()


def test_queries_stay_the_same_with_more_models(operator, django_assert_num_queries):
    for index in range(3):
        Model.objects.create(model_id=f"m{index}", max_model_len=64)
        with django_assert_num_queries(3):  # session, user, models
            operator.get("/models/")
