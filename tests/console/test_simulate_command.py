"""`manage.py simulate`: one JSON object on stdout, a table without --json, exit codes."""

import io
import json

import pyarrow
import pyarrow.parquet as parquet
import pytest
from django.core.management import call_command

from controlplane.sim.traces import COLUMNS


@pytest.fixture
def trace(tmp_path) -> str:
    rows = [(0.1 * i, 900, 20, [i, i + 100], None, None) for i in range(30)]
    columns = dict(zip(COLUMNS, map(list, zip(*rows, strict=True)), strict=True))
    parquet.write_table(pyarrow.table(columns), tmp_path / "chat.parquet")
    return str(tmp_path / "chat.parquet")


def test_it_prints_exactly_one_json_object(trace):
    out = io.StringIO()
    arguments = ["--trace", trace, "--speed", "2", "--workers", "3", "--timing", "peer"]
    call_command("simulate", *arguments, "--seeds", "2", "--json", stdout=out)
    answer = json.loads(out.getvalue())
    assert out.getvalue().count("\n") == 1
    assert not answer["partial"] and [row["seed"] for row in answer["rows"]] == [1, 2, 1, 2]
    assert {row["policy"] for row in answer["rows"]} == {"slackwater", "peer_round_robin"}
    assert [row["good_requests"] for row in answer["rows"]] == [30] * 4


def test_without_json_a_line_a_row(trace):
    out = io.StringIO()
    call_command("simulate", "--trace", trace, "--policy", "peer_round_robin", stdout=out)
    head, row = out.getvalue().splitlines()
    assert head.startswith("policy") and row.split()[:3] == ["peer_round_robin", "1", "30"]


@pytest.mark.parametrize("wrong", [["--policy", "best"], ["--speed", "0"], ["--seeds", "none"]])
def test_what_cannot_be_run_is_usage(trace, wrong, capfd):
    with pytest.raises(SystemExit) as stopped:
        call_command("simulate", "--trace", trace, *wrong)
    assert stopped.value.code == 2
    assert capfd.readouterr().err.strip()
