"""Frozen facts that the control plane takes in and gives out: requests, workers, events, commands.

`ControlPlane.handle(event, now_s, uniform) -> list[Command]` is the only entry. An event says what
happened; a command says what the driver (console/fleet.py, or the simulator) shall do.
Times ending in `_at_s` are on the caller's monotonic clock.
"""

from dataclasses import dataclass, field
from typing import Literal

import msgspec

from controlplane import protocol
from controlplane.protocol import Policy, Role, Stage

WorkerStatus = Literal["live", "suspect", "loading", "draining", "drained", "lost"]
Split = Literal["local", "handoff"]
Phase = Literal["queued", "prefill", "transfer", "decode", "orphaned"]
Tier = Literal["guaranteed", "surplus"]  # surplus runs in what guaranteed work leaves
PlannerMode = Literal["auto", "shadow"]
PlanKind = Literal["role", "model", "start", "drain", "stop"]
OverLimit = Literal["surplus", "reject"]
ContractKey = tuple[str, str, str]  # tenant, model, class
Cause = Literal["submitted", "replaced", "refused", "failover", "handoff_failed", "planned"]
Bound = str  # what decided: only_one, cost, score, damage, batch, filters, hold, order, or a code


@dataclass(frozen=True, slots=True)
class SLOClass:
    """A named latency promise. `deadline_s` is set for batch only."""

    name: str
    rank: int  # 0 is served first
    ttft_s_p99: float
    itl_s_p99: float
    is_batch: bool = False
    deadline_s: float | None = None
    queue_s_max: float = 30.0  # a request that waits longer ends as expired
    gap_s_max: float = 0.0  # above itl_s_p99: paced, itl_s_p99 holds for the mean gap of a request


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One request as the plane sees it: sizes and hashes, never text or output length."""

    request_id: str
    tenant_id: str
    model_id: str
    slo: SLOClass
    prompt_tokens: int
    output_tokens_max: int
    block_hashes: tuple[bytes, ...]  # salted chain over full prompt blocks
    arrived_at_s: float
    tenant_concurrency_max: int
    key_id: str = ""  # of the tenant's keys, which share its part fairly
    weight: float = 1.0  # of its tenant; 0: surplus only
    fingerprint: bytes = b""  # of tenant and prompt; empty: never recognised again


@dataclass(frozen=True, slots=True)
class Contract:
    """What one tenant may ask of one model in one SLO class, and what it is promised for it."""

    tenant_id: str
    model_id: str
    class_name: str
    requests_per_min: int
    tokens_per_min: int  # prompt and output together
    concurrency_max: int
    attainment: float = 0.99  # share of requests within the class's targets
    over_limit: OverLimit = "surplus"  # what becomes of a request above the rates
    when_late: OverLimit = "surplus"  # and of one that no worker can serve in time
    budget_tokens: int | None = None  # of one period; None: not limited
    budget_usd: float | None = None
    period: str = ""  # name of the budget's period; what is spent counts from 0 in a new one
    usd_per_million_prompt: float = 0.0
    usd_per_million_output: float = 0.0
    output_share: float = 0.25  # of the tokens, when the contract is weighed against capacity
    itl_s: float = 0.1  # the class's ITL target
    is_batch: bool = False

    def __post_init__(self) -> None:
        assert 1 <= self.requests_per_min <= self.tokens_per_min, self
        assert self.concurrency_max >= 1 and 0.0 < self.attainment < 1.0, self
        assert 0.0 <= self.output_share <= 1.0, self

    @property
    def key(self) -> ContractKey:
        return (self.tenant_id, self.model_id, self.class_name)

    @property
    def name(self) -> str:
        return "/".join(self.key)


@dataclass(frozen=True, slots=True)
class Spent:
    """What a contract had used of its period before this process started."""

    key: ContractKey
    tokens: int
    usd: float


# --- outcomes and their explanation --------------------------------------------------------------


class Candidate(msgspec.Struct, frozen=True):
    """One worker the router looked at, with the numbers it compared.

    A decision makes several, so it is a Struct: 0.1 us each, a frozen dataclass takes 1.3."""

    worker_id: str
    role: Role
    eligible: bool
    reason: str  # why not eligible, or "" when eligible
    queue_s: float  # predicted wait before this prompt starts
    prefill_s: float
    transfer_s: float
    ttft_s: float  # predicted, queue + prefill + transfer
    itl_s: float  # predicted step after joining
    cached_tokens: int
    free_blocks: int
    score: float
    ttft_s_p99: float = 0.0  # calibrated
    itl_added_s: float = 0.0  # to each step of the rows that are there
    hit_blocks: int = 0  # of its own size, cached on the device or in host memory


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a request runs: one worker, or a prefill worker that hands KV to a decode worker."""

    split: Split
    prefill_worker: str
    decode_worker: str
    predicted_ttft_s: float
    predicted_itl_s: float


