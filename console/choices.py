"""`n`: several outputs of one request, each a generation of its own with its own draws.

They have one seed and different choice indices. The first refusal ends all of them.
"""

import asyncio
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

import msgspec

from console.gateway import Gateway
from console.generation import Completion, Delta, GenerateSpec, LiveRequest, Refusal

WAITING_MAX = 64  # deltas of all choices that wait for a slow reader


def choices_of(spec: GenerateSpec, num_choices: int) -> list[GenerateSpec]:
    """The spec once for each choice; request ids of the further ones end with their index."""
    if num_choices == 1:
        return [spec]
    sampling = spec.sampling
    if not spec.is_seeded:
        sampling = msgspec.structs.replace(sampling, seed=secrets.randbits(63))
    return [
        replace(
            spec,
            sampling=msgspec.structs.replace(sampling, choice_index=index),
            is_seeded=True,
            request_id=f"{spec.request_id}-{index}" if index else spec.request_id,
        )
        for index in range(num_choices)
    ]


async def collect(
    gateway: Gateway, specs: list[GenerateSpec], lives: list[LiveRequest]
) -> list[Completion] | Refusal:
    """All outputs whole; cancelling the task cancels every generation."""
    if len(specs) == 1:
        outcome = await gateway.collect(specs[0], lives[0])
        return outcome if isinstance(outcome, Refusal) else [outcome]
    tasks = [
        asyncio.ensure_future(gateway.collect(spec, live))
        for spec, live in zip(specs, lives, strict=True)
    ]
    outcomes: list[Completion] = []
    try:
        for task in asyncio.as_completed(tasks):
            outcome = await task
            if isinstance(outcome, Refusal):
                return outcome
        outcomes = [task.result() for task in tasks]  # type: ignore[misc]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return outcomes


async def generate(
    gateway: Gateway, specs: list[GenerateSpec], lives: list[LiveRequest]
) -> AsyncGenerator[tuple[int, Delta | Refusal], None]:
    """Deltas of all choices as they come, with the index of their choice. Close it to cancel."""
    queue: asyncio.Queue[tuple[int, Delta | Refusal | Exception]] = asyncio.Queue(WAITING_MAX)

    async def run(index: int) -> None:
        try:
            async with aclosing(gateway.generate(specs[index], lives[index])) as items:
                async for item in items:
                    await queue.put((index, item))
        except Exception as error:  # a bug: raised where the items are taken
            await queue.put((index, error))

    tasks = [asyncio.ensure_future(run(index)) for index in range(len(specs))]
    num_open = len(specs)
    try:
        while num_open:
            index, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            num_open -= isinstance(item, Refusal) or item.usage is not None
            yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
