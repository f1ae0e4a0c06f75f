"""A workload replayed in virtual time: the real ControlPlane and scheduler on modelled workers.

It plays the driver (console/fleet.py), the gateway and the clients, who come back exactly when a
refusal tells them to. What each of them saw is a `Record`. Links keep their order and fail never;
controlplane/sim/cluster.py is the one with faults.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import inf

from controlplane import domain, protocol
from controlplane.config import ControlPlaneConfig
from controlplane.plane import ControlPlane
from controlplane.sim.events import Events
from controlplane.sim.hardware import Hardware
from controlplane.sim.replayworker import Key, ReplaySequence, ReplayWorker
from controlplane.sim.traces import TraceRequest

TICK_S = 0.1
HEARTBEAT_S = 1.0
MESSAGE_S = 0.0005  # between console and worker, one way: one data centre
DRAIN_S = 300.0  # after the last arrival, for what is still running
SECRET = b"replayed cluster"
MODEL_ID = "model"
MAX_MODEL_LEN = 131_072


@dataclass(frozen=True, slots=True)
class Client:
    """How a trace's requests become ours."""

    slo_of: Callable[[TraceRequest], domain.SLOClass]
    output_tokens_max: int  # what a request allows; its true length is nobody's to know
    tenants: Sequence[str] = ("tenant",)  # users of the trace are spread over them
    retries_max: int = 0  # times that a refused request comes back, when it was told to
    slow_s: float = inf  # gaps above it are counted
    tokens_max_of: Callable[[TraceRequest], int] | None = None  # where they allow different ones
    skipped: frozenset[int] = frozenset()  # arrivals, by number from 1, that never come

    def tenant_of(self, index: int) -> str:
        return self.tenants[index % len(self.tenants)]

    def tokens_max(self, row: TraceRequest) -> int:
        return self.tokens_max_of(row) if self.tokens_max_of else self.output_tokens_max


@dataclass(slots=True)
class Record:
    """One submission and what came of it. Times are the client's, seconds."""

    index: int  # of the arrival; a retry keeps it
    attempt: int  # 0 is the first
    at_s: float
    class_name: str
    ttft_target_s: float
    itl_target_s: float
    prompt_tokens: int
    output_tokens: int
    ttft_s: float | None = None
    gap_s_max: float = 0.0
    num_slow: int = 0  # gaps above Client.slow_s
    ended_at_s: float | None = None
    code: str = ""  # of its rejection
    retry_after_s: float | None = None
    was_admitted: bool = False  # placed or queued in the guaranteed tier
    demoted: str = ""  # code
    predicted_s: float | None = None  # mean TTFT of its first placement, from then
    predicted_s_p99: float | None = None
    placed_at_s: float | None = None
    num_moves: int = 0
    was_handed_off: bool = False

    @property
    def is_done(self) -> bool:
        return self.ended_at_s is not None and not self.code

    @property
    def is_good(self) -> bool:
        """The strict rule: first token and every gap in time."""
        return (
            self.is_done
            and self.ttft_s is not None
            and self.ttft_s <= self.ttft_target_s
            and self.gap_s_max <= self.itl_target_s
        )


@dataclass(slots=True)
class _Stream:
    """The gateway's side of one request."""

    record: Record
    source: TraceRequest
    request: domain.GenerateRequest
    epoch: int = 0
    sequence: ReplaySequence | None = None  # of the current epoch, where it decodes
    decode_at: "Member | None" = None


@dataclass(frozen=True, slots=True)
class _Arrival:
    """A prompt's KV that its decode worker has got."""

    key: Key
    num_bytes: int
    ready_at_s: float  # when its prompt was computed


@dataclass(slots=True)
class Member:
    """A worker process with its link."""

    worker: ReplayWorker
    hello: protocol.Hello
    worker_id: str = ""
    epoch: int = 0
    reported_at_s: float = 0.0
    link_free_at_s: float = 0.0  # its KV leaves one transfer after the other
    arrived: list["_Arrival"] = field(default_factory=list)  # KV that no step has used yet