@dataclass(frozen=True, slots=True)
class Demotion:
    """Why a request runs in the surplus tier. `code` is one of contract_rate, contract_pace,
    late, no_weight."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Placed:
    placement: Placement
    epoch: int
    demotion: Demotion | None = None


@dataclass(frozen=True, slots=True)
class Queued:
    position: int  # 1 is next
    predicted_start_s: float  # from now
    demotion: Demotion | None = None


@dataclass(frozen=True, slots=True)
class Rejected:
    """`code` is stable: tenant_concurrency, queue_full, no_worker, model_not_served,
    prompt_too_long, queue_timeout, draining, retries_exhausted, contract_rate, contract_budget,
    contract_concurrency, late, overloaded, overload_share, over_commit, poison_request,
    worker_error."""

    code: str
    message: str
    retry_after_s: float | None


@dataclass(frozen=True, slots=True)
class DecisionRecord:
    """Why a request went where it went; stored with the request and shown on its page."""

    request_id: str
    epoch: int
    outcome: Literal["placed", "queued", "rejected"]
    reason: str  # one sentence with the numbers that decided
    split_reason: str
    waited_s: float
    uncached_tokens: int
    handoff_threshold_tokens: int
    placement: Placement | None
    candidates: tuple[Candidate, ...] = field(default=())
    tier: Tier = "guaranteed"
    bound: Bound = ""
    cause: Cause = "submitted"  # why there was something to decide
    after_s: float = 0.0  # since its arrival
    retry_after_s: float | None = None


# --- events: what happened -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WorkerHello:
    """A connection whose token (if it sent one) the console has already verified."""

    connection_id: str
    hello: protocol.Hello


@dataclass(frozen=True, slots=True)
class WorkerMessage:
    worker_id: str
    epoch: int
    message: (
        protocol.Accepted
        | protocol.Rejected
        | protocol.WorkerLoad
        | protocol.Heartbeat
        | protocol.HandoffReady
        | protocol.HandoffDone
        | protocol.HandoffFailed
        | protocol.ModelsChanged
        | protocol.ModelRefused
        | protocol.Drained
        | protocol.Goodbye
    )


@dataclass(frozen=True, slots=True)
class WorkerClosed:
    """The connection of this incarnation is gone."""

    worker_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Submit:
    request: GenerateRequest


@dataclass(frozen=True, slots=True)
class FirstToken:
    request_id: str
    ttft_s: float


@dataclass(frozen=True, slots=True)
class Progressed:
    """The first new id of a later epoch is here: what moved goes on."""

    request_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The gateway has the last token, or gave the request up (`status` cancelled or failed)."""

    request_id: str
    status: Literal["completed", "cancelled", "failed"]
    output_tokens: int  # delivered
    itl_s_p99: float = 0.0  # of the gaps that the client saw


@dataclass(frozen=True, slots=True)
class Stalled:
    """The gateway misses output ids that no worker sent again in time: move the request."""

    request_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class SequenceFailed:
    """The worker gave the sequence up with an error, e.g. logits that were not finite."""

    worker_id: str
    request_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class RoleOrdered:
    worker_id: str
    role: Role
    by: str


