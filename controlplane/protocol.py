"""Messages between workers and the console, and their one codec (msgpack over websocket frames).

Every work message carries `(request_id, epoch)`. The epoch of a request is raised whenever its work
moves to another worker; a receiver ignores older epochs. `seq` is the output index of the first
token in a message: duplicates are dropped and gaps are asked for again (`Resend`).
Durations are seconds. Deadlines travel as seconds remaining at send; each side adds its own clock.
"""

import hashlib
import sys
from array import array
from collections.abc import Sequence
from struct import unpack
from typing import Literal

import msgspec

from controlplane.errors import ProtocolError

VERSION = 1
FRAME_BYTES_MAX = 1 << 20
CREDIT_FRAMES = 256  # frames that a worker may send before the console acknowledges some
RESEND_TOKENS_MAX = 8192  # ids of one sequence that a worker keeps for `Resend`
GRAMMAR_FUEL_MAX = 1_000_000  # llguidance's units for building a grammar's lexer, about 20 ms
GRAMMAR_ITEMS_MAX = 50_000  # Earley items of one mask, about 2.5 ms

Role = Literal["prefill", "decode", "mixed"]
Stage = Literal["full", "prefill", "decode"]
FinishReason = Literal["stop", "length", "handed_off", "cancelled", "error"]


class DeviceFacts(msgspec.Struct, frozen=True):
    """The device behind a worker; `kind` is `modelled` for the fake engine."""

    kind: Literal["cpu", "cuda", "modelled"]
    name: str
    memory_bytes: int
    num_sms: int
    dtype: str


class DeviceLoad(msgspec.Struct, frozen=True):
    """What the driver tells of a device now."""

    utilization: float  # share of its last sampling period with work running, 0 to 1
    power_w: float


class ModelFacts(msgspec.Struct, frozen=True):
    """A model that a worker has loaded. `weights_sha256` makes two replicas comparable."""

    model_id: str
    weights_sha256: str
    max_model_len: int  # tokens
    vocab_size: int
    kv_bytes_per_token: int


class StepModel(msgspec.Struct, frozen=True):
    """Step-time model: seconds by what a step computes; latency.step_s is the formula."""

    base_s: float
    per_token_s: float
    per_context_token_s: float
    # added for each token row beyond latency.HINGE_ROWS, where the weights' read hides no more
    per_token_over_s: tuple[float, float] = (0.0, 0.0)
    per_sequence_s: float = 0.0
    per_chunk_context_token_s: float | None = None  # None: chunks read context like decode rows


class LiveSequence(msgspec.Struct, frozen=True):
    """A sequence that a reconnecting worker still holds."""

    request_id: str
    epoch: int
    output_tokens: int


class ResumeProof(msgspec.Struct, frozen=True):
    """What a reconnecting worker shows instead of a join token."""

    worker_id: str
    secret: str


# --- worker -> console ---------------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """First frame of a worker. Exactly one of `token` and `resume` is set."""

    versions: list[int]
    name: str
    engine: str
    engine_version: str
    role: Role
    device: DeviceFacts
    models: list[ModelFacts]
    block_tokens: int
    num_blocks: int
    step_model: StepModel
    handoff_address: str | None = None  # host:port where peers fetch KV; None: role mixed only
    token: str | None = None
    resume: ResumeProof | None = None
    sequences: list[LiveSequence] = []
    host_blocks: int = 0  # KV blocks that its host tier keeps beyond `num_blocks`
    loadable: list[
        str
    ] = []  # ids of models that it could serve instead; `models` may be empty then


class Accepted(msgspec.Struct, frozen=True, tag="accepted"):
    """The worker has reserved KV for the sequence."""

    request_id: str
    epoch: int


