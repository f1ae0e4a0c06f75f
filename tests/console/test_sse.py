"""Chunks and bodies: every piece is JSON that says what the delta said."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from console.apierrors import ApiError
from console.generation import Completion, Delta, Usage
from console.sse import DONE, PING, ChunkEncoder, Envelope, body_json, error_event, fingerprint

USAGE = Usage(prompt_tokens=5, output_tokens=2, cached_tokens=1)


def envelope(endpoint="chat", model_id='m"\n'):
    return Envelope(endpoint, "g1-abc", model_id, "default", 1_700_000_000)


def decode(data: bytes):
    assert data.endswith(b"\n\n")
    events = data.decode().removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


@given(st.text(max_size=30))
def test_any_text_survives_in_one_line(text):
    for endpoint in ("chat", "completions"):
        encoder = ChunkEncoder(envelope(endpoint), False, False)
        data = encoder.delta(Delta(text, 0, [1]))
        if not text:
            assert data == b""
            continue
        (chunk,) = decode(data)
        choice = chunk["choices"][0]
        assert (choice["delta"]["content"] if endpoint == "chat" else choice["text"]) == text
        assert choice["finish_reason"] is None and choice["logprobs"] is None
        assert chunk["model"] == 'm"\n' and chunk["created"] == 1_700_000_000


@pytest.mark.parametrize("include_usage", [True, False])
@pytest.mark.parametrize("text", ["end", ""])
def test_last_chat_delta_is_followed_by_an_empty_one_with_the_reason(text, include_usage):
    encoder = ChunkEncoder(envelope(), include_usage, False)
    *texts, last = decode(encoder.delta(Delta(text, 1, [2], "stop", USAGE)))
    assert [t["choices"][0]["delta"]["content"] for t in texts] == ([text] if text else [])
    assert last["choices"][0] == {
        "index": 0,
        "delta": {},
        "logprobs": None,
        "finish_reason": "stop",
    }
    assert ("usage" in last) is include_usage


def test_last_completion_chunk_carries_text_and_reason():
    encoder = ChunkEncoder(envelope("completions"), False, False)
    (last,) = decode(encoder.delta(Delta("end", 1, [2], "length", USAGE)))
    assert last["choices"][0]["text"] == "end"
    assert last["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
@pytest.mark.parametrize("text", ["", "x"])
@pytest.mark.parametrize("reason", [None, "stop"])
def test_each_id_is_on_exactly_one_chunk_of_a_debug_stream(endpoint, text, reason):
    encoder = ChunkEncoder(envelope(endpoint), False, True)
    delta = Delta(text, 7, [1, 2], reason, USAGE if reason else None)
    debugs = [c["slackwater"] for c in decode(encoder.delta(delta)) if "slackwater" in c]
    assert debugs == [{"seq": 7, "token_ids": [1, 2]}]


def test_usage_chunk_only_when_asked_for():
    assert ChunkEncoder(envelope(), False, False).closing(USAGE) == DONE
    closing = ChunkEncoder(envelope(), True, False).closing(USAGE)
    assert closing.endswith(DONE)
    (chunk,) = decode(closing.removesuffix(DONE))
    assert chunk["choices"] == []
    assert chunk["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 2,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 1},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def test_role_chunk_opens_a_chat():
    (chunk,) = decode(ChunkEncoder(envelope(), True, False).opening())
    assert chunk["choices"][0]["delta"]["role"] == "assistant"
    assert chunk["usage"] is None


def test_body_carries_ids_for_debugging_only():
    completion = Completion("g1-abc", "hi", [1, 2], "stop", USAGE, [])
    assert "slackwater" not in body_json(envelope(), [completion])
    body = body_json(envelope(), [completion], with_ids=True)
    assert body["slackwater"] == {"seq": 0, "token_ids": [1, 2]}


def test_fingerprint_depends_on_the_model_only():
    assert fingerprint("a") == fingerprint("a") != fingerprint("b")


def test_failure_is_an_event_of_its_own():
    (event,) = decode(error_event(ApiError(503, "overloaded", 'no "room"')))
    assert event == {
        "error": {
            "message": 'no "room"',
            "type": "server_error",
            "param": None,
            "code": "overloaded",
        }
    }
    assert DONE == b"data: [DONE]\n\n" and PING.startswith(b":")
