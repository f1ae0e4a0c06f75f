"""Tool calls are taken out of a text wherever its pieces are cut; what is no call stays text."""

import json

import pytest

from console.fields import Refused
from console.tools import TOOLS_MAX, ToolCallReader, read_tools

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern 🌊"}}\n</tool_call>'
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def read_in_pieces(text: str, size: int, is_parallel: bool = True):
    reader = ToolCallReader(["weather"], is_parallel)
    said, calls = "", []
    for start in range(0, len(text), size):
        more, found = reader.feed(text[start : start + size], is_last=start + size >= len(text))
        said += more
        calls += found
    return said, [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 11, 1000])
def test_calls_do_not_depend_on_how_the_text_is_cut(size):
    said, calls = read_in_pieces(f"Let me look.{CALL}{CALL}", size)
    assert said == "Let me look." and calls == [("weather", {"city": "Bern 🌊"})] * 2


@pytest.mark.parametrize("size", [1, 5, 1000])
@pytest.mark.parametrize(
    "text",
    [
        "2 < 3 and <tool> is no call",
        '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
        "<tool_call>not json</tool_call>",
        '<tool_call>{"name": "weather", "argu',
        "ends with <tool_ca",
    ],
)
def test_what_is_no_call_stays_text(text, size):
    assert read_in_pieces(text, size) == (text, [])


def test_one_call_when_parallel_calls_are_off():
    assert len(read_in_pieces(CALL * 3, 1000, is_parallel=False)[1]) == 1


def test_call_ids_differ():
    reader = ToolCallReader(["weather"])
    _, calls = reader.feed(CALL * 2, is_last=True)
    assert len({call.call_id for call in calls}) == 2


def test_choice_selects_what_must_be_called():
    other = {"type": "function", "function": {"name": "time"}}
    names = lambda plan: ([t.name for t in plan.tools], [t.name for t in plan.forced])  # noqa: E731
    assert names(read_tools([TOOL, other], None, None)) == (["weather", "time"], [])
    assert names(read_tools([TOOL, other], "none", None)) == ([], [])
    assert names(read_tools([TOOL, other], "required", None)) == (["weather", "time"],) * 2
    named = {"type": "function", "function": {"name": "time"}}
    assert names(read_tools([TOOL, other], named, None)) == (["weather", "time"], ["time"])


def test_tools_are_bounded():
    def tools(count: int) -> list[dict]:
        return [{"type": "function", "function": {"name": f"f{i}"}} for i in range(count)]

    assert len(read_tools(tools(TOOLS_MAX), None, None).tools) == TOOLS_MAX
    with pytest.raises(Refused):
        read_tools(tools(TOOLS_MAX + 1), None, None)