class Rejected(msgspec.Struct, frozen=True, tag="rejected"):
    """The worker cannot take the sequence; the router tries its next candidate."""

    request_id: str
    epoch: int
    reason: str  # no_kv_room | draining | unknown_model | too_long | queue_full
    free_blocks: int


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural logarithms of probabilities by the model, before any sampling parameter."""

    logprob: float  # of the output id
    top_ids: list[int]  # the likeliest ids, likeliest first
    top_logprobs: list[float]


class SequenceReport(msgspec.Struct, frozen=True, array_like=True):
    """What one step did for one sequence of this link."""

    request_id: str
    epoch: int
    seq: int  # output index of token_ids[0]
    token_ids: list[int]
    finish_reason: FinishReason | None
    prefill_tokens: int  # prompt tokens computed in this step
    cached_tokens: int  # prompt tokens found in the prefix cache (whole sequence)
    context_tokens: int
    # One per id where the request asked for them, else empty; None for ids of an earlier worker.
    logprobs: list[TokenLogprobs | None] = []
    # Seconds of this worker that the sequence has cost so far (gpuseconds.py): totals, not deltas.
    prefill_gpu_s: float = 0.0
    decode_gpu_s: float = 0.0


class GpuSeconds(msgspec.Struct, frozen=True, array_like=True):
    """How a worker has spent its time since it started: work by lane and stage, and idle time. The
    worker measures each; a wall clock elsewhere tells whether they add up."""

    online_prefill_s: float = 0.0
    online_decode_s: float = 0.0
    batch_prefill_s: float = 0.0
    batch_decode_s: float = 0.0
    batch_fixed_s: float = 0.0  # of batch's seconds: its share of what a step costs with any rows
    idle_s: float = 0.0  # blocked with nothing to run

    @property
    def online_s(self) -> float:
        return self.online_prefill_s + self.online_decode_s

    @property
    def batch_s(self) -> float:
        return self.batch_prefill_s + self.batch_decode_s

    @property
    def total_s(self) -> float:
        return self.online_s + self.batch_s + self.idle_s


class WorkerLoad(msgspec.Struct, frozen=True):
    """State of a worker after a step or at a heartbeat; seconds are since the previous report."""

    role: Role
    step_index: int
    predicted_s: float  # of the last step
    measured_s: float
    online_s: float  # seconds charged to online rows
    batch_s: float
    idle_s: float  # time blocked with nothing to run
    rows_online: int  # token rows of the last step
    rows_batch: int
    running_online: int  # sequences
    running_batch: int
    waiting_online: int
    waiting_batch: int
    prefill_tokens_waiting: int  # uncached online prompt tokens not yet computed
    context_tokens_running: int
    kv_blocks_total: int
    kv_blocks_free: int
    kv_blocks_cached: int
    kv_blocks_held_batch: int
    step_model: StepModel
    device: DeviceLoad | None = None  # None: the device does not tell
    spent: GpuSeconds = GpuSeconds()  # since the worker's start


class StepReport(msgspec.Struct, frozen=True, tag="step"):
    """One frame per step: the new tokens of all sequences of this link, and the worker's load."""

    sequences: list[SequenceReport]
    load: WorkerLoad


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat"):
    """Sent when no StepReport left for a second. `busy_s` is the age of the step in hand."""

    load: WorkerLoad
    busy_s: float


class HandoffReady(msgspec.Struct, frozen=True, tag="handoff_ready"):
    """The prefill worker has computed the prompt; its blocks wait under a lease."""

    request_id: str
    epoch: int
    blocks: int
    bytes: int


class HandoffDone(msgspec.Struct, frozen=True, tag="handoff_done"):
    """The decode worker holds verified KV and begins its first step with it. `seconds` passed
    between the computed prompt and its KV in place."""

    request_id: str
    epoch: int
    blocks: int
    bytes: int
    seconds: float


class HandoffFailed(msgspec.Struct, frozen=True, tag="handoff_failed"):
    """The decode worker got no usable KV and holds nothing for the sequence any more."""

    request_id: str
    epoch: int
    reason: str  # unreachable | refused | checksum | timeout | malformed


class ModelsChanged(msgspec.Struct, frozen=True, tag="models_changed"):
    """The worker serves these models now (none after `UnloadModel`); what Hello said of the former
    ones is void, their KV is gone. `seconds` is what the change took."""

    models: list[ModelFacts]
    block_tokens: int
    num_blocks: int
    step_model: StepModel
    seconds: float
    host_blocks: int = 0


class ModelRefused(msgspec.Struct, frozen=True, tag="model_refused"):
    """The worker did not do what LoadModel or UnloadModel asked, and serves what it served."""

    model_id: str
    reason: str


class Drained(msgspec.Struct, frozen=True, tag="drained"):
    """The worker finished what it had after `Drain`."""


class Goodbye(msgspec.Struct, frozen=True, tag="goodbye"):
    """The worker ends and says why."""

    reason: str


# --- console -> worker ---------------------------------------------------------------------------


