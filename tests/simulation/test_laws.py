"""The laws themselves: each refuses what it is there to refuse."""

from dataclasses import replace

import pytest

from controlplane import domain, protocol
from controlplane.config import ControlPlaneConfig
from controlplane.contractbook import ContractBook
from controlplane.invariants import Watch
from controlplane.latency import LatencyModel
from controlplane.sim import laws, scenario
from controlplane.sim.equalshares import WINDOW_S, Fairness
from gpuworkers import scheduler
from gpuworkers.sequence import Sequence
from tests.factories import make_hello, make_load, make_request

POLICY = protocol.Policy()
CONTRACT = domain.Contract("acme", "m", "interactive", 2, 1_000, 2, budget_tokens=2_000)
PLACEMENT = domain.Placement("local", "w1", "w1", 0.1, 0.01)


def sequence(name: str, is_batch: bool, outputs: int = 0, prompt: int = 40) -> Sequence:
    slo = scenario.CLASSES[2 if is_batch else 0]
    return Sequence(
        request_id=name,
        epoch=1,
        stage="full",
        salt=b"s",
        sampling=protocol.Sampling(20),
        targets=protocol.ClassTargets(
            slo.name, slo.rank, slo.ttft_s_p99, slo.itl_s_p99, is_batch=is_batch
        ),
        token_ids=[1] * (prompt + outputs),
        prompt_tokens=prompt,
        delivered_tokens=0,
        arrived_at_s=0.0,
        phase="running",
        computed_tokens=prompt + outputs - 1 if outputs else 0,
        last_token_at_s=0.0 if outputs else None,
    )


def planned() -> tuple[scheduler.Plan, scheduler.SchedulerState, LatencyModel]:
    state = scheduler.SchedulerState(
        decoding=(sequence("d", False, outputs=2),),
        batch_decoding=(sequence("b", True, outputs=3),),
    )
    model = LatencyModel(scenario.STEP)
    return scheduler.plan(0.05, state, model, POLICY), state, model


def test_a_plan_of_the_scheduler_passes():
    plan, state, model = planned()
    assert (len(plan.rows), plan.num_online) == (2, 1)
    laws.check_plan(0.05, plan, state, model, POLICY)


def tampered(plan: scheduler.Plan, **changes) -> scheduler.Plan:
    return replace(plan, **changes)


@pytest.mark.parametrize(
    ("change", "law"),
    [
        (lambda plan: {"rows": plan.rows[1:], "num_online": plan.num_online - 1}, "plan"),
        (lambda plan: {"num_online": plan.num_online - 1}, "plan"),
        (lambda plan: {"rows": (*plan.rows[:-1], plan.rows[0])}, "plan"),
        (lambda plan: {"predicted_s": plan.predicted_s + 0.1}, "plan"),
        (lambda plan: {"rows": (plan.rows[0]._replace(start=0), *plan.rows[1:])}, "plan"),
        (lambda plan: {"rows": (plan.rows[0]._replace(samples=False), *plan.rows[1:])}, "plan"),
    ],
)
def test_a_plan_that_does_not_add_up_is_refused(change, law):
    plan, state, model = planned()
    with pytest.raises(AssertionError, match=law):
        laws.check_plan(0.05, tampered(plan, **change(plan)), state, model, POLICY)


def test_batch_that_runs_before_an_online_decode_is_refused():
    plan, state, model = planned()
    batch = plan.rows[-1:]
    features = type(plan.features)().with_tokens(batch[0].start, 1)
    alone = tampered(
        plan, rows=batch, num_online=0, features=features, predicted_s=model.predict_s(features)
    )
    with pytest.raises(AssertionError, match="I10"):
        laws.check_plan(0.05, alone, state, model, POLICY)


def watch() -> Watch:
    found = Watch(b"a secret of the plane", ControlPlaneConfig())
    hello = make_hello()
    welcome = protocol.Welcome("w1", 1, "s", 1, POLICY)
    found.after(domain.WorkerHello("c1", hello), [domain.Greet("c1", welcome)], 0.0)
    return found


def place(name: str, tier: str = "guaranteed") -> list[domain.Command]:
    record = domain.DecisionRecord(name, 1, "placed", "r", "", 0.0, 1, 1, PLACEMENT)
    return [
        domain.Dispatch("w1", name, 1, "full", tier=tier),  # type: ignore[arg-type]
        domain.Decided(name, domain.Placed(PLACEMENT, 1), record),
    ]


