"""The audit chain: what is in it, that nobody changes it, and that tampering is found and named."""

import io
import json

import pytest
from django.contrib.admin.models import LogEntry
from django.core.management import call_command
from django.db import DatabaseError, connection, transaction

from console import audit
from console.models import AuditEvent, Tenant
from tests.console import rows
from tests.console.pagecast import client_of, make_tenant

pytestmark = pytest.mark.django_db


@pytest.fixture
def olga():
    return rows.make_operator()


def write(olga, number):
    tenant = Tenant.objects.first() or make_tenant()
    for index in range(number):
        audit.record(olga, tenant, f"w{index}", before={"weight": index}, after={"weight": 9})


def unguarded(sql, *values):
    """What somebody with the database's password could do: without triggers."""
    with connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            cursor.execute("ALTER TABLE console_auditevent DISABLE TRIGGER ALL")
        else:
            cursor.execute("DROP TRIGGER IF EXISTS auditevent_no_update")
            cursor.execute("DROP TRIGGER IF EXISTS auditevent_no_delete")
        cursor.execute(sql, values)


def verify(*args):
    out = io.StringIO()
    try:
        call_command("verify_audit", "--json", *args, stdout=out)
        code = 0
    except SystemExit as ended:
        code = ended.code
    return code, json.loads(out.getvalue())


def test_an_event_says_who_what_when_and_the_values(olga):
    write(olga, 1)
    event = AuditEvent.objects.get()
    assert (event.actor, event.action, event.object_type) == ("olga", "change", "tenant")
    assert (event.object_text, event.words) == ("acme", "w0")
    assert json.loads(event.before) == {"weight": 0} and json.loads(event.after) == {"weight": 9}
    assert LogEntry.objects.get().pk == event.log_entry_id


@pytest.mark.parametrize("change", ["update", "delete"])
def test_the_database_refuses_to_change_or_delete_an_event(olga, change):
    write(olga, 1)
    with pytest.raises(DatabaseError, match="append-only"), transaction.atomic():
        if change == "update":
            AuditEvent.objects.update(actor="eve")
        else:
            AuditEvent.objects.all().delete()
    assert AuditEvent.objects.get().actor == "olga"


def test_a_chain_that_nobody_touched_holds(olga):
    write(olga, 4)
    code, said = verify()
    assert (code, said["checked"], said["broken"], said["why"]) == (0, 4, None, "")
    assert said["digest"] == AuditEvent.objects.first().digest
    assert verify("--digest", said["digest"])[0] == 0


def test_an_empty_chain_holds():
    assert verify()[0] == 0


@pytest.mark.parametrize(
    "column", ["actor", "action", "object_type", "object_id", "object_text", "words", "after"]
)
def test_a_changed_value_is_found_and_named(olga, column):
    write(olga, 4)
    unguarded(f"UPDATE console_auditevent SET {column} = %s WHERE sequence = 2", "x")
    code, said = verify()
    assert (code, said["checked"], said["broken"]) == (3, 1, 2)
    assert "not those that were written" in said["why"]


def test_a_changed_value_with_a_digest_made_anew_breaks_the_next_link(olga):
    write(olga, 4)
    event = AuditEvent.objects.get(sequence=2)
    event.actor = "eve"
    unguarded(
        "UPDATE console_auditevent SET actor = %s, digest = %s WHERE sequence = 2",
        "eve",
        event.computed(),
    )
    code, said = verify()
    assert (code, said["broken"]) == (3, 3) and "does not follow" in said["why"]


def test_a_missing_event_is_found_and_named(olga):
    write(olga, 4)
    unguarded("DELETE FROM console_auditevent WHERE sequence = %s", 3)
    code, said = verify()
    assert (code, said["checked"], said["broken"], said["why"]) == (3, 2, 4, "event 3 is missing")


def test_events_cut_off_at_the_end_are_missed_by_who_kept_the_digest(olga):
    write(olga, 4)
    kept = verify()[1]["digest"]
    unguarded("DELETE FROM console_auditevent WHERE sequence = %s", 4)
    assert verify("--digest", kept)[0] == 3


def test_writes_through_the_api_and_the_admin_join_the_chain_once(olga):
    write(olga, 1)
    client = client_of("ada")
    client.logout()
    client.force_login(olga)
    url = f"/admin/console/tenant/{Tenant.objects.get().pk}/delete/"
    assert client.post(url, {"post": "yes"}).status_code == 302
    assert [event.action for event in AuditEvent.objects.order_by("sequence")] == [
        "change",
        "delete",
    ]
    assert audit.feed() == 0 and verify()[0] == 0


def test_a_long_log_is_fed_in_parts(olga, monkeypatch):
    monkeypatch.setattr(audit, "FEED_MAX", 2)
    tenant = make_tenant()
    for _ in range(5):
        LogEntry.objects.log_actions(olga.pk, [tenant], 2, change_message="m", single_object=True)
    audit.feed_all()
    assert AuditEvent.objects.count() == 5 and verify()[0] == 0


# --- page ---


def test_the_page_lists_events_with_values_and_filters_them(olga):
    client = client_of()
    assert "Nothing has been changed yet" in client.get("/audit/").content.decode()
    write(olga, 2)
    text = client.get("/audit/").content.decode()
    assert "2 events" in text and ">weight<" in text and "<strong>9</strong>" in text
    assert "No event matches" in client.get("/audit/", {"actor": "eve"}).content.decode()
    assert "1 event<" in client.get("/audit/", {"q": "w1"}).content.decode()
    file = client.get("/audit/", {"format": "json"})
    assert [row["sequence"] for row in json.loads(file.content)] == [2, 1]


def test_the_page_checks_the_chain_on_request(olga):
    write(olga, 3)
    client = client_of()
    assert "3 events hold" in client.get("/audit/", {"check": "1"}).content.decode()
    unguarded("UPDATE console_auditevent SET words = %s WHERE sequence = 2", "x")
    text = client.get("/audit/", {"check": "1"}).content.decode()
    assert "Broken after 1 events: event 2" in text


def test_queries_stay_the_same_with_more_events(olga, django_assert_num_queries):
    client = client_of()
    for _ in range(2):
        write(olga, 20)
        with django_assert_num_queries(4):  # session, user, count, rows
            client.get("/audit/")
