"""`POST /v1/responses`, the stateless part: input to a conversation, output to response objects.

Nothing is stored, so `previous_response_id` and conversations are refused by name
(console/parameters.py). A stream is OpenAI's sequence of named events, numbered from 0.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from console import grammars, parameters
from console.apierrors import ApiError, invalid
from console.fields import Fields, Refused, refuse
from console.generation import Completion, Delta, Shape, Usage
from console.messages import MESSAGES_MAX, PARTS_MAX, read_messages
from console.options import Options, ParsedRequest
from console.requests import finish_chat, take_model
from console.snapshot import Snapshot, TenantFacts
from console.sse import Envelope, message_json
from console.tokens import TemplateRefused, Tokenizers
from console.tools import ToolCall, ToolCallReader, read_tools

_PARTS = ("input_text", "output_text", "text")
_encode = msgspec.json.encode


def parse_response(
    body: Mapping[str, Any], snapshot: Snapshot, tokenizers: Tokenizers, tenant: TenantFacts
) -> ParsedRequest | ApiError:
    """A body of POST /v1/responses, as `caps.load_json` gave it."""
    try:
        fields = Fields(body, parameters.RESPONSES)
        model, tokenizer = take_model(fields, snapshot, tokenizers)
        instructions = fields.take("instructions")
        if type(instructions) not in (str, type(None)):
            refuse("instructions must be text.", "instructions")
        items = _items(fields.take("input"))
        if instructions:
            items.insert(0, {"role": "system", "content": instructions})
        grammar = _grammar(fields.take("text"))
        tools = read_tools(
            fields.take("tools"), fields.take("tool_choice"), fields.take("parallel_tool_calls")
        )
        options = Options(fields, snapshot, tenant, ("max_output_tokens",))
        fields.end()
        messages = read_messages(items, "input")
        return finish_chat(options, model, tokenizer, messages, tools, grammar, prompt_name="input")
    except TemplateRefused as error:
        return invalid(str(error), "input")
    except Refused as refused:
        return refused.error


def _items(value: Any) -> list[dict[str, Any]]:
    """Input items as messages of a chat; their fields are checked with those."""
    if type(value) is str:
        return [{"role": "user", "content": value}]
    if type(value) is not list or not 1 <= len(value) < MESSAGES_MAX:
        refuse(f"input must be text or a list of 1 to {MESSAGES_MAX - 1} items.", "input")
    return [_item(item, f"input[{index}]") for index, item in enumerate(value)]


def _item(item: Any, where: str) -> dict[str, Any]:
    if type(item) is not dict:
        refuse(f"{where} must be an object.", where)
    left = {k: v for k, v in item.items() if k not in ("type", "id", "status")}
    kind = item.get("type", "message")
    if kind == "message":
        return {**left, "content": _content(left.get("content"), where)}
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        return {"role": "assistant", "content": None, "tool_calls": [call]}
    if kind == "function_call_output":
        content = _content(item.get("output"), where)
        return {"role": "tool", "tool_call_id": item.get("call_id"), "content": content}
    refuse(f"{where}.type must be message, function_call or function_call_output.", where)


def _content(content: Any, where: str) -> Any:
    if type(content) is not list:
        return content
    if not 1 <= len(content) <= PARTS_MAX:
        refuse(f"{where}.content must have 1 to {PARTS_MAX} parts.", where)
    for part in content:
        if type(part) is not dict or part.get("type") not in _PARTS:
            refuse(f"{where}.content must be of text parts.", where)
    return [{"type": "text", "text": part.get("text")} for part in content]


def _grammar(text: Any) -> str:
    """`text.format` in the shape that `response_format` has in a chat."""
    if text is None:
        return ""
    if type(text) is not dict or set(text) - {"format", "verbosity"}:
        refuse("text must be an object with a format.", "text")
    if text.get("verbosity") not in (None, "medium"):
        refuse("text.verbosity is not supported: no model here has such a setting.", "text")
    form = text.get("format")
    if type(form) is dict and form.get("type") == "json_schema":
        described = {key: value for key, value in form.items() if key != "type"}
        return grammars.of_schema(described, "text.format")
    return grammars.of_response_format(form)


def response_json(
    envelope: Envelope, completions: Sequence[Completion], shape: Shape, with_ids: bool = False
) -> dict[str, Any]:
    """The whole answer of a request that does not stream."""
    (completion,) = completions
    message, _ = message_json(completion, shape.tools)
    output = []
    if message["content"] or "tool_calls" not in message:
        output.append(_message_item(envelope, message["content"]))
    for call in message.get("tool_calls", ()):
        function = call["function"]
        made = ToolCall(call["id"], function["name"], function["arguments"])
        output.append(_call_item(made, "completed"))
    body = _response(envelope, output, completion.finish_reason, completion.usage)
    if with_ids:
        body["slackwater"] = {"seq": 0, "token_ids": completion.token_ids}
    return body


def _response(
    envelope: Envelope, output: list[dict[str, Any]], reason: str | None, usage: Usage | None
) -> dict[str, Any]:
    """`reason` None: still running."""
    status = {None: "in_progress", "length": "incomplete"}.get(reason, "completed")
    return {
        "id": f"resp_{envelope.request_id}",
        "object": "response",
        "created_at": envelope.created,
        "status": status,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if reason == "length" else None,
        "instructions": None,
        "metadata": {},
        "model": envelope.model_id,
        "output": output,
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "service_tier": envelope.service_tier,
        "store": False,
        "temperature": None,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_p": None,
        "truncation": "disabled",
        "usage": None if usage is None else _usage_json(usage),
    }


def _usage_json(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.output_tokens,
    }


def _message_item(envelope: Envelope, text: str, status: str = "completed") -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": []}
    return {
        "type": "message",
        "id": f"msg_{envelope.request_id}",
        "status": status,
        "role": "assistant",
        "content": [part] if status == "completed" else [],
    }


def _call_item(call: ToolCall, status: str) -> dict[str, Any]:
    return {
        "type": "function_call",
        "id": call.call_id.replace("call_", "fc_"),
        "call_id": call.call_id,
        "name": call.name,
        "arguments": call.arguments if status == "completed" else "",
        "status": status,
    }


class ResponseEncoder:
    """The events of one stream; see `sse.ChunkEncoder` for the calls."""

    def __init__(self, envelope: Envelope, with_ids: bool, shape: Shape) -> None:
        self._envelope = envelope
        self._with_ids = with_ids
        self._tools = ToolCallReader.of(shape.tools) if shape.tools.tools else None
        self._sequence_number = 0
        self._texts: list[str] | None = None  # of the message item, once it is open
        self._output: list[dict[str, Any]] = []
        self._reason = "stop"

    def opening(self) -> bytes:
        response = _response(self._envelope, [], None, None)
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def delta(self, delta: Delta) -> bytes:
        reason = delta.finish_reason
        text, calls = delta.text, list[ToolCall]()
        if self._tools is not None:
            text, calls = self._tools.feed(text, is_last=reason is not None)
        data = self._text(text, delta) if text or self._with_ids else b""
        for call in calls:
            data += self._close_message() + self._call(call)
        if reason is not None:
            self._reason = reason
            if self._texts is None and not self._output:
                data += self._text("", delta)
            data += self._close_message()
        return data

    def closing(self, usage: Usage) -> bytes:
        response = _response(self._envelope, self._output, self._reason, usage)
        name = "incomplete" if self._reason == "length" else "completed"
        return self._event(f"response.{name}", response=response)

    def error(self, error: ApiError) -> bytes:
        """A failure after the headers have gone."""
        return self._event("error", code=error.code, message=error.message, param=error.param)

    def _place(self) -> dict[str, Any]:
        item_id = f"msg_{self._envelope.request_id}"
        return {"item_id": item_id, "output_index": len(self._output), "content_index": 0}

    def _text(self, text: str, delta: Delta) -> bytes:
        data = b""
        if self._texts is None:
            self._texts = []
            item = _message_item(self._envelope, "", "in_progress")
            part = {"type": "output_text", "text": "", "annotations": []}
            data = self._event(
                "response.output_item.added", output_index=len(self._output), item=item
            ) + self._event("response.content_part.added", **self._place(), part=part)
        self._texts.append(text)
        more: dict[str, Any] = {"delta": text, "logprobs": []}
        if self._with_ids:
            more["slackwater"] = {"seq": delta.seq, "token_ids": delta.token_ids}
        return data + self._event("response.output_text.delta", **self._place(), **more)

    def _close_message(self) -> bytes:
        if self._texts is None:
            return b""
        text, place = "".join(self._texts), self._place()
        self._texts = None
        item = _message_item(self._envelope, text)
        data = (
            self._event("response.output_text.done", **place, text=text, logprobs=[])
            + self._event("response.content_part.done", **place, part=item["content"][0])
            + self._event(
                "response.output_item.done", output_index=place["output_index"], item=item
            )
        )
        self._output.append(item)
        return data

    def _call(self, call: ToolCall) -> bytes:
        index, item = len(self._output), _call_item(call, "completed")
        place = {"item_id": item["id"], "output_index": index}
        self._output.append(item)
        return (
            self._event(
                "response.output_item.added",
                output_index=index,
                item=_call_item(call, "in_progress"),
            )
            + self._event("response.function_call_arguments.delta", **place, delta=call.arguments)
            + self._event(
                "response.function_call_arguments.done",
                **place,
                name=call.name,
                arguments=call.arguments,
            )
            + self._event("response.output_item.done", output_index=index, item=item)
        )

    def _event(self, name: str, **fields: Any) -> bytes:
        body = {"type": name, "sequence_number": self._sequence_number, **fields}
        self._sequence_number += 1
        return b"event: " + name.encode() + b"\ndata: " + _encode(body) + b"\n\n"
