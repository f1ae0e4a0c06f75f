"""Answers of the two generation endpoints: whole bodies, and chunks of a stream.

A chunk differs from the one before in its text only, so everything around the text is encoded
once for each request.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from console.apierrors import ApiError
from console.generation import Completion, Delta, Usage

GenerateEndpoint = Literal["chat", "completions"]
DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
_ID_PREFIX = {"chat": "chatcmpl-", "completions": "cmpl-"}
_encode = msgspec.json.encode


@dataclass(frozen=True, slots=True)
class Envelope:
    """What every answer to one request repeats; `created` is Unix time in seconds."""

    endpoint: GenerateEndpoint
    request_id: str
    model_id: str
    service_tier: str
    created: int

    def fields(self, kind: str) -> dict[str, Any]:
        return {
            "id": _ID_PREFIX[self.endpoint] + self.request_id,
            "object": kind,
            "created": self.created,
            "model": self.model_id,
            "service_tier": self.service_tier,
            "system_fingerprint": fingerprint(self.model_id),
        }


def fingerprint(model_id: str) -> str:
    """Stands for model and numerics; equal seeds give equal outputs under equal fingerprints."""
    return f"fp_{hashlib.sha256(model_id.encode()).hexdigest()[:10]}"


def usage_json(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.prompt_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def body_json(envelope: Envelope, completion: Completion, with_ids: bool = False) -> dict[str, Any]:
    """The whole answer of a request that does not stream."""
    choice: dict[str, Any] = {"index": 0}
    if envelope.endpoint == "chat":
        message = {"role": "assistant", "content": completion.text, "refusal": None}
        choice["message"] = message
    else:
        choice["text"] = completion.text
    choice |= {"logprobs": None, "finish_reason": completion.finish_reason}
    kind = "chat.completion" if envelope.endpoint == "chat" else "text_completion"
    body = envelope.fields(kind) | {"choices": [choice], "usage": usage_json(completion.usage)}
    if with_ids:
        body["slackwater"] = {"seq": 0, "token_ids": completion.token_ids}
    return body


class ChunkEncoder:
    """Server-sent events of one stream.

    With `with_ids` each chunk carries `slackwater: {seq, token_ids}`: output index of its first id
    and the ids, for checks of continuity."""

    def __init__(self, envelope: Envelope, include_usage: bool, with_ids: bool) -> None:
        self._is_chat = envelope.endpoint == "chat"
        self._include_usage = include_usage
        self._with_ids = with_ids
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        self._head = b"data: " + _encode(envelope.fields(kind))[:-1]
        opening = b'"delta":{"content":' if self._is_chat else b'"text":'
        self._before_text = self._head + b',"choices":[{"index":0,' + opening
        self._after_text = (b"}" if self._is_chat else b"") + b',"logprobs":null,"finish_reason":'
        self._end = (b',"usage":null' if include_usage else b"") + b"}\n\n"

    def role(self) -> bytes:
        """First chunk of a chat."""
        return (
            self._head
            + b',"choices":[{"index":0,"delta":{"role":"assistant","content":"","refusal":null}'
            + b',"logprobs":null,"finish_reason":null}]'
            + self._end
        )

    def delta(self, delta: Delta) -> bytes:
        """Chunks of a delta, or nothing while its text is held back; the last with the reason."""
        reason = delta.finish_reason
        if self._is_chat and reason is not None:
            last = self._wrap(None, reason, delta if not delta.text else None)
            return (self._wrap(delta.text, None, delta) if delta.text else b"") + last
        if not delta.text and reason is None and not self._with_ids:
            return b""
        return self._wrap(delta.text, reason, delta)

    def usage(self, usage: Usage) -> bytes:
        """The chunk that `include_usage` asks for, without choices."""
        if not self._include_usage:
            return b""
        return self._head + b',"choices":[],"usage":' + _encode(usage_json(usage)) + b"}\n\n"

    def _wrap(self, text: str | None, reason: str | None, ids_of: Delta | None) -> bytes:
        end = self._end
        if self._with_ids and ids_of is not None:
            debug = _encode({"seq": ids_of.seq, "token_ids": ids_of.token_ids})
            end = b',"slackwater":' + debug + end
        reason_json = b"null" if reason is None else b'"%b"' % reason.encode()
        if text is None:  # the end of a chat: an empty delta
            before = self._head + b',"choices":[{"index":0,"delta":{'
            return before + self._after_text + reason_json + b"}]" + end
        return self._before_text + _encode(text) + self._after_text + reason_json + b"}]" + end


def error_event(error: ApiError) -> bytes:
    """A failure after the headers have gone; OpenAI's client raises it as APIError."""
    return b"data: " + json.dumps(error.body()).encode() + b"\n\n"
