"""Gateway: one settled outcome for each request, ids to text, stop, cancel, failure."""

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest

from console.gateway import EVENTS_SLACK, HASH_BLOCK_TOKENS, MERGE_TOKENS_MAX
from console.generation import Completion, Delta, Refusal, Tokens
from console.requests import parse_completion, spec_of
from console.tokens import Tokenizers
from controlplane import domain, protocol
from tests.console.memoryserver import (
    CLASSES,
    MODEL_ID,
    TENANT,
    MemoryServer,
    make_snapshot,
)

TOKENIZERS = Tokenizers()


def make_spec(**changes):
    body = {"model": MODEL_ID, "prompt": "abc", "max_tokens": 100} | changes
    parsed = parse_completion(body, make_snapshot(), TOKENIZERS, TENANT)
    return spec_of(parsed, TENANT, "key", "completions")


async def items_of(server, spec):
    async with aclosing(server.gateway.generate(spec)) as stream:
        return [item async for item in stream]


async def test_deltas_are_contiguous_and_the_last_has_reason_and_usage():
    server = MemoryServer("hello")
    items = await items_of(server, make_spec())
    assert all(isinstance(item, Delta) for item in items)
    ids = []
    for item in items:
        assert item.seq == len(ids)
        ids += item.token_ids
    assert ids == list(b"hello") and "".join(item.text for item in items) == "hello"
    assert [item.finish_reason for item in items[:-1]] == [None] * (len(items) - 1)
    assert items[-1].finish_reason == "stop"
    assert items[-1].usage.prompt_tokens == 3 and items[-1].usage.output_tokens == 5


async def test_ids_that_wait_are_merged_up_to_a_bound():
    server = MemoryServer("x" * 20)
    live = server.gateway.prepare(make_spec())
    stream = server.gateway.generate(make_spec(), live)
    first = await anext(stream)
    while live.journal.finish_reason is None:
        await asyncio.sleep(0)
    second = await anext(stream)
    assert len(first.token_ids) == 1 and len(second.token_ids) == MERGE_TOKENS_MAX
    await stream.aclose()


async def test_collect_gives_the_whole_output():
    server = MemoryServer("hello")
    completion = await server.gateway.collect(make_spec(stop=["lo"]))
    assert isinstance(completion, Completion)
    assert (completion.text, completion.finish_reason) == ("hel", "stop")
    assert completion.token_ids == list(b"hello")
    assert completion.request_id == server.request_facts()[0].request_id


async def test_refusal_is_the_only_item_when_nothing_was_generated():
    server = MemoryServer(num_workers=0)
    (item,) = await items_of(server, make_spec())
    assert isinstance(item, Refusal) and item.rejected.code in ("no_worker", "model_not_served")
    fact = server.request_facts()[0]
    assert fact.status == "rejected" and fact.error_code == item.rejected.code
    assert fact.ttft_ms is None and fact.itl_ms_p99 is None and fact.split == ""
    assert await server.gateway.collect(make_spec()) == item
    assert server.fleet.requests == {}


async def test_output_that_a_worker_gives_up_goes_on_at_another():
    server = MemoryServer("abcdef", num_workers=2)
    for worker in server.workers:
        worker.gate, worker.ids_before_gate = asyncio.Event(), 2
    stream = server.gateway.generate(make_spec())
    items = [await anext(stream), await anext(stream)]
    first, other = sorted(server.workers, key=lambda worker: not worker.assigned)
    other.gate.set()
    first.report(first.assigned[0], 2, [ord("c")], "error")
    items += [item async for item in stream]
    assert [token for item in items for token in item.token_ids] == list(b"abcdef")
    assert items[-1].finish_reason == "stop"
    assert other.assigned[0].delivered == list(b"abc")
    assert [(fact.status, fact.failovers) for fact in server.request_facts()] == [("completed", 1)]


async def test_output_that_two_workers_give_up_ends_with_a_refusal():
    server = MemoryServer("abcdef", num_workers=2)
    for worker in server.workers:
        worker.script = lambda assign: [*b"ab", None]
    items = await items_of(server, make_spec())
    assert [token for item in items[:-1] for token in item.token_ids] == list(b"ab")
    assert items[-1].rejected.code == "worker_error"
    assert [fact.status for fact in server.request_facts()] == ["failed"]
    (again,) = await items_of(server, make_spec())
    assert again.rejected.code == "poison_request", "the same prompt of the same tenant"


