"""What may leave in the middle of a step: which blocks of a prompt are final, layer by layer."""

from collections.abc import Callable

from gpuworkers.reports import Key
from gpuworkers.scheduler import Plan, PlanRow

# The leading blocks of a prompt that are final in some layers: key, all its blocks, layers, how
# many of the blocks. Called in the middle of a step, by the thread that runs it.
LayerListener = Callable[[Key, list[int], range, int], None]


def layer_hook(
    plan: Plan, block_tokens: int, num_layers: int, listener: LayerListener | None
) -> Callable[[int], None] | None:
    """What the runner calls when the KV of all rows is in a layer; None when nobody hears of it.

    A block that a later chunk goes on filling is final only then. Tells at once what is there from
    the prefix cache. Batch prompts are left out: they can be preempted, and leave when whole."""
    rows = [r for r in plan.rows if r.sequence.stage == "prefill" and not r.sequence.is_batch]
    if listener is None or not rows:
        return None
    for row in rows:
        if row.start >= block_tokens:
            before = row.start // block_tokens
            listener(row.sequence.key, row.sequence.block_ids, range(num_layers), before)
    ends = [(row, _final_blocks(row, block_tokens)) for row in rows]

    def written(layer: int) -> None:
        for row, end in ends:
            listener(row.sequence.key, row.sequence.block_ids, range(layer, layer + 1), end)

    return written


def _final_blocks(row: PlanRow, block_tokens: int) -> int:
    """Leading blocks that no later token changes; with the last token of the prompt, all."""
    if row.samples:
        return len(row.sequence.block_ids)
    return (row.start + row.count) // block_tokens
