"""The demo's load in virtual time: the step in its mix flips one worker within a minute."""

import random

import pytest

from console import demoload
from controlplane import domain, protocol
from controlplane.config import ControlPlaneConfig
from controlplane.sim.cluster import Cluster
from tests.factories import MODEL, make_hello, make_request

# The packaged model on one core of a small machine: 570 prompt tokens in about 1.5 s.
CPU = protocol.StepModel(base_s=0.04, per_token_s=0.0025, per_context_token_s=1e-6)
CLASS = domain.SLOClass("interactive", 0, ttft_s_p99=4.0, itl_s_p99=0.3)
END_S = demoload.SHIFT_AFTER_S + 100.0


class Words:
    """A prompt's text is as long as it was asked to be."""

    def text(self, num_tokens: int, chance: random.Random) -> str:
        return "word " * num_tokens


def play(rate_per_s: float, seed: int) -> tuple[Cluster, list[tuple[float, domain.PlanChanged]]]:
    target = Cluster(seed, ControlPlaneConfig())
    for index, role in enumerate(("prefill", "decode")):
        address = f"127.0.0.1:{index + 1}"
        target.add(make_hello(role, step_model=CPU, handoff_address=address))
    for index, arrival in enumerate(demoload.arrivals(Words(), rate_per_s, seed)):
        if arrival.at_s > END_S:
            break

        def arrive(index: int = index, arrival: demoload.Arrival = arrival) -> None:
            request = make_request(
                f"r{index}",
                model_id=MODEL.model_id,
                slo=CLASS,
                prompt_tokens=len(arrival.user_text.split()) + demoload.TEMPLATE_TOKENS_MAX,
                output_tokens_max=arrival.output_tokens_max,
                arrived_at_s=target.events.now_s,
            )
            target.submit(request)

        target.events.at(arrival.at_s, arrive)
    plans: list[tuple[float, domain.PlanChanged]] = []
    while target.events.now_s < END_S + 30.0:
        before = len(target.commands)
        target.events.run(target.events.now_s + 1.0)
        fresh = target.commands[before:]
        plans += [
            (target.events.now_s, item) for item in fresh if isinstance(item, domain.PlanChanged)
        ]
    return target, plans


@pytest.mark.parametrize(("rate_per_s", "seed"), [(0.25, 1), (0.4, 2), (0.65, 3), (0.8, 4)])
def test_step_in_the_mix_flips_one_worker_within_a_minute_and_nothing_fails(rate_per_s, seed):
    target, plans = play(rate_per_s, seed)
    ((at_s, plan),) = plans
    assert demoload.SHIFT_AFTER_S < at_s <= demoload.SHIFT_AFTER_S + 60.0
    assert (plan.kind, plan.role_before, plan.role_after) == ("role", "prefill", "decode")
    assert plan.by == "planner" and "prompts were long" in plan.reason
    assert {stream.end for stream in target.streams.values()} == {"completed"}
