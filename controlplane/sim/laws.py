"""Laws about workers: blocks, salts, who holds an epoch, and what a step plan may hold.

Numbers as in reliability.md section 10; the plane's own laws are in controlplane/invariants.py.
Everything here is counted again from the rows, never asked of the code that it is about.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Seq

from controlplane.latency import LatencyModel, StepFeatures
from controlplane.protocol import Policy
from gpuworkers import blocks, scheduler
from gpuworkers.sequence import Sequence

Held = Mapping[tuple[str, int], Sequence]
EPSILON_S = 1e-9


def check_plan(
    now_s: float,
    plan: scheduler.Plan,
    state: scheduler.SchedulerState,
    model: LatencyModel,
    policy: Policy,
) -> None:
    """A plan is made of what may run, adds up, and lets no batch row cost an online token."""
    _check_rows(plan, state, model, policy)
    _check_chunks(plan, model, policy)
    _check_order(now_s, plan, state, model)
    if len(plan.rows) > plan.num_online:
        _check_batch(now_s, plan, state, model, policy)


def _check_rows(
    plan: scheduler.Plan, state: scheduler.SchedulerState, model: LatencyModel, policy: Policy
) -> None:
    online = {s.key: s for s in (*state.decoding, *state.prefilling)}
    batch = {s.key: s for s in (*state.batch_decoding, *state.batch_prefilling)}
    features, seen = StepFeatures(), set()
    for index, (sequence, start, count, samples) in enumerate(plan.rows):
        lane = online if index < plan.num_online else batch
        assert lane.get(sequence.key) is sequence, f"plan: {sequence.key} is in the wrong lane"
        assert sequence.key not in seen, f"plan: {sequence.key} twice"
        seen.add(sequence.key)
        pending = sequence.pending_tokens
        assert start == sequence.computed_tokens and 1 <= count <= pending, (
            f"plan: {sequence.key} computes {count} of {pending} from {start}"
        )
        assert samples == (count == pending), f"plan: {sequence.key} samples={samples}"
        features = features.with_tokens(start, count)
    assert features == plan.features, f"plan: {plan.features} for {features}"
    assert plan.predicted_s == model.predict_s(features), f"plan: {plan.predicted_s}"
    assert features.rows <= policy.step_tokens_max, f"plan: {features.rows} rows"
    num_batch = sum(row.sequence.is_decoding for row in plan.rows[plan.num_online :])
    assert num_batch <= policy.batch_rows_max, f"plan: {num_batch} batch rows"
    assert plan.rows or not (online or batch), f"plan: nothing of {len(online)}, {len(batch)} runs"


def _check_chunks(plan: scheduler.Plan, model: LatencyModel, policy: Policy) -> None:
    """A chunk that does not end its prompt fills its target, but for less than one unit."""
    features = StepFeatures()
    for index, (sequence, start, count, samples) in enumerate(plan.rows):
        target_s = plan.online_target_s if index < plan.num_online else plan.batch_target_s
        if not samples:
            more = count + scheduler.CHUNK_TOKENS_MIN
            can_grow = more <= min(
                sequence.pending_tokens,
                policy.chunk_tokens_max,
                policy.step_tokens_max - features.rows,
            )
            is_full = model.plan_s(features.with_tokens(start, more)) > target_s - EPSILON_S
            assert is_full or not can_grow, f"plan: {sequence.key} could compute {more} tokens"
        features = features.with_tokens(start, count)
        if index and not sequence.is_decoding:
            assert model.plan_s(features) <= target_s + EPSILON_S, (
                f"plan: {count} tokens of {sequence.key} do not fit {target_s:.3f} s"
            )


def _check_order(
    now_s: float, plan: scheduler.Plan, state: scheduler.SchedulerState, model: LatencyModel
) -> None:
    """A prompt that can be in time is not left out for one that cannot."""
    planned = {row.sequence.key for row in plan.rows}

    def laxity_s(sequence: Sequence) -> float:
        rest = StepFeatures().with_tokens(sequence.computed_tokens, sequence.pending_tokens)
        return sequence.first_token_due_at_s - now_s - model.predict_s(rest)

    running = [s.key for s in state.prefilling if s.key in planned and laxity_s(s) < -EPSILON_S]
    waiting = [s.key for s in state.prefilling if s.key not in planned and laxity_s(s) > EPSILON_S]
    assert not (running and waiting), f"plan: {running[0]} is lost and goes before {waiting[0]}"


def _check_batch(
    now_s: float,
    plan: scheduler.Plan,
    state: scheduler.SchedulerState,
    model: LatencyModel,
    policy: Policy,
) -> None:
    """I10: with batch beside it no online row waits that would have run, and no token that would
    have been in time is late."""
    rows = plan.rows[: plan.num_online]
    online = {row.sequence.key for row in rows}
    left_out = [item.key for item in state.decoding if item.key not in online]
    assert not left_out, f"I10: batch runs before {left_out[:3]}"
    alone = StepFeatures()
    for _, start, count, _ in rows:
        alone = alone.with_tokens(start, count)
    for item in state.prefilling:
        if item.key not in online:  # not for the batch rows: it did not fit before them
            count = min(item.pending_tokens, scheduler.CHUNK_TOKENS_MIN)
            if alone.rows + count > policy.step_tokens_max:
                continue
            with_it_s = model.plan_s(alone.with_tokens(item.computed_tokens, count))
            assert with_it_s > plan.online_target_s - EPSILON_S, (
                f"I10: batch runs and {item.key} does not, {with_it_s:.3f} s with it"
            )
    if not rows:
        return
    alone_s, all_s = model.plan_s(alone), model.plan_s(plan.features)
    itl_s = min(item.targets.itl_s for item in (*state.decoding, *state.prefilling))
    kappa = 1.0 if state.quiet_s >= scheduler.QUIET_S else policy.kappa
    assert all_s <= max(kappa * itl_s, alone_s) + EPSILON_S, (
        f"I10: {all_s:.3f} s with batch, ITL target {itl_s:.3f} s"
    )
    for item in state.decoding:
        left_s = item.next_token_due_at_s() - now_s
        if left_s > alone_s:
            assert all_s <= left_s + EPSILON_S, f"I10: batch makes {item.key} late"


def check_workers(workers: Seq[tuple[blocks.BlockPool, Held]]) -> None:
    """I7, I8 and I9 over all of them: each worker's pool and what it holds."""
    decoding: dict[tuple[str, int], int] = {}
    for index, (pool, held) in enumerate(workers):
        pool.check_integrity()
        size = pool.block_tokens
        content: dict[int, tuple[bytes, Seq[int]]] = {}  # salt, and all ids up to its end
        for key, sequence in held.items():
            if sequence.phase == "running" and sequence.stage != "prefill":
                other = decoding.setdefault(key, index)
                assert other == index, f"I9: {key} runs on two workers"
            table = pool.block_ids(key)
            assert len(table) == blocks.blocks_for(sequence.tokens_max, size), (
                f"I7: {key} has {len(table)} blocks for {sequence.tokens_max} tokens"
            )
            for place, block_id in enumerate(table):
                end = size * (place + 1)
                written = sequence.token_ids[:end] if end <= sequence.computed_tokens else ()
                if block_id not in content:
                    content[block_id] = (sequence.salt, written)
                    continue
                salt, ids = content[block_id]
                assert salt == sequence.salt, f"I8: block {block_id} of {salt!r} and {key}"
                assert written and ids == written, f"I7: block {block_id} of {key} is another's"
        assert pool.num_owners == len(held), f"I7: {pool.num_owners} owners, {len(held)} sequences"
