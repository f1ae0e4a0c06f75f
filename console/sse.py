"""Answers of the two generation endpoints: whole bodies, and chunks of a stream.

A chunk differs from the one before in its text only, so everything around the text is encoded
once for each request.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from console.apierrors import ApiError
from console.generation import PLAIN, Completion, Delta, Shape, Usage
from console.tools import ToolCallReader, ToolPlan
from controlplane.protocol import TokenLogprobs

GenerateEndpoint = Literal["chat", "completions", "responses"]

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
UNKNOWN_LOGPROB = -9999.0  # OpenAI's value for "very unlikely": the number was lost
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


def usage_sum(usages: Sequence[Usage]) -> Usage:
    """Of all choices of one request: the prompt counts once."""
    first = usages[0]
    output_tokens = sum(usage.output_tokens for usage in usages)
    return Usage(first.prompt_tokens, output_tokens, max(u.cached_tokens for u in usages))


def body_json(
    envelope: Envelope,
    completions: Sequence[Completion],
    shape: Shape = PLAIN,
    with_ids: bool = False,
) -> dict[str, Any]:
    """The whole answer of a request that does not stream, one choice for each completion."""
    choices = [
        _choice(envelope.endpoint, index, completion, shape)
        for index, completion in enumerate(completions)
    ]
    kind = "chat.completion" if envelope.endpoint == "chat" else "text_completion"
    usage = usage_sum([completion.usage for completion in completions])
    body = envelope.fields(kind) | {"choices": choices, "usage": usage_json(usage)}
    if with_ids:
        body["slackwater"] = {"seq": 0, "token_ids": completions[0].token_ids}
    return body


def _choice(
    endpoint: GenerateEndpoint, index: int, completion: Completion, shape: Shape
) -> dict[str, Any]:
    scores = None
    if shape.pieces is not None:
        scores = Scores(endpoint, shape.pieces).of(completion.token_ids, completion.logprobs)
    if endpoint == "completions":
        text = shape.echo + completion.text
        reason = completion.finish_reason
        return {"index": index, "text": text, "logprobs": scores, "finish_reason": reason}
    message, reason = message_json(completion, shape.tools)
    return {"index": index, "message": message, "logprobs": scores, "finish_reason": reason}


def message_json(completion: Completion, tools: ToolPlan) -> tuple[dict[str, Any], str]:
    """The assistant's message, and why it ended."""
    message: dict[str, Any] = {"role": "assistant", "content": completion.text, "refusal": None}
    if not tools.tools:
        return message, completion.finish_reason
    text, calls = ToolCallReader.of(tools).feed(completion.text, is_last=True)
    if not calls:
        return message, completion.finish_reason
    message |= {"content": text or None, "tool_calls": [call.as_json() for call in calls]}
    return message, _reason(completion.finish_reason, has_calls=True)


def _reason(finish_reason: str, has_calls: bool) -> str:
    return "tool_calls" if has_calls and finish_reason == "stop" else finish_reason


class Scores:
    """Logprobs of one output in the form of its endpoint; `text_offset` runs on over chunks."""

    def __init__(self, endpoint: GenerateEndpoint, pieces: Sequence[bytes]) -> None:
        self._is_chat = endpoint == "chat"
        self._pieces = pieces
        self._offset = 0

    def of(
        self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None]
    ) -> dict[str, Any]:
        """An entry is None for an id of a worker that died before it told them."""
        pairs = list(zip(token_ids, entries, strict=True))
        if self._is_chat:
            return {"content": [self._chat(*pair) for pair in pairs], "refusal": None}
        scores: dict[str, Any] = {
            "tokens": [self._text(token_id) for token_id in token_ids],
            "token_logprobs": [None if e is None else e.logprob for e in entries],
            "top_logprobs": [
                {self._text(i): v for i, v in zip(e.top_ids, e.top_logprobs, strict=True)}
                if e is not None
                else None
                for e in entries
            ],
            "text_offset": [],
        }
        for token in scores["tokens"]:
            scores["text_offset"].append(self._offset)
            self._offset += len(token)
        return scores

    def _chat(self, token_id: int, entry: TokenLogprobs | None) -> dict[str, Any]:
        if entry is None:
            return self._token(token_id, UNKNOWN_LOGPROB) | {"top_logprobs": []}
        top = zip(entry.top_ids, entry.top_logprobs, strict=True)
        likeliest = [self._token(other_id, value) for other_id, value in top]
        return self._token(token_id, entry.logprob) | {"top_logprobs": likeliest}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        piece = self._pieces[token_id]
        return {"token": self._text(token_id), "logprob": logprob, "bytes": list(piece)}

    def _text(self, token_id: int) -> str:
        return self._pieces[token_id].decode(errors="replace")


