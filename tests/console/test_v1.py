"""`/v1` as an ASGI application: answers, streams, errors in OpenAI's shape, disconnects."""

import asyncio
import json
from dataclasses import replace

import pytest

from console import v1
from console.daphneserver import WRITE_EXTENSION
from console.rateheaders import go_duration
from console.snapshot import ModelFacts
from controlplane import domain
from tests.console.memoryserver import (
    CLASSES,
    KEY,
    MODEL_ID,
    REVOKED_KEY,
    TENANT,
    Client,
    MemoryServer,
    chat_body,
    make_snapshot,
)


def assert_error(exchange, status, code):
    """OpenAI's error shape, and nothing of our insides in it."""
    assert exchange.status == status, exchange.body
    assert exchange.is_complete
    error = exchange.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert error["message"] and "Traceback" not in error["message"]
    assert exchange.headers["x-request-id"]
    assert exchange.headers["content-type"] == "application/json"
    return error


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0)


# --- whole answers -------------------------------------------------------------------------------


async def test_chat_answers_in_openai_shape():
    server = MemoryServer("Hello, wörld.")
    exchange = await server.chat(max_tokens=64)
    assert exchange.status == 200
    body = exchange.json()
    assert body["id"].startswith("chatcmpl-") and body["object"] == "chat.completion"
    assert body["model"] == MODEL_ID and body["service_tier"] == "default"
    assert body["system_fingerprint"].startswith("fp_")
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello, wörld.", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    num_prompt = len(server.worker.assigned[0].prompt_ids)
    assert body["usage"]["prompt_tokens"] == num_prompt
    assert body["usage"]["completion_tokens"] == len("Hello, wörld.".encode())
    assert body["usage"]["total_tokens"] == num_prompt + len("Hello, wörld.".encode())
    assert exchange.headers["openai-version"] == "2020-10-01"
    assert exchange.headers["openai-processing-ms"].isdigit()
    assert exchange.headers["x-slackwater-worker"] == "w1"
    assert exchange.headers["x-request-id"] in body["id"]


async def test_completion_answers_in_openai_shape():
    server = MemoryServer("abcdef")
    body = json.dumps({"model": MODEL_ID, "prompt": "x", "max_tokens": 3}).encode()
    exchange = await server.call(path="/v1/completions", body=body)
    answer = exchange.json()
    assert answer["id"].startswith("cmpl-") and answer["object"] == "text_completion"
    assert answer["choices"] == [
        {"index": 0, "text": "abc", "logprobs": None, "finish_reason": "length"}
    ]
    assert server.worker.assigned[0].prompt_ids == list(b"x")


async def test_completion_is_limited_to_16_tokens_when_none_are_named():
    server = MemoryServer("a" * 40)
    body = json.dumps({"model": MODEL_ID, "prompt": [120]}).encode()
    answer = (await server.call(path="/v1/completions", body=body)).json()
    assert answer["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(
    ("asked", "class_name", "answered"),
    [
        ("priority", "interactive", "priority"),
        ("fast", "interactive", "priority"),
        ("default", "standard", "default"),
        ("flex", "flex", "flex"),
        ("auto", "standard", "default"),
        (None, "standard", "default"),
        (..., "standard", "default"),
    ],
)
async def test_service_tier_selects_the_class_and_is_answered(asked, class_name, answered):
    server = MemoryServer()
    exchange = await server.chat(service_tier=asked)
    assert exchange.json()["service_tier"] == answered
    assert server.worker.assigned[0].targets.name == class_name
    assert server.request_facts()[0].class_name == class_name


async def test_stop_string_ends_the_answer_before_it_and_cancels_the_worker():
    server = MemoryServer("one two three four")
    exchange = await server.chat(stop=["three"])
    body = exchange.json()
    assert body["choices"][0]["message"]["content"] == "one two "
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == len("one two three")
    assert server.worker.cancelled == [server.worker.assigned[0].request_id]


# --- streams -------------------------------------------------------------------------------------


async def test_chat_stream_has_role_text_one_reason_usage_and_done():
    server = MemoryServer("Hi there")
    exchange = await server.chat(stream=True, stream_options={"include_usage": True})
    assert exchange.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = exchange.events()
    assert done == "[DONE]"
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 8
    assert chunks[0]["choices"][0]["delta"] == {
        "role": "assistant",
        "content": "",
        "refusal": None,
    }
    assert all(chunk["usage"] is None for chunk in chunks)
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == "Hi there"
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons[-1] == "stop" and set(reasons[:-1]) == {None}
    assert chunks[-1]["choices"][0]["delta"] == {}
    assert {chunk["id"] for chunk in (*chunks, usage)} == {chunks[0]["id"]}


