"""The corpus of malformed requests: each is a 4xx in OpenAI's shape, and nothing else happens."""

import asyncio
import json

import pytest

from console.caps import BODY_BYTES_MAX
from tests.console.memoryserver import MODEL_ID, Client, MemoryServer, chat_body

HUGE = 10**40
NOT_TEXT = (1, 0.5, True, [], {}, ["x"], [[]], {"a": "b"})
NOT_NUMBER = ("1", "", True, False, [], {}, [1], "NaN")
NOT_INTEGER = (*NOT_NUMBER, 1.5, 1.0, "5")
NOT_FLAG = (1, 0, "true", "", [], {}, 0.0, "no", [True])
DEEP: list = []
for _ in range(40):
    DEEP = [DEEP]


def fields(name, *values):
    """Bodies of the chat endpoint with one bad field."""
    return [chat_body(**{name: value}) for value in values]


def message(**changes):
    entry = {"role": "user", "content": "x"} | changes
    return {name: value for name, value in entry.items() if value is not ...}


def messages(*lists):
    return [chat_body(messages=entries) for entries in lists]


def replaced(old: bytes, *news: bytes):
    """Raw bodies in which a piece of a good one is replaced."""
    good = json.dumps(chat_body(seed=1), separators=(",", ":")).encode()
    assert old in good
    return [good.replace(old, new) for new in news]


NUMBERS = (
    b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"1" + b"0" * 5000,
    b"9007199254740993", b"-9007199254740993", b"01", b"+1", b"0x10", b"1.", b".5",
)  # fmt: skip
TEXTS = (
    rb'"\ud800"', rb'"\udc00"', rb'"\ud800\ud800"', rb'"a\u0000b"', b'"a\x00b"', b'"\xff\xfe"',
    b'"\xed\xa0\x80"', b'"\xc0\xaf"', b'"line\nend"', b'"\\x41"', b'"unfinished',
)  # fmt: skip

