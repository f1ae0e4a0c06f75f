"""Fair turns by GPU time: bounds, weights, keys, locality, and what counters forget."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane import domain, fairqueue
from controlplane.fairqueue import FairQueue
from controlplane.gpuseconds import request_s
from controlplane.protocol import StepModel
from tests.controlplane.rig import Rig, of, rejection
from tests.factories import BATCH, make_hello, make_request

H200 = StepModel(4.8e-3, 18e-6, 29e-9)


def push(queue: FairQueue, name: str, tenant: str, **facts) -> None:
    queue.push(make_request(name, tenant_id=tenant, **facts))


def take(queue: FairQueue, output_tokens: int | None = None) -> str:
    """Start whoever is next, end it at once; without a cached prefix."""
    request = queue.heads(1)[0]
    queue.take(request.request_id, H200, request.prompt_tokens)
    queue.check_integrity()
    queue.settle(request.request_id, output_tokens)
    return request.request_id


def cost_s(request) -> float:
    return request_s(H200, request.prompt_tokens, request.prompt_tokens, request.output_tokens_max)


def test_idle_tenant_earns_no_credit():
    queue = FairQueue(tenants_max=10)
    for index in range(6):
        push(queue, f"a{index}", "a")
    for _ in range(4):
        take(queue, 16)
    for index in range(3):
        push(queue, f"b{index}", "b", arrived_at_s=1.0)
    order = [take(queue, 16) for _ in range(5)]
    assert order.index("a4") <= 1 and order.index("a5") <= 3


def test_queue_of_one_tenant_is_first_come_first_served():
    queue = FairQueue(tenants_max=10)
    for index in range(5):
        push(queue, f"a{index}", "a")
    assert [take(queue, 16) for _ in range(5)] == [f"a{index}" for index in range(5)]


def test_position_counts_turns():
    queue = FairQueue(tenants_max=10)
    for index in range(3):
        push(queue, f"a{index}", "a")
    push(queue, "b0", "b")
    assert [queue.position(name) for name in ("a0", "a1", "a2", "b0")] == [1, 3, 4, 1]


def test_counters_of_idle_tenants_are_bounded_and_waiting_ones_are_kept():
    queue = FairQueue(tenants_max=3)
    for index in range(10):
        push(queue, f"r{index}", f"t{index}")
    assert len(queue.heads(100)) == 10, "waiting tenants keep their counters"
    while len(queue):
        take(queue, 16)
    push(queue, "last", "new")
    assert len(queue._counters) == len(queue._tenants) == 3 and "new" in queue._tenants


def test_keys_of_one_tenant_are_bounded():
    queue = FairQueue(tenants_max=3)
    for index in range(fairqueue.KEYS_MAX + 5):
        push(queue, f"r{index}", "a", key_id=f"k{index}")
        take(queue, 16)
    assert len(queue._tenants["a"].keys) == fairqueue.KEYS_MAX


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.integers(1, 4_000), st.integers(1, 500)),
        min_size=20,
        max_size=120,
    )
)
def test_two_backlogged_tenants_stay_within_two_largest_requests(costs):
    """Random costs, outputs that are known only at the end: the bound of the virtual counter."""
    queue = FairQueue(tenants_max=10)
    waiting, true_s = {"t0": 0, "t1": 0}, {}
    for index, (tenant, prompt_tokens, output_tokens) in enumerate(costs):
        waiting[f"t{tenant}"] += 1
        request = make_request(
            f"r{index:03}",
            tenant_id=f"t{tenant}",
            prompt_tokens=prompt_tokens,
            output_tokens_max=output_tokens,
        )
        queue.push(request)
        true_s[request.request_id] = cost_s(request)
    served, largest_s = {"t0": 0.0, "t1": 0.0}, max(true_s.values())
    while all(waiting.values()):
        head = queue.heads(1)[0]
        queue.take(head.request_id, H200, head.prompt_tokens)
        queue.settle(head.request_id, head.output_tokens_max)
        waiting[head.tenant_id] -= 1
        served[head.tenant_id] += true_s[head.request_id]
        assert abs(served["t0"] - served["t1"]) <= 2.0 * largest_s


def test_shares_follow_the_weights():
    queue = FairQueue(tenants_max=10)
    for index in range(40):
        push(queue, f"a{index}", "a", weight=3.0)
        push(queue, f"b{index}", "b", weight=1.0)
    taken = [take(queue, 16)[0] for _ in range(40)]
    assert taken.count("a") == pytest.approx(30, abs=1)


def test_costs_are_gpu_time_so_a_long_prompt_counts_for_many_short_ones():
    queue = FairQueue(tenants_max=10)
    for index in range(2):
        push(queue, f"long{index}", "a", prompt_tokens=4_000, output_tokens_max=1)
    for index in range(20):
        push(queue, f"short{index}", "b", prompt_tokens=400, output_tokens_max=1)
    assert take(queue, 1) == "long0"
    between = 0
    while take(queue, 1) != "long1":
        between += 1
    ratio = request_s(H200, 4_000, 4_000, 1) / request_s(H200, 400, 400, 1)
    assert 10 < ratio < 16 and between == pytest.approx(ratio, abs=1)  # attention is quadratic


def test_cached_prompts_are_cheaper():
    queue = FairQueue(tenants_max=10)
    for tenant in ("a", "b"):
        push(queue, tenant, tenant, prompt_tokens=1_000)
    queue.take("a", H200, 1_000)
    queue.take("b", H200, 16)
    assert queue.served_s("b") < queue.served_s("a")


def test_keys_of_a_tenant_take_turns_and_many_keys_win_nothing():
    queue = FairQueue(tenants_max=10)
    for index in range(9):
        push(queue, f"a{index}", "a", key_id=f"k{index % 3}")
    for index in range(6):
        push(queue, f"b{index}", "b", key_id="k")
    taken = [take(queue, 16) for _ in range(12)]
    assert sum(name.startswith("a") for name in taken) == 6
    assert {name for name in taken if name.startswith("a")} == {f"a{n}" for n in range(6)}


def test_a_rejected_request_costs_nothing():
    queue = FairQueue(tenants_max=10)
    for index in range(3):
        push(queue, f"a{index}", "a")
    queue.remove("a0")
    assert queue.served_s("a") == 0.0
    take(queue, None)  # it had a worker, and was given up
    assert queue.served_s("a") == 0.0


def test_the_end_corrects_what_the_start_has_charged():
    queue = FairQueue(tenants_max=10)
    for index in range(2):
        push(queue, f"a{index}", "a", prompt_tokens=100, output_tokens_max=1_000)
    queue.take("a0", H200, 100)
    guessed_s = queue.served_s("a")
    queue.settle("a0", 10)
    assert queue.served_s("a") == pytest.approx(request_s(H200, 100, 100, 10))
    assert queue.served_s("a") < guessed_s
    queue.take("a1", H200, 100)  # its tenant is known for short outputs by now
    assert queue.served_s("a") == pytest.approx(2.0 * request_s(H200, 100, 100, 10))
    queue.settle("unknown", 5)


def test_within_a_quantum_the_longest_cached_prefix_goes_first_and_not_beyond():
    queue = FairQueue(tenants_max=10)
    for index in range(20):
        push(queue, f"a{index}", "a")
        push(queue, f"b{index}", "b")
    for _ in range(4):
        take(queue, 16)

    def hits(request) -> int:
        return 640 if request.tenant_id == "b" else 0

    taken = []
    for _ in range(8):
        head = queue.heads(16, hits)[0]
        queue.take(head.request_id, H200, head.prompt_tokens)
        queue.settle(head.request_id, 16)
        taken.append(head.tenant_id)
    assert taken[0] == "b" and taken.count("b") > taken.count("a") > 0
    unit_s = request_s(H200, 32, 32, 16)
    ahead_s = queue.served_s("b") - queue.served_s("a")
    assert 0.0 < ahead_s <= (fairqueue.QUANTUM_COSTS + 1.01) * unit_s


def test_counters_do_not_drift_away(monkeypatch):
    monkeypatch.setattr(fairqueue, "REBASE_S", 0.001)
    queue = FairQueue(tenants_max=10)
    for index in range(200):
        push(queue, f"a{index}", "a", weight=3.0)
        push(queue, f"b{index}", "b")
    taken = [take(queue, 16)[0] for _ in range(200)]
    assert max(queue.served_s("a"), queue.served_s("b")) < 0.01
    assert taken.count("a") == pytest.approx(150, abs=2)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["push", "take", "remove"]), st.integers(0, 5))))
def test_queue_loses_and_invents_nothing(steps):
    queue = FairQueue(tenants_max=2)
    inside: set[str] = set()
    for number, (step, pick) in enumerate(steps):
        if step == "push":
            request_id = f"r{number}"
            push(queue, request_id, f"t{pick}", model_id=f"m{pick % 2}", key_id=f"k{pick % 3}")
            inside.add(request_id)
        elif inside:
            request_id = sorted(inside)[pick % len(inside)]
            if step == "take":
                queue.take(request_id, H200, 8)
            else:
                queue.remove(request_id)
            inside.remove(request_id)
        queue.check_integrity()
        assert {request.request_id for request in queue.requests()} == inside
        assert {request.request_id for request in queue.heads(1000)} == inside
        places = sorted(queue.position(request_id) for request_id in inside)
        assert all(1 <= place <= len(inside) for place in places)


# --- in the plane --------------------------------------------------------------------------------


def test_batch_and_interactive_work_keep_separate_counters():
    rig = Rig(sequences_max=1, batch_rows_max=1)
    rig.join("decode")
    rig.submit("b0", slo=BATCH, tenant_id="acme", output_tokens_max=900)
    rig.submit("r0", tenant_id="other")
    rig.submit("a1", tenant_id="acme")
    rig.submit("z1", tenant_id="zeta")
    (dispatch,) = of(domain.Dispatch, rig.finish("r0"))
    assert dispatch.request_id == "a1", "its batch work is not held against it"


def test_tenant_of_weight_zero_is_served_in_what_others_leave():
    rig = Rig(sequences_max=1)
    rig.join("decode")
    rig.submit("r0", tenant_id="other")
    rig.submit("free", tenant_id="free", weight=0.0)
    rig.submit("paid", tenant_id="paid")
    (dispatch,) = of(domain.Dispatch, rig.finish("r0"))
    assert dispatch.request_id == "paid"
    (dispatch,) = of(domain.Dispatch, rig.finish("paid"))
    assert (dispatch.request_id, dispatch.tier) == ("free", "surplus")


def test_refused_requests_leave_no_charge_in_the_plane():
    rig = Rig()
    rig.join("decode", models=(make_hello().models[0],))
    for index in range(3):
        rejection(rig.submit(f"x{index}", output_tokens_max=100_000))
    assert rig.plane._requests._room._queues == {}