async def test_stream_without_include_usage_has_no_usage_field():
    server = MemoryServer("Hi")
    events = (await server.chat(stream=True)).events()
    assert all("usage" not in event for event in events[:-1])


async def test_completion_stream_carries_text():
    server = MemoryServer("abc")
    body = json.dumps({"model": MODEL_ID, "prompt": "x", "stream": True}).encode()
    *chunks, done = (await server.call(path="/v1/completions", body=body)).events()
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "abc"
    assert [c["choices"][0]["finish_reason"] for c in chunks][-1] == "stop"
    assert all(chunk["object"] == "text_completion" for chunk in chunks)


async def test_stream_never_splits_a_character():
    server = MemoryServer("a😀é漢")
    events = (await server.chat(stream=True)).events()
    texts = [event["choices"][0]["delta"].get("content", "") for event in events[:-1]]
    assert "".join(texts) == "a😀é漢"
    assert not any("\ufffd" in text for text in texts)


async def test_debug_header_puts_every_id_on_a_chunk_in_order():
    text = "a😀 stop"
    server = MemoryServer(text)
    client = Client(
        body=json.dumps(chat_body(stream=True)).encode(), headers={"x-slackwater-debug": "ids"}
    )
    await server.app(client.scope, client.receive, client.send)
    debugs = [e["slackwater"] for e in client.events()[:-1] if "slackwater" in e]
    ids = []
    for debug in debugs:
        assert debug["seq"] == len(ids)
        ids += debug["token_ids"]
    assert ids == list(text.encode())


async def test_ids_are_not_sent_without_the_debug_header():
    server = MemoryServer("abc")
    assert b"slackwater" not in (await server.chat(stream=True)).body


async def test_stream_writes_through_the_direct_write_of_the_server_when_there_is_one():
    server = MemoryServer("abc")
    client = Client(body=json.dumps(chat_body(stream=True)).encode())
    direct = []

    async def write_now(data):
        assert client.status == 200
        direct.append(data)

    client.scope["extensions"] = {WRITE_EXTENSION: write_now}
    await server.app(client.scope, client.receive, client.send)
    assert client.is_complete and client.chunks == []
    assert b"".join(direct).endswith(b"data: [DONE]\n\n")


async def test_failure_midway_ends_the_stream_with_an_error_event(caplog):
    server = MemoryServer(num_workers=2)
    for worker in server.workers:
        worker.script = lambda assign: [*b"ab", None]
    client = Client(body=json.dumps(chat_body(stream=True)).encode())
    await server.app(client.scope, client.receive, client.send)
    assert client.is_complete
    error = client.events()[-1]["error"]
    assert error["code"] == "worker_error" and error["type"] == "server_error"
    assert b"[DONE]" not in client.body
    assert server.request_facts()[0].status == "failed"


async def test_stream_goes_on_at_the_next_id_when_its_worker_dies():
    server = MemoryServer("abcdefgh", num_workers=2)
    for worker in server.workers:
        worker.gate, worker.ids_before_gate = asyncio.Event(), 3
    client = Client(
        body=json.dumps(chat_body(stream=True)).encode(), headers={"x-slackwater-debug": "ids"}
    )
    task = asyncio.create_task(server.app(client.scope, client.receive, client.send))
    await until(lambda: any(worker.given.values() for worker in server.workers))
    first = next(worker for worker in server.workers if worker.assigned)
    second = next(worker for worker in server.workers if worker is not first)
    await until(lambda: first.given[first.assigned[0].request_id] == 3)
    first.die()
    second.gate.set()
    await task
    assert second.assigned[0].delivered == list(b"abc")
    events = client.events()
    assert events[-1] == "[DONE]"
    debugs = [e["slackwater"] for e in events[:-1] if "slackwater" in e]
    ids = []
    for debug in debugs:
        assert debug["seq"] == len(ids)
        ids += debug["token_ids"]
    assert ids == list(b"abcdefgh")
    reasons = [e["choices"][0]["finish_reason"] for e in events[:-1]]
    assert [reason for reason in reasons if reason] == ["stop"]
    assert server.request_facts()[0].failovers == 1