def refuse(name: str, outcome: domain.Rejected) -> list[domain.Command]:
    record = domain.DecisionRecord(name, 0, "rejected", "r", "", 0.0, 0, 0, None)
    return [domain.Decided(name, outcome, record)]


def test_a_silent_worker_that_gets_work_is_noticed():
    found = watch()
    found.after(domain.Submit(make_request("r1")), place("r1"), 1.0)
    load = make_load()
    found.after(domain.WorkerMessage("w1", 1, load), [], 2.0)
    silent_s = max(1.5, 2.0 * max(load.predicted_s, load.measured_s)) + 0.1
    with pytest.raises(AssertionError, match="I14"):
        found.after(domain.Submit(make_request("r2")), place("r2"), 2.0 + silent_s)


def test_work_for_a_worker_that_is_gone_is_noticed():
    found = watch()
    found.after(domain.WorkerClosed("w1", 1), [], 0.5)
    with pytest.raises(AssertionError, match="I9"):
        found.after(domain.Submit(make_request("r1")), place("r1"), 0.6)


def test_a_tier_that_was_not_decided_is_noticed():
    with pytest.raises(AssertionError, match="I5"):
        watch().after(domain.Submit(make_request("r1")), place("r1", "surplus"), 0.1)


def test_a_full_queue_that_is_not_full_is_noticed():
    with pytest.raises(AssertionError, match="I16"):
        watch().after(
            domain.Submit(make_request("r1")),
            refuse("r1", domain.Rejected("queue_full", "", 1.0)),
            0.1,
        )


@pytest.mark.parametrize(
    ("outcome", "tokens"),
    [
        (domain.Rejected("contract_concurrency", "", 1.0), 10),
        (domain.Rejected("contract_budget", "", None), 10),
        (domain.Rejected("contract_rate", "", 1.0), 10),
        (domain.Rejected("contract_rate", "", None), 1_000),
    ],
)
def test_a_refusal_with_room_left_is_noticed(outcome, tokens):
    book = ContractBook(CONTRACT)
    book.admitted("r0", 100, True, 0.0)
    with pytest.raises(AssertionError, match="I5"):
        book.refused(outcome, tokens, 1.0)


@pytest.mark.parametrize(("retry_s", "is_right"), [(59.5, True), (58.0, False), (62.0, False)])
def test_a_retry_time_that_is_too_soon_or_too_late_is_noticed(retry_s, is_right):
    book = ContractBook(CONTRACT)
    book.admitted("r0", 100, True, 0.0)
    book.admitted("r1", 100, True, 0.5)
    refusal = domain.Rejected("contract_rate", "", retry_s)
    if is_right:
        book.refused(refusal, 100, 1.0)
        return
    with pytest.raises(AssertionError, match="I5"):
        book.refused(refusal, 100, 1.0)


def test_surplus_for_its_pace_is_noticed_where_what_was_not_used_is_counted():
    """Of 700 tokens that it reserved 117 are above its rate after 35 s, and then it took 100."""
    book = ContractBook(CONTRACT)
    book.admitted("r0", 700, True, 0.0)
    book.demoted("contract_pace", 35.0)
    book.settled("r0", 50, 50, True, 35.0)
    with pytest.raises(AssertionError, match="I5"):
        book.demoted("contract_pace", 35.0)


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_a_minute_that_one_of_two_equal_tenants_got_is_noticed(share):
    """`share` of what is served goes to the first one."""
    fairness = Fairness()
    welcome = protocol.Welcome("w1", 1, "s", 1, POLICY)
    fairness.after(domain.WorkerHello("c1", make_hello()), [domain.Greet("c1", welcome)], 0.0)
    for tenant in ("a", "b"):
        for index in range(200):
            request = make_request(f"{tenant}{index}", tenant_id=tenant)
            fairness.after(domain.Submit(request), [], 0.0)
    served = {"a": 0, "b": 0}

    def serve() -> None:
        for number in range(100):
            tenant = "a" if served["a"] < share * (number + 1) else "b"
            name = f"{tenant}{served[tenant]}"
            served[tenant] += 1
            fairness.after(
                domain.Tick(), [domain.Dispatch("w1", name, 1, "full")], number * WINDOW_S / 80
            )

    if share == 0.5:
        serve()
        assert fairness.num_compared > 0
        return
    with pytest.raises(AssertionError, match="I11"):
        serve()
