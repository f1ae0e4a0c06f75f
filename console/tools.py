"""Tools of a chat: what the client declares, and calls found in what the model writes.

Models here are told of tools by their chat template and answer in the form of Hermes and Qwen:
`<tool_call>{"name": …, "arguments": {…}}</tool_call>` (NousResearch, Hermes function calling).
"""

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from console.fields import Fields, refuse
from console.parameters import FUNCTION

TOOLS_MAX = 128
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
DESCRIPTION_CHARS_MAX = 4_096
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the client can run; `parameters` is the JSON schema of its arguments."""

    name: str
    description: str
    parameters: dict[str, Any]

    def for_template(self) -> dict[str, Any]:
        """As transformers hands tools to a chat template."""
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": self.parameters,
        }
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolCall:
    call_id: str
    name: str
    arguments: str  # JSON text, as OpenAI's client expects it

    def as_json(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.call_id, "type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """Tools shown to the model, and those of which one must be called (`tool_choice`)."""

    tools: tuple[Tool, ...] = ()
    forced: tuple[Tool, ...] = ()
    is_parallel: bool = True


NO_TOOLS = ToolPlan()


def read_tools(tools: Any, choice: Any, parallel: Any) -> ToolPlan:
    """The three fields of a chat body. Raises Refused."""
    if type(parallel) not in (bool, type(None)):
        refuse("parallel_tool_calls must be true or false.", "parallel_tool_calls")
    if tools in (None, []):
        if choice not in (None, "none", "auto"):
            refuse("tool_choice needs tools.", "tool_choice")
        return ToolPlan()
    if type(tools) is not list or len(tools) > TOOLS_MAX:
        refuse(f"tools must be a list of at most {TOOLS_MAX} tools.", "tools")
    read = tuple(_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools))
    by_name = {tool.name: tool for tool in read}
    if len(by_name) < len(read):
        refuse("Two tools have the same name.", "tools")
    if choice == "none":
        return ToolPlan()
    if choice in (None, "auto"):
        return ToolPlan(read, (), parallel is not False)
    if choice == "required":
        return ToolPlan(read, read, False)
    if type(choice) is dict and choice.get("type") == "function":
        function = choice.get("function")
        name = function.get("name") if type(function) is dict else choice.get("name")
        if type(name) is str and name in by_name:
            return ToolPlan(read, (by_name[name],), False)
    refuse("tool_choice must be none, auto, required or a function of tools.", "tool_choice")


def _tool(value: Any, where: str) -> Tool:
    if type(value) is not dict or value.get("type") != "function":
        refuse(f"{where} must be a tool of type function.", where)
    function = value.get("function", value)  # /v1/responses has the fields beside the type
    if type(function) is not dict:
        refuse(f"{where}.function must be an object.", where)
    fields = Fields({k: v for k, v in function.items() if k != "type"}, FUNCTION, where)
    name, description = fields.take("name"), fields.take("description")
    parameters = fields.take("parameters")
    fields.flag("strict")
    if type(name) is not str or not NAME.fullmatch(name):
        refuse(f"{where}.name must be 1 to 64 letters, digits, _ or -.", where)
    if description is None:
        description = ""
    if type(description) is not str or len(description) > DESCRIPTION_CHARS_MAX:
        refuse(f"{where}.description must be at most {DESCRIPTION_CHARS_MAX} characters.", where)
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
    if type(parameters) is not dict:
        refuse(f"{where}.parameters must be a JSON schema.", where)
    return Tool(name, description, parameters)


class ToolCallReader:
    """Takes calls out of a text as it grows; what is no call stays text.

    Text from an opening mark on is held back until the call is complete, or the output ends."""

    def __init__(self, names: Sequence[str], is_parallel: bool = True) -> None:
        self._names = frozenset(names)
        self._calls_max = TOOLS_MAX if is_parallel else 1
        self._held = ""
        self.num_calls = 0

    @classmethod
    def of(cls, plan: ToolPlan) -> "ToolCallReader":
        return cls([tool.name for tool in plan.tools], plan.is_parallel)

    def feed(self, text: str, is_last: bool) -> tuple[str, list[ToolCall]]:
        """Text that may go out now, and calls that are complete now."""
        held = self._held + text
        plain: list[str] = []
        calls: list[ToolCall] = []
        while True:
            start = held.find(_OPEN)
            if start < 0:
                break
            end = held.find(_CLOSE, start)
            if end < 0:
                break
            call = self._read(held[start + len(_OPEN) : end])
            if call is None:
                plain.append(held[: end + len(_CLOSE)])
            else:
                plain.append(held[:start])
                if self.num_calls < self._calls_max:
                    calls.append(call)
                    self.num_calls += 1
            held = held[end + len(_CLOSE) :]
        keep = 0 if is_last else _held_back(held)
        plain.append(held[: len(held) - keep])
        self._held = held[len(held) - keep :]
        said = "".join(plain)
        return (said.strip() if self.num_calls else said), calls

    def _read(self, body: str) -> ToolCall | None:
        try:
            value = json.loads(body)
        except ValueError:
            return None
        if type(value) is not dict or value.get("name") not in self._names:
            return None
        arguments = json.dumps(value.get("arguments") or {}, ensure_ascii=False)
        return ToolCall(f"call_{secrets.token_hex(12)}", value["name"], arguments)


def _held_back(text: str) -> int:
    """Characters at the end that are, or may become, the start of a call."""
    start = text.find(_OPEN)
    if start >= 0:
        return len(text) - start
    for length in range(min(len(_OPEN) - 1, len(text)), 0, -1):
        if _OPEN.startswith(text[-length:]):
            return length
    return 0
