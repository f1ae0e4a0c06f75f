"""Chooses the rows of the next engine step: pure, the same code in worker and simulator.

Order: online decodes; online prefill chunks by least laxity while the step stays within the online
target; then, within a smaller target, batch decodes and one batch chunk. The online part of a plan
does not depend on the batch sequences. Method: algorithms.md 2a (Sarathi-Serve, HyGen, QoServe).
"""

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from controlplane.latency import LatencyModel, StepFeatures
from controlplane.protocol import Policy
from gpuworkers.sequence import Sequence

CHUNK_TOKENS_MIN = 16  # also the rounding of a chunk
CHUNK_TOKENS_MAX = 512  # of one sequence in one step
STEP_TOKENS_MAX = 1024  # token rows of one step; bounds activation memory
ALONE_TTFT_SHARE = (
    0.25  # with nobody decoding, a step may delay an arrival by this much of its TTFT
)


@dataclass(frozen=True, slots=True)
class SchedulerState:
    """The sequences that may run now. All of them have their blocks."""

    decoding: tuple[Sequence, ...] = ()
    prefilling: tuple[Sequence, ...] = ()
    batch_decoding: tuple[Sequence, ...] = ()  # the one that waited longest first
    batch_prefilling: tuple[Sequence, ...] = ()  # the next to be computed first


@dataclass(frozen=True, slots=True)
class PlanRow:
    """Tokens [start, start + count) of one sequence; the last one yields an id when `samples`."""

    sequence: Sequence
    start: int
    count: int
    samples: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """One step. The first `num_online` of `rows` are online, the others batch."""

    rows: tuple[PlanRow, ...]
    num_online: int
    features: StepFeatures
    predicted_s: float
    online_target_s: float  # infinite when nothing online limits the step
    batch_target_s: float


class _Draft:
    """A plan while it grows."""

    def __init__(self) -> None:
        self.rows: list[PlanRow] = []
        self.features = StepFeatures()

    def add(self, sequence: Sequence, count: int) -> None:
        start = sequence.computed_tokens
        self.rows.append(PlanRow(sequence, start, count, count == sequence.pending_tokens))
        self.features = self.features.with_tokens(start, count)

    @property
    def tokens_left(self) -> int:
        return STEP_TOKENS_MAX - self.features.rows


def plan(now_s: float, state: SchedulerState, model: LatencyModel, policy: Policy) -> Plan:
    """The rows of the step that starts at now_s. Inputs are not changed."""
    draft = _Draft()
    for sequence in state.decoding[:STEP_TOKENS_MAX]:
        draft.add(sequence, 1)
    floor_s = model.plan_s(draft.features)  # a step of decodes only
    online = state.decoding or state.prefilling
    itl_s = min((sequence.targets.itl_s for sequence in online), default=math.inf)
    # Where decodes alone take longer than the target no plan can meet it; prefill then gets as
    # much time as the decodes, or it would starve behind them.
    pace_s = itl_s if floor_s <= itl_s else 2 * floor_s
    slack_s = _slack_s(now_s, state.decoding, floor_s, pace_s)
    online_target_s = min(slack_s, pace_s)
    if state.prefilling and not state.decoding:  # no token is due: longer chunks are cheaper
        ttft_s = min(sequence.targets.ttft_s_left for sequence in state.prefilling)
        online_target_s = max(itl_s, policy.tau_idle_s, ALONE_TTFT_SHARE * ttft_s)
    _add_online_chunks(now_s, draft, state.prefilling, online_target_s, model)
    num_online = len(draft.rows)

    is_idle = not state.decoding and not state.prefilling
    if is_idle:
        one_row_s = model.plan_s(StepFeatures(rows=1))
        batch_target_s = max(policy.tau_idle_s, 2 * one_row_s)
    else:
        batch_target_s = min(slack_s, policy.kappa * itl_s)
    _add_batch(draft, state, batch_target_s, model, policy, must_progress=is_idle)
    return Plan(
        tuple(draft.rows),
        num_online,
        draft.features,
        model.predict_s(draft.features),
        online_target_s,
        batch_target_s,
    )


def _slack_s(now_s: float, decoding: Seq[Sequence], floor_s: float, pace_s: float) -> float:
    """Seconds until the first online decode is late; a row already late is paced, not a block."""
    slack_s = math.inf
    for sequence in decoding:
        left_s = sequence.next_token_due_at_s() - now_s
        slack_s = min(slack_s, left_s if left_s > floor_s else max(sequence.targets.itl_s, pace_s))
    return slack_s


def _add_online_chunks(
    now_s: float, draft: _Draft, prefilling: Seq[Sequence], target_s: float, model: LatencyModel
) -> None:
    """Least laxity first; those that cannot be in time any more stand behind all others."""

    def order(sequence: Sequence) -> tuple[bool, float, str]:
        rest = StepFeatures().with_tokens(sequence.computed_tokens, sequence.pending_tokens)
        laxity_s = sequence.first_token_due_at_s - now_s - model.predict_s(rest)
        return (laxity_s < 0, laxity_s, sequence.request_id)

    for sequence in sorted(prefilling, key=order):
        count = chunk_tokens(target_s, draft.features, sequence, model)
        if count == 0:
            if draft.rows:
                break
            count = min(sequence.pending_tokens, CHUNK_TOKENS_MIN)  # an empty step helps nobody
        draft.add(sequence, count)


def _add_batch(
    draft: _Draft,
    state: SchedulerState,
    target_s: float,
    model: LatencyModel,
    policy: Policy,
    must_progress: bool,
) -> None:
    """Batch decodes in turn, then one chunk. With nobody online at least one row runs."""
    rows_max = min(policy.batch_rows_max, draft.tokens_left)
    for num_rows, sequence in enumerate(state.batch_decoding[:rows_max]):
        grown = draft.features.with_tokens(sequence.computed_tokens, 1)
        if model.plan_s(grown) > target_s and not (must_progress and num_rows == 0):
            break
        draft.add(sequence, 1)
    if state.batch_prefilling:
        head = state.batch_prefilling[0]
        count = chunk_tokens(target_s, draft.features, head, model)
        if count == 0 and must_progress and not draft.rows:
            count = min(head.pending_tokens, CHUNK_TOKENS_MIN)
        if count:
            draft.add(head, count)


def chunk_tokens(
    target_s: float, features: StepFeatures, sequence: Sequence, model: LatencyModel
) -> int:
    """Most tokens of the sequence that keep the step within target_s: all that are left, or a
    multiple of CHUNK_TOKENS_MIN, or 0."""
    start = sequence.computed_tokens
    most = min(sequence.pending_tokens, CHUNK_TOKENS_MAX, STEP_TOKENS_MAX - features.rows)
    if most <= 0:
        return 0

    def fits(count: int) -> bool:
        return model.plan_s(features.with_tokens(start, count)) <= target_s

    if most == sequence.pending_tokens and fits(most):
        return most
    low, high = 0, most // CHUNK_TOKENS_MIN
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle * CHUNK_TOKENS_MIN):
            low = middle
        else:
            high = middle - 1
    return low * CHUNK_TOKENS_MIN
