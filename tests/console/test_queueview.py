"""Rows of Queues & SLO: who waits longest, which limit binds, when a budget burns."""

import pytest

from console import queueview
from controlplane import domain
from controlplane.ledger import AccountView
from controlplane.overload import OverloadView
from tests.console.test_livefeed import make_request, make_row


def make_account(tenant_id="acme", **changes):
    limits = {"requests_per_min": 60, "tokens_per_min": 1000, "concurrency_max": 4}
    contract = domain.Contract(tenant_id, "m", "interactive", **limits)
    values = {
        **dict.fromkeys(("num_running", "requests_last_min", "tokens_last_min"), 0),
        **dict.fromkeys(("spent_tokens", "held_tokens", "num_missed", "num_surplus"), 0),
        **dict.fromkeys(("spent_usd", "held_usd", "burn_rate_fast", "burn_rate_slow"), 0.0),
        "num_met": 10,
        "error_budget_left": 1.0,
    }
    return AccountView(changes.pop("contract", contract), **(values | changes))


def queued(index, wait_s, tenant_id="acme"):
    return domain.RequestView(
        f"r{index}", tenant_id, "m", "interactive", "queued", 1, wait_s, wait_s, 100, None
    )


def test_waiting_is_counted_by_class_and_tenant_the_longest_wait_first():
    requests = [queued(1, 1.0), queued(2, 3.0), queued(3, 9.0, "umbrella"), make_request(4)]
    first, second = queueview.waiting_rows(requests)
    assert (first["tenant_id"], first["waiting"], first["oldest_id"]) == ("umbrella", 1, "r3")
    assert (second["waiting"], second["oldest_s"], second["prompt_tokens"]) == (2, 3.0, 200)
    assert [row["tenant_id"] for row in queueview.waiting_rows(requests, "acme")] == ["acme"]


def test_waiting_rows_have_a_limit():
    requests = [queued(index, 1.0, f"t{index}") for index in range(queueview.WAITING_MAX + 1)]
    assert len(queueview.waiting_rows(requests)) == queueview.WAITING_MAX


def test_a_class_shows_what_waits_and_runs():
    view = domain.ClusterView((), (queued(1, 2.0), make_request(2)), (("interactive", 1),), ())
    (row,) = queueview.class_rows([make_row()], view)
    assert (row["waiting"], row["running"], row["oldest_ms"]) == (1, 1, 2000.0)
    (idle,) = queueview.class_rows([make_row()], domain.ClusterView((), (), (), ()))
    assert (idle["waiting"], idle["running"], idle["oldest_ms"]) == (0, 0, None)


@pytest.mark.parametrize(
    ("changes", "binding"),
    [
        ({"num_running": 3}, "in flight"),
        ({"requests_last_min": 59}, "requests/min"),
        ({"tokens_last_min": 400, "num_running": 1}, "tokens/min"),
    ],
)
def test_the_limit_that_is_nearest_binds(changes, binding):
    assert queueview.contract_row(make_account(**changes))["binding"]["name"] == binding


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"num_met": 0}, "no_data"),
        ({}, "ok"),
        ({"burn_rate_fast": 14.4}, "burning"),
        ({"burn_rate_fast": 14.4, "burn_rate_slow": 14.4}, "missed"),
        ({"burn_rate_slow": 6.0}, "burning"),
        ({"burn_rate_slow": 5.9}, "ok"),
        ({"error_budget_left": -0.1}, "missed"),
    ],
)
def test_the_status_of_a_contract_is_that_of_its_error_budget(changes, status):
    assert queueview.burn_status(make_account(**changes)) == status


def test_contracts_that_burn_fastest_come_first_and_have_a_limit():
    accounts = [
        make_account(f"t{index}", burn_rate_slow=float(index))
        for index in range(queueview.CONTRACTS_MAX + 1)
    ]
    rows = queueview.contract_rows(accounts)
    assert len(rows) == queueview.CONTRACTS_MAX
    assert rows[0]["contract"].tenant_id == f"t{queueview.CONTRACTS_MAX}"
    (only,) = queueview.contract_rows(accounts, "t7")
    assert only["contract"].tenant_id == "t7"


def test_the_ladder_says_what_is_given_up():
    row = queueview.overload_row(OverloadView(2, {"kv": 0.3, "queue": 0.81}, "queue"))
    assert row["words"] == "no surplus request starts"
    assert [rung["is_on"] for rung in row["rungs"]] == [True, True, False, False]
    assert [signal["name"] for signal in row["signals"]] == ["queue", "kv"]