BODIES: dict[str, list] = {
    "json_numbers": replaced(b'"seed":1', *(b'"seed":' + number for number in NUMBERS)),
    "json_texts": replaced(b'"Hi"', *TEXTS),
    "json_syntax": [
        b"", b" ", b"{", b"}", b"{}}", b"{,}", b'{"a"}', b"{'a':1}", b"nul", b"\xef\xbb\xbf{}",
        b"\x00", b'{"a":1}{"a":1}', "{}".encode("utf-16"), "{}".encode("utf-32"),
        b"model=x&prompt=y", b"<xml/>", b'{"a":1,}', b"// c\n{}",
    ],
    "json_top_level": [b"[]", b"1", b'"x"', b"null", b"true", b"[{}]", b"1.5", b'[[["a"]]]'],
    "json_depth": [
        b"[" * 100_000, b'{"a":' * 100_000, b"[" * 40 + b"]" * 40, b'[{"a":' * 50,
        *(chat_body(**{name: DEEP}) for name in ("metadata", "tools", "stop", "messages")),
    ],
    "json_size": [
        b"[" + b"{}," * 500_000 + b"{}]", b"[" + b"1," * 30_000 + b"1]",
        b'{"a":[' + b'"",' * 30_000 + b'""]}', b'"a"' * 50_000, b"," * 30_000,
        *(chat_body(**{name: [0] * 25_000}) for name in ("stop", "metadata", "prompt")),
    ],
    "json_duplicate_keys": replaced(
        b'"seed":1', b'"seed":1,"seed":1', b'"seed":1,"seed":null', b'"seed":1,"model":"x"',
        b'"seed":1,"messages":[]', b'"metadata":{"a":"1","a":"2"}', b'"x":{"a":1,"a":1}',
        b'"\\u0073eed":1,"seed":2', b'"":1,"":2',
    ),
    "unknown_fields": fields("kv_transfer_params", {}) + [
        chat_body(**{name: 1})
        for name in (
            "request_id", "priority", "cache_salt", "worker", "Model", "max_token", "__class__",
            "", "a\r\nb", "x" * 100_000, "\u202eledom", "tenant",
        )
    ],
    "model": fields(
        "model", ..., None, "", *NOT_TEXT, "nothing", "../../etc/passwd", "m" * 1_000_000,
        "modelled-8b\r\nx: y", "MODELLED-8B", "\u202emodelled-8b", "' OR 1=1 --",
    ),
    "messages": fields("messages", ..., None, [], "x", 1, True, {}, [1], ["x"], [None], [[]])
    + messages([{}], [message()] * 1025),
    "role": messages(
        *([message(role=role)] for role in (..., None, "", 1, True, [], {}, "User", "root", "tool",
          "function", "system\n", "<|im_end|>", "x" * 10_000)),
    ),
    "content": messages(
        *([message(content=content)] for content in (..., None, 1, 1.5, True, {}, [], [1], ["x"])),
    ),
    "content_parts": messages(
        *(
            [message(content=[part])]
            for part in (
                {}, None, {"type": "text"}, {"type": "text", "text": None}, {"text": "x"},
                {"type": "text", "text": 1}, {"type": "text", "text": "x", "extra": 1},
                {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}},
                {"type": "input_audio"}, {"type": "TEXT", "text": "x"},
            )
        ),
        [message(content=[{"type": "text", "text": ""}] * 1025)],
    ),
    "message_fields": messages(
        *(
            [message(**extra)]
            for extra in (
                {"name": 1}, {"name": "x" * 65}, {"weight": 1}, {"tool_calls": [{}]},
                {"tool_call_id": "x"}, {"function_call": {}}, {"audio": {"id": "x"}}, {"": 1},
                {"refusal": "no"}, {"Content": "x"},
            )
        ),
    ),
    "max_tokens": fields("max_tokens", -1, 0, *NOT_INTEGER, 1 << 31, 1 << 52, 2000),
    "max_completion_tokens": fields("max_completion_tokens", -1, 0, *NOT_INTEGER, 1 << 31, 1024)
    + [chat_body(max_tokens=1, max_completion_tokens=2)],
    "n": fields("n", 0, -1, 9, 128, 1 << 31, True, "1", 1.5, [], {}, [1]),
    "temperature": fields("temperature", -0.1, 2.1, 1 << 50, *NOT_NUMBER),
    "top_p": fields("top_p", 0, -1, 1.01, 2, *NOT_NUMBER),
    "top_k": fields("top_k", -2, 1 << 40, *NOT_INTEGER),
    "seed": fields("seed", *NOT_INTEGER),
    "min_tokens": fields("min_tokens", -1, 1025, 1 << 31, *NOT_INTEGER),
    "stop": fields(
        "stop", "", [""], 1, True, {}, [1], [None], ["a"] * 5, "x" * 65, ["a", "x" * 65],
        ["a"] * 10_000, [["a"]], "é" * 33,
    ),
    "stop_token_ids": fields(
        "stop_token_ids", 1, "1", True, {}, [-1], [258], [1.5], ["1"], [True], [None], [1] * 65,
    ),
    "flags": fields("stream", *NOT_FLAG) + fields("ignore_eos", *NOT_FLAG),
    "stream_options": [
        chat_body(stream=stream, stream_options=options)
        for stream, options in (
            (False, {}), (..., {"include_usage": True}), (True, []), (True, 1), (True, "x"),
            (True, True), (True, {"include_usage": 1}), (True, {"include_usage": "yes"}),
            (True, {"x": 1}), (True, {"include_obfuscation": 2}),
        )
    ],
    "service_tier": fields("service_tier", "", "batch", "Priority", "gold", *NOT_TEXT, "x" * 9999),
    "response_format": fields(
        "response_format", "text", 1, True, [], {}, {"type": "json_object"}, {"type": "Text"},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}},
        {"type": "text", "x": 1}, {"type": "regex", "pattern": "(a+)+b"},
    ),
    "unsupported": [
        chat_body(**{name: value})
        for name, value in (
            ("logit_bias", {"-1": 1}), ("logit_bias", {"999999": 100}), ("logit_bias", []),
            ("logit_bias", {"5": 101}), ("logit_bias", {"5": True}), ("logit_bias", {"x": 1}),
            ("logit_bias", {str(i): 1 for i in range(301)}), ("logit_bias", {"9" * 5000: 1}),
            ("logprobs", 5), ("top_logprobs", 20), ("top_logprobs", 21), ("presence_penalty", 2.1),
            ("frequency_penalty", -3), ("frequency_penalty", "1"), ("best_of", 2), ("echo", True),
            ("suffix", "x"), ("functions", [{}]), ("modalities", ["audio"]), ("verbosity", "low"),
            ("prediction", {}), ("web_search_options", {}), ("min_p", 1.1), ("min_p", False),
            ("repetition_penalty", 0), ("repetition_penalty", 11), ("n", True), ("n", 9),
            ("reasoning_effort", "high"), ("moderation", {}),
        )
    ],
    "tools": [
        chat_body(tools=tools)
        for tools in (
            1, {}, [1], [{}], [{"type": "function"}], [{"type": "web_search"}],
            [{"type": "function", "function": {"name": "a b"}}],
            [{"type": "function", "function": {"name": "a" * 65}}],
            [{"type": "function", "function": {"name": "f", "parameters": 1}}],
            [{"type": "function", "function": {"name": "f", "what": 1}}],
            [{"type": "function", "function": {"name": "f"}}] * 2,
            [{"type": "function", "function": {"name": "f"}}],  # its template knows no tools
        )
    ]
    + [chat_body(tool_choice=choice) for choice in ("required", 1, {"type": "function"}, [])],
    "schema": [
        chat_body(response_format=value)
        for value in (
            1, [], {}, {"type": "xml"}, {"type": "json_schema"}, {"type": "text", "x": 1},
            {"type": "json_schema", "json_schema": []},
            {"type": "json_schema", "json_schema": {"name": "x"}},
            {"type": "json_schema", "json_schema": {"schema": {}}},
            {"type": "json_schema", "json_schema": {"name": "x" * 65, "schema": {}}},
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"a": "b" * 70_000}}},
            {"type": "json_object"},  # a model without a vocabulary of text
        )
    ],
    "labels": fields("user", *NOT_TEXT, "x" * 513)
    + fields(
        "metadata", 1, "x", [], True, {"a": 1}, {"a": None}, {"a": {}}, {"k" * 65: "v"},
        {"k": "v" * 513}, {str(i): "v" for i in range(17)},
    ),
    "too_long": [
        chat_body(messages=[message(content=text)])
        for text in ("x" * 1025, "x" * 100_000, "é" * 600, "😀" * 300, "x" * 3_000_000, " " * 5000,
                     "\n" * 2000, "<|im_end|>" * 200)
    ],
}  # fmt: skip