async def test_silent_stream_gets_pings():
    server = MemoryServer("ab")
    app = v1.V1(lambda: server.services, ping_s=0.01)
    server.worker.gate = asyncio.Event()
    client = Client(body=json.dumps(chat_body(stream=True)).encode())
    task = asyncio.create_task(app(client.scope, client.receive, client.send))
    await until(lambda: client.body.count(b": ping\n\n") >= 2)
    assert client.status == 200
    server.worker.gate.set()
    await task
    assert client.events()[-1] == "[DONE]"


# --- disconnects ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
async def test_client_that_leaves_cancels_its_generation(stream):
    server = MemoryServer("abcdef")
    server.worker.gate, server.worker.ids_before_gate = asyncio.Event(), 2
    client = Client(body=json.dumps(chat_body(stream=stream)).encode())
    task = asyncio.create_task(server.app(client.scope, client.receive, client.send))
    await until(lambda: server.worker.given)
    client.gone.set()
    await task
    assert server.worker.cancelled == [server.worker.assigned[0].request_id]
    assert not client.is_complete
    fact = server.request_facts()[0]
    assert fact.status == "cancelled" and fact.stream is stream
    assert server.fleet.requests == {}


async def test_server_that_cuts_a_reader_off_cancels_the_generation():
    server = MemoryServer("abcdef")
    client = Client(body=json.dumps(chat_body(stream=True)).encode())

    async def write_now(data):
        raise asyncio.CancelledError

    client.scope["extensions"] = {WRITE_EXTENSION: write_now}
    task = asyncio.create_task(server.app(client.scope, client.receive, client.send))
    await asyncio.wait({task})
    assert task.cancelled()
    assert server.request_facts()[0].status == "cancelled"


async def test_client_that_leaves_before_its_body_is_there_is_forgotten():
    server = MemoryServer()
    client = Client()
    client._messages = [{"type": "http.disconnect"}]
    await server.app(client.scope, client.receive, client.send)
    assert client.status is None and server.facts == []


# --- models --------------------------------------------------------------------------------------


async def test_models_are_listed_and_found():
    server = MemoryServer()
    body = (await server.call("GET", "/v1/models")).json()
    assert body["object"] == "list" and [row["id"] for row in body["data"]] == [MODEL_ID]
    row = (await server.call("GET", f"/v1/models/{MODEL_ID}")).json()
    assert row == body["data"][0] and row["object"] == "model"
    assert row["owned_by"] == "slackwater" and isinstance(row["created"], int)


@pytest.mark.parametrize("name", ["nothing", "../../etc/passwd", "modelled-8b/", "a" * 1000])
async def test_unknown_model_is_404(name):
    server = MemoryServer()
    assert_error(await server.call("GET", f"/v1/models/{name}"), 404, "model_not_found")


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/v1/", "/v1/chat", "/v1/chat/completions/", "/v1/responses/", "/v1/x\r\ny", "/v1/%00"]
)
async def test_unknown_path_is_404_in_openai_shape(path):
    server = MemoryServer()
    assert_error(await server.call(path=path), 404, "unknown_url")


async def test_embeddings_are_model_not_found():
    server = MemoryServer()
    assert_error(await server.call(path="/v1/embeddings", body=b"{}"), 404, "model_not_found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/chat/completions", "POST"),
        ("PUT", "/v1/completions", "POST"),
        ("DELETE", "/v1/models", "GET"),
        ("POST", "/v1/models/modelled-8b", "GET"),
        ("OPTIONS", "/v1/chat/completions", "POST"),
    ],
)
async def test_wrong_method_is_405_and_names_the_right_one(method, path, allowed):
    server = MemoryServer()
    exchange = await server.call(method, path)
    assert_error(exchange, 405, "method_not_allowed")
    assert exchange.headers["allow"] == allowed


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        f"Basic {KEY.text}",
        KEY.text,
        "Bearer sk-sw-00000000-" + "0" * 49,
        f"Bearer {KEY.text[:-1]}x",
        f"Bearer {REVOKED_KEY.text}",
        "Bearer ' OR 1=1 --",
        b"Bearer \xff\xfe",
    ],
    ids=lambda value: "header",  # keys differ in each process
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("GET", "/v1/models"),
        ("GET", f"/v1/models/{MODEL_ID}"),
        ("POST", "/v1/embeddings"),
    ],
)
async def test_no_endpoint_answers_without_a_good_key(authorization, method, path):
    server = MemoryServer()
    exchange = await server.call(method, path, b"{}", {"authorization": authorization})
    assert_error(exchange, 401, "invalid_api_key")
    assert exchange.headers["www-authenticate"] == "Bearer"


