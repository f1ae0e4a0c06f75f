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
    if len(specs) == 1:
        async with aclosing(gateway.generate(specs[0], lives[0])) as items:
            async for item in items:
                yield 0, item
        return
    queue: asyncio.Queue[tuple[int, Delta | Refusal]] = asyncio.Queue(WAITING_MAX)

    async def run(index: int) -> None:
        async with aclosing(gateway.generate(specs[index], lives[index])) as items:
            async for item in items:
                await queue.put((index, item))

    tasks = [asyncio.ensure_future(run(index)) for index in range(len(specs))]
    num_open = len(specs)
    try:
        while num_open:
            index, item = await _next(queue, tasks)
            num_open -= isinstance(item, Refusal) or item.usage is not None
            yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _next(
    queue: "asyncio.Queue[tuple[int, Delta | Refusal]]", tasks: "list[asyncio.Future[None]]"
) -> tuple[int, Delta | Refusal]:
    """The next item; the error of a generation that failed instead of ending."""
    getting = asyncio.ensure_future(queue.get())
    try:
        await asyncio.wait({getting, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        while not getting.done():
            for task in tasks:
                if task.done() and task.exception() is not None:
                    raise task.exception()  # type: ignore[misc]
            running = [task for task in tasks if not task.done()]
            await asyncio.wait({getting, *running}, return_when=asyncio.FIRST_COMPLETED)
        return getting.result()
    finally:
        getting.cancel()
