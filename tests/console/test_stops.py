"""Stop strings across chunk boundaries, and output text from ids."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from console.stops import OutputText, StopMatcher
from console.tokens import ByteTokenizer


def run(stops, chunks):
    matcher = StopMatcher(stops)
    out = []
    for chunk in chunks:
        text, is_stopped = matcher.feed(chunk)
        out.append(text)
        if is_stopped:
            return "".join(out), True
    return "".join(out) + matcher.flush(), False


@pytest.mark.parametrize(
    ("stops", "text", "expected", "is_stopped"),
    [
        ([], "abc", "abc", False),
        (["c"], "abcd", "ab", True),
        (["bcd"], "abce", "abce", False),
        (["ab", "b"], "xab", "x", True),  # both complete at b: the longest
        (["bcd", "c"], "abcd", "ab", True),  # c is complete first
        (["aab"], "aaab", "a", True),
        (["\n\n"], "a\n\nb", "a", True),
        (["é"], "caffé", "caff", True),
        (["abcabd"], "abcabcabd", "abc", True),
    ],
)
def test_text_ends_before_the_first_stop_string(stops, text, expected, is_stopped):
    assert run(stops, [text]) == (expected, is_stopped)
    assert run(stops, list(text)) == (expected, is_stopped)


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=4),
    st.lists(st.text("abc", max_size=5), max_size=10),
)
def test_result_does_not_depend_on_how_the_text_is_cut(stops, chunks):
    whole = "".join(chunks)
    text, is_stopped = run(stops, chunks)
    assert (text, is_stopped) == run(stops, list(whole))
    assert whole.startswith(text)
    assert is_stopped == any(stop in whole for stop in stops)
    assert not any(stop in text for stop in stops)


def test_only_what_could_become_a_stop_string_is_held_back():
    matcher = StopMatcher(["END"])
    assert matcher.feed("abE") == ("ab", False)
    assert matcher.feed("N") == ("", False)
    assert matcher.feed("x") == ("ENx", False)


def feed_all(text, ids, is_last=True):
    return text.feed(list(ids), is_last)


def test_ids_after_the_stop_string_do_not_count():
    text = OutputText(ByteTokenizer(), ["END"], 0)
    piece = text.feed(list(b"some END and more"), is_last=False)
    assert (piece.text, piece.num_ids, piece.is_stopped) == ("some ", len("some END"), True)


def test_character_split_over_ids_comes_out_whole():
    text = OutputText(ByteTokenizer(), [], 0)
    pieces = [text.feed([byte], is_last=False).text for byte in "😀é".encode()]
    assert pieces == ["", "", "", "😀", "", "é"]


def test_unfinished_character_at_the_end_is_a_replacement_character():
    text = OutputText(ByteTokenizer(), [], 0)
    assert text.feed(list("a😀".encode()[:-1]), is_last=True).text == "a\ufffd"


def test_held_back_text_comes_out_at_the_end():
    text = OutputText(ByteTokenizer(), ["END"], 0)
    assert text.feed(list(b"the EN"), is_last=False).text == "the "
    piece = text.feed([], is_last=True)
    assert piece.text == "EN" and not piece.is_stopped


def test_stop_strings_do_not_count_before_min_tokens():
    text = OutputText(ByteTokenizer(), ["a"], 4)
    piece = text.feed(list(b"aaxa-"), is_last=False)
    assert (piece.text, piece.num_ids, piece.is_stopped) == ("aax", 4, True)


@given(st.binary(max_size=30), st.integers(0, 30))
def test_text_equals_decoding_all_bytes_at_once(data, cut):
    text = OutputText(ByteTokenizer(), [], 0)
    out = text.feed(list(data[:cut]), is_last=False).text
    out += text.feed(list(data[cut:]), is_last=True).text
    assert out == data.decode(errors="replace")