async def test_key_of_an_inactive_tenant_is_401():
    server = MemoryServer(snapshot=make_snapshot(tenants={}))
    assert_error(await server.call("GET", "/v1/models"), 401, "invalid_api_key")


@pytest.mark.parametrize("host", [None, "", "evil.example", "localhost\x00", "[::1", "a b"])
async def test_foreign_host_is_refused(host):
    server = MemoryServer()
    assert_error(
        await server.call("GET", "/v1/models", headers={"host": host}), 400, "invalid_host"
    )


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000"])
async def test_loopback_hosts_are_served(host):
    server = MemoryServer()
    exchange = await server.call("GET", "/v1/models", headers={"host": host})
    assert exchange.status == 200


async def test_second_request_over_the_concurrency_limit_is_429_with_a_retry_hint():
    tenants = {"acme": replace(TENANT, concurrency_max=1)}
    server = MemoryServer(snapshot=make_snapshot(tenants=tenants))
    server.worker.gate = asyncio.Event()
    first = asyncio.create_task(server.chat())
    await until(lambda: server.worker.assigned)
    exchange = await server.chat(stream=True)
    assert_error(exchange, 429, "rate_limit_exceeded")
    assert int(exchange.headers["retry-after-ms"]) > 0
    assert int(exchange.headers["retry-after"]) >= 1
    assert server.request_facts()[0].status == "rejected"
    server.worker.gate.set()
    assert (await first).status == 200


async def test_draining_server_is_503():
    server = MemoryServer()
    server.services.draining = True
    assert_error(await server.chat(), 503, "draining")


async def test_server_that_starts_is_503():
    app = v1.V1(lambda: None)
    client = Client(body=b"{}")
    await app(client.scope, client.receive, client.send)
    assert_error(client, 503, "starting")


async def test_large_bodies_are_parsed_in_threads_up_to_a_bound():
    models = {MODEL_ID: ModelFacts(MODEL_ID, "", 100_000, 1.0, True)}
    tenants = {"acme": replace(TENANT, concurrency_max=2 * v1.PARSING_MAX)}
    server = MemoryServer("ok", snapshot=make_snapshot(models=models, tenants=tenants))
    text = "x" * (v1.THREAD_BODY_BYTES + 1)
    messages = [{"role": "user", "content": text}]
    answers = await asyncio.gather(
        *(server.chat(messages=messages) for _ in range(v1.PARSING_MAX + 1))
    )
    refused = [answer for answer in answers if answer.status == 503]
    assert len(refused) == 1 and refused[0].json()["error"]["code"] == "overloaded"
    assert refused[0].headers["retry-after"] == "1"
    assert sum(answer.status == 200 for answer in answers) == v1.PARSING_MAX
    assert server.worker.assigned[0].prompt_ids.count(ord("x")) == len(text)
    assert (await server.chat(messages=messages)).status == 200


async def test_model_whose_folder_is_broken_is_503_for_itself_only(tmp_path, caplog):
    broken = ModelFacts("broken", str(tmp_path), 1024, 1.0, True)
    models = make_snapshot().models | {"broken": broken}
    server = MemoryServer(snapshot=make_snapshot(models=models))
    assert_error(await server.chat(model="broken"), 503, "model_unavailable")
    assert (await server.chat()).status == 200


async def test_doubled_headers_are_refused():
    server = MemoryServer()
    for name, value, status in (
        (b"host", b"localhost", 400),
        (b"authorization", f"Bearer {KEY.text}".encode(), 401),
        (b"content-type", b"application/json", 415),
        (b"content-encoding", b"identity", 415),
    ):
        client = Client(body=json.dumps(chat_body()).encode())
        client.scope["headers"] = [h for h in client.scope["headers"] if h[0] != name]
        client.scope["headers"] += [(name, value), (name, value)]
        await server.app(client.scope, client.receive, client.send)
        assert client.status == status, name


async def test_fault_of_ours_is_500_without_details(caplog):
    server = MemoryServer()
    server.services.tokenizers = None
    exchange = await server.chat()
    error = assert_error(exchange, 500, "internal_error")
    assert "NoneType" not in error["message"]
    assert "request failed" in caplog.text


# --- facts ---------------------------------------------------------------------------------------


