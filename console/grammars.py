"""Grammars of guided decoding: made from what a client asks for, checked before a worker sees them.

Making one is joining text; compiling one can take long or much memory, so the check runs in a
process of its own that is killed when it overruns. Workers compile under the same limits.
"""

import hashlib
import json
import select
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from llguidance import LLMatcher

from console.apierrors import ApiError, invalid
from console.fields import Fields, refuse
from console.parameters import NAMED_SCHEMA
from console.tools import Tool

SCHEMA_BYTES_MAX = 64 << 10
SCHEMA_NAME_CHARS_MAX = 64
CHECK_S_MAX = 2.0  # wall time of a check before its process is killed
COMPILE_S_MAX = 0.25  # processor time: a worker's step waits as long when it first sees the grammar
CHECKED_MAX = 512  # outcomes kept
# As JSON is mostly written. Free whitespace is a place where a small model never finds out again.
SPACING: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_ANY_OBJECT = '{"type": "object"}'


def of_response_format(value: Any) -> str:
    """The grammar of a `response_format`, empty for text. Raises Refused."""
    if value is None:
        return ""
    if type(value) is not dict:
        refuse("response_format must be an object.", "response_format")
    fields = dict(value)
    kind = fields.pop("type", None)
    if kind == "text" and not fields:
        return ""
    if kind == "json_object" and not fields:
        return _of_schema(_ANY_OBJECT)
    if kind != "json_schema" or set(fields) != {"json_schema"}:
        refuse(
            "response_format must be of type text, json_object or json_schema.", "response_format"
        )
    described = fields["json_schema"]
    if type(described) is not dict:
        refuse("response_format.json_schema must be an object.", "response_format")
    return of_schema(described, "response_format.json_schema")


def of_schema(described: dict[str, Any], where: str) -> str:
    """The grammar of a named schema `{name, schema, strict?, description?}`. Raises Refused."""
    fields = Fields(described, NAMED_SCHEMA, where)
    name, schema = fields.take("name"), fields.take("schema")
    fields.flag("strict")
    if type(name) is not str or not 1 <= len(name) <= SCHEMA_NAME_CHARS_MAX:
        refuse(f"{where}.name must be text of 1 to {SCHEMA_NAME_CHARS_MAX} characters.", where)
    if type(fields.take("description")) not in (str, type(None)):
        refuse(f"{where}.description must be text.", where)
    if type(schema) is not dict:
        refuse(f"{where}.schema must be a JSON schema.", where)
    text = json.dumps(schema)
    if len(text) > SCHEMA_BYTES_MAX:
        refuse(f"{where}.schema is larger than {SCHEMA_BYTES_MAX} bytes.", where)
    return _of_schema(text)


def of_tool_calls(tools: Sequence[Tool]) -> str:
    """The grammar of a call of one of the tools, in the form that `console.tools` reads."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.name}, "arguments": tool.parameters},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    schema = json.dumps({"anyOf": calls, "x-guidance": SPACING})
    if len(schema) > SCHEMA_BYTES_MAX:
        refuse(f"The tools' parameters are larger than {SCHEMA_BYTES_MAX} bytes.", "tools")
    lark = f'start: "<tool_call>\\n" call "\\n</tool_call>"\ncall: %json {schema}'
    return str(LLMatcher.grammar_from_lark(lark))


def _of_schema(text: str) -> str:
    return str(LLMatcher.grammar_from_json_schema(text, overrides=SPACING))


def grammar_refused(problem: str) -> ApiError:
    return invalid(f"The schema cannot be used: {problem}.", "response_format", "invalid_schema")


class GrammarChecker:
    """Compiles grammars in a child process, one at a time, and remembers what came of it.

    `check` blocks: call it in a thread. The child is started by the first check and again after it
    was killed."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._known: OrderedDict[bytes, str] = OrderedDict()

    def is_known(self, grammar: str) -> bool:
        """Whether `check` answers at once."""
        return not grammar or _key(grammar) in self._known

    def check(self, grammar: str) -> str:
        """Why the grammar cannot be used, in one line; empty when it can, or when there is none."""
        if not grammar:
            return ""
        with self._lock:
            known = self._known.get(_key(grammar))
            if known is not None:
                return known
            problem = self._ask(grammar)
            self._known[_key(grammar)] = problem
            if len(self._known) > CHECKED_MAX:
                self._known.popitem(last=False)
            return problem

    def close(self) -> None:
        """End the child process."""
        with self._lock:
            self._kill()

    def _ask(self, grammar: str) -> str:
        if self._child is not None and self._child.poll() is not None:
            self._kill()
        child = self._child
        if child is None:
            child = self._child = subprocess.Popen(
                [sys.executable, "-m", "console.grammarcheck"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
        assert child.stdin is not None and child.stdout is not None
        try:
            child.stdin.write(json.dumps(grammar).encode() + b"\n")
            child.stdin.flush()
        except BrokenPipeError:
            self._kill()
            return "it could not be checked; try again"
        if not select.select([child.stdout], [], [], CHECK_S_MAX)[0]:
            self._kill()
            return f"compiling it took longer than {CHECK_S_MAX:g} s"
        line = child.stdout.readline()
        if not line:  # the child broke its memory limit
            self._kill()
            return "compiling it took too much memory"
        found = json.loads(line)
        if not found["error"] and found["seconds"] > COMPILE_S_MAX:
            return f"compiling it took longer than {COMPILE_S_MAX:g} s"
        return str(found["error"])

    def _kill(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    pipe.close()


def _key(grammar: str) -> bytes:
    return hashlib.sha256(grammar.encode()).digest()
