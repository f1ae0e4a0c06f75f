"""A cluster in virtual time: the real ControlPlane, modelled workers, and links that can fail.

It plays the driver (console/fleet.py): it carries out commands and delivers messages. The gateway
and its clients are in clients.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import msgspec

from controlplane import domain, protocol
from controlplane.config import ControlPlaneConfig
from controlplane.invariants import Watch
from controlplane.plane import ControlPlane
from controlplane.sim import laws
from controlplane.sim.clients import Clients, Stream
from controlplane.sim.equalshares import Fairness
from controlplane.sim.events import Events
from controlplane.sim.worker import Key, ModelledWorker

TICK_S = 0.1
HEARTBEAT_S = 1.0
MESSAGE_S_MAX = 0.02
TRANSFER_BYTES_S = 1e9
RESTART_S = 2.0  # of a worker process that died by itself
SCAN_EVERY = 100  # events
POISON_KILLS_MAX = 2
SECRET = b"simulated cluster"
STRANGER = "stranger"  # connection of one who must not get in
WELL_S = 20.0  # after a disturbance


@dataclass(frozen=True, slots=True)
class Frames:
    """Shares of the frames from workers that the network treats badly."""

    duplicated: float = 0.0
    reordered: float = 0.0
    delayed: float = 0.0
    delay_s_max: float = 0.5


@dataclass(slots=True)
class Member:
    """A worker process with its link. A dead one never acts again; a frozen one acts later."""

    worker: ModelledWorker
    facts: protocol.Hello
    worker_id: str = ""
    epoch: int = 0
    resume_secret: str = ""
    is_connected: bool = False
    is_dead: bool = False
    frozen_until_s: float = 0.0
    cut_off_until_s: float = 0.0  # partitioned: frames wait
    slow_factor: float = 1.0
    disturbed_at_s: float = 0.0  # something was wrong with it or its link until then
    errors_left: int = 0  # sequences that it will give up with an error
    sent_until_s: float = 0.0  # links keep their order
    received_until_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Backend:
    """Starts workers for the plan: what they say of themselves, and when they are there."""

    hello: Callable[[str, protocol.Role, str], protocol.Hello]  # name, role, model
    cold_start_s: float


class Cluster:
    def __init__(
        self, seed: int, config: ControlPlaneConfig, transfer_failures: float = 0.0
    ) -> None:
        self.events = Events(seed)
        self.plane = ControlPlane(config, SECRET)
        self.members: list[Member] = []
        self.commands: list[domain.Command] = []
        self.frames = Frames()
        self.poison: dict[str, int] = {}  # requests that kill their worker, and how often they did
        self.replaced: set[str] = set()  # requests that were moved before their start
        self.reached: set[str] = set()  # rare states
        self.clients = Clients(self.events, self.handle, self._ask_again, self.reached)
        self.num_scans = 0
        self._config = config
        self._contracts: tuple[domain.Contract, ...] = ()
        self.watch, self.fairness = Watch(SECRET, self._config), Fairness()
        self._num_handled = self._depth = 0
        self._scan_at = SCAN_EVERY
        self._stalled_until_s = 0.0
        self.transfer_failures = transfer_failures
        self.models: dict[str, protocol.ModelFacts] = {}  # by id: what workers could load
        self.model_load_s = 5.0
        self.backend: Backend | None = None
        self.events.after(TICK_S, self._tick)

    @property
    def streams(self) -> dict[str, Stream]:
        return self.clients.streams

    def _tick(self) -> None:
        self._tick_once()
        self.events.after(TICK_S, self._tick)

    def _tick_once(self) -> None:
        if self.events.now_s >= self._stalled_until_s:
            self.handle(domain.Tick())

    def stall(self, seconds: float) -> None:
        """The console's loop stands still. Then it looks at its clock first, and reads after."""
        self._stalled_until_s = self.events.now_s + seconds
        self.events.at(self._stalled_until_s, self._tick_once)
        self.reached.add("console stalled")

    def handle(self, event: domain.Event) -> None:
        now_s = self.events.now_s
        commands = self.plane.handle(event, now_s, self.events.random.random)
        self.watch.after(event, commands, now_s)
        self.fairness.after(event, commands, now_s)
        self._num_handled += 1
        self.commands += commands
        self._depth += 1  # what is carried out may be an event at once
        for command in commands:
            self._execute(command)
        self._depth -= 1
        if not self._depth and self._num_handled >= self._scan_at:
            self._scan_at = self._num_handled + SCAN_EVERY
            self.scan()

    def scan(self) -> None:
        """All laws on all state."""
        self.num_scans += 1
        if self.fairness.num_compared:
            self.reached.add("tenants compared")
        self._check_roles()
        self.watch.scan(self.plane, self.events.now_s)
        workers = [member.worker for member in self.members if not member.is_dead]
        laws.check_workers([(worker.pool, worker.sequences) for worker in workers])

    def _check_roles(self) -> None:
        """Workers with a connection do what the plane thinks they do."""
        roles = {item.worker_id: item.role for item in self.plane.view(self.events.now_s).workers}
        for member in self.members:
            if member.is_connected and member.worker_id in roles:
                role = roles[member.worker_id]
                assert member.worker.role == role, (
                    f"I18: {member.worker_id} is {member.worker.role}, {role} for the plane"
                )

    # --- what a scenario does

    def set_contracts(self, contracts: tuple[domain.Contract, ...]) -> None:
        self._contracts = contracts
        self.handle(domain.ContractsSet(contracts))

    def partition(self, member: Member, seconds: float) -> None:
        """Frames in both directions wait; neither side is told."""
        member.disturbed_at_s = max(member.disturbed_at_s, self.events.now_s + seconds)
        member.cut_off_until_s = max(member.cut_off_until_s, self.events.now_s + seconds)

    def restart_plane(self) -> None:
        """kill -9 of the console: its streams break, its memory is gone, workers dial in again."""
        self.reached.add("plane restarted")
        self._stalled_until_s = self.events.now_s
        for stream in self.streams.values():
            stream.end = stream.end or "gateway_lost"
        self.plane = ControlPlane(self._config, SECRET)
        self.watch, self.fairness = Watch(SECRET, self._config), Fairness()
        self.handle(domain.ContractsSet(self._contracts))
        for member in self.members:
            member.worker_id, member.is_connected = "", False
            if not member.is_dead:
                for key in list(member.worker.sequences):
                    member.worker.drop(key)
                self._reconnect_later(member)

    def add(self, hello: protocol.Hello) -> Member:
        """A new worker process joins."""
        worker = ModelledWorker(
            hello.role,
            hello.step_model,
            hello.num_blocks,
            hello.block_tokens,
            hello.models[0].model_id,
            self.events.now_s,
        )
        member = Member(worker, hello)
        self.members.append(member)
        self._connect(member)
        self._beat(member)
        return member

    def kill(self, member: Member) -> None:
        """kill -9: the closed connection is noticed a moment later."""
        member.is_dead = True
        self._disconnect(member)

    def freeze(self, member: Member, seconds: float) -> None:
        """SIGSTOP for a while: nothing is sent, nothing is read."""
        member.disturbed_at_s = max(member.disturbed_at_s, self.events.now_s + seconds)
        member.frozen_until_s = self.events.now_s + seconds

    def leave(self, member: Member) -> None:
        """The worker shuts down in order: says so, and its connection closes."""
        self.reached.add("goodbye")
        self._send(member, protocol.Goodbye("shutting down"))
        self.kill(member)

    def try_join(self, hello: protocol.Hello) -> None:
        """A stranger who must be refused, once there is a member to tell it from."""
        workers = self.plane.view(self.events.now_s).workers
        if all(item.status == "lost" for item in workers):
            return
        self.reached.add("impostor")
        self.handle(domain.WorkerHello(STRANGER, hello))

    def cut(self, member: Member) -> None:
        """The link breaks; the worker goes on and dials in again."""
        self._disconnect(member)
        self.events.after(self.events.random.uniform(0.1, 5.0), partial(self._connect, member))

    def submit(
        self,
        request: domain.GenerateRequest,
        tokens: int | None = None,
        prompt_ids: list[int] | None = None,
    ) -> None:
        """`tokens` are those of the true output, by default all that may be."""
        if prompt_ids is None:
            chance = self.events.random
            prompt_ids = [chance.randrange(50_000) for _ in range(request.prompt_tokens)]
        tokens = request.output_tokens_max if tokens is None else tokens
        self.clients.submit(request, tokens, prompt_ids)

    # --- links

    def _connect(self, member: Member) -> None:
        if member.is_dead or member.is_connected:
            return
        if self.events.now_s < member.cut_off_until_s:
            self.events.at(member.cut_off_until_s, partial(self._connect, member))
            return
        proof = None
        if member.worker_id:
            proof = protocol.ResumeProof(member.worker_id, member.resume_secret)
        facts = {name: getattr(member.facts, name) for name in member.facts.__struct_fields__}
        facts |= {"token": None if proof else "t", "resume": proof}
        facts |= {"role": member.worker.role, "sequences": member.worker.live()}
        held = {(item.request_id, item.epoch) for item in facts["sequences"]}
        for key in [key for key in member.worker.sequences if key not in held]:
            member.worker.drop(key)  # an open transfer does not outlive its connection
        member.is_connected = True
        index = self.members.index(member)
        self.handle(domain.WorkerHello(str(index), protocol.Hello(**facts)))

    def _disconnect(self, member: Member) -> None:
        if member.is_connected:
            member.is_connected = False
            closed = domain.WorkerClosed(member.worker_id, member.epoch)
            self.events.after(MESSAGE_S_MAX, partial(self.handle, closed))

    def _delay(self, until_s: float, member: Member) -> float:
        """When a message sent now arrives on a link that keeps its order."""
        delay_s = self.events.random.uniform(0.0, MESSAGE_S_MAX)
        return max(until_s, self.events.now_s + delay_s, member.cut_off_until_s)

    def _send(self, member: Member, message: object) -> None:
        """To the plane. Of what is sent on a broken link half is lost, and half arrives all the
        same, under the epoch of that connection."""
        if not member.is_connected and self.events.random.random() < 0.5:
            return
        at_s = member.sent_until_s = self._delay(member.sent_until_s, member)
        event = partial(self._receive, member.worker_id, member.epoch, message, self.plane)
        frames, chance = self.frames, self.events.random
        if frames.delayed and chance.random() < frames.delayed:
            at_s = member.sent_until_s = at_s + chance.uniform(0.0, frames.delay_s_max)
        if frames.reordered and chance.random() < frames.reordered:
            at_s += chance.uniform(0.0, 10.0 * MESSAGE_S_MAX)  # the next ones overtake it
        if frames.duplicated and chance.random() < frames.duplicated:
            self.events.at(at_s + chance.uniform(0.0, 5.0 * MESSAGE_S_MAX), event)
        self.events.at(at_s, event)

    def _receive(self, worker_id: str, epoch: int, message: object, plane: ControlPlane) -> None:
        if plane is not self.plane:  # sent to a console that is gone
            return
        if self.events.now_s < self._stalled_until_s:
            again = partial(self._receive, worker_id, epoch, message, plane)
            self.events.at(self._stalled_until_s, again)
            return
        if isinstance(message, protocol.StepReport):
            for report in message.sequences:
                self.clients.report(worker_id, report)
            message = message.load
        self.handle(domain.WorkerMessage(worker_id, epoch, message))  # type: ignore[arg-type]

    def _act(self, member: Member, epoch: int, action: partial[None]) -> None:
        """Run a worker's action when it is neither frozen nor dead nor of an older connection."""
        is_lost = epoch and (epoch != member.epoch or not member.is_connected)
        if member.is_dead or is_lost:
            return
        if self.events.now_s < member.frozen_until_s:
            again = partial(self._act, member, epoch, action)
            self.events.at(member.frozen_until_s, again)
        else:
            action()

    # --- commands

    def _execute(self, command: domain.Command) -> None:
        match command:
            case domain.Greet(connection_id, message) if connection_id == STRANGER:
                assert isinstance(message, protocol.Refused), f"I9: a stranger joins: {message}"
            case domain.Greet(connection_id, message):
                member = self.members[int(connection_id)]
                if not member.is_connected:
                    return
                assert isinstance(message, protocol.Welcome), message
                member.worker_id, member.epoch = message.worker_id, message.epoch
                member.resume_secret = message.resume_secret
            case domain.CloseWorker(worker_id):
                member = self._member(worker_id)
                self._check_given_up(member, command)
                if member.is_connected:
                    member.is_connected = False
                    self._act(member, 0, partial(self._reconnect_later, member))
            case domain.Dispatch(worker_id):
                member = self._member(worker_id)
                assign = self._message(command, self.clients.dispatched(command))
                self._to_worker(worker_id, partial(self._assign, member, assign))
            case domain.CancelSequence(worker_id, request_id, epoch):
                worker = self._member(worker_id).worker
                self._to_worker(worker_id, partial(worker.drop, (request_id, epoch)))
            case domain.Reattach(worker_id, request_id, epoch):
                member = self._member(worker_id)
                self.reached.add("reattached")
                self._to_worker(worker_id, partial(self._resend, member, (request_id, epoch)))
            case domain.SendRole(worker_id, role):
                self._member(worker_id).worker.role = role
            case domain.SendUnload(worker_id):
                member = self._member(worker_id)
                self._to_worker(worker_id, partial(self._unload, member))
            case domain.SendLoad(worker_id, model_id):
                member = self._member(worker_id)
                self._to_worker(worker_id, partial(self._load, member, model_id))
            case domain.StartWorker(name, role, model_id):
                assert self.backend is not None, name
                hello = self.backend.hello(name, role, model_id)
                self.events.after(self.backend.cold_start_s, partial(self._start, hello))
            case domain.StopWorker(name):
                member = next(item for item in self.members if item.facts.name == name)
                assert not member.worker.sequences, f"{name} was stopped at work"
                self.kill(member)
            case domain.SendDrain(worker_id):
                worker = self._member(worker_id).worker
                self._to_worker(worker_id, partial(setattr, worker, "is_draining", True))
            case domain.FailoverCounted(epoch=epoch):
                self.reached.add("failover" if epoch < 3 else "failover again")
            case domain.MoveCounted(is_copied=is_copied):
                self.reached.add("left, KV copied" if is_copied else "left, KV computed again")
            case domain.HandoffCounted(recomputed_tokens=tokens):
                self.reached.add("handoff recomputed" if tokens else "handoff")
            case domain.Decided(request_id, domain.Placed(_, _, demotion), record):
                if demotion is not None:
                    self.reached.add(f"surplus {demotion.code}")
                if "starts it in" in record.reason:
                    self.reached.add("moved before its start")
                    self.replaced.add(request_id)
                if "died with it" in record.reason or "no_kv_room" in record.reason:
                    self.reached.add("no KV room")
            case domain.Decided(request_id, domain.Rejected() as rejected):
                self.reached.add(rejected.code)
                self.clients.rejected(request_id, rejected.code)
            case domain.PlanChanged(by="planner"):
                self.reached.add("planner flip")
            case _:
                pass

    def _check_given_up(self, member: Member, command: domain.CloseWorker) -> None:
        """I9: nobody is given up who has been well and connected for long enough to be heard."""
        is_replaced = "joined again" in command.reason
        is_well = member.is_connected and not member.is_dead and member.slow_factor == 1.0
        well_s = self.events.now_s - member.disturbed_at_s
        is_delayed = self.frames != Frames()
        assert is_replaced or is_delayed or not is_well or well_s < WELL_S, (
            f"I9: {member.worker_id} is given up though it is well: {command.reason}"
        )

    def _member(self, worker_id: str) -> Member:
        return next(member for member in self.members if member.worker_id == worker_id)

    def _reconnect_later(self, member: Member) -> None:
        self.events.after(self.events.random.uniform(0.1, 5.0), partial(self._connect, member))

    def _to_worker(self, worker_id: str, action: partial[None]) -> None:
        member = self._member(worker_id)
        member.received_until_s = self._delay(member.received_until_s, member)
        act = partial(self._act, member, member.epoch, action)
        self.events.at(member.received_until_s, act)

    def _message(self, command: domain.Dispatch, stream: Stream) -> protocol.Assign:
        slo = stream.request.slo
        return protocol.Assign(
            request_id=command.request_id,
            epoch=command.epoch,
            model_id=stream.request.model_id,
            stage=command.stage,
            prompt_ids=stream.prompt_ids,
            delivered=list(stream.ids),
            sampling=protocol.Sampling(stream.request.output_tokens_max),
            targets=protocol.ClassTargets(
                slo.name,
                slo.rank,
                slo.ttft_s_p99 if command.tier == "guaranteed" else 0.0,
                slo.itl_s_p99,
                slo.is_batch,
            ),
            salt=stream.request.tenant_id.encode(),
            handoff_out=command.handoff_out,
            handoff_in=command.handoff_in,
        )

    # --- workers

    def _start(self, hello: protocol.Hello) -> None:
        self.add(hello)

    def _unload(self, member: Member) -> None:
        if member.worker.sequences:
            refused = protocol.ModelRefused(member.worker.model_id, "sequences are in hand")
            self._send(member, refused)
            return
        member.worker.unload()
        self._tell_models(member, [], 0.0)

    def _load(self, member: Member, model_id: str) -> None:
        """The model's facts are those of any worker that has it."""
        facts = self.models[model_id]
        done = partial(self._loaded, member, facts)
        self.events.after(self.model_load_s, partial(self._act, member, 0, done))

    def _loaded(self, member: Member, facts: protocol.ModelFacts) -> None:
        member.worker.model_id = facts.model_id
        self._tell_models(member, [facts], self.model_load_s)

    def _tell_models(
        self, member: Member, models: list[protocol.ModelFacts], seconds: float
    ) -> None:
        member.facts = msgspec.structs.replace(member.facts, models=models)
        facts = member.facts
        changed = protocol.ModelsChanged(
            models, facts.block_tokens, facts.num_blocks, facts.step_model, seconds
        )
        self._send(member, changed)

    def _beat(self, member: Member) -> None:
        if member.is_dead:
            return
        if member.is_connected and self.events.now_s >= member.frozen_until_s:
            now_s = self.events.now_s
            beat = protocol.Heartbeat(member.worker.load(now_s), member.worker.busy_s(now_s))
            self._send(member, beat)
            if member.worker.is_draining and not member.worker.sequences:
                self._send(member, protocol.Drained())
        self.events.after(HEARTBEAT_S, partial(self._beat, member))

    def _assign(self, member: Member, message: protocol.Assign) -> None:
        answer = member.worker.assign(message, self.events.now_s)
        self._send(member, answer)
        if message.handoff_in is not None and isinstance(answer, protocol.Accepted):
            key = (message.request_id, message.epoch)
            limit_s = self.events.now_s + message.handoff_in.timeout_s
            self._fetch(member, key, message.handoff_in.address, limit_s)
        self._step(member)

    def _fetch(self, member: Member, key: Key, address: str, limit_s: float) -> None:
        """The decode side asks its peer for the KV every 10 ms until it has it or gives up."""
        sequence = member.worker.sequences.get(key)
        if sequence is None or sequence.phase != "arriving":
            return
        peer = next(item for item in self.members if item.facts.handoff_address == address)
        reason = "timeout" if self.events.now_s > limit_s else ""
        if peer.is_dead:
            reason = "unreachable"
        held = peer.worker.sequences.get(key)
        if not reason and (held is None or held.phase != "leased"):
            again = partial(self._fetch, member, key, address, limit_s)
            self.events.after(0.01, partial(self._act, member, 0, again))
            return
        if not reason and self.events.random.random() < self.transfer_failures:
            reason = "checksum"
        if reason:
            member.worker.drop(key)
            self._send(member, protocol.HandoffFailed(*key, reason))
            return
        assert held is not None
        member.worker.install(key, held.output_ids[held.delivered_tokens :])
        peer.worker.drop(key)
        num_bytes = held.handoff_tokens * member.facts.models[0].kv_bytes_per_token
        self._send(member, protocol.HandoffDone(*key, 1, num_bytes, num_bytes / TRANSFER_BYTES_S))
        self._step(member)

    def _step(self, member: Member) -> None:
        """Start a step when none is in hand."""
        if member.worker.plan is not None:
            return
        seconds = member.worker.start_step(self.events.now_s)
        if seconds is None:
            return
        plan = member.worker.plan
        assert plan is not None
        for row in plan.rows if self.poison else ():
            name = row.sequence.request_id
            if name in self.poison:
                stream = self.streams[name]
                is_zombie = stream.end or stream.epoch != row.sequence.epoch
                self.poison[name] += not is_zombie  # one that thaws dies of what was long moved
                limit = POISON_KILLS_MAX + (name in self.replaced)  # two workers may start it then
                assert self.poison[name] <= limit, f"I13: {name} killed {self.poison}"
                self.reached.add("poison")
                self.kill(member)
                self.events.after(RESTART_S, partial(self.add, member.facts))
                return
        seconds *= member.slow_factor
        done = partial(self._step_done, member, seconds)
        self.events.after(seconds, partial(self._act, member, 0, done))

    def _step_done(self, member: Member, seconds: float) -> None:
        reports, ready = member.worker.finish_step(self.events.now_s, seconds)
        if reports and member.errors_left:
            member.errors_left -= 1
            reports[-1] = self._failed(member, reports[-1])
        self._send(member, protocol.StepReport(reports, member.worker.load(self.events.now_s)))
        for key in ready:
            self._send(member, protocol.HandoffReady(*key, 1, 1000))
        self._step(member)

    def _failed(self, member: Member, report: protocol.SequenceReport) -> protocol.SequenceReport:
        """The same step, had its logits not been finite: no id, and the sequence is gone."""
        member.worker.drop((report.request_id, report.epoch))
        return msgspec.structs.replace(report, token_ids=[], finish_reason="error")

    def _resend(self, member: Member, key: Key) -> None:
        """All ids of the sequence again; the journal drops those it has."""
        sequence = member.worker.sequences.get(key)
        if sequence is not None:
            report = protocol.SequenceReport(*key, 0, sequence.output_ids, None, 0, 0, 0)
            self._send(member, protocol.StepReport([report], member.worker.load(self.events.now_s)))
        self._step(member)

    def _ask_again(self, worker_id: str, key: Key) -> None:
        member = self._member(worker_id)
        self._to_worker(worker_id, partial(self._resend, member, key))