class ChunkEncoder:
    """Server-sent events of one choice of a stream.

    With `with_ids` each chunk carries `slackwater: {seq, token_ids}`: output index of its first id
    and the ids, for checks of continuity."""

    def __init__(
        self,
        envelope: Envelope,
        include_usage: bool,
        with_ids: bool,
        shape: Shape = PLAIN,
        index: int = 0,
    ) -> None:
        self._is_chat = envelope.endpoint == "chat"
        self._include_usage = include_usage
        self._with_ids = with_ids
        self._shape = shape
        self._tools = ToolCallReader.of(shape.tools) if shape.tools.tools else None
        self._scores = None
        if shape.pieces is not None:
            self._scores = Scores(envelope.endpoint, shape.pieces)
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        self._head = b"data: " + _encode(envelope.fields(kind))[:-1]
        self._choice = self._head + b',"choices":[{"index":%d,' % index
        self._before_text = self._choice + (b'"delta":{"content":' if self._is_chat else b'"text":')
        self._after_text = (b"}" if self._is_chat else b"") + b',"logprobs":'
        self._end = (b',"usage":null' if include_usage else b"") + b"}\n\n"

    def opening(self) -> bytes:
        """What goes before the first delta: a chat's role, a completion's echo."""
        if self._is_chat:
            role = b'"delta":{"role":"assistant","content":"","refusal":null}'
            return self._choice + role + b',"logprobs":null,"finish_reason":null}]' + self._end
        return self._wrap(self._shape.echo, None, None) if self._shape.echo else b""

    def delta(self, delta: Delta) -> bytes:
        """Chunks of a delta, or nothing while its text is held back; the last with the reason."""
        reason = delta.finish_reason
        if self._tools is not None:
            return self._delta_with_tools(delta, self._tools)
        has_news = delta.text or self._with_ids or (self._scores is not None and delta.token_ids)
        if self._is_chat and reason is not None:
            last = self._wrap(None, reason, delta if not has_news else None)
            return (self._wrap(delta.text, None, delta) if has_news else b"") + last
        if not has_news and reason is None:
            return b""
        return self._wrap(delta.text, reason, delta)

    def closing(self, usage: Usage) -> bytes:
        """The end of the stream, after the chunk without choices that `include_usage` asks for."""
        if not self._include_usage:
            return DONE
        head = self._head + b',"choices":[],"usage":'
        return head + _encode(usage_json(usage)) + b"}\n\n" + DONE

    def error(self, error: ApiError) -> bytes:
        """A failure after the headers have gone."""
        return error_event(error)

    def _delta_with_tools(self, delta: Delta, reader: ToolCallReader) -> bytes:
        reason, before = delta.finish_reason, reader.num_calls
        text, calls = reader.feed(delta.text, is_last=reason is not None)
        chunks = [self._wrap(text, None, delta)] if text or self._with_ids else []
        for index, call in enumerate(calls, before):
            tool_calls = [{"index": index, **call.as_json()}]
            chunks.append(
                self._choice
                + b'"delta":{"tool_calls":'
                + _encode(tool_calls)
                + b'},"logprobs":null,"finish_reason":null}]'
                + self._end
            )
        if reason is not None:
            chunks.append(self._wrap(None, _reason(reason, reader.num_calls > 0), None))
        return b"".join(chunks)

    def _wrap(self, text: str | None, reason: str | None, ids_of: Delta | None) -> bytes:
        end = self._end
        if self._with_ids and ids_of is not None:
            debug = _encode({"seq": ids_of.seq, "token_ids": ids_of.token_ids})
            end = b',"slackwater":' + debug + end
        scores = b"null"
        if self._scores is not None and ids_of is not None and ids_of.token_ids:
            scores = _encode(self._scores.of(ids_of.token_ids, ids_of.logprobs))
        reason_json = b"null" if reason is None else b'"%b"' % reason.encode()
        rest = scores + b',"finish_reason":' + reason_json + b"}]" + end
        if text is None:  # the end of a chat: an empty delta
            return self._choice + b'"delta":{' + self._after_text + rest
        return self._before_text + _encode(text) + self._after_text + rest


def error_event(error: ApiError) -> bytes:
    """A failure after the headers have gone; OpenAI's client raises it as APIError."""
    return b"data: " + json.dumps(error.body()).encode() + b"\n\n"