async def test_closing_the_stream_cancels_once():
    server = MemoryServer("abcdef")
    server.worker.gate, server.worker.ids_before_gate = asyncio.Event(), 2
    stream = server.gateway.generate(make_spec())
    await anext(stream)
    await stream.aclose()
    assert [fact.status for fact in server.request_facts()] == ["cancelled"]
    assert server.worker.cancelled == [server.worker.assigned[0].request_id]


async def test_cancelling_collect_cancels_the_request():
    server = MemoryServer("abcdef")
    server.worker.gate = asyncio.Event()
    task = asyncio.create_task(server.gateway.collect(make_spec()))
    while not server.worker.assigned:
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    assert [fact.status for fact in server.request_facts()] == ["cancelled"]


async def test_fault_of_ours_is_a_failed_request():
    server = MemoryServer("abc")
    broken = replace(make_spec(), tokenizer=None)
    with pytest.raises(AttributeError):
        await items_of(server, broken)
    assert server.request_facts() == []  # before submit nothing has begun
    broken = replace(make_spec(), tokenizer=type("Empty", (), {"pieces": []})())
    with pytest.raises(IndexError):
        await items_of(server, broken)
    assert [fact.status for fact in server.request_facts()] == ["failed"]
    assert server.fleet.requests == {}


async def test_unseeded_draws_differ_and_seeded_ones_do_not():
    server = MemoryServer()
    unseeded = {server.gateway.prepare(make_spec()).sampling.seed for _ in range(8)}
    assert len(unseeded) == 8
    assert {server.gateway.prepare(make_spec(seed=7)).sampling.seed for _ in range(3)} == {7}
    greedy = server.gateway.prepare(make_spec(temperature=0))
    assert greedy.sampling.seed == 0


async def test_prepared_request_names_the_blocks_of_its_prompt_under_the_tenants_salt():
    server = MemoryServer()
    prompt = list(range(2 * HASH_BLOCK_TOKENS + 1))
    spec = make_spec(prompt=prompt)
    live = server.gateway.prepare(spec)
    hashes = live.request.block_hashes
    assert hashes == protocol.block_hashes(TENANT.salt, prompt, HASH_BLOCK_TOKENS)
    assert len(hashes) == 2
    other = replace(spec, tenant=replace(TENANT, salt=b"other"))
    assert server.gateway.prepare(other).request.block_hashes[0] != hashes[0]
    size_max = spec.sampling.output_tokens_max + EVENTS_SLACK
    for _ in range(size_max):
        live.events.put(Tokens([1], None))
    with pytest.raises(asyncio.QueueFull):
        live.events.put(Tokens([1], None))
    assert live.request_id.startswith("g1-")


async def test_batch_class_reaches_worker_and_fact():
    server = MemoryServer("abc")
    batch = CLASSES["batch"]
    spec = replace(make_spec(), slo=batch.slo, service_tier="batch", is_batch=True)
    assert isinstance(await server.gateway.collect(spec), Completion)
    assert server.worker.assigned[0].targets.is_batch
    fact = server.request_facts()[0]
    assert fact.is_batch and fact.class_name == "batch" and fact.service_tier == "batch"


async def test_the_stored_decisions_hold_the_outcome_of_the_end_that_stored_them():
    server = MemoryServer("abc")
    completion = await server.gateway.collect(make_spec())
    stored = server.request_facts()[0].decision
    assert [record["outcome"] for record in stored["records"]] == ["placed"]
    assert stored["outcome"]["status"] == "completed"
    assert stored["outcome"]["output_tokens"] == len(completion.token_ids)
    assert stored["outcome"]["ttft_s_predicted"] > 0.0


async def test_request_that_waited_too_long_is_expired():
    server = MemoryServer(num_workers=1)
    spec = make_spec()
    server.worker.gate = asyncio.Event()
    live = server.gateway.prepare(spec)
    stream = server.gateway.generate(spec, live)
    first = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    rejected = domain.Rejected("queue_timeout", "waited 30 s", 1.0)
    record = domain.DecisionRecord(live.request_id, 1, "rejected", "r", "", 30.0, 3, 0, None)
    live.events.put(domain.Decided(live.request_id, rejected, record))
    assert await first == Refusal(rejected)
    await stream.aclose()
    assert [fact.status for fact in server.request_facts()] == ["expired"]


async def test_events_of_a_slow_reader_fit_even_one_at_a_time():
    server = MemoryServer("x" * 100)
    live = server.gateway.prepare(make_spec())
    for _ in range(live.sampling.output_tokens_max):
        live.events.put(Tokens([1], None))  # raises when it does not fit
