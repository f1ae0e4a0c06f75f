"""How a generation is answered: all at once, or as a stream of events.

Both watch for a client that has gone, because Daphne's `send` stays silent for it, and for the
deadline that the client gave.
"""

import asyncio
from contextlib import aclosing

from console import choices
from console.apierrors import ApiError, of_rejection
from console.exchange import EventWriter, Exchange, disconnected, end_tasks
from console.gateway import Gateway, Generation
from console.generation import Event, GenerateSpec, LiveRequest, Refusal, Usage
from console.rateheaders import rate_headers
from console.responses import ResponseEncoder, response_json
from console.running import Stop
from console.sse import ChunkEncoder, Envelope, body_json, usage_sum

DEADLINE_EXCEEDED = ApiError(
    504,
    "deadline_exceeded",
    "The answer was not complete within x-deadline-ms.",
    should_retry=False,
)
Encoder = ChunkEncoder | ResponseEncoder
Encoders = list[ChunkEncoder] | list[ResponseEncoder]


def end_late(stop: Stop) -> None:
    """The client's deadline has come."""
    if not stop.done():
        stop.set_result(DEADLINE_EXCEEDED)


async def answer_whole(
    exchange: Exchange,
    gateway: Gateway,
    specs: list[GenerateSpec],
    envelope: Envelope,
    with_ids: bool,
    stop: Stop,
) -> ApiError | None:
    """Generate all, answer once; nothing is answered to a client that has gone."""
    lives = [gateway.prepare(spec) for spec in specs]
    generation = asyncio.ensure_future(choices.collect(gateway, specs, lives))
    watch = asyncio.ensure_future(disconnected(exchange.receive))
    try:
        await asyncio.wait({generation, watch, stop}, return_when=asyncio.FIRST_COMPLETED)
        if not generation.done():
            return None if watch.done() else stop.result()
        outcome = generation.result()
    finally:
        await end_tasks(generation, watch)
    exchange.extra_headers += rate_headers(gateway.rates(lives[0]))
    if isinstance(outcome, Refusal):
        return of_rejection(outcome.rejected, envelope.service_tier)
    exchange.extra_headers += _placement_headers(lives[0])
    render = response_json if envelope.endpoint == "responses" else body_json
    await exchange.answer(200, render(envelope, outcome, specs[0].shape, with_ids))
    return None


async def answer_stream(
    exchange: Exchange,
    gateway: Gateway,
    specs: list[GenerateSpec],
    encoders: Encoders,
    ping_s: float,
    stop: Stop,
) -> ApiError | None:
    """Write chunks as deltas come; headers wait for the first, so that a refusal has a status."""
    writer = EventWriter(exchange)
    generation = asyncio.ensure_future(_produce(writer, gateway, specs, encoders))
    watch = asyncio.ensure_future(disconnected(exchange.receive))
    try:
        while not (generation.done() or watch.done() or stop.done()):
            await asyncio.wait(
                {generation, watch, stop}, timeout=ping_s, return_when=asyncio.FIRST_COMPLETED
            )
            if not (generation.done() or watch.done() or stop.done()):
                await writer.ping(ping_s)
        if not generation.done():
            if watch.done():
                return None
            await end_tasks(generation)
            if not writer.is_open:
                return stop.result()
            await writer.finish(encoders[0].error(stop.result()))
            return None
        return generation.result()
    finally:
        await end_tasks(generation, watch)


async def _produce(
    writer: EventWriter,
    gateway: Gateway,
    specs: list[GenerateSpec],
    encoders: Encoders,
) -> ApiError | None:
    """The stream's events from the first to the last; an error when nothing was written yet."""
    lives = [gateway.prepare(spec) for spec in specs]
    if len(specs) == 1:
        return await _produce_one(writer, gateway, specs[0], lives[0], encoders[0])
    unopened = set(range(len(specs)))
    usages: list[Usage] = []
    async with aclosing(choices.generate(gateway, specs, lives)) as items:
        async for index, item in items:
            encoder = encoders[index]
            if isinstance(item, Refusal):
                return await _refuse(writer, gateway, specs[index], lives[index], encoder, item)
            await _open(writer, gateway, lives[index])
            data = encoder.delta(item)
            if index in unopened:
                unopened.remove(index)
                data = encoder.opening() + data
            if item.usage is not None:
                usages.append(item.usage)
            if len(usages) < len(specs):
                await writer.write(data)
            else:
                await writer.finish(data + encoder.closing(usage_sum(usages)))
                return None
    raise AssertionError(f"request {lives[0].request_id} ended without an outcome")


