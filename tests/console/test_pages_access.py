"""Who may see which page, under which policy, and what every page has."""

import re
from pathlib import Path

import pytest
from django.contrib.staticfiles import finders
from django.test import Client
from django.urls import reverse

from console import keys
from console.models import ApiKey, Tenant
from tests.console.pagecast import client_of, make_batch, make_record

pytestmark = pytest.mark.django_db

PAGES = {
    "overview": (),
    "requests": (),
    "history": (),
    "workers": (),
    "workers_add": (),
    "playground": (),
    "batches": (),
    "keys": (),
    "usage": (),
    "audit": (),
    "models": (),
    "contracts": (),
    "contract_add": (),
    "key_add": (),
    "key_rotate": ("KEY00000",),
    "key_revoke": ("KEY00000",),
    "queues": (),
    "alerts": (),
    "routing": (),
    "split": (),
    "split_order": ("shadow",),
    "request": ("r1",),
    "batch": ("batch_0",),
}
CHARTED = ("overview", "queues", "split", "usage")
ALL = sorted(PAGES)


@pytest.fixture(autouse=True)
def rows():
    make_record()
    make_batch()
    key = keys.create(Tenant.objects.get(slug="acme"), name="ci")
    ApiKey.objects.filter(pk=key.pk).update(public_id="KEY00000")


def address(name):
    return reverse(f"pages:{name}", args=PAGES[name])


@pytest.mark.parametrize("name", ALL)
def test_a_page_renders_for_an_operator_without_a_running_control_plane(operator, name):
    response = operator.get(address(name))
    assert response.status_code == 200
    text = response.content.decode()
    assert "NaN" not in text and ">None<" not in text


@pytest.mark.parametrize("name", ALL)
def test_a_stranger_is_sent_to_the_login_and_back(name):
    response = Client(SERVER_NAME="localhost").get(address(name))
    assert response.status_code == 302
    assert response["location"] == f"/admin/login/?next={address(name)}"


@pytest.mark.parametrize("name", ALL)
def test_a_user_who_is_no_operator_is_refused(name):
    response = client_of("eve", is_staff=False).get(address(name))
    assert response.status_code == 403
    assert "operators" in response.content.decode()


@pytest.mark.parametrize("name", [*ALL, "live_history"])
def test_pages_refuse_methods_they_do_not_have(operator, name):
    where = reverse("pages:live_history") if name == "live_history" else address(name)
    assert operator.delete(where).status_code == 405


@pytest.mark.parametrize("name", ALL)
def test_scripts_come_from_files_of_this_host_only(operator, name):
    response = operator.get(address(name))
    policy = response["content-security-policy"]
    assert "script-src 'self';" in policy
    assert ("style-src-attr 'unsafe-inline'" in policy) == (name in CHARTED)
    text = response.content.decode()
    assert not re.findall(r"<script(?![^>]*\bsrc=\"/static/)", text)
    assert not re.findall(r"\s(?:style|on[a-z]+|hx-on[^=]*|hx-vars|hx-vals)=", text)
    assert not re.findall(r"(?:src|href)=\"(?:https?:)?//", text)


@pytest.mark.parametrize("name", ALL)
def test_every_table_has_a_caption_and_every_field_a_label(operator, name):
    text = operator.get(address(name)).content.decode()
    for table in re.findall(r"<table.*?</table>", text, re.S):
        assert "<caption" in table
    for tag in re.findall(r"<(?:input|select|textarea)[^>]*>", text):
        if 'type="hidden"' in tag:
            continue
        field_id = re.search(r'id="([^"]+)"', tag)
        start = text.index(tag)
        opened = text.rfind("<label", 0, start) > text.rfind("</label", 0, start)
        assert opened or "aria-label" in tag, field_id


@pytest.mark.parametrize("name", ["overview", "requests", "workers", "split", "queues"])
def test_a_live_page_opens_exactly_one_socket_and_can_be_paused(operator, name):
    text = operator.get(address(name)).content.decode()
    assert text.count("ws-connect=") == 1 and 'id="pause"' in text


@pytest.mark.parametrize("name", ["request", "batch", "key_rotate", "key_revoke"])
def test_an_unknown_id_is_not_found(operator, name):
    response = operator.get(reverse(f"pages:{name}", args=["nothing"]))
    assert response.status_code == 404
    assert "Not found" in response.content.decode()


def test_the_current_page_is_marked_in_the_navigation(operator):
    text = operator.get("/workers/").content.decode()
    assert re.search(r'data-go="workers" aria-current="page"', text)
    assert text.count('aria-current="page"') == 1


def test_the_login_page_is_ours_and_needs_no_other_host():
    text = Client(SERVER_NAME="localhost").get("/admin/login/?next=/").content.decode()
    assert "Slackwater" in text and "Operators only" in text and 'name="next" value="/"' in text


def test_a_wrong_password_is_said_and_signs_nobody_in():
    client = Client(SERVER_NAME="localhost")
    response = client.post("/admin/login/", {"username": "ada", "password": "no"})
    assert response.status_code == 200 and 'role="alert"' in response.content.decode()
    assert client.get("/").status_code == 302


def test_an_expired_login_sends_htmx_to_the_login_as_a_whole_page():
    response = Client(SERVER_NAME="localhost").get("/?part=tiles", headers={"hx-request": "true"})
    assert response["hx-redirect"].startswith("/admin/login/")


def test_charts_send_no_data_to_the_vendor_and_their_module_stays_small():
    path = finders.find("console/charts.js")
    text = Path(path).read_text()
    assert 'showSendToCloud: false, plotlyServerURL: ""' in text and "displaylogo: false" in text
    assert len(text.splitlines()) <= 200


@pytest.mark.parametrize(
    "name", ["barchart", "charts", "format", "keys", "keytest", "live", "playground", "stream"]
)
def test_scripts_never_write_markup(name):
    text = Path(finders.find(f"console/{name}.js")).read_text()
    for writing in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert writing not in text
