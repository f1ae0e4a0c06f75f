"""The plane's bounded parts on their own: fair queue, transfer rates."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.config import ControlPlaneConfig
from controlplane.disagg import TransferRates
from controlplane.fairqueue import FairQueue, cost_tokens
from tests.factories import make_request


def take(queue: FairQueue) -> str:
    request_id = queue.heads(1)[0].request_id
    queue.take(request_id)
    return request_id


def test_idle_tenant_earns_no_credit():
    queue = FairQueue(tenants_max=10)
    for index in range(5):
        queue.push(make_request(f"a{index}", tenant_id="a"))
    for _ in range(4):
        take(queue)
    queue.push(make_request("a5", tenant_id="a"))
    for index in range(3):
        queue.push(make_request(f"b{index}", tenant_id="b", arrived_at_s=1.0))
    order = [take(queue) for _ in range(5)]
    assert order.index("a4") <= 1 and order.index("a5") <= 3


def test_queue_of_one_tenant_is_first_come_first_served():
    queue = FairQueue(tenants_max=10)
    for index in range(5):
        queue.push(make_request(f"a{index}"))
    assert [take(queue) for _ in range(5)] == [f"a{index}" for index in range(5)]


def test_position_counts_turns():
    queue = FairQueue(tenants_max=10)
    for index in range(3):
        queue.push(make_request(f"a{index}", tenant_id="a"))
    queue.push(make_request("b0", tenant_id="b"))
    assert [queue.position(name) for name in ("a0", "a1", "a2", "b0")] == [1, 3, 4, 1]


def test_counters_of_idle_tenants_are_bounded_and_waiting_ones_are_kept():
    queue = FairQueue(tenants_max=3)
    for index in range(10):
        queue.push(make_request(f"r{index}", tenant_id=f"t{index}"))
    assert len(queue.heads(100)) == 10, "waiting tenants keep their counters"
    while len(queue):
        take(queue)
    queue.push(make_request("last", tenant_id="new"))
    assert len(queue._served) == 3 and "new" in queue._served


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(1, 400)), min_size=20, max_size=120),
)
def test_two_backlogged_tenants_stay_within_one_largest_request(costs):
    queue = FairQueue(tenants_max=10)
    waiting = {"t0": 0, "t1": 0}
    for index, (tenant, prompt_tokens) in enumerate(costs):
        waiting[f"t{tenant}"] += 1
        request = make_request(f"r{index:03}", tenant_id=f"t{tenant}", prompt_tokens=prompt_tokens)
        queue.push(request)
    served = {"t0": 0.0, "t1": 0.0}
    largest = max(cost_tokens(make_request(prompt_tokens=cost)) for _, cost in costs)
    while all(waiting.values()):
        head = queue.heads(1)[0]
        queue.take(head.request_id)
        waiting[head.tenant_id] -= 1
        served[head.tenant_id] += cost_tokens(head)
        assert abs(served["t0"] - served["t1"]) <= largest


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["push", "take", "remove"]), st.integers(0, 5))))
def test_queue_loses_and_invents_nothing(steps):
    queue = FairQueue(tenants_max=2)
    inside: set[str] = set()
    for number, (step, pick) in enumerate(steps):
        if step == "push":
            request_id = f"r{number}"
            queue.push(make_request(request_id, tenant_id=f"t{pick}", model_id=f"m{pick % 2}"))
            inside.add(request_id)
        elif inside:
            request_id = sorted(inside)[pick % len(inside)]
            (queue.take if step == "take" else queue.remove)(request_id)
            inside.remove(request_id)
        assert len(queue) == len(inside)
        assert {request.request_id for request in queue.requests()} == inside
        assert {request.request_id for request in queue.heads(1000)} == inside


def test_transfer_rate_moves_towards_what_is_measured_and_is_bounded():
    config = ControlPlaneConfig(
        pairs_max=2, transfer_bytes_per_s=1e9, transfer_weight=0.5, transfer_setup_s=0.02
    )
    rates = TransferRates(config)
    assert rates.transfer_s(("a", "b"), 10**9) == pytest.approx(1.02)
    for _ in range(20):
        rates.observe(("a", "b"), 10**6, 0.03)  # 10 ms beyond the set-up
    assert rates.seconds_per_byte(("a", "b")) == pytest.approx(1e-8, rel=1e-3)
    rates.observe(("a", "c"), 10**6, 0.001)
    assert rates.seconds_per_byte(("a", "c")) == pytest.approx(5e-10), "never below nothing"
    rates.observe(("a", "d"), 10**6, 0.03)
    assert len(rates) == 2
    assert rates.seconds_per_byte(("a", "b")) == 1e-9, "the oldest pair is forgotten"
