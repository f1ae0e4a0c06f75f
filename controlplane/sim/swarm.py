"""Runs one scenario: a phase with faults in which nothing may go wrong, then everything is healed
and all work has to end. The laws are checked after every event.
"""

from dataclasses import dataclass, replace
from functools import partial

import msgspec

from controlplane import domain, protocol
from controlplane.config import ControlPlaneConfig
from controlplane.sim import outputs, promises
from controlplane.sim import scenario as scenarios
from controlplane.sim.cluster import Cluster, Member
from controlplane.sim.events import Events
from controlplane.sim.scenario import Arrival, Fault, Scenario

CONVERGE_S = 30.0  # after healing, every member is live and what moved has moved (I19)
END_S = 400.0  # by then all work has ended
CLOSING = ("kill", "cut", "goodbye")  # faults that end a connection; a goodbye may get lost
FLOOD_REQUESTS = 25
ENDS = frozenset(
    {
        "completed", "cancelled", "queue_full", "queue_timeout", "retries_exhausted", "no_worker",
        "prompt_too_long", "contract_rate", "contract_budget", "contract_concurrency", "late",
        "tenant_concurrency",
        "poison_request", "worker_error", "gateway_lost",
    }
)  # fmt: skip
# States that the seeds must reach, or they would prove little: each by one of RARE_SEEDS at least.
RARE_SEEDS = 1_000
RARE = frozenset(
    {
        "failover again", "handoff recomputed", "moved before its start", "plane restarted",
        "poison", "reattached", "duplicate dropped", "gap", "stalled", "surplus late",
        "surplus contract_rate", "contract_rate", "contract_budget", "contract_concurrency", "late",
        "queue_full", "queue_timeout", "no KV room", "planner flip", "no_worker",
        "tenant_concurrency", "tenants compared", "impostor", "goodbye", "console stalled",
        "sequence failed", "worker_error", "poison_request", "poison again",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a scenario went; `violation` is empty when no law was broken."""

    seed: int
    num_events: int
    violation: str
    reached: frozenset[str]
    ends: tuple[tuple[str, int], ...]
    commands: tuple[domain.Command, ...] = ()

    @property
    def law(self) -> str:
        """What kind of violation it is."""
        return self.violation.split(":")[0]


def run(scenario: Scenario, keeps_commands: bool = False) -> Outcome:
    """Deterministic in the scenario."""
    history = History(scenario)
    violation = ""
    try:
        history.play()
    except AssertionError as error:
        violation = str(error) or "an assertion without words"
    except (
        LookupError,
        ValueError,
        AttributeError,
        TypeError,
        StopIteration,
        ArithmeticError,
    ) as error:
        violation = f"{type(error).__name__}: {error}"  # a bug too, whatever it is called
    cluster = history.cluster
    ends: dict[str, int] = {}
    for stream in cluster.streams.values():
        ends[stream.end or "none"] = ends.get(stream.end or "none", 0) + 1
    return Outcome(
        scenario.seed,
        cluster.events.num_run,
        violation,
        frozenset(cluster.reached),
        tuple(sorted(ends.items())),
        tuple(cluster.commands) if keeps_commands else (),
    )


class History:
    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        config = ControlPlaneConfig.from_mapping(dict(scenario.settings))
        self.cluster = Cluster(scenario.seed, config, scenario.transfer_failures)
        self.cluster.frames = scenario.frames
        chance = self.cluster.events.random
        self._shared = [chance.randrange(50_000) for _ in range(scenarios.SHARED_TOKENS)]
        self._num_joined = self._num_floods = 0
        # Two deaths by chance look like poison.
        self._has_kills = any(fault.kind in CLOSING for fault in scenario.faults)

    def play(self) -> None:
        cluster, events = self.cluster, self.cluster.events
        promises.check(Events(self.scenario.seed).random)
        outputs.check(Events(self.scenario.seed).random)
        cluster.set_contracts(self.scenario.contracts)
        for spec in self.scenario.workers:
            self.join(spec)
        for arrival in self.scenario.arrivals:
            events.at(arrival.at_s, partial(self.arrive, arrival))
        for arrival in self.scenario.backlog:
            events.at(arrival.at_s, partial(self.arrive, arrival))
        for fault in self.scenario.faults:
            events.at(fault.at_s, partial(self._fault, fault))
        events.run(scenarios.HEAL_AT_S)
        self._heal()
        events.run(scenarios.HEAL_AT_S + CONVERGE_S)
        self._check_converged()
        until_s = scenarios.HEAL_AT_S + CONVERGE_S
        has_backlog = bool(self.scenario.backlog)
        while until_s < END_S and (
            not all(item.end for item in cluster.streams.values())
            or (has_backlog and until_s < scenarios.HEAL_AT_S + scenarios.BACKLOG_S)
        ):
            until_s += 10.0
            events.run(until_s)
        events.run(until_s + 5.0)
        self._check_end()

    def join(self, spec: scenarios.WorkerSpec) -> Member:
        return self.cluster.add(self._hello(spec))

    def _hello(self, spec: scenarios.WorkerSpec) -> protocol.Hello:
        self._num_joined += 1
        step, slow = scenarios.STEP, spec.slowness
        return protocol.Hello(
            versions=[protocol.VERSION],
            name=f"worker{self._num_joined}",
            engine="fake",
            engine_version="0",
            role=spec.role,
            device=protocol.DeviceFacts("modelled", "simulated", 1 << 30, 0, "bf16"),
            models=[scenarios.MODEL],
            block_tokens=scenarios.BLOCK_TOKENS,
            num_blocks=spec.num_blocks,
            step_model=protocol.StepModel(
                slow * step.base_s,
                slow * step.per_token_s,
                slow * step.per_context_token_s,
                (slow * step.per_token_over_s[0], slow * step.per_token_over_s[1]),
            ),
            handoff_address=f"127.0.0.1:{self._num_joined}",
            token="t",
        )

    def arrive(self, arrival: Arrival) -> None:
        chance, slo = self.cluster.events.random, scenarios.CLASSES[arrival.slo]
        own = arrival.prompt_tokens - (len(self._shared) if arrival.is_shared else 0)
        prompt_ids = [*(self._shared if arrival.is_shared else ())]
        prompt_ids += [chance.randrange(50_000) for _ in range(own)]
        tenant_id = f"t{arrival.tenant}"
        request = domain.GenerateRequest(
            request_id=arrival.request_id,
            tenant_id=tenant_id,
            model_id=scenarios.MODEL.model_id,
            slo=slo,
            prompt_tokens=arrival.prompt_tokens,
            output_tokens_max=arrival.output_tokens_max,
            block_hashes=protocol.block_hashes(
                tenant_id.encode(), prompt_ids, scenarios.BLOCK_TOKENS
            ),
            arrived_at_s=self.cluster.events.now_s,
            tenant_concurrency_max=30,
            fingerprint=protocol.fingerprint(tenant_id.encode(), prompt_ids),
        )
        self.cluster.submit(request, arrival.output_tokens, prompt_ids)

    # --- faults

    def _fault(self, fault: Fault) -> None:
        cluster, seconds = self.cluster, 0.5 + 12.0 * fault.value
        alive = [member for member in cluster.members if not member.is_dead]
        member = alive[int(fault.pick * len(alive))] if alive else None
        if fault.kind == "flood":
            self._flood(fault)
        elif fault.kind == "restart":
            cluster.restart_plane()
        elif fault.kind == "join" or member is None:
            self.join(self.scenario.workers[int(fault.pick * len(self.scenario.workers))])
        elif fault.kind == "kill":
            cluster.kill(member)
        elif fault.kind == "freeze":
            cluster.freeze(member, seconds)
        elif fault.kind == "slow":
            member.slow_factor = 1.0 + 9.0 * fault.value
        elif fault.kind == "partition":
            cluster.partition(member, seconds)
        elif fault.kind == "cut":
            cluster.cut(member)
        elif fault.kind == "drain" and len(alive) > 2 and member.worker_id:
            cluster.handle(domain.DrainOrdered(member.worker_id, "ann"))
        elif fault.kind == "role" and member.worker_id:
            role = ("prefill", "decode", "mixed")[int(3 * fault.value)]
            cluster.handle(domain.RoleOrdered(member.worker_id, role, "ann"))  # type: ignore[arg-type]
        elif fault.kind == "error":
            member.errors_left += 1 + int(3 * fault.value)
        elif fault.kind == "stall":
            cluster.stall(0.5 + 4.0 * fault.value)
        elif fault.kind == "impostor":
            self._impostor(fault)
        elif fault.kind == "goodbye" and len(alive) > 2 and member.worker_id:
            cluster.leave(member)
        elif fault.kind in ("cancel", "poison"):
            self._single_out(fault)

    def _impostor(self, fault: Fault) -> None:
        """A worker with other weights under the name that is served, or another's identity."""
        genuine = self.scenario.workers[int(fault.pick * len(self.scenario.workers))]
        hello = self._hello(genuine)
        other = msgspec.structs.replace(scenarios.MODEL, weights_sha256="b" * 64)
        proof = protocol.ResumeProof("w1", "0" * 64)
        if fault.value < 0.5:
            hello = msgspec.structs.replace(hello, models=[other])
        else:
            hello = msgspec.structs.replace(hello, token=None, resume=proof)
        self.cluster.try_join(hello)

    def _single_out(self, fault: Fault) -> None:
        """A client goes away; or a request that has not come yet will kill its worker."""
        cluster = self.cluster
        if fault.kind == "cancel":
            names = sorted(name for name, item in cluster.streams.items() if not item.end)
            waiting = [name for name in names if not cluster.streams[name].epoch]
            names = waiting if waiting and fault.value < 0.5 else names
            if names:
                cluster.clients.cancel(names[int(fault.pick * len(names))])
            return
        names = [item.request_id for item in self.scenario.arrivals]
        names = [name for name in names if name not in cluster.streams]
        if names:
            name = names[int(fault.pick * len(names))]
            cluster.poison.setdefault(name, 0)
            cluster.events.at(scenarios.HEAL_AT_S + CONVERGE_S, partial(self._again, name))

    def _again(self, name: str) -> None:
        """Its sender does not give up: the same prompt under another name."""
        stream = self.cluster.streams.get(name)
        is_first = f"{name}-again" not in self.cluster.streams
        if stream is not None and stream.end == "poison_request" and is_first:
            self.cluster.reached.add("poison again")
            now_s = self.cluster.events.now_s
            again = replace(stream.request, request_id=f"{name}-again", arrived_at_s=now_s)
            self.cluster.submit(again, stream.tokens, stream.prompt_ids)

    def _flood(self, fault: Fault) -> None:
        """One tenant sends much at once."""
        self._num_floods += 1
        chance, now_s = self.cluster.events.random, self.cluster.events.now_s
        for index in range(FLOOD_REQUESTS):
            tokens = chance.randint(8, 120)
            arrival = Arrival(
                at_s=now_s + chance.uniform(0.0, 1.0),
                request_id=f"f{self._num_floods}-{index}",
                tenant=int(2 * fault.pick),
                slo=0,
                prompt_tokens=tokens,
                output_tokens_max=16,
                output_tokens=chance.randint(1, 16),
                is_shared=False,
            )
            self.cluster.events.at(arrival.at_s, partial(self.arrive, arrival))

    # --- the end

    def _heal(self) -> None:
        cluster = self.cluster
        cluster.frames = type(cluster.frames)()
        cluster.transfer_failures = 0.0
        for member in cluster.members:
            member.frozen_until_s = min(member.frozen_until_s, cluster.events.now_s)
            member.cut_off_until_s = min(member.cut_off_until_s, cluster.events.now_s)
            if member.slow_factor != 1.0:  # the step in hand stays slow
                member.slow_factor, member.disturbed_at_s = 1.0, cluster.events.now_s
        for spec in self.scenario.workers[:2]:
            self.join(replace(spec, role="mixed", num_blocks=400))

    def _check_converged(self) -> None:
        """I19."""
        cluster, now_s = self.cluster, self.cluster.events.now_s
        view = cluster.plane.view(now_s)
        known = {worker.worker_id: worker for worker in view.workers}
        for member in cluster.members:
            if member.is_dead:
                continue
            assert member.is_connected, f"I19: {member.worker_id} has not come back"
            worker = known[member.worker_id]
            is_ordered = worker.status in ("draining", "drained")
            assert worker.status == "live" or is_ordered, f"I19: {worker.worker_id} {worker.status}"
        for item in view.requests:
            is_moving = item.phase in ("orphaned", "transfer")
            assert not is_moving or item.phase_s < CONVERGE_S, f"I19: {item}"

    def _check_end(self) -> None:
        cluster, now_s = self.cluster, self.cluster.events.now_s
        for name, stream in cluster.streams.items():
            assert stream.end, f"I1: {name} has no end after {now_s:.0f} s: {stream}"
            assert stream.end in ENDS, f"I1: {name} ended as {stream.end}"
            is_guilty = name.removesuffix("-again") in cluster.poison or self._has_kills
            assert stream.end != "poison_request" or is_guilty, f"I13: {name} was harmed: {stream}"
            is_complete = len(stream.ids) >= stream.tokens
            assert stream.end != "completed" or is_complete, f"I3: {name} {stream}"
        cluster.scan()
        cluster.watch.at_rest(cluster.plane, now_s)
        for member in cluster.members:
            if member.is_connected and not member.is_dead:
                worker = member.worker
                assert not worker.sequences, f"I7: {member.worker_id} holds {worker.sequences}"
                free = worker.pool.num_available
                assert free == worker.pool.num_blocks, f"I7: {member.worker_id} has {free} free"