@dataclass(frozen=True, slots=True)
class PolicyChanged:
    policy: Policy


@dataclass(frozen=True, slots=True)
class DrainOrdered:
    worker_id: str
    by: str


@dataclass(frozen=True, slots=True)
class ModelOrdered:
    """Let a worker serve another of the models that it can load."""

    worker_id: str
    model_id: str
    by: str


@dataclass(frozen=True, slots=True)
class FleetOffered:
    """From now on the driver carries out StartWorker and StopWorker. The plan keeps the workers
    between the two numbers; of those that run it may stop the ones named here and those it has
    started."""

    workers_min: int
    workers_max: int
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StartFailed:
    """A worker that StartWorker asked for will not join."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class PlannerOrdered:
    """From now on the planner acts (auto) or only records what it would do (shadow)."""

    mode: PlannerMode
    by: str


@dataclass(frozen=True, slots=True)
class PlanRolledBack:
    """Undo the newest change of the planner that still stands."""

    by: str


@dataclass(frozen=True, slots=True)
class ContractsSet:
    """The contracts in force from now on. The console has asked `ControlPlane.preview` first."""

    contracts: tuple[Contract, ...]
    spent: tuple[Spent, ...] = ()


@dataclass(frozen=True, slots=True)
class ClassesSet:
    """The SLO classes that are served; decisions are compared with what each would have given."""

    classes: tuple[SLOClass, ...]


@dataclass(frozen=True, slots=True)
class SlackAssessed:
    """The least slack of a model's promised batches, tested once a minute."""

    model_id: str
    slack: float


@dataclass(frozen=True, slots=True)
class ServerDraining:
    """The console takes no new request from now on."""


@dataclass(frozen=True, slots=True)
class HostLoad:
    """How full the console itself is: shares of a limit by name, 1.0 at the limit."""

    signals: dict[str, float]


@dataclass(frozen=True, slots=True)
class Tick:
    """Every 100 ms: expiry of workers and queued requests, planner."""


Event = (
    WorkerHello
    | WorkerMessage
    | WorkerClosed
    | Submit
    | FirstToken
    | Progressed
    | Finished
    | Stalled
    | SequenceFailed
    | RoleOrdered
    | ModelOrdered
    | DrainOrdered
    | FleetOffered
    | StartFailed
    | PlannerOrdered
    | PlanRolledBack
    | ContractsSet
    | PolicyChanged
    | ClassesSet
    | SlackAssessed
    | ServerDraining
    | HostLoad
    | Tick
)

# --- commands: what the driver shall do ----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Greet:
    """Send `message` on the connection; after Refused close it."""

    connection_id: str
    message: protocol.Welcome | protocol.Refused


