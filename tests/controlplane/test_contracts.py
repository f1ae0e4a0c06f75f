"""Contracts: rates that are never overrun, budgets, over-commitment, error budget and burn rate."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane import domain
from controlplane.contracts import COMMIT_SHARE, Capacity, demand_gpu_s, preview
from controlplane.ledger import Account, ErrorBudget, Ledger, RateWindow, worst_case
from tests.controlplane.rig import Rig, of, placement, rejection
from tests.factories import BATCH, CPU_STEP, INTERACTIVE, MODEL, make_request


def make_contract(**facts) -> domain.Contract:
    values = {"requests_per_min": 60, "tokens_per_min": 6_000, "concurrency_max": 10} | facts
    return domain.Contract(
        "acme", MODEL.model_id, values.pop("class_name", "interactive"), **values
    )


# --- rates ---------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.integers(1, 20),
    st.lists(st.tuples(st.floats(0.0, 20.0), st.integers(1, 20)), max_size=60),
)
def test_no_60_seconds_ever_hold_more_than_the_limit(limit, asks):
    window, now_s, taken = RateWindow(limit), 0.0, []
    for pause_s, amount in asks:
        now_s += pause_s
        wait_s = window.free_in_s(amount, now_s)
        if wait_s is None:
            assert amount > limit
        elif wait_s == 0.0:
            window.add(amount, now_s)
            taken.append((now_s, amount))
            recent = sum(number for at_s, number in taken if at_s > now_s - 60.0)
            assert recent <= limit


@settings(deadline=None)
@given(
    st.integers(1, 20),
    st.lists(st.tuples(st.floats(0.0, 20.0), st.integers(1, 20)), max_size=60),
)
def test_retry_after_of_a_rate_is_exact(limit, asks):
    window, now_s = RateWindow(limit), 0.0
    for pause_s, amount in asks:
        now_s += pause_s
        wait_s = window.free_in_s(amount, now_s)
        if wait_s is None:
            continue
        assert 0.0 <= wait_s <= 61.0
        if wait_s > 1e-3:
            assert window.free_in_s(amount, now_s + wait_s - 1e-6) > 0.0
        now_s += wait_s
        assert window.free_in_s(amount, now_s) == 0.0
        window.add(amount, now_s)


def test_refund_counts_for_the_second_it_was_taken_in_and_not_after_a_minute():
    window = RateWindow(100)
    second = window.add(100, 5.0)
    assert window.free_in_s(1, 6.0) == 60.0
    window.refund(60, second, 7.0)
    assert window.free_in_s(60, 7.0) == 0.0 and window.total == 40
    assert window.free_in_s(100, 66.0) == 0.0 and window.total == 0
    window.refund(40, second, 67.0)
    assert window.total == 0


# --- reserve and settle --------------------------------------------------------------------------

ASKS = st.lists(
    st.tuples(st.floats(0.0, 5.0), st.integers(1, 300), st.integers(1, 200), st.floats(0.0, 1.0)),
    max_size=60,
)


@settings(deadline=None)
@given(ASKS, st.integers(1, 4), st.integers(300, 5_000))
def test_no_limit_is_overrun_and_all_is_free_when_idle(asks, concurrency, budget):
    contract = make_contract(
        requests_per_min=10,
        tokens_per_min=1_500,
        concurrency_max=concurrency,
        budget_tokens=budget,
        budget_usd=0.01,
        usd_per_million_prompt=1.0,
        usd_per_million_output=4.0,
    )
    ledger, now_s, running, billed = Ledger(), 0.0, [], 0
    ledger.set_contracts([contract])
    for index, (pause_s, prompt, output, share) in enumerate(asks):
        now_s += pause_s
        request = make_request(f"r{index}", prompt_tokens=prompt, output_tokens_max=output)
        account = ledger.account(request)
        tokens, usd = worst_case(contract, request)
        if not account.refuse_hard(tokens, usd) and not account.over_rate(tokens, now_s):
            ledger.reserve(account, request, "guaranteed", now_s)
            running.append((request.request_id, int(share * output)))
        (view,) = ledger.views(now_s)
        assert view.num_running <= concurrency
        assert view.spent_tokens + view.held_tokens <= budget
        assert view.spent_usd + view.held_usd <= 0.01 + 1e-9
        assert view.requests_last_min <= 10 and view.tokens_last_min <= 1_500
        ledger.check_integrity([name for name, _ in running])
        if running and share < 0.7:
            billed += ledger.settle(*running.pop(0), True, now_s)[0]
    for name, used in running:
        billed += ledger.settle(name, used, True, now_s)[0]
    (view,) = ledger.views(now_s)
    assert (view.num_running, view.held_tokens, view.held_usd) == (0, 0, 0.0)
    assert view.spent_tokens == billed


def test_budget_of_a_new_period_starts_at_nothing_and_a_restart_goes_on_from_what_was_spent():
    contract = make_contract(budget_tokens=100, period="2026-11")
    ledger = Ledger()
    ledger.set_contracts([contract], [domain.Spent(contract.key, 80, 0.0)])
    account = ledger.account(make_request())
    assert account.refuse_hard(21, 0.0).code == "contract_budget"
    assert account.refuse_hard(20, 0.0) is None
    ledger.set_contracts([replace(contract, period="2026-12")])
    assert account.refuse_hard(100, 0.0) is None and account.refuse_hard(101, 0.0)


def test_contract_that_ends_is_kept_until_its_last_request_is_settled():
    ledger, request = Ledger(), make_request()
    ledger.set_contracts([make_contract()])
    ledger.reserve(ledger.account(request), request, "guaranteed", 0.0)
    ledger.set_contracts([])
    assert ledger.account(request) is None and ledger.contracts() == ()
    assert len(ledger.views(0.0)) == 1
    assert ledger.settle("r1", 5, True, 1.0) == (37, 0.0)
    assert ledger.views(1.0) == ()
    assert ledger.settle("r1", 5, True, 1.0) == (0, 0.0)


# --- what the plane does with them ---------------------------------------------------------------


def under(contract: domain.Contract, **settings) -> Rig:
    rig = Rig(**settings)
    rig.join("decode")
    rig.handle(domain.ContractsSet((contract,)))
    return rig


def test_request_over_its_rate_runs_in_the_surplus_tier():
    rig = under(make_contract(requests_per_min=2))
    for name in ("r1", "r2"):
        assert of(domain.Decided, rig.submit(name))[0].outcome.demotion is None
    (decided,) = of(domain.Decided, rig.submit("r3"))
    assert decided.outcome.demotion.code == "contract_rate"
    assert decided.record.tier == "surplus" and "2 of 2 requests" in decided.record.reason
    rig.finish("r1")  # it waits while its worker has prompts that are guaranteed
    rig.finish("r2")
    rig.tick(0.1, heard=("w1",))
    dispatched = of(domain.Dispatch, rig.commands)[-1]
    assert (dispatched.request_id, dispatched.tier) == ("r3", "surplus")


def test_contract_without_surplus_refuses_with_the_exact_time_to_come_back():
    rig = under(make_contract(requests_per_min=1, over_limit="reject"))
    rig.submit("r1")
    rig.finish("r1")
    rig.now_s = 10.5
    refused = rejection(rig.submit("r2"))
    assert refused.code == "contract_rate" and refused.retry_after_s == pytest.approx(50.5)
    rig.tick(refused.retry_after_s, heard=("w1",))
    placement(rig.submit("r3"))


def test_request_larger_than_its_rate_can_ever_be_is_refused_for_good():
    rig = under(make_contract(tokens_per_min=60, over_limit="reject"))
    assert rejection(rig.submit(prompt_tokens=50)).retry_after_s is None


def test_unused_worst_case_is_free_again_at_the_end():
    rig = under(make_contract(tokens_per_min=100, over_limit="reject"))
    rig.submit("r1", prompt_tokens=40, output_tokens_max=40)
    assert rejection(rig.submit("r2", prompt_tokens=40, output_tokens_max=10)).code
    rig.finish("r1")  # 4 ids were delivered
    placement(rig.submit("r3", prompt_tokens=40, output_tokens_max=16))
    (account,) = rig.plane.accounts(rig.now_s)
    assert account.tokens_last_min == 44 + 56 and account.spent_tokens == 44


def test_concurrency_and_budget_of_a_contract_bind_every_tier():
    rig = under(make_contract(concurrency_max=2, budget_tokens=150))
    rig.submit("r1"), rig.submit("r2")
    assert rejection(rig.submit("r3")).code == "contract_concurrency"
    rig.finish("r1"), rig.finish("r2")
    assert rejection(rig.submit("r4", prompt_tokens=70, output_tokens_max=9)).code == (
        "contract_budget"
    )
    placement(rig.submit("r5", prompt_tokens=70, output_tokens_max=8))


def test_batch_under_a_contract_is_bound_by_its_budget_only():
    contract = make_contract(
        class_name="batch", is_batch=True, requests_per_min=1, budget_tokens=100
    )
    rig = under(contract)
    for index in range(2):
        placement(rig.submit(f"b{index}", slo=BATCH))
    assert rejection(rig.submit("b2", slo=BATCH)).code == "contract_budget"


def test_other_tenants_models_and_classes_are_not_bound_by_a_contract():
    rig = under(make_contract(requests_per_min=1, over_limit="reject"))
    rig.submit("r1")
    placement(rig.submit("r2", tenant_id="beta"))
    placement(rig.submit("r3", slo=replace(INTERACTIVE, name="standard")))
    assert rejection(rig.submit("r4")).code == "contract_rate"


def test_attainment_counts_what_was_promised_and_leaves_out_the_tenants_own_doing():
    rig = under(make_contract(attainment=0.9, concurrency_max=3))
    for name in ("met", "slow", "gone"):
        rig.submit(name)
    rejection(rig.submit("over"))
    rig.handle(domain.FirstToken("met", 0.5))
    rig.finish("met")
    rig.handle(domain.FirstToken("slow", 4.5))
    rig.finish("slow")
    rig.finish("gone", "cancelled")
    rig.submit("stuttered")
    rig.handle(domain.FirstToken("stuttered", 0.5))
    rig.handle(domain.Finished("stuttered", "completed", 4, itl_s_p99=0.3))
    (account,) = rig.plane.accounts(rig.now_s)
    assert (account.num_met, account.num_missed) == (1, 2)
    assert account.error_budget_left == pytest.approx(1.0 - (2 / 3) / 0.1)
    assert account.burn_rate_fast == pytest.approx((2 / 3) / 0.1)


def test_burn_rate_of_a_window_forgets_what_is_older():
    budget = ErrorBudget()
    for minute in range(60):
        for _ in range(9):
            budget.observe(True, 60.0 * minute)
        budget.observe(minute >= 5, 60.0 * minute)
    now_s = 59 * 60.0
    assert budget.burn_rate(0.99, 60, now_s) == pytest.approx(5 / 600 / 0.01)
    assert budget.burn_rate(0.99, 5, now_s) == 0.0
    assert budget.burn_rate(0.99, 60, now_s + 301.0) == 0.0
    assert budget.burn_rate(0.99, 60, now_s + 7_200.0) == 0.0
    assert budget.left_share(0.99) == pytest.approx(1.0 - 5 / 600 / 0.01)


# --- what may be promised ------------------------------------------------------------------------


def capacity(num_workers: int, kv_tokens: int = 10**9) -> Capacity:
    return Capacity(MODEL.model_id, num_workers, kv_tokens, CPU_STEP)


def test_contract_that_fits_exactly_is_taken_and_one_more_token_is_not():
    contract = make_contract(requests_per_min=1, tokens_per_min=10_000)
    needed = demand_gpu_s(contract, CPU_STEP)
    num_workers = 3
    fitting = int(10_000 * COMMIT_SHARE * num_workers / needed)
    while demand_gpu_s(replace(contract, tokens_per_min=fitting), CPU_STEP) > 2.7:
        fitting -= 1
    for tokens, is_refused in ((fitting, False), (fitting + 1, True)):
        (row,) = preview([], [replace(contract, tokens_per_min=tokens)], [capacity(num_workers)])
        assert (row.refusal is not None) == is_refused, row
    assert "GPU-s/s" in row.refusal.message and "90%" in row.refusal.message


def test_kv_of_concurrent_requests_is_counted_too():
    contract = make_contract(requests_per_min=1, tokens_per_min=100, concurrency_max=50)
    (row,) = preview([], [contract], [capacity(1, kv_tokens=5_000)])
    assert row.refusal is None and row.kv_after == 5_000
    (row,) = preview([], [replace(contract, concurrency_max=51)], [capacity(1, kv_tokens=5_000)])
    assert "5100 KV tokens" in row.refusal.message


@settings(deadline=None)
@given(st.integers(1, 1_000), st.integers(1, 100), st.integers(1, 5), st.integers(0, 5))
def test_more_workers_never_turn_a_contract_away_and_smaller_ones_always_follow(
    requests, tokens_each, num_workers, more
):
    contract = make_contract(requests_per_min=requests, tokens_per_min=requests * tokens_each)
    (few,) = preview([], [contract], [capacity(num_workers)])
    (many,) = preview([], [contract], [capacity(num_workers + more)])
    assert few.refusal or not many.refusal
    (less,) = preview([contract], [], [capacity(num_workers)])
    assert less.refusal is None


def test_plane_previews_against_its_live_workers():
    rig = Rig()
    (row,) = rig.plane.preview([make_contract()])
    assert "no live worker serves" in row.refusal.message
    rig.join("decode")
    (row,) = rig.plane.preview([make_contract(tokens_per_min=1_000)])
    assert row.refusal is None and row.committed_before == 0.0
    rig.handle(domain.ContractsSet((make_contract(tokens_per_min=1_000),)))
    (row,) = rig.plane.preview([make_contract(tokens_per_min=900_000)])
    assert row.refusal.code == "over_commit" and row.committed_before > 0.0


def test_more_contracts_than_allowed_are_a_bug_of_the_caller():
    rig = Rig(contracts_max=1)
    rig.handle(domain.ContractsSet((make_contract(),)))
    with pytest.raises(AssertionError):
        rig.handle(domain.ContractsSet((make_contract(), make_contract(class_name="flex"))))


def test_account_of_a_contract_made_smaller_keeps_what_runs_and_lets_nothing_more_in():
    account = Account(make_contract())
    account.requests.add(30, 0.0)
    account.change(make_contract(requests_per_min=10))
    assert account.over_rate(1, 0.0).retry_after_s == 61.0
    assert account.over_rate(1, 61.0) is None
