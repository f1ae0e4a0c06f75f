"""Workloads as streams: the reader, scaling, and prefix names."""

from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest

from controlplane.sim import traces
from controlplane.sim.traces import Trace, TraceRequest


def trace(*rows: TraceRequest, span_s: float = 100.0) -> Trace:
    return Trace("rows", lambda: iter(rows), span_s, len(rows) / span_s)


def every(count: int, step_s: float, **facts) -> Trace:
    rows = [TraceRequest(index * step_s, 100, 10, **facts) for index in range(count)]
    return trace(*rows, span_s=count * step_s)


def write(folder: Path, name: str, rows: list[dict], drop: str = "") -> None:
    schema = pyarrow.schema(
        [
            ("arrival_s", pyarrow.float64()),
            ("input_tokens", pyarrow.int32()),
            ("output_tokens", pyarrow.int32()),
            ("hash_ids", pyarrow.list_(pyarrow.int32())),
            ("session_id", pyarrow.string()),
            ("client_id", pyarrow.string()),
        ]
    )
    table = pyarrow.Table.from_pylist(rows, schema=schema)
    parquet.write_table(table.drop_columns(drop) if drop else table, folder / f"{name}.parquet")


def row(at_s: float, **facts) -> dict:
    return {
        "arrival_s": at_s,
        "input_tokens": 700,
        "output_tokens": 5,
        "hash_ids": [],
        "session_id": None,
        "client_id": None,
    } | facts


def test_a_file_is_read_with_its_prefixes_and_users(tmp_path):
    write(tmp_path, "chat", [row(0.0, hash_ids=[4, 9], client_id="c1"), row(2.5, session_id="s")])
    read = traces.read(str(tmp_path), "chat")
    assert list(read.rows()) == [
        TraceRequest(0.0, 700, 5, (4, 9), "c1", ""),
        TraceRequest(2.5, 700, 5, (), "", "s"),
    ]
    assert (read.span_s, read.rate_per_s) == (pytest.approx(2.5), pytest.approx(0.8))


def test_a_file_larger_than_what_is_held_gives_the_same_rows(tmp_path, monkeypatch):
    write(tmp_path, "chat", [row(float(index)) for index in range(20)])
    held = list(traces.read(str(tmp_path), "chat").rows())
    monkeypatch.setattr(traces, "ROWS_HELD_MAX", 19)
    monkeypatch.setattr(traces, "ROWS_PER_READ", 3)
    streamed = traces.read(str(tmp_path), "chat")
    assert list(streamed.rows()) == list(streamed.rows()) == held


@pytest.mark.parametrize(
    ("folder", "problem"),
    [("", "no traces: give their folder"), ("/nowhere", "no trace /nowhere/chat.parquet")],
)
def test_without_the_file_one_line_says_how_to_give_it(folder, problem):
    with pytest.raises(ValueError, match=problem) as caught:
        traces.read(folder, "chat")
    assert "SLACKWATER_TRACES" in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_of_another_schema_is_named_with_the_column_it_lacks(tmp_path):
    write(tmp_path, "profile", [row(0.0)], drop="hash_ids")
    with pytest.raises(ValueError, match="profile.parquet has no column hash_ids"):
        traces.read(str(tmp_path), "profile")
    write(tmp_path, "empty", [])
    with pytest.raises(ValueError, match="empty.parquet has no requests"):
        traces.read(str(tmp_path), "empty")


def test_stamps_on_ticks_are_spread_within_their_tick_and_stay_in_order(tmp_path):
    write(tmp_path, "mooncake_conversation", [row(3.0 * (index // 10)) for index in range(100)])
    read = traces.read(str(tmp_path), "mooncake_conversation", seed=3)
    at_s = [item.at_s for item in read.rows()]
    assert at_s == sorted(at_s) == [item.at_s for item in read.rows()]
    assert len(set(at_s)) == 100
    assert all(at // 3.0 == index // 10 for index, at in enumerate(at_s))
    assert at_s[-1] < read.span_s


def test_a_window_begins_at_zero():
    cut = every(10, 1.0).window(3.0, 2.0)
    assert [item.at_s for item in cut.rows()] == [0.0, 1.0]
    assert (cut.span_s, cut.rate_per_s) == (2.0, 1.0)


def test_copies_multiply_the_rate_and_share_no_prefix():
    tripled = every(100, 1.0, hash_ids=(7,)).scaled(3.0)
    rows = list(tripled.rows())
    assert len(rows) == 300 and tripled.rate_per_s == 3.0
    assert [item.at_s for item in rows] == sorted(item.at_s for item in rows)
    assert rows[0].at_s >= 0.0 and rows[-1].at_s < tripled.span_s
    wide = [item for item in rows if item.prompt_tokens >= 64]
    assert len({item.block_names(64) for item in wide}) == 3


def test_a_rate_between_two_numbers_of_copies_stretches_time_where_there_are_no_users():
    scaled = every(1_000, 0.1).scaled(2.5)
    assert scaled.rate_per_s == pytest.approx(25.0)
    assert scaled.span_s == pytest.approx(100.0)
    assert len(list(scaled.rows())) == pytest.approx(2_500, rel=0.01)


def test_scaling_down_keeps_whole_clients():
    rows = [TraceRequest(0.1 * i, 100, 10, client_id=f"c{i % 40}") for i in range(2_000)]
    scaled = trace(*rows, span_s=200.0).scaled(0.3)
    kept = list(scaled.rows())
    clients = {item.client_id for item in kept}
    assert 10 <= len(clients) <= 14
    assert scaled.rate_per_s == pytest.approx(3.0, rel=0.03)
    assert len(kept) == pytest.approx(600, rel=0.03)


def test_sessions_stand_for_clients_where_none_are_named():
    rows = [TraceRequest(float(i), 100, 10, session_id=f"s{i % 10}") for i in range(100)]
    kept = {item.session_id for item in trace(*rows).scaled(0.5).rows()}
    assert len(kept) == 5


@pytest.mark.parametrize("factor", [0.0, -1.0, float(traces.COPIES_MAX)])
def test_a_factor_that_cannot_be_is_refused(factor):
    with pytest.raises(ValueError, match="scale factor"):
        every(10, 1.0).scaled(factor)


def test_block_names_are_equal_exactly_where_prefixes_are():
    short = TraceRequest(0.0, 1_000, 1, (5, 6))
    longer = TraceRequest(0.0, 2_000, 1, (5, 6, 7, 8))
    other = TraceRequest(0.0, 1_000, 1, (5, 9))
    names = short.block_names(64)
    assert len(names) == len(set(names)) == 1_000 // 64
    assert {len(name) for name in names} == {8}
    assert longer.block_names(64)[: len(names)] == names
    assert other.block_names(64)[:8] == names[:8] and other.block_names(64)[8] != names[8]
    assert TraceRequest(0.0, 1_000, 1).block_names(64) == ()


def test_the_synthetic_workload_needs_no_file_and_repeats_by_seed():
    made = traces.synthetic(1, 20.0, 60.0, shared_share=0.3)
    rows = list(made.rows())
    assert rows == list(made.rows()) == list(traces.synthetic(1, 20.0, 60.0, 0.3).rows())
    assert rows != list(traces.synthetic(2, 20.0, 60.0, 0.3).rows())
    assert len(rows) == pytest.approx(60.0 * made.rate_per_s) and len(rows) > 600
    first_blocks = [item.hash_ids[0] for item in rows]
    assert len(set(first_blocks)) < 0.85 * len(rows)
    assert all(-(-item.prompt_tokens // 512) <= len(item.hash_ids) for item in rows)