@dataclass(frozen=True, slots=True)
class CloseWorker:
    """Close the connection of a fenced or dead worker."""

    worker_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Send Assign to a worker. The driver adds prompt, sampling and the journal's ids.

    From here on only reports of `epoch` count for the request."""

    worker_id: str
    request_id: str
    epoch: int
    stage: Stage
    handoff_out: protocol.HandoffOut | None = None
    handoff_in: protocol.HandoffIn | None = None
    tier: Tier = "guaranteed"  # surplus: the worker serves it behind all that may be in time


@dataclass(frozen=True, slots=True)
class CancelSequence:
    worker_id: str
    request_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Reattach:
    """A reconnected worker goes on with this sequence: ask it for what the journal misses."""

    worker_id: str
    request_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class SendRole:
    worker_id: str
    role: Role


@dataclass(frozen=True, slots=True)
class SendPolicy:
    worker_id: str
    policy: Policy


@dataclass(frozen=True, slots=True)
class SendDrain:
    worker_id: str


@dataclass(frozen=True, slots=True)
class SendUnload:
    worker_id: str
    model_id: str


@dataclass(frozen=True, slots=True)
class SendLoad:
    worker_id: str
    model_id: str


@dataclass(frozen=True, slots=True)
class StartWorker:
    """Start one more worker under this name; it joins with it, or StartFailed tells."""

    name: str
    role: Role
    model_id: str


@dataclass(frozen=True, slots=True)
class DrainWorker:
    """The worker of this name drains for good: it must not be started again when it ends."""

    name: str


@dataclass(frozen=True, slots=True)
class StopWorker:
    """End the worker process of this name: it is drained, or never joined."""

    name: str


@dataclass(frozen=True, slots=True)
class Decided:
    """Outcome of a submit, of a queued request's turn, or of a move after a failure.

    Rejected is terminal: the gateway answers the client with it."""

    request_id: str
    outcome: Placed | Queued | Rejected
    record: DecisionRecord


@dataclass(frozen=True, slots=True)
class PlanChanged:
    """What a worker does has changed, by whom and why; kept as a plan record. In shadow mode it
    only would have. A worker to be started has no id yet: `worker_id` is its name."""

    worker_id: str
    role_before: Role
    role_after: Role
    by: str  # "planner" or the operator's name
    reason: str
    is_shadow: bool = False
    kind: PlanKind = "role"
    model_before: str = ""
    model_after: str = ""


@dataclass(frozen=True, slots=True)
class HandoffCounted:
    """A KV transfer ended; `recomputed_tokens` > 0 when the prompt had to be computed again."""

    request_id: str
    bytes: int
    seconds: float
    recomputed_tokens: int


@dataclass(frozen=True, slots=True)
class Harvested:
    """What the time of one model's workers went into over the last `seconds`. GPU-seconds."""

    model_id: str
    seconds: float
    worker_s: float  # of live members
    member_s: float  # of all members, lost ones included
    online_s: float
    batch_s: float
    batch_tokens: float  # harvest.cost_tokens of the batch lines that ended
    backlog_s: float  # while batch lines waited


@dataclass(frozen=True, slots=True)
class Escalated:
    """How far batch goes for its promises has changed: an index of escalation.LEVEL_NAMES."""

    model_id: str
    level: int
    slack: float


@dataclass(frozen=True, slots=True)
class FailoverCounted:
    """A request left a worker that was lost, fenced or silent."""

    request_id: str
    from_worker: str
    epoch: int


@dataclass(frozen=True, slots=True)
class MoveCounted:
    """A running stream left a worker that still served it; its KV was copied, or is computed again
    from the ids."""

    request_id: str
    from_worker: str
    to_worker: str
    epoch: int
    is_copied: bool


Command = (
    Greet
    | CloseWorker
    | Dispatch
    | CancelSequence
    | Reattach
    | SendRole
    | SendDrain
    | SendPolicy
    | SendUnload
    | SendLoad
    | StartWorker
    | DrainWorker
    | StopWorker
    | Decided
    | PlanChanged
    | HandoffCounted
    | FailoverCounted
    | MoveCounted
    | Harvested
    | Escalated
)

# --- views: what pages and metrics read ----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A worker as pages show it; replaced whole at each tick."""

    worker_id: str
    epoch: int
    name: str
    engine: str
    engine_version: str
    role: Role
    status: WorkerStatus
    device: protocol.DeviceFacts
    models: tuple[protocol.ModelFacts, ...]
    block_tokens: int
    num_blocks: int
    handoff_address: str | None
    heard_ago_s: float
    load: protocol.WorkerLoad | None
    requests: int  # requests placed on it now
    exception: str  # e.g. "serves prefill too: no prefill worker is live", else ""


@dataclass(frozen=True, slots=True)
class RequestView:
    request_id: str
    tenant_id: str
    model_id: str
    class_name: str
    phase: Phase
    epoch: int
    age_s: float
    phase_s: float
    prompt_tokens: int
    placement: Placement | None


@dataclass(frozen=True, slots=True)
class ClusterView:
    """Everything that live pages show of the plane; built on demand, never mutated."""

    workers: tuple[WorkerView, ...]
    requests: tuple[RequestView, ...]
    queued_by_class: tuple[tuple[str, int], ...]
    plans: tuple[PlanChanged, ...]  # newest first, bounded
    planner_mode: PlannerMode = "auto"