IDLE_TTFT_SHARE = 0.05  # design.md section 11
# With nobody decoding, a step may delay an arrival by this much of its TTFT: workers plan with it,
# and the router predicts with it. Every further step pays its base again; with 0.25 the slowest of
# 570-token prompts on two CPU workers took 1,450-1,790 ms in nine runs, with 0.5 1,330-1,570 in
# three.
ALONE_TTFT_SHARE = 0.5


class Policy(msgspec.Struct, frozen=True):
    """Settings that a worker's scheduler takes from the control plane."""

    kappa: float = 0.6  # share of the strictest ITL target that batch rows may fill
    tau_idle_s: float = 0.25  # longest step when no online row is present
    batch_rows_max: int = 64
    chunk_tokens_max: int = 512  # of one sequence in one step
    step_tokens_max: int = 1024  # token rows of one step; bounds activation memory
    first_token_share: float = 0.25  # of batch's target, in a step that yields a first token
    # While no row of the top class, by rank, is online at a worker: what batch may fill of a step
    # when its promises are short of time. 0: as in any step.
    loose_kappa: float = 0.0
    top_rank: int = 0

    @classmethod
    def for_targets(
        cls,
        ttft_s: float,
        itl_s: float,
        kappa: float,
        first_token_share: float = 0.25,
    ) -> "Policy":
        """For workers whose strictest latency class has these targets: batch alone may delay an
        arrival by IDLE_TTFT_SHARE of its TTFT target, or by what it may fill of a step."""
        return cls(
            kappa,
            max(IDLE_TTFT_SHARE * ttft_s, kappa * itl_s),
            first_token_share=first_token_share,
        )


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """The worker is a member; `resume_secret` replaces the join token on reconnect."""

    worker_id: str
    epoch: int
    resume_secret: str
    credit_frames: int
    policy: Policy
    heartbeat_s: float = 1.0


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The worker may not join; it prints the reason, and ends when `permanent`."""

    reason: str
    permanent: bool = True


class Sampling(msgspec.Struct, frozen=True):
    """How output ids are drawn. Draws are keyed by (seed, choice index, output index)."""

    output_tokens_max: int
    temperature: float = 0.0  # 0 is greedy, ties to the lowest id
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    seed: int = 0
    choice_index: int = 0
    stop_token_ids: list[int] = []
    output_tokens_min: int = 0
    ignore_eos: bool = False
    min_p: float = 0.0  # 0: off
    logprobs: int | None = None  # likeliest ids to report beside each id; None: no logprobs
    presence_penalty: float = 0.0  # subtracted once from the logit of each id of the output so far
    frequency_penalty: float = 0.0  # subtracted as often as the output so far has the id
    repetition_penalty: float = 1.0  # divides logits above 0 of ids seen, multiplies those below
    logit_bias: dict[int, float] = {}  # added to the logits of these ids
    grammar: str = ""  # what the output must match, in llguidance's JSON form; empty: anything


class ClassTargets(msgspec.Struct, frozen=True):
    """What the step scheduler needs of an SLO class."""

    name: str
    rank: int  # 0 is served first
    ttft_s_left: float  # 0 in the surplus tier, below 0 when the deadline has passed
    itl_s: float
    is_batch: bool = False
    gap_s_max: float = 0.0  # above itl_s: paced, itl_s holds for the mean and this for each gap

    @property
    def step_s(self) -> float:
        """How long one step beside its decode rows may last."""
        return max(self.itl_s, self.gap_s_max)

    @property
    def is_surplus(self) -> bool:
        """It was never promised to be in time."""
        return self.ttft_s_left == 0.0


class HandoffOut(msgspec.Struct, frozen=True):
    """For stage `prefill`: keep the KV for the peer that shows `capability`, at most `lease_s`."""

    capability: str
    lease_s: float = 30.0


class HandoffIn(msgspec.Struct, frozen=True):
    """For stage `decode`: fetch the KV at `address`; the control plane issued it."""

    address: str
    capability: str
    timeout_s: float = 30.0


class Assign(msgspec.Struct, frozen=True, tag="assign"):
    """A sequence to run. `delivered` are output ids the client already has (failover): the worker
    rebuilds KV for prompt + delivered and goes on at output index len(delivered)."""

    request_id: str
    epoch: int
    model_id: str
    stage: Stage
    prompt_ids: list[int]
    delivered: list[int]
    sampling: Sampling
    targets: ClassTargets
    salt: bytes  # first link of the prefix hash chain: tenants share no KV
    handoff_out: HandoffOut | None = None
    handoff_in: HandoffIn | None = None


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Stop a sequence and free its blocks; no answer is expected."""

    request_id: str
    epoch: int


