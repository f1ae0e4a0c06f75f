"""The `messages` of a chat: roles and text, everything else refused by name."""

from typing import Any

from console.caps import quote
from console.fields import PARAM_CHARS_MAX, refuse

MESSAGES_MAX = 1_024
PARTS_MAX = 1_024
NAME_CHARS_MAX = 64

_MESSAGE_OFF = ("annotations", "audio", "function_call", "refusal", "tool_call_id", "tool_calls")
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def read_messages(value: Any) -> list[dict[str, str]]:
    """Role and text of each message; `developer` is `system`."""
    if type(value) is not list or not 1 <= len(value) <= MESSAGES_MAX:
        refuse(f"messages must be a list of 1 to {MESSAGES_MAX} messages.", "messages")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(value)]


def _message(message: Any, where: str) -> dict[str, str]:
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
    for off in _MESSAGE_OFF:
        if left.pop(off, None) not in (None, []):
            refuse(f"{where}.{off} is not supported.", f"{where}.{off}", "unsupported_parameter")
    for unknown in left:
        param = f"{where}.{unknown[:PARAM_CHARS_MAX]}"
        refuse(f"Unknown field: {where}.{quote(unknown)}.", param, "unknown_parameter")
    return {"role": _ROLES[role], "content": content}


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