COMPLETION_BODIES = {
    "prompt": [
        {"model": MODEL_ID, "prompt": prompt}
        for prompt in (
            None, "", [], {}, 1, True, [""], ["a", "b"], [["a"]], [-1], [258], [1.5], [True],
            [None], [[1], [2]], [[]], [1, "a"], [HUGE], [1] * 1024,
        )
    ]
    + [{"model": MODEL_ID}],
    "completion_fields": [
        {"model": MODEL_ID, "prompt": "x"} | extra
        for extra in (
            {"messages": []}, {"max_completion_tokens": 1}, {"response_format": {"type": "text"}},
            {"best_of": 2}, {"echo": 1}, {"suffix": "x"}, {"logprobs": 6}, {"max_tokens": 1025},
            {"logprobs": True}, {"echo": True, "logprobs": 1}, {"tools": []},
        )
    ],
}  # fmt: skip

HEADERS: dict[str, list] = {
    "content_type": [
        {"content-type": value}
        for value in (
            None, "", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data",
            "application/json; charset=utf-16", "application/jsonx", "json",
            "application/json, text/plain", b"\xff\xfe",
        )
    ],
    "content_encoding": [
        {"content-encoding": value}
        for value in ("gzip", "br", "deflate", "zstd", "x", "gzip, identity", "GZIP", b"\xff")
    ],
    "host": [
        {"host": value}
        for value in (
            None, "", "evil.example", "localhost.evil.example", "localhost/x", "local host",
            "localhost:port", "[::1", "169.254.169.254", b"\xff", "localhost@evil.example",
        )
    ],
}  # fmt: skip


