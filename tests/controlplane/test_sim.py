"""The real ControlPlane with the real scheduler and block pool, in virtual time, under faults."""

from collections import defaultdict

import pytest

from controlplane import domain
from controlplane.config import ControlPlaneConfig
from controlplane.sim.cluster import Cluster
from controlplane.sim.events import Events
from tests.controlplane.rig import of
from tests.factories import BATCH, INTERACTIVE, make_hello, make_request


def cluster(seed: int, *roles, transfer_failures: float = 0.0, num_blocks: int = 512, **settings):
    result = Cluster(seed, ControlPlaneConfig.from_mapping(settings), transfer_failures)
    for role in roles:
        join(result, role, num_blocks)
    return result


def join(target: Cluster, role, num_blocks: int = 512):
    address = f"127.0.0.1:{len(target.members) + 1}"
    return target.add(make_hello(role, num_blocks=num_blocks, handoff_address=address))


def load(target: Cluster, num_requests: int, seconds: float, slo=INTERACTIVE) -> None:
    """Half short and half long prompts at random times."""
    chance = target.events.random
    for index in range(num_requests):
        prompt_tokens = chance.choice([chance.randint(8, 48), chance.randint(256, 600)])
        request_id, output = f"{slo.name}{index}", chance.randint(1, 64)

        def arrive(request_id=request_id, prompt_tokens=prompt_tokens, output=output):
            target.submit(
                make_request(
                    request_id,
                    tenant_id=f"t{len(request_id) % 3}",
                    slo=slo,
                    prompt_tokens=prompt_tokens,
                    output_tokens_max=output,
                    arrived_at_s=target.events.now_s,
                )
            )

        target.events.after(chance.uniform(0.0, seconds), arrive)


def check_at_rest(target: Cluster) -> None:
    """Every request has one end, complete when completed; nothing is held anywhere."""
    for request_id, stream in target.streams.items():
        assert stream.end, f"{request_id} has no end: {stream}"
        if stream.end == "completed":
            assert len(stream.ids) == stream.request.output_tokens_max
    view = target.plane.view(target.events.now_s)
    assert view.requests == ()
    assert all(worker.requests == 0 for worker in view.workers)
    assert all(number == 0 for _, number in view.queued_by_class)
    for member in target.members:
        if member.is_connected and not member.is_dead:
            assert member.worker.sequences == {}, member.worker.sequences
            assert member.worker.pool.num_available == member.worker.pool.num_blocks
    check_commands(target)


def check_commands(target: Cluster) -> None:
    """One dispatch, or one pair of stages, per epoch; epochs rise by one; one terminal decision."""
    stages = defaultdict(list)
    for item in of(domain.Dispatch, target.commands):
        stages[item.request_id, item.epoch].append((item.stage, item.worker_id))
    highest: dict[str, int] = defaultdict(int)
    for (request_id, epoch), found in stages.items():
        assert epoch == highest[request_id] + 1, (request_id, epoch)
        highest[request_id] = epoch
        if len(found) == 1:
            assert found[0][0] == "full", found
        else:
            assert [stage for stage, _ in found] == ["prefill", "decode"], found
            assert found[0][1] != found[1][1], found
    ends = [
        item.request_id
        for item in of(domain.Decided, target.commands)
        if isinstance(item.outcome, domain.Rejected)
    ]
    assert len(ends) == len(set(ends))


def test_undisturbed_demo_hands_off_long_prompts_and_completes_all():
    target = cluster(1, "prefill", "decode")
    load(target, 60, 90.0)
    target.events.run(130.0)
    check_at_rest(target)
    assert all(stream.end == "completed" for stream in target.streams.values())
    placed = [
        item.outcome.placement
        for item in of(domain.Decided, target.commands)
        if isinstance(item.outcome, domain.Placed)
    ]
    num_long = sum(stream.request.prompt_tokens > 48 for stream in target.streams.values())
    num_handoffs = sum(item.split == "handoff" for item in placed)
    assert num_long * 0.8 <= num_handoffs <= num_long
    assert of(domain.PlanChanged, target.commands) == []
    assert of(domain.FailoverCounted, target.commands) == []
    num_single = sum(
        stream.request.output_tokens_max == 1 and stream.request.prompt_tokens > 48
        for stream in target.streams.values()
    )  # those end with their first id and need no transfer
    assert len(of(domain.HandoffCounted, target.commands)) >= num_handoffs - num_single


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("seed", range(5))
def test_killed_worker_of_two_loses_and_repeats_nothing(seed, victim):
    target = cluster(seed, "prefill", "decode")
    load(target, 24, 30.0)
    victim = target.members[victim]
    while not victim.worker.sequences or target.events.now_s < 15.0:
        target.events.run(target.events.now_s + 0.05)
    target.kill(victim)
    target.events.run(150.0)
    check_at_rest(target)
    assert all(stream.end == "completed" for stream in target.streams.values())
    counted = of(domain.HandoffCounted, target.commands)
    moved = [item for item in counted if item.recomputed_tokens]  # the peer noticed it first
    assert of(domain.FailoverCounted, target.commands) or moved


