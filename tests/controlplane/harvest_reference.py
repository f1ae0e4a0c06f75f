"""The reference run once more, written apart from the simulator: numpy on the table, no scheduler
of ours, no blocks, no model. Only the arrivals are shared.

Kappa 1, exact step times, no noise, no margin, step cap = the ITL target, KV unlimited: every step
takes all online decodes, online prompts (shortest first), all batch decodes, then batch prompts
until the step lasts the target.
"""

import json
from pathlib import Path

import numpy as np

TABLES = Path(__file__).parents[2] / "controlplane" / "sim" / "tables"
PROMPT, OUTPUT, OUTPUT_WORK = 1000, 250, 2.2


class Table:
    def __init__(self, name: str) -> None:
        file = json.loads((TABLES / f"{name}.json").read_text())
        mixed, decode = file["mixed_step_ms"], file["decode_step_ms"]
        self.tokens = np.array([0, *mixed["prefill_tokens"]], float)
        self.rows = np.array(mixed["decode_rows"], float)
        self.contexts = np.array(mixed["decode_context_tokens"], float)
        # decodes alone, on the grid of the mixed table, stand for a chunk of 0 tokens
        alone = [[self.two(decode, max(r, 1), c) for c in self.contexts] for r in self.rows]
        self.ms = np.array([alone, *mixed["ms"]])
        prefill = file["prefill_ms"]
        self.new, self.prefix = np.array(prefill["new_tokens"]), np.array(prefill["prefix_tokens"])
        self.added = np.array(prefill["ms"]) - np.array(prefill["ms"])[:, :1]

    @staticmethod
    def two(table: dict, rows: float, context: float) -> float:
        by_row = [np.interp(context, table["context_tokens"], line) for line in table["ms"]]
        return float(np.interp(rows, table["batch"], by_row))

    def seconds(self, chunks: list[tuple[int, int]], rows: int, context: int) -> float:
        mean = context / rows if rows else self.contexts[0]
        total = 0.0
        axes, point = (
            (self.tokens, self.rows, self.contexts),
            (sum(c for _, c in chunks), rows, mean),
        )
        cells = [
            int(np.clip(np.searchsorted(a, p) - 1, 0, len(a) - 2))
            for a, p in zip(axes, point, strict=True)
        ]
        at = [(p - a[i]) / (a[i + 1] - a[i]) for a, p, i in zip(axes, point, cells, strict=True)]
        for corner in np.ndindex(2, 2, 2):
            weight = np.prod([s if bit else 1 - s for s, bit in zip(at, corner, strict=True)])
            total += weight * self.ms[tuple(i + bit for i, bit in zip(cells, corner, strict=True))]
        for start, count in chunks:
            if start:
                lines = [np.interp(start, self.prefix, line) for line in self.added]
                total += np.interp(max(count, 64), self.new, lines) * min(1.0, count / 64)
        return 1e-3 * float(total)


def batch_work_per_s(table: Table, arrivals, itl_s: float, seconds: float, warm_s: float) -> float:
    """Batch work of the run after its warm-up, in prompt tokens per second."""
    now_s, work, arrived = 0.0, 0.0, 0
    prompts: list[list[int]] = []  # done, prompt tokens, output tokens
    decodes: list[list[int]] = []  # context, output tokens left
    batch = np.zeros(0, int)  # outputs of the batch rows so far
    head = 0  # tokens done of the next batch prompt
    while now_s < seconds:
        while arrived < len(arrivals) and arrivals[arrived].at_s <= now_s:
            prompts.append([0, arrivals[arrived].prompt_tokens, arrivals[arrived].output_tokens])
            arrived += 1
        rows = len(decodes) + len(batch)
        context = sum(c + 1 for c, _ in decodes) + int((PROMPT + batch).sum())
        chunks: list[tuple[int, int]] = []

        def room(start: int, most: int) -> int:
            low, high = 0, most
            while low < high:
                middle = (low + high + 1) // 2
                fits = table.seconds([*chunks, (start, middle)], rows, context) <= itl_s  # noqa: B023
                low, high = (middle, high) if fits else (low, middle - 1)
            return low

        prompts.sort(key=lambda p: p[1] - p[0])
        for prompt in prompts:
            count = room(prompt[0], prompt[1] - prompt[0])
            if count == 0:
                break
            chunks.append((prompt[0], count))
            prompt[0] += count
        num_online, started = len(chunks), head
        while (count := room(started, PROMPT - started)) > 0:
            chunks.append((started, count))
            started = (started + count) % PROMPT
        step_s = max(table.seconds(chunks, rows, context), 1e-4)
        now_s += step_s
        prompt_tokens = sum(count for _, count in chunks[num_online:])
        new_rows, head = divmod(head + prompt_tokens, PROMPT)
        if now_s >= warm_s:
            work += prompt_tokens + OUTPUT_WORK * (len(batch) + new_rows)
        batch = batch + 1
        batch = np.concatenate([batch[batch < OUTPUT], np.ones(new_rows, int)])
        decodes = [[c + 1, left - 1] for c, left in decodes if left > 1]
        decodes += [[p[1], p[2] - 1] for p in prompts if p[0] == p[1] and p[2] > 1]
        prompts = [p for p in prompts if p[0] < p[1]]
    return work / (now_s - warm_s)
