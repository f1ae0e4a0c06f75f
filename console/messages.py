"""The `messages` of a chat: roles, text and tool calls, everything else refused by name."""

import json
from typing import Any

from console.caps import quote
from console.fields import PARAM_CHARS_MAX, refuse

MESSAGES_MAX = 1_024
PARTS_MAX = 1_024
NAME_CHARS_MAX = 64

CALLS_MAX = 128
CALL_ID_CHARS_MAX = 128

_MESSAGE_OFF = ("annotations", "audio", "function_call", "refusal")
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}


def read_messages(value: Any, name: str = "messages") -> list[dict[str, Any]]:
    """Role, text and tool calls of each message; `developer` is `system`."""
    if type(value) is not list or not 1 <= len(value) <= MESSAGES_MAX:
        refuse(f"{name} must be a list of 1 to {MESSAGES_MAX} messages.", name)
    return [_message(message, f"{name}[{index}]") for index, message in enumerate(value)]


def message_bytes(message: dict[str, Any]) -> int:
    """Bytes of a message's text and calls, before any tokenising."""
    return len(message["content"].encode()) + sum(
        len(json.dumps(call["function"]["arguments"])) for call in message.get("tool_calls", ())
    )


def _message(message: Any, where: str) -> dict[str, Any]:
    if type(message) is not dict:
        refuse(f"{where} must be an object.", where)
    left = dict(message)
    role = left.pop("role", None)
    if type(role) is not str or role not in _ROLES:
        refuse(f"{where}.role must be one of {', '.join(_ROLES)}.", f"{where}.role")
    content = _content(left.pop("content", None), role, f"{where}.content")
    name = left.pop("name", None)
    if name is not None and (type(name) is not str or len(name) > NAME_CHARS_MAX):
        refuse(f"{where}.name must be text of at most {NAME_CHARS_MAX} characters.", where)
    made: dict[str, Any] = {"role": _ROLES[role], "content": content}
    calls, call_id = left.pop("tool_calls", None), left.pop("tool_call_id", None)
    if calls not in (None, []):
        if role != "assistant":
            refuse(f"{where}.tool_calls is for the role assistant.", f"{where}.tool_calls")
        made["tool_calls"] = _calls(calls, f"{where}.tool_calls")
    if (call_id is not None) != (role == "tool"):
        refuse(f"{where}.tool_call_id belongs to the role tool.", f"{where}.tool_call_id")
    if call_id is not None:
        if type(call_id) is not str or not 1 <= len(call_id) <= CALL_ID_CHARS_MAX:
            refuse(f"{where}.tool_call_id must be text.", f"{where}.tool_call_id")
        made["tool_call_id"] = call_id
    for off in _MESSAGE_OFF:
        if left.pop(off, None) not in (None, []):
            refuse(f"{where}.{off} is not supported.", f"{where}.{off}", "unsupported_parameter")
    for unknown in left:
        param = f"{where}.{unknown[:PARAM_CHARS_MAX]}"
        refuse(f"Unknown field: {where}.{quote(unknown)}.", param, "unknown_parameter")
    return made


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Calls that the assistant made earlier, their arguments as objects for the template."""
    if type(value) is not list or len(value) > CALLS_MAX:
        refuse(f"{where} must be a list of at most {CALLS_MAX} calls.", where)
    made = []
    for index, call in enumerate(value):
        function = call.get("function") if type(call) is dict else None
        if type(function) is not dict or call.get("type", "function") != "function":
            refuse(f"{where}[{index}] must be a call of type function.", f"{where}[{index}]")
        name, text = function.get("name"), function.get("arguments", "{}")
        arguments = _arguments(text) if type(text) is str else None
        if type(name) is not str or len(name) > NAME_CHARS_MAX or arguments is None:
            refuse(
                f"{where}[{index}].function needs a name and arguments: a JSON object as text.",
                f"{where}[{index}].function",
            )
        made.append({"type": "function", "function": {"name": name, "arguments": arguments}})
    return made


def _arguments(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if type(value) is dict else None


def _content(content: Any, role: str, where: str) -> str:
    """Text, or text parts joined by line ends as vLLM does; null for an assistant only."""
    if content is None and role == "assistant":
        return ""
    if type(content) is str:
        return content
    if type(content) is not list or not 1 <= len(content) <= PARTS_MAX:
        refuse(f"{where} must be text or a list of 1 to {PARTS_MAX} text parts.", where)
    for index, part in enumerate(content):
        is_text = type(part) is dict and part.get("type") == "text"
        if not is_text or type(part.get("text")) is not str or len(part) > 2:
            refuse(f"{where}[{index}] must be a part of type text.", f"{where}[{index}]")
    return "\n".join(part["text"] for part in content)