def test_failed_transfers_are_computed_again():
    target = cluster(3, "prefill", "decode", transfer_failures=0.5)
    load(target, 30, 60.0)
    target.events.run(150.0)
    check_at_rest(target)
    assert all(stream.end == "completed" for stream in target.streams.values())
    counted = of(domain.HandoffCounted, target.commands)
    assert any(item.recomputed_tokens >= 256 for item in counted)
    assert any(item.recomputed_tokens == 0 for item in counted)


@pytest.mark.parametrize("seed", range(15))
def test_random_faults_lose_and_repeat_nothing(seed):
    chance = Events(seed).random
    roles = [chance.choice(["prefill", "decode", "mixed"]) for _ in range(chance.randint(1, 4))]
    target = cluster(
        seed,
        *roles,
        transfer_failures=chance.choice([0.0, 0.2]),
        num_blocks=chance.choice([64, 512]),
        queue_max=chance.choice([5, 1000]),
        moves_max=chance.choice([1, 5]),
    )
    load(target, 40, 40.0)
    load(target, 10, 40.0, BATCH)
    for _ in range(chance.randint(2, 8)):
        target.events.after(chance.uniform(1.0, 40.0), lambda: fault(target))
    target.events.run(45.0)
    join(target, "decode"), join(target, "prefill")  # heal
    target.events.run(400.0)
    check_at_rest(target)
    allowed = {
        "completed",
        "cancelled",
        "queue_full",
        "queue_timeout",
        "retries_exhausted",
        "prompt_too_long",
        "no_worker",
        "poison",
    }
    assert {stream.end for stream in target.streams.values()} <= allowed
    if not any(member.is_dead for member in target.members):
        assert "no_worker" not in {stream.end for stream in target.streams.values()}


def fault(target: Cluster) -> None:
    chance = target.events.random
    member = chance.choice(target.members)
    kind = chance.choice(["kill", "freeze", "cut", "join", "role", "drain", "cancel"])
    if kind == "kill":
        target.kill(member)
    elif kind == "freeze" and not member.is_dead:
        target.freeze(member, chance.choice([1.0, 5.0, 20.0]))
    elif kind == "cut":
        target.cut(member)
    elif kind == "join":
        join(target, chance.choice(["prefill", "decode", "mixed"]))
    elif kind == "role":
        role = chance.choice(["prefill", "decode", "mixed"])
        target.handle(domain.RoleOrdered(member.worker_id, role, "ann"))
    elif kind == "drain" and len(target.members) > 1:
        target.handle(domain.DrainOrdered(member.worker_id, "ann"))
    elif target.streams:
        target.clients.cancel(chance.choice(sorted(target.streams)))


def test_same_seed_gives_the_same_commands():
    runs = []
    for _ in range(2):
        target = cluster(7, "prefill", "decode", "mixed", transfer_failures=0.2)
        load(target, 30, 20.0)
        target.events.after(10.0, lambda target=target: target.kill(target.members[1]))
        target.events.run(60.0)
        runs.append(target.commands)
    assert runs[0] == runs[1]


def test_mix_that_shifts_moves_a_worker_there_and_back_without_a_loss():
    target = cluster(5, "prefill", "decode")
    chance = target.events.random

    def arrive(index: int) -> None:
        now_s = target.events.now_s
        is_long = chance.random() < (0.5 if now_s < 60.0 else 0.0 if now_s < 140.0 else 0.8)
        tokens = chance.randint(256, 600) if is_long else chance.randint(8, 48)
        target.submit(
            make_request(
                f"r{index}", prompt_tokens=tokens, output_tokens_max=24, arrived_at_s=now_s
            )
        )

    for index in range(140):
        target.events.after(1.5 * index, lambda index=index: arrive(index))
    target.events.run(260.0)
    check_at_rest(target)
    assert all(stream.end == "completed" for stream in target.streams.values())
    plans = of(domain.PlanChanged, target.commands)
    assert [(plan.role_before, plan.role_after) for plan in plans[:2]] == [
        ("prefill", "decode"),
        ("decode", "prefill"),
    ]
    assert all(plan.by == "planner" for plan in plans) and len(plans) == 2


def test_events_run_in_order_of_time_and_then_of_adding():
    events, order = Events(0), []
    for name, at_s in (("c", 2.0), ("a", 1.0), ("b", 1.0), ("late", 9.0)):
        events.at(at_s, lambda name=name: order.append(name))
    events.run(5.0)
    assert order == ["a", "b", "c"] and events.now_s == 5.0
    with pytest.raises(AssertionError, match="lies before"):
        events.at(4.0, lambda: None)
