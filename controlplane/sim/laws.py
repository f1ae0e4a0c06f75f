"""Laws about workers: blocks, salts, who holds an epoch, and what a step plan may leave out.

Numbers as in reliability.md section 10; the plane's own laws are in controlplane/invariants.py.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Seq

from gpuworkers import blocks, scheduler
from gpuworkers.sequence import Sequence

Held = Mapping[tuple[str, int], Sequence]


def check_plan(plan: scheduler.Plan, state: scheduler.SchedulerState) -> None:
    """I10: no batch row runs in a step that leaves out an online decode."""
    if len(plan.rows) == plan.num_online:
        return
    online = {row.sequence.key for row in plan.rows[: plan.num_online]}
    left_out = [item.key for item in state.decoding if item.key not in online]
    assert not left_out, f"I10: batch runs before {left_out[:3]}"


def check_workers(workers: Seq[tuple[blocks.BlockPool, Held]]) -> None:
    """I7, I8 and I9 over all of them: each worker's pool and what it holds."""
    decoding: dict[tuple[str, int], int] = {}
    for index, (pool, held) in enumerate(workers):
        pool.check_integrity()
        salts: dict[int, bytes] = {}
        for key, sequence in held.items():
            if sequence.phase == "running" and sequence.stage != "prefill":
                other = decoding.setdefault(key, index)
                assert other == index, f"I9: {key} runs on two workers"
            for block_id in pool.block_ids(key):
                salt = salts.setdefault(block_id, sequence.salt)
                assert salt == sequence.salt, f"I8: block {block_id} of {salt!r} and {key}"
        assert pool.num_owners == len(held), f"I7: {pool.num_owners} owners, {len(held)} sequences"