async def _produce_one(
    writer: EventWriter,
    gateway: Gateway,
    spec: GenerateSpec,
    live: LiveRequest,
    encoder: Encoder,
) -> ApiError | None:
    """One choice: the first event by this task, the rest pushed from where ids come in, for as
    long as the reader keeps up."""
    generation = gateway.begin(spec, live)
    try:
        head = encoder.opening()
        while not generation.is_over:
            for item in await generation.next():
                if isinstance(item, Refusal):
                    return await _refuse(writer, gateway, spec, live, encoder, item)
                await _open(writer, gateway, live)
                data, head = head + encoder.delta(item), b""
                if item.usage is not None:
                    await writer.finish(data + encoder.closing(item.usage))
                    return None
                await writer.write(data)
            if writer.can_push and not generation.is_over:
                last = await _push(writer, generation, encoder, spec.service_tier)
                if last is not None:
                    await writer.finish(last)
                    return None
                await writer.write(b"")  # waits for the reader
    except asyncio.CancelledError:
        generation.cancel()
        raise
    finally:
        generation.close()
    raise AssertionError(f"request {live.request_id} ended without an outcome")


async def _push(
    writer: EventWriter, generation: Generation, encoder: Encoder, service_tier: str
) -> bytes | None:
    """Write events as they come, in the turn of the loop that brings them. The stream's last bytes,
    not yet written, or None when the reader is behind."""
    over: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
    mailbox = generation.live.events

    def sink(event: Event) -> None:
        try:
            data, usage = b"", None
            for item in generation.take(event):
                if isinstance(item, Refusal):
                    error = of_rejection(item.rejected, service_tier)
                    over.set_result(encoder.error(error))
                    return
                data += encoder.delta(item)
                usage = item.usage
            if usage is not None:
                over.set_result(data + encoder.closing(usage))
            elif data and not writer.push(data):
                mailbox.sink = None
                over.set_result(None)
        except Exception as error:  # a bug must end this stream, not the worker's link
            mailbox.sink = None
            over.set_exception(error)

    while (event := mailbox.take_now()) is not None:  # what came while this task was writing
        if over.done():
            break
        sink(event)
    if not over.done():
        mailbox.sink = sink
    try:
        return await over
    finally:
        mailbox.sink = None


async def _open(writer: EventWriter, gateway: Gateway, live: LiveRequest) -> None:
    if not writer.is_open:
        await writer.open(rate_headers(gateway.rates(live)) + _placement_headers(live))


async def _refuse(
    writer: EventWriter,
    gateway: Gateway,
    spec: GenerateSpec,
    live: LiveRequest,
    encoder: Encoder,
    refusal: Refusal,
) -> ApiError | None:
    error = of_rejection(refusal.rejected, spec.service_tier)
    if not writer.is_open:
        writer.add_headers(rate_headers(gateway.rates(live)))
        return error
    await writer.finish(encoder.error(error))
    return None


def _placement_headers(live: LiveRequest) -> list[tuple[bytes, bytes]]:
    """Where the request runs and how long it waited, as known when the headers go out."""
    headers = [(b"x-slackwater-decision-id", live.request_id.encode())]
    if live.placement is not None:
        headers.append((b"x-slackwater-worker", live.placement.decode_worker.encode()))
        headers.append((b"x-slackwater-split", live.placement.split.encode()))
    if live.waited_s is not None:
        headers.append((b"x-slackwater-queue-ms", b"%.1f" % (live.waited_s * 1000)))
    return headers