@dataclass(slots=True)
class Replay:
    """One run. Make it, `add` workers, set contracts, `run`; then read `records`."""

    config: ControlPlaneConfig
    hardware: Hardware
    client: Client
    seed: int = 1
    block_tokens: int = 64
    policy: protocol.Policy | None = None
    events: Events = field(init=False)
    plane: ControlPlane = field(init=False)
    members: list[Member] = field(init=False, default_factory=list)
    records: list[Record] = field(init=False, default_factory=list)
    plans: list[tuple[float, domain.PlanChanged]] = field(init=False, default_factory=list)
    _streams: dict[str, _Stream] = field(init=False, default_factory=dict)
    _by_id: dict[str, Member] = field(init=False, default_factory=dict)
    _step_model: protocol.StepModel = field(init=False)
    _rows: Iterator[TraceRequest] = field(init=False, default_factory=lambda: iter(()))
    _num_arrived: int = field(init=False, default=0)
    _is_over: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.events = Events(self.seed)
        self.plane = ControlPlane(self.config, SECRET)
        self._step_model = self.hardware.profile()
        if self.policy is not None:
            self.handle(domain.PolicyChanged(self.policy))

    # --- what a run is made of

    def add(self, role: protocol.Role = "mixed") -> Member:
        """One more worker, of a role."""
        index = len(self.members)
        table = self.hardware.table.file
        hello = protocol.Hello(
            versions=[protocol.VERSION],
            name=f"replayed-{index}",
            engine="fake",
            engine_version="replay",
            role=role,
            device=protocol.DeviceFacts("modelled", table.gpu, 0, 0, "bf16"),
            models=[
                protocol.ModelFacts(
                    MODEL_ID, "0" * 64, MAX_MODEL_LEN, 128_256, table.kv_bytes_per_token
                )
            ],
            block_tokens=self.block_tokens,
            num_blocks=self.hardware.kv_tokens // self.block_tokens,
            step_model=self._step_model,
            handoff_address=f"replayed-{index}:1",
            token="t",
        )
        worker = ReplayWorker(self.hardware, hello, 1_000 * self.seed + index)
        member = Member(worker, hello)
        self.members.append(member)
        self.handle(domain.WorkerHello(str(index), hello))
        self.events.after(HEARTBEAT_S, partial(self._beat, member))
        return member

    def run(self, rows: Iterator[TraceRequest], seconds: float) -> list[Record]:
        """Replay the arrivals of [0, seconds) and let them end; gives the records."""
        self._rows = rows
        self._arrive_next(seconds)
        self._tick()
        self.events.run(seconds)
        limit_s = seconds + DRAIN_S
        while self._streams and self.events.now_s < limit_s:
            self.events.run(min(limit_s, self.events.now_s + 1.0))
        self._is_over = True
        return self.records

    # --- clients

    def _arrive_next(self, seconds: float) -> None:
        row = next(self._rows, None)
        if row is not None and row.at_s < seconds:
            self.events.at(row.at_s, partial(self._arrive, row, seconds))

    def _arrive(self, row: TraceRequest, seconds: float) -> None:
        self._num_arrived += 1
        if self._num_arrived not in self.client.skipped:
            self._submit(row, self._num_arrived, 0)
        self._arrive_next(seconds)

    def _submit(self, row: TraceRequest, index: int, attempt: int) -> None:
        now_s, slo = self.events.now_s, self.client.slo_of(row)
        request = domain.GenerateRequest(
            request_id=f"r{index}.{attempt}" if attempt else f"r{index}",
            tenant_id=self.client.tenant_of(index),
            model_id=MODEL_ID,
            slo=slo,
            prompt_tokens=row.prompt_tokens,
            output_tokens_max=self.client.tokens_max(row),
            block_hashes=row.block_names(self.config.prefix_block_tokens),
            arrived_at_s=now_s,
            tenant_concurrency_max=1 << 30,
        )
        output_tokens = min(row.output_tokens, request.output_tokens_max)
        record = Record(
            index,
            attempt,
            now_s,
            slo.name,
            slo.ttft_s_p99,
            slo.itl_s_p99,
            row.prompt_tokens,
            output_tokens,
        )
        self.records.append(record)
        self._streams[request.request_id] = _Stream(record, row, request)
        self.handle(domain.Submit(request))

    def _refused(self, stream: _Stream, outcome: domain.Rejected) -> None:
        record = stream.record
        record.code, record.retry_after_s = outcome.code, outcome.retry_after_s
        record.ended_at_s = self.events.now_s
        del self._streams[stream.request.request_id]
        if record.attempt < self.client.retries_max and outcome.retry_after_s is not None:
            again = partial(self._submit, stream.source, record.index, record.attempt + 1)
            self.events.after(outcome.retry_after_s, again)

    # --- the plane

    def handle(self, event: domain.Event) -> None:
        now_s = self.events.now_s
        for command in self.plane.handle(event, now_s, self.events.random.random):
            self._execute(command)

    def _tick(self) -> None:
        if not self._is_over:
            self.handle(domain.Tick())
            self.events.after(TICK_S, self._tick)

    def _execute(self, command: domain.Command) -> None:
        match command:
            case domain.Greet(connection_id, message):
                assert isinstance(message, protocol.Welcome), message
                member = self.members[int(connection_id)]
                member.worker_id, member.epoch = message.worker_id, message.epoch
                member.worker.policy = message.policy
                self._by_id[message.worker_id] = member
            case domain.Dispatch():
                self._dispatch(command)
            case domain.CancelSequence(worker_id, request_id, epoch):
                member = self._by_id[worker_id]
                self._later(partial(member.worker.drop, (request_id, epoch)))
            case domain.SendRole(worker_id, role):
                self._by_id[worker_id].worker.role = role
            case domain.SendPolicy(worker_id, policy):
                self._by_id[worker_id].worker.policy = policy
            case domain.Decided(request_id, outcome, record):
                self._decided(self._streams[request_id], outcome, record)
            case domain.PlanChanged():
                self.plans.append((self.events.now_s, command))
            case _:
                pass

    def _decided(
        self,
        stream: _Stream,
        outcome: domain.Placed | domain.Queued | domain.Rejected,
        why: domain.DecisionRecord,
    ) -> None:
        record = stream.record
        if isinstance(outcome, domain.Rejected):
            self._refused(stream, outcome)
            return
        if outcome.demotion is not None:
            record.demoted = outcome.demotion.code
        else:
            record.was_admitted = True
        if isinstance(outcome, domain.Placed):
            placement = outcome.placement
            record.was_handed_off = placement.split == "handoff"
            if record.placed_at_s is None:
                record.placed_at_s = self.events.now_s
                first = next(c for c in why.candidates if c.worker_id == placement.prefill_worker)
                record.predicted_s, record.predicted_s_p99 = first.ttft_s, first.ttft_s_p99
            else:
                record.num_moves += 1

    def _later(self, action: Callable[[], None]) -> None:
        """A message arrives."""
        self.events.after(MESSAGE_S, action)

    def _dispatch(self, command: domain.Dispatch) -> None:
        stream, member = self._streams[command.request_id], self._by_id[command.worker_id]
        request, slo = stream.request, stream.request.slo
        # Without a first token the client has nothing: what an old epoch sampled is lost.
        before = stream.sequence if stream.record.ttft_s is not None else None
        stream.epoch = command.epoch
        delivered = before.output_tokens if before is not None else 0
        ttft_left_s = slo.ttft_s_p99 - (self.events.now_s - request.arrived_at_s)
        sequence = ReplaySequence(
            request_id=request.request_id,
            epoch=command.epoch,
            stage=command.stage,
            salt=b"",
            sampling=protocol.Sampling(request.output_tokens_max),
            targets=protocol.ClassTargets(
                slo.name,
                slo.rank,
                ttft_left_s if command.tier == "guaranteed" else 0.0,
                slo.itl_s_p99,
                gap_s_max=slo.gap_s_max,
            ),
            token_ids=[0] * (request.prompt_tokens + delivered),
            prompt_tokens=request.prompt_tokens,
            delivered_tokens=delivered,
            arrived_at_s=self.events.now_s + MESSAGE_S,
            last_token_at_s=before.last_token_at_s if before is not None else None,
            left_tokens=stream.record.output_tokens - delivered,
            gap_s_max=before.gap_s_max if before is not None else 0.0,
            slow_s=self.client.slow_s,
            num_slow=before.num_slow if before is not None else 0,
            names=stream.source.block_names(self.block_tokens),
        )
        if command.stage != "prefill":  # of two stages decode is dispatched last
            stream.sequence, stream.decode_at = sequence, member
        self._later(partial(self._assign, member, sequence))

    # --- workers

    def _to_plane(self, member: Member, message: object) -> None:
        event = domain.WorkerMessage(member.worker_id, member.epoch, message)  # type: ignore[arg-type]
        self._later(partial(self.handle, event))

    def _beat(self, member: Member) -> None:
        if self._is_over:
            return
        now_s = self.events.now_s
        if now_s - member.reported_at_s >= HEARTBEAT_S:
            busy_s = member.worker.busy_for_s(now_s)
            self._to_plane(member, protocol.Heartbeat(member.worker.load(), busy_s))
        self.events.after(HEARTBEAT_S, partial(self._beat, member))

    def _assign(self, member: Member, sequence: ReplaySequence) -> None:
        reason = member.worker.assign(sequence)
        free = member.worker.pool.num_available
        self._to_plane(
            member,
            protocol.Rejected(*sequence.key, reason, free)
            if reason
            else protocol.Accepted(*sequence.key),
        )
        self._step(member)

    def _step(self, member: Member) -> None:
        """Start a step when none is in hand."""
        if member.worker.plan is None:
            seconds = member.worker.start_step(self.events.now_s)
            if seconds is not None:
                self._begin(member)
                self.events.after(seconds, partial(self._step_done, member, seconds))

    def _begin(self, member: Member) -> None:
        """The first step with KV from a peer: only now does the client get the first id, so that
        the next one follows after one step (console/fleet.py)."""
        now_s, arrived = self.events.now_s, member.arrived
        member.arrived = []
        for item in arrived:
            sequence = member.worker.held.get(item.key)
            if sequence is None:
                continue  # cancelled meanwhile
            sequence.last_token_at_s = now_s
            seconds = now_s - item.ready_at_s
            done = protocol.HandoffDone(*item.key, 1, item.num_bytes, seconds)
            self._to_plane(member, done)
            self._later(partial(self._first_token, sequence))

    def _step_done(self, member: Member, seconds: float) -> None:
        now_s = self.events.now_s
        end = member.worker.finish_step(now_s, seconds)
        member.reported_at_s = now_s
        self._later(partial(self._report, member, member.worker.load(), end.started, end.ended))
        for sequence in end.ready:
            self._transfer(member, sequence, seconds)
        self._step(member)

    def _report(
        self,
        member: Member,
        load: protocol.WorkerLoad,
        started: list[ReplaySequence],
        ended: list[ReplaySequence],
    ) -> None:
        """A step's report reaches the console: ids to the clients, then the load to the plane."""
        for sequence in started:
            if sequence.stage != "prefill" or not sequence.left_tokens:
                self._first_token(sequence)
        for sequence in ended:
            self._ended(sequence)
        self.handle(domain.WorkerMessage(member.worker_id, member.epoch, load))

    def _first_token(self, sequence: ReplaySequence) -> None:
        stream = self._streams.get(sequence.request_id)
        if stream is None or stream.epoch != sequence.epoch:
            return
        if stream.record.ttft_s is None:
            stream.record.ttft_s = self.events.now_s - stream.record.at_s
            self.handle(domain.FirstToken(sequence.request_id, stream.record.ttft_s))
        elif sequence.epoch > 1:
            self.handle(domain.Progressed(sequence.request_id, sequence.epoch))

    def _ended(self, sequence: ReplaySequence) -> None:
        stream = self._streams.get(sequence.request_id)
        if stream is None or stream.epoch != sequence.epoch:
            return
        record = stream.record
        record.gap_s_max, record.num_slow = sequence.gap_s_max, sequence.num_slow
        record.ended_at_s = self.events.now_s
        del self._streams[sequence.request_id]
        finished = domain.Finished(
            sequence.request_id, "completed", record.output_tokens, sequence.gap_s_max
        )
        self.handle(finished)

    # --- handoff

    def _transfer(self, member: Member, sequence: ReplaySequence, step_s: float) -> None:
        """The prompt's KV goes layer by layer while it is computed: what is left after the last
        step is its last layer, or what the link has not kept up with (algorithms.md 2d)."""
        now_s, link = self.events.now_s, self.hardware.link
        tokens = sequence.handoff_tokens
        num_bytes = tokens * self.hardware.table.file.kv_bytes_per_token
        wire_s = num_bytes / link.bytes_per_s
        begun_at_s = max(member.link_free_at_s, now_s - step_s)
        last_layer_s = wire_s / self.hardware.num_layers
        done_at_s = max(begun_at_s + wire_s, now_s + last_layer_s)
        member.link_free_at_s = done_at_s
        self._to_plane(member, protocol.HandoffReady(*sequence.key, 1, num_bytes))
        arrived = partial(self._arrived, member, sequence, num_bytes, now_s)
        self.events.at(done_at_s + link.setup_s, arrived)

    def _arrived(
        self, source: Member, sequence: ReplaySequence, num_bytes: int, ready_at_s: float
    ) -> None:
        """The KV is in place, unless one of the two sides was told to drop it."""
        stream = self._streams.get(sequence.request_id)
        is_current = stream is not None and stream.epoch == sequence.epoch
        target = stream.decode_at if stream is not None and is_current else None
        if target is None or sequence.key not in target.worker.held:
            source.worker.drop(sequence.key)
            return
        assert stream is not None
        fresh = sequence.output_tokens - sequence.delivered_tokens
        target.worker.install(sequence.key, fresh, sequence.last_token_at_s)
        source.worker.drop(sequence.key)
        target.arrived.append(_Arrival(sequence.key, num_bytes, ready_at_s))
        self._step(target)