def raw(body) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()


CASES = [
    *(
        pytest.param("/v1/chat/completions", raw(body), {}, id=f"{kind}-{index}")
        for kind, bodies in BODIES.items()
        for index, body in enumerate(bodies)
    ),
    *(
        pytest.param("/v1/completions", raw(body), {}, id=f"{kind}-{index}")
        for kind, bodies in COMPLETION_BODIES.items()
        for index, body in enumerate(bodies)
    ),
    *(
        pytest.param("/v1/chat/completions", raw(chat_body()), headers, id=f"{kind}-{index}")
        for kind, entries in HEADERS.items()
        for index, headers in enumerate(entries)
    ),
]


def test_there_are_at_least_8_cases_of_each_of_25_kinds():
    sizes = {kind: len(cases) for kind, cases in (BODIES | COMPLETION_BODIES | HEADERS).items()}
    assert len(sizes) >= 25
    assert min(sizes.values()) >= 8, sizes


@pytest.mark.parametrize(("path", "body", "headers"), CASES)
async def test_malformed_request_is_a_4xx_in_openai_shape(path, body, headers, caplog):
    server = MemoryServer()
    caplog.clear()
    facts_before = list(server.facts)
    exchange = await server.call(path=path, body=body, headers=headers)
    assert 400 <= exchange.status < 500, exchange.body[:300]
    assert exchange.is_complete and len(exchange.body) < 2_000
    answer = exchange.json()
    assert set(answer) == {"error"}
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"]
    assert isinstance(error["code"], str) and error["type"].endswith("_error")
    assert error["param"] is None or isinstance(error["param"], str)
    assert "Traceback" not in error["message"] and "\n" not in error["message"]
    assert caplog.records == [], "a client's mistake is no event for the log"
    assert server.worker.assigned == [] and server.facts == facts_before


async def test_running_stream_is_unaffected_by_malformed_requests():
    server = MemoryServer("abcdefghij")
    gate = server.worker.gate = asyncio.Event()
    server.worker.ids_before_gate = 3
    client = Client(body=json.dumps(chat_body(stream=True)).encode())
    stream = asyncio.create_task(server.app(client.scope, client.receive, client.send))
    for case in CASES[::25]:
        path, body, headers = case.values
        assert (await server.call(path=path, body=body, headers=headers)).status < 500
    gate.set()
    await stream
    assert client.events()[-1] == "[DONE]"
    assert server.request_facts()[0].output_tokens == 10


async def test_body_over_the_cap_is_refused_while_it_arrives():
    server = MemoryServer()
    client = Client()
    piece = b"x" * (64 << 10)
    taken = 0

    async def receive():
        nonlocal taken
        taken += len(piece)
        return {"type": "http.request", "body": piece, "more_body": True}

    await server.app(client.scope, receive, client.send)
    assert client.status == 413 and client.json()["error"]["code"] == "request_too_large"
    assert taken <= BODY_BYTES_MAX + 2 * len(piece)


async def test_secret_text_of_a_refused_request_is_nowhere(caplog):
    canary = "canary-7f3a"
    server = MemoryServer()
    for body in (
        chat_body(messages=[message(content=canary)], temperature="x"),
        chat_body(messages=[message(content=[{"type": "image", "url": canary}])]),
        chat_body(stop=[canary * 20]),
        chat_body(metadata={"a": canary, "b": 1}),
    ):
        exchange = await server.call(body=json.dumps(body).encode())
        assert exchange.status == 400 and canary.encode() not in exchange.body
    assert canary not in caplog.text
