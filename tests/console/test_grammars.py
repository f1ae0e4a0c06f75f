"""Grammars are made without compiling and compiled where they can be killed."""

import os
import signal

import pytest

from console import grammars
from console.fields import Refused
from console.grammars import GrammarChecker, of_response_format, of_tool_calls
from console.tools import Tool

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def schema(value, name="x"):
    return {"type": "json_schema", "json_schema": {"name": name, "schema": value}}


@pytest.fixture
def checker():
    made = GrammarChecker()
    yield made
    made.close()


def test_text_needs_no_grammar_and_no_check(checker):
    assert of_response_format(None) == of_response_format({"type": "text"}) == ""
    assert checker.check("") == "" and checker.is_known("") and checker._child is None


def test_schemas_that_compile_pass_and_are_remembered(checker):
    for value in ({"type": "json_object"}, schema(SCHEMA), schema({"$ref": "#"})):
        grammar = of_response_format(value)
        assert checker.check(grammar) == "" and checker.is_known(grammar)
    assert checker.check(of_tool_calls([Tool("f", "", SCHEMA), Tool("g", "", {})])) == ""


def test_schemas_that_do_not_compile_say_why_in_one_line(checker):
    problem = checker.check(of_response_format(schema({"type": "nothing"})))
    assert "nothing" in problem and "\n" not in problem


def test_a_child_that_was_killed_is_started_again(checker):
    grammar = of_response_format(schema(SCHEMA))
    assert checker.check(grammar) == ""
    os.kill(checker._child.pid, signal.SIGKILL)
    checker._child.wait()
    assert checker.check(of_response_format(schema({"type": "string"}))) == ""


def test_a_check_that_overruns_is_killed_and_refused(checker, monkeypatch):
    checker.check(of_response_format({"type": "json_object"}))
    child = checker._child
    os.kill(child.pid, signal.SIGSTOP)
    monkeypatch.setattr(grammars, "CHECK_S_MAX", 0.2)
    assert "longer" in checker.check(of_response_format(schema(SCHEMA)))
    assert child.poll() is not None
    assert checker.check(of_response_format(schema({"type": "integer"}))) == ""


def test_outcomes_kept_are_bounded(checker, monkeypatch):
    monkeypatch.setattr(grammars, "CHECKED_MAX", 2)
    made = [of_response_format(schema({"type": "integer", "minimum": i})) for i in range(3)]
    for grammar in made:
        checker.check(grammar)
    assert [checker.is_known(grammar) for grammar in made] == [False, True, True]


def test_schema_size_is_bounded():
    with pytest.raises(Refused):
        of_response_format(schema({"description": "x" * grammars.SCHEMA_BYTES_MAX}))