async def test_a_finished_request_is_counted_and_stored_once_before_its_last_byte():
    server = MemoryServer("abc")
    client = Client(body=json.dumps(chat_body(stream=True)).encode())
    counted_at_done = []

    async def send(message):
        if b"[DONE]" in message.get("body", b""):
            counted_at_done.append(len(server.request_facts()))
        await client.send(message)

    await server.app(client.scope, client.receive, send)
    assert counted_at_done == [1]
    fact = server.request_facts()[0]
    assert fact.status == "completed" and fact.finish_reason == "stop"
    assert (fact.tenant_id, fact.key_id, fact.model_id) == ("acme", KEY.public_id, MODEL_ID)
    assert fact.output_tokens == 3 and fact.prompt_tokens == len(
        server.worker.assigned[0].prompt_ids
    )
    assert fact.split == "local" and fact.decode_worker == "w1"
    assert 0 <= fact.queue_ms <= fact.ttft_ms <= fact.e2e_ms
    assert fact.itl_ms_p99 is not None and fact.decision["records"][0]["outcome"] == "placed"
    assert json.dumps(fact.decision)
    assert fact.arrived_at.tzinfo is not None
    counters = server.live.frame(server.fleet.now_s())["counters"]
    assert counters["completed"] == 1 and counters["tokens_interactive"] == 3


async def test_every_class_can_be_the_default_of_a_tenant():
    for name in ("interactive", "standard", "flex"):
        tenants = {"acme": replace(TENANT, default_class=name)}
        server = MemoryServer(snapshot=make_snapshot(tenants=tenants))
        assert (await server.chat()).json()["service_tier"] == CLASSES[name].service_tier


# --- headers of ours -----------------------------------------------------------------------------


async def test_a_class_can_be_named_outright():
    server = MemoryServer()
    body = json.dumps(chat_body()).encode()
    answered = await server.call(body=body, headers={"x-slo-class": "interactive"})
    assert answered.json()["service_tier"] == "priority"
    for name in ("batch", "nothing", ""):
        refused = await server.call(body=body, headers={"x-slo-class": name})
        assert_error(refused, 400, "invalid_slo_class")


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_is_not_there_in_time_becomes_an_error(stream):
    server = MemoryServer()
    server.worker.gate, server.worker.ids_before_gate = asyncio.Event(), 0
    body = json.dumps(chat_body(stream=stream)).encode()
    late = await server.call(body=body, headers={"x-deadline-ms": "30"})
    error = assert_error(late, 504, "deadline_exceeded")
    assert "x-deadline-ms" in error["message"]
    assert late.headers["x-should-retry"] == "false"
    await until(lambda: server.worker.cancelled)


async def test_a_stream_that_overruns_its_deadline_says_so_in_an_event():
    server = MemoryServer()
    server.worker.gate, server.worker.ids_before_gate = asyncio.Event(), 3
    body = json.dumps(chat_body(stream=True)).encode()
    late = await server.call(body=body, headers={"x-deadline-ms": "200"})
    assert late.status == 200 and late.is_complete
    last = [line for line in late.body.decode().splitlines() if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "x", "3600001", "9" * 30])
async def test_bad_deadlines_are_refused(text):
    server = MemoryServer()
    body = json.dumps(chat_body()).encode()
    refused = await server.call(body=body, headers={"x-deadline-ms": text})
    assert_error(refused, 400, "invalid_deadline")


@pytest.mark.parametrize("stream", [False, True])
async def test_rates_of_the_contract_are_told_on_success_and_refusal(stream):
    server = MemoryServer()
    contract = domain.Contract(
        tenant_id="acme",
        model_id=MODEL_ID,
        class_name="standard",
        requests_per_min=2,
        tokens_per_min=10_000,
        concurrency_max=8,
        over_limit="reject",
    )
    server.fleet.handle(domain.ContractsSet((contract,)))
    told = [await server.chat(stream=stream, max_tokens=50) for _ in range(3)]
    assert [exchange.status for exchange in told] == [200, 200, 429]
    left = [exchange.headers["x-ratelimit-remaining-requests"] for exchange in told]
    assert left == ["1", "0", "0"]
    for exchange in told:
        assert exchange.headers["x-ratelimit-limit-requests"] == "2"
        assert exchange.headers["x-ratelimit-limit-tokens"] == "10000"
        assert exchange.headers["x-ratelimit-reset-tokens"].endswith("s")
    assert int(told[2].headers["retry-after-ms"]) <= 61_000


def test_durations_are_written_as_go_writes_them():
    told = {0.0: "0ms", 0.02: "20ms", 1.0: "1s", 1.5: "1.5s", 59.9996: "1m0s", 360.0: "6m0s"}
    assert {seconds: go_duration(seconds) for seconds in told} == told
