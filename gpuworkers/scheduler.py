"""Chooses the rows of the next engine step: pure, the same code in worker and simulator.

Order: online decodes; online prefill chunks by least laxity while the step stays within the online
target; then, within a smaller target, batch decodes in turn and batch chunks. The online part of a
plan does not depend on the batch sequences. Method: algorithms.md 2a (Sarathi-Serve, HyGen,
QoServe, SCORPIO); two step targets are ours.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from controlplane.latency import CONTEXT_TILE, HINGE_ROWS, LatencyModel, StepFeatures
from controlplane.protocol import ALONE_TTFT_SHARE, IDLE_TTFT_SHARE, Policy
from gpuworkers.sequence import Sequence

CHUNK_TOKENS_MIN = 16  # also the rounding of a chunk
FULL_SHARE = 0.8  # decodes that fill this much of the online target let loose rows skip a step
SKIP_TARGETS = 2.0  # a row may skip when its token is due no sooner than this many targets
RISK_SHARE = 0.2  # of the TTFT target: laxity from which a prompt goes first
QUIET_S = 10.0  # without an arrival: nobody is expected to wait for the step in hand
AT_RISK, IN_TIME, LOST = 0, 1, 2  # order of prompts


@dataclass(frozen=True, slots=True)
class SchedulerState:
    """The sequences that may run now. All of them have their blocks."""

    decoding: tuple[Sequence, ...] = ()
    prefilling: tuple[Sequence, ...] = ()
    batch_decoding: tuple[Sequence, ...] = ()  # the one that waited longest first
    batch_prefilling: tuple[Sequence, ...] = ()  # the next to be computed first
    quiet_s: float = 0.0  # since the newest online arrival


class PlanRow(NamedTuple):
    """Tokens [start, start + count) of one sequence; the last one yields an id when `samples`.

    A tuple, because a step makes hundreds of them."""

    sequence: Sequence
    start: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody needs
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

    def add_decodes(self, sequences: Seq[Sequence], context_tokens: int) -> None:
        """Many rows at once; context_tokens is what they read together."""
        self.rows += [PlanRow(s, s.computed_tokens, 1, True) for s in sequences]
        self.features = self.features.with_decodes(len(sequences), context_tokens)

    def plan(self, num_online: int, model: LatencyModel, online_s: float, batch_s: float) -> Plan:
        predicted_s = model.predict_s(self.features)
        return Plan(tuple(self.rows), num_online, self.features, predicted_s, online_s, batch_s)


def plan(now_s: float, state: SchedulerState, model: LatencyModel, policy: Policy) -> Plan:
    """The rows of the step that starts at now_s. Inputs are not changed."""
    draft = _Draft()
    decoding = state.decoding[: policy.step_tokens_max]
    draft.add_decodes(decoding, _context_tokens(decoding))
    floor_s = model.plan_s(draft.features)  # a step of decodes only
    online = state.decoding or state.prefilling
    itl_s = min((sequence.targets.itl_s for sequence in online), default=math.inf)
    # Where decodes alone take longer than the target no plan can meet it; prefill then gets as
    # much time as the decodes, or it would starve behind them.
    step_s = min((sequence.targets.step_s for sequence in online), default=math.inf)
    pace_s = step_s if floor_s <= itl_s else 2 * floor_s
    late_s = itl_s if floor_s <= itl_s else pace_s
    slack_s = _slack_s(now_s, decoding, floor_s, late_s)
    online_target_s = min(slack_s, pace_s) - model.host_s
    if state.prefilling and not decoding:  # no token is due: longer chunks are cheaper
        left_s = [sequence.targets.ttft_s_left for sequence in state.prefilling]
        # Those given up on have none left; they must not make the chunks of all shorter.
        usual_s = policy.tau_idle_s / IDLE_TTFT_SHARE
        ttft_s = min((left for left in left_s if left > 0.0), default=usual_s)
        online_target_s = max(itl_s, policy.tau_idle_s, ALONE_TTFT_SHARE * ttft_s)
    if floor_s > FULL_SHARE * online_target_s:
        due_s = now_s + SKIP_TARGETS * online_target_s
        must = [sequence for sequence in decoding if sequence.next_token_due_at_s() < due_s]
        must = must or list(decoding)  # where all could wait, none has anybody to wait for
        draft = _Draft()
        draft.add_decodes(must, _context_tokens(must))
    num_decodes = len(draft.rows)
    _add_online_chunks(now_s, draft, state.prefilling, online_target_s, model, policy)
    num_online = len(draft.rows)

    if online:
        # A first token waits for the whole step: what batch adds to it is all delay. Such steps
        # are few, so that keeping them short costs batch little.
        is_first = any(row.samples for row in draft.rows[num_decodes:])
        first_share = policy.first_token_share if is_first else 1.0
        kappa = 1.0 if state.quiet_s >= QUIET_S else policy.kappa
        batch_s = kappa * first_share * itl_s
        if policy.loose_kappa and _is_loose(state, policy):
            # An arrival of the top class waits for this step: a tenth of its TTFT target at most.
            loose_s = policy.loose_kappa * first_share * itl_s
            batch_s = max(batch_s, min(loose_s, 2.0 * policy.tau_idle_s))
        batch_target_s = min(slack_s, batch_s) - model.host_s
    else:
        batch_target_s = max(policy.tau_idle_s, 2 * model.plan_s(StepFeatures(rows=1)))
    _add_batch(draft, state, batch_target_s, model, policy, must_progress=not online)
    return draft.plan(num_online, model, online_target_s, batch_target_s)


def plan_fixed_chunk(
    state: SchedulerState, model: LatencyModel, policy: Policy, tokens_max: int
) -> Plan:
    """The baseline: as vLLM with priorities, a fixed number of token rows in a step and no look at
    the time it takes. Online decodes, online prompts by arrival, batch decodes, batch prompts."""
    draft = _Draft()
    decoding = state.decoding[: max(tokens_max, 1)]
    draft.add_decodes(decoding, _context_tokens(decoding))
    for sequence in state.prefilling:
        count = min(sequence.pending_tokens, tokens_max - draft.features.rows)
        if count <= 0:
            break
        draft.add(sequence, count)
    num_online = len(draft.rows)
    left = max(0, min(policy.batch_rows_max, tokens_max - draft.features.rows))
    batch = state.batch_decoding[:left]
    draft.add_decodes(batch, _context_tokens(batch))
    for sequence in state.batch_prefilling:
        count = min(sequence.pending_tokens, tokens_max - draft.features.rows)
        if count <= 0:
            break
        draft.add(sequence, count)
    return draft.plan(num_online, model, math.inf, math.inf)


def _context_tokens(decoding: Seq[Sequence]) -> int:
    """KV tokens that these decode rows read."""
    return sum([sequence.computed_tokens for sequence in decoding]) + len(decoding)


def _is_loose(state: SchedulerState, policy: Policy) -> bool:
    """No row of the top class is online here, planned or not."""
    ranks = [s.targets.rank for s in (*state.decoding, *state.prefilling)]
    return min(ranks) > policy.top_rank


def _slack_s(now_s: float, decoding: Seq[Sequence], floor_s: float, late_s: float) -> float:
    """Seconds until the first online decode is late; a row already late is paced, not a block."""
    slack_s = math.inf
    for sequence in decoding:
        left_s = sequence.next_token_due_at_s() - now_s
        if left_s <= floor_s:
            left_s = max(sequence.targets.itl_s, late_s)
        slack_s = min(slack_s, left_s)
    return slack_s


def _add_online_chunks(
    now_s: float,
    draft: _Draft,
    prefilling: Seq[Sequence],
    target_s: float,
    model: LatencyModel,
    policy: Policy,
) -> None:
    """Those at risk by least laxity, then the shortest first: while nobody's deadline is near, a
    long prompt that lets short ones pass costs least. Those that cannot be in time any more stand
    behind those that can. Prompts of the surplus tier have steps of their own, when no other is
    there: their chunks would make the steps of others longer, and long prompts late."""

    def order(sequence: Sequence) -> tuple[int, float, str]:
        rest = StepFeatures().with_tokens(sequence.computed_tokens, sequence.pending_tokens)
        rest_s = model.predict_s(rest)
        laxity_s = sequence.first_token_due_at_s - now_s - rest_s
        if laxity_s < 0:
            return (LOST, laxity_s, sequence.request_id)
        if laxity_s < RISK_SHARE * sequence.targets.ttft_s_left:
            return (AT_RISK, laxity_s, sequence.request_id)
        return (IN_TIME, rest_s, sequence.request_id)

    guaranteed = [sequence for sequence in prefilling if not sequence.targets.is_surplus]
    for sequence in sorted(guaranteed or prefilling, key=order):
        count = chunk_tokens(target_s, draft.features, sequence, model, policy)
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
    """Batch decodes in turn, then chunks: the end of one prompt and the start of the next, or every
    second step would be short. With nobody online at least one row runs."""
    rows_max = max(0, min(policy.batch_rows_max, policy.step_tokens_max - draft.features.rows))
    batch = state.batch_decoding[:rows_max]
    context_tokens = list(accumulate([sequence.computed_tokens + 1 for sequence in batch]))
    base = draft.features

    def too_long(count: int) -> bool:
        grown = base.with_decodes(count, context_tokens[count - 1])
        return model.plan_s(grown) > target_s

    count = len(batch)
    if count and too_long(count):  # the most rows that are not: they stand in order of time
        count = bisect_right(range(1, count + 1), False, key=too_long)
        count = max(count, 1 if must_progress else 0)
    if count:
        draft.add_decodes(batch[:count], context_tokens[count - 1])
    for prompt in state.batch_prefilling:
        tokens = chunk_tokens(target_s, draft.features, prompt, model, policy)
        if tokens == 0:
            if draft.rows or not must_progress:
                break
            tokens = min(prompt.pending_tokens, CHUNK_TOKENS_MIN)
        draft.add(prompt, tokens)


def chunk_tokens(
    target_s: float,
    features: StepFeatures,
    sequence: Sequence,
    model: LatencyModel,
    policy: Policy,
) -> int:
    """Most tokens of the sequence that keep the step within target_s: all that are left, or a
    multiple of CHUNK_TOKENS_MIN, or 0. In closed form, so its cost does not grow with the chunk."""
    start = sequence.computed_tokens
    rows_left = policy.step_tokens_max - features.rows
    most = min(sequence.pending_tokens, policy.chunk_tokens_max, rows_left)
    if most <= 0:
        return 0

    def fits(count: int) -> bool:
        return model.plan_s(features.with_tokens(start, count)) <= target_s

    if most == sequence.pending_tokens and fits(most):
        return most
    most = most // CHUNK_TOKENS_MIN * CHUNK_TOKENS_MIN
    budget_s = target_s / model.plan_margin
    count = int(min(most, _chunk_root(budget_s, features, start, model)))
    count = count // CHUNK_TOKENS_MIN * CHUNK_TOKENS_MIN
    # The root is exact but for rounding: of the float, and of the half token of an odd chunk.
    while count and not fits(count):
        count -= CHUNK_TOKENS_MIN
    while count < most and fits(count + CHUNK_TOKENS_MIN):
        count += CHUNK_TOKENS_MIN
    return count


def _chunk_root(budget_s: float, features: StepFeatures, start: int, model: LatencyModel) -> float:
    """Tokens c for which the step with a chunk [start, start + c) takes budget_s.

    The model is the largest of one line per hinge, so c is the smallest of as many roots of
    A + h·c + al·c²/2 = budget; each as 2·room / (h + sqrt(h² + 2·al·room)), which does not cancel
    and holds for al = 0."""
    step = model.coefficients()
    context_s = step.per_context_token_s
    chunk_s = step.per_chunk_context_token_s
    assert chunk_s is not None
    fixed_s = step.base_s + step.per_sequence_s * (features.sequences + 1)
    fixed_s += context_s * (features.context_tokens - features.chunk_context_tokens)
    fixed_s += chunk_s * features.chunk_context_tokens
    attention_s = chunk_s / CONTEXT_TILE
    token_s, smallest = step.per_token_s, math.inf
    for over_s, hinge in zip((0.0, *step.per_token_over_s), (0, *HINGE_ROWS), strict=True):
        token_s += over_s
        fixed_s -= over_s * hinge
        room_s = budget_s - fixed_s - token_s * features.rows
        if room_s <= 0.0:
            return 0.0
        slope_s = token_s + attention_s * start
        divisor_s = slope_s + math.sqrt(slope_s**2 + 2.0 * attention_s * room_s)
        if divisor_s > 0.0:
            smallest = min(smallest, 2.0 * room_s / divisor_s)
    return smallest