class Resend(msgspec.Struct, frozen=True, tag="resend"):
    """The console misses output ids from `seq` on."""

    request_id: str
    epoch: int
    seq: int


class SetRole(msgspec.Struct, frozen=True, tag="set_role"):
    """Change the admission mask; sequences in hand go on."""

    role: Role


class SetPolicy(msgspec.Struct, frozen=True, tag="set_policy"):
    """The SLO classes have changed: plan with these settings from the next step on."""

    policy: Policy


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Take nothing new, finish what is there, answer `Drained`."""


class LoadModel(msgspec.Struct, frozen=True, tag="load_model"):
    """Serve this model, one of Hello's `loadable`; the worker serves none now."""

    model_id: str


class UnloadModel(msgspec.Struct, frozen=True, tag="unload_model"):
    """Free the model's weights and KV; refused while a sequence is in hand."""

    model_id: str


class Ack(msgspec.Struct, frozen=True, tag="ack"):
    """`frames` more frames were consumed: the worker may send as many again."""

    frames: int


FromWorker = (
    Hello
    | Accepted
    | Rejected
    | StepReport
    | Heartbeat
    | HandoffReady
    | HandoffDone
    | HandoffFailed
    | ModelsChanged
    | ModelRefused
    | Drained
    | Goodbye
)
ToWorker = (
    Welcome
    | Refused
    | Assign
    | Cancel
    | Resend
    | SetRole
    | SetPolicy
    | LoadModel
    | UnloadModel
    | Drain
    | Ack
)

_encoder = msgspec.msgpack.Encoder()
_from_worker = msgspec.msgpack.Decoder(FromWorker)
_to_worker = msgspec.msgpack.Decoder(ToWorker)


def encode(message: FromWorker | ToWorker) -> bytes:
    """One websocket frame. Raises ProtocolError over FRAME_BYTES_MAX."""
    frame = _encoder.encode(message)
    if len(frame) > FRAME_BYTES_MAX:
        raise ProtocolError(
            f"{type(message).__name__} of {len(frame)} bytes, at most {FRAME_BYTES_MAX}"
        )
    return frame


def decode_from_worker(frame: bytes) -> FromWorker:
    """The console's side of the codec. Raises ProtocolError for anything else than a message."""
    try:
        message: FromWorker = _from_worker.decode(frame)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise ProtocolError(
            f"unreadable frame of {len(frame)} bytes from worker: {error}"
        ) from None
    return message


def decode_to_worker(frame: bytes) -> ToWorker:
    """The worker's side of the codec. Raises ProtocolError for anything else than a message."""
    try:
        message: ToWorker = _to_worker.decode(frame)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise ProtocolError(
            f"unreadable frame of {len(frame)} bytes from console: {error}"
        ) from None
    return message


def block_hashes(salt: bytes, token_ids: Sequence[int], block_tokens: int) -> tuple[bytes, ...]:
    """Names of the full blocks of a token sequence, the same in router index and worker cache.

    h_0 = SHA-256(salt), h_i = SHA-256(h_(i-1) || ids of block i as little-endian uint32): equal
    names mean equal ids from the first token on, and never across two salts.
    """
    size, count = 4 * block_tokens, len(token_ids) // block_tokens
    blocks = unpack(f"{size}s" * count, _packed(token_ids)[: size * count])
    sha256 = hashlib.sha256
    link = sha256(salt).digest()
    return tuple([link := sha256(link + block).digest() for block in blocks])


def _packed(token_ids: Sequence[int]) -> bytes:
    """Little-endian uint32. An array takes two thirds of struct.pack's time."""
    packed = array("I", token_ids)
    assert packed.itemsize == 4, packed.itemsize
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def fingerprint(salt: bytes, token_ids: Sequence[int]) -> bytes:
    """Name of a whole prompt of one tenant: equal for equal prompts, and tells nothing of them."""
    return hashlib.sha256(hashlib.sha256(salt).digest() + _packed(token_ids)).digest()[:16]
