"""Strict JSON: what a body may not look like, and that refusing it is cheap."""

import json
import tracemalloc

import pytest

from console.apierrors import ApiError
from console.caps import BODY_BYTES_MAX, JSON_DEPTH_MAX, JSON_NODES_MAX, load_json, quote


def message(raw):
    error = load_json(raw)
    assert isinstance(error, ApiError), error
    assert error.status in (400, 413)
    return error.message


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"a": [1, -1, 2.5, True, None, "x"]},
        {"a": 1 << 53, "b": -(1 << 53)},
        {"a": '😀 \u202e \\u0041 " ] } , {'},
        {"deep": {"er": [[[[[[]]]]]]}},
        {"a": "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")},
    ],
)
def test_plain_json_is_read_as_python_reads_it(value):
    assert load_json(json.dumps(value).encode()) == value
    assert load_json(json.dumps(value, ensure_ascii=False).encode()) == value


@pytest.mark.parametrize(
    ("raw", "part"),
    [
        (b"", "not valid JSON"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        (b'{"a":NaN}', "NaN"),
        (b'{"a":-Infinity}', "Infinity"),
        (b'{"a":1e999}', "too large"),
        (b'{"a":-1e999}', "too large"),
        (b'{"a":9007199254740993}', "2^53"),
        (b'{"a":1' + b"0" * 5000 + b"}", "2^53"),
        (b'{"a":1,"a":2}', "twice"),
        (b'{"x":{"b":1,"c":2,"b":3}}', "'b'"),
        (b'{"a":"\\ud800"}', "surrogate"),
        (b'{"\\udfff":1}', "surrogate"),
        (b'{"a":["x","\\u0000"]}', "NUL"),
        (b'{"a":"\x00"}', "not valid JSON"),
        (b'{"a":"\xff"}', "UTF-8"),
        (b'{"a":"\xed\xa0\x80"}', "UTF-8"),
        (b"[]", "object"),
        (b'"text"', "object"),
        (b"{}{}", "not valid JSON"),
        (b"]", "never opened"),
        (b'{"a":01}', "not valid JSON"),
        (b"{'a':1}", "not valid JSON"),
        ("{}".encode("utf-16"), "not valid"),
        (b"{" * 100_000, "deeper"),
        (b"[" * (JSON_DEPTH_MAX + 1) + b"]" * (JSON_DEPTH_MAX + 1), "deeper"),
        (b'{"a":' * 40 + b"1" + b"}" * 40, "deeper"),
        (b"[" + b"{}," * JSON_NODES_MAX + b"{}]", "more than"),
        (b'"" ' * (3 * JSON_NODES_MAX), "more than"),
        (b" " * (BODY_BYTES_MAX + 1), "larger"),
    ],
)
def test_bad_json_is_refused_with_its_reason(raw, part):
    assert part in message(raw)


def test_depth_and_size_at_their_maximum_are_read():
    inner = b"[" * (JSON_DEPTH_MAX - 1) + b"]" * (JSON_DEPTH_MAX - 1)
    assert "a" in load_json(b'{"a":' + inner + b"}")
    numbers = ",".join(["1"] * (JSON_NODES_MAX - 3))
    assert len(load_json(f'{{"a":[{numbers}]}}'.encode())["a"]) == JSON_NODES_MAX - 3


def test_half_an_escape_before_a_backslash_is_text():
    assert load_json(rb'{"a":"\\ud800 \\u0000"}') == {"a": r"\ud800 \u0000"}


def test_pair_of_surrogate_escapes_is_one_character():
    assert load_json(rb'{"a":"\ud83d\ude00"}') == {"a": "😀"}


def test_body_of_four_megabytes_of_brackets_costs_no_memory():
    raw = b"[" + b"{}," * ((BODY_BYTES_MAX - 10) // 3) + b"{}]"
    tracemalloc.start()
    message(raw)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_quoted_client_text_is_short_and_on_one_line():
    assert quote("a\r\nb") == "'a\\r\\nb'"
    assert len(quote("x" * 10_000)) < 100
