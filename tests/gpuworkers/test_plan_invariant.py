"""Batch never touches online rows: over 1,000 steps they get the same blocks, order and tokens."""

import random

import pytest

from controlplane.latency import LatencyModel, roofline
from controlplane.protocol import ClassTargets, Policy, Sampling
from gpuworkers import blocks, scheduler
from gpuworkers.scheduler import SchedulerState
from gpuworkers.sequence import Sequence

STEPS = 1000
STEP_S = 0.02  # every step, whatever is in it
BLOCK = 16
ONLINE = ClassTargets("interactive", 0, 0.5, 0.05)
BATCH = ClassTargets("batch", 9, 1e5, 1e5, is_batch=True)


def made(name: str, prompt: int, output: int, targets: ClassTargets, at_s: float) -> Sequence:
    return Sequence(
        request_id=name,
        epoch=1,
        stage="full",
        salt=b"",
        sampling=Sampling(output),
        targets=targets,
        token_ids=[len(name) + i % 97 for i in range(prompt)],
        prompt_tokens=prompt,
        delivered_tokens=0,
        arrived_at_s=at_s,
        phase="running",
    )


class Worker:
    """Steps of fixed time; the ids it samples depend on all ids before."""

    def __init__(self, seed: int, num_batch: int) -> None:
        self.source = random.Random(seed)
        self.pool = blocks.BlockPool(4000, BLOCK)
        self.batch_pool = blocks.BlockPool(4000, BLOCK)
        self.running: list[Sequence] = []
        self.batch = [made(f"b{i}", 200, 500, BATCH, 0.0) for i in range(num_batch)]
        for sequence in self.batch:
            self.batch_pool.allocate(sequence.key, [], blocks.blocks_for(700, BLOCK))
        self.model = LatencyModel(roofline(3.9e-3, 1.2e-3, 27e-6, 32e-9))
        self.seen: list[tuple[object, ...]] = []
        self.batch_rows = 0

    def arrive(self, now_s: float, index: int) -> None:
        if self.source.random() < 0.15:
            prompt, output = self.source.randint(1, 1500), self.source.randint(1, 60)
            sequence = made(f"r{index}", prompt, output, ONLINE, now_s)
            num_blocks = blocks.blocks_for(sequence.tokens_max, BLOCK)
            self.pool.allocate(sequence.key, [], num_blocks)
            sequence.block_ids = self.pool.block_ids(sequence.key)
            self.running.append(sequence)

    def step(self, now_s: float) -> None:
        state = SchedulerState(
            tuple(s for s in self.running if s.is_decoding),
            tuple(s for s in self.running if not s.is_decoding),
            tuple(s for s in self.batch if s.is_decoding),
            tuple(s for s in self.batch if not s.is_decoding),
        )
        plan = scheduler.plan(now_s, state, self.model, Policy())
        self.batch_rows += len(plan.rows) - plan.num_online
        for index, (sequence, start, count, samples) in enumerate(plan.rows):
            sequence.computed_tokens = start + count
            if samples:
                sequence.token_ids.append(hash(tuple(sequence.token_ids[-5:])) % 1000)
                sequence.last_token_at_s = now_s + STEP_S
            if index < plan.num_online:
                newest = sequence.token_ids[-1]
                blocks_then = tuple(sequence.block_ids)
                self.seen.append((now_s, sequence.request_id, start, count, newest, blocks_then))
            elif sequence in self.batch:
                self.batch.append(self.batch.pop(self.batch.index(sequence)))
        for sequence in [s for s in self.running if s.finish_reason(())]:
            self.running.remove(sequence)
            self.pool.free(sequence.key)
        self.pool.check_integrity()


@pytest.mark.parametrize("seed", [1, 2])
def test_online_rows_get_the_same_blocks_order_and_tokens_with_and_without_batch(seed):
    alone, beside = Worker(seed, 0), Worker(seed, 40)
    for index in range(STEPS):
        for worker in (alone, beside):
            worker.arrive(index * STEP_S, index)
            worker.step(index * STEP_S)
    assert alone.seen == beside.seen
    assert len({name for _, name, *_ in alone.seen}) > 100
    assert beside.batch_rows > STEPS and alone.batch_rows == 0
