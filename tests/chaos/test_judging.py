"""What `make chaos` counts: failures, differences, and the gap that each fault made."""

from dataclasses import replace

import pytest

from tests.chaos.__main__ import MODELLED_PART, gap_s_p99, judge, main, table
from tests.chaos.faults import Fault
from tests.chaos.load import Seen, differs
from tests.e2e.harness import Streamed

KILL, STOP = Fault("kill", "decode-1", 10.0, 0.0), Fault("stop", "decode-2", 20.0, 4.0)


def seen(arrived_at_s, **facts) -> Seen:
    return Seen(0, arrived_at_s[0], arrived_at_s[-1], arrived_at_s, **facts)


def judged(streams, faults=(KILL,), wanted=1, num_hanging=0):
    return judge(MODELLED_PART, wanted, list(faults), streams, num_hanging, 3.0, 1, 9.0)


def test_gap_belongs_to_the_fault_that_it_follows():
    stream = seen([9.9, 10.1, 10.3, 19.6, 24.0, 24.1])
    assert gap_s_p99([stream], [KILL], "kill") == pytest.approx(9.3), "ids were on their way"
    stream = seen([9.0, 9.9, 10.4, 10.7, 19.9, 24.0])
    assert gap_s_p99([stream], [KILL, STOP], "kill") == pytest.approx(0.5)
    assert gap_s_p99([stream], [KILL, STOP], "stop") == pytest.approx(4.1)
    assert gap_s_p99([seen([1.0, 2.0])], [KILL], "kill") is None, "it had ended"


def test_gap_of_a_stop_is_not_that_of_a_kill_that_falls_into_it():
    stream = seen([19.8, 19.9, 23.2, 23.3])
    late_kill = replace(KILL, at_s=21.0)
    assert gap_s_p99([stream], [STOP, late_kill], "kill") is None
    assert gap_s_p99([stream], [STOP, late_kill], "stop") == pytest.approx(3.3)


def test_run_passes_with_all_faults_and_no_failure_only():
    good = seen([1.0, 2.0])
    assert judged([good]).is_passed
    assert not judged([good], wanted=2).is_passed
    assert not judged([good], num_hanging=1).is_passed
    failed = judged([good, replace(good, error="APIError: gone")])
    assert (failed.failed, failed.different, failed.is_passed) == (1, 0, False)
    different = judged([good, replace(good, difference="text 'a', undisturbed 'b'")])
    assert (different.failed, different.different, different.is_passed) == (0, 1, False)
    assert different.problems == ["body 0: text 'a', undisturbed 'b'"]


def test_stream_differs_by_ids_text_order_or_end():
    usage = {"completion_tokens": 2}
    expected = Streamed("ab", [1, 2], [(0, 1), (1, 1)], [], ["length"], 1, usage)
    assert differs(expected, replace(expected, chunks=[(0, 2)])) == "", "cut another way"
    assert "repeat or skip" in differs(expected, replace(expected, chunks=[(0, 1), (2, 1)]))
    assert differs(expected, replace(expected, text="ac")).startswith("text")
    assert differs(expected, replace(expected, finish_reasons=["stop"])).startswith("finish")
    near, far = replace(expected, logprobs=[-1.0]), replace(expected, logprobs=[-1.01])
    assert differs(near, replace(near, logprobs=[-1.0005])) == ""
    assert differs(near, far).startswith("logprobs") and differs(near, expected) != ""
    assert differs(expected, replace(expected, usage={"completion_tokens": 3})).startswith("usage")


def test_table_has_a_row_for_each_part():
    lines = table([judged([seen([1.0, 2.0])]), judged([seen([9.5, 12.0])])]).splitlines()
    assert len(lines) == 3 and lines[0].startswith("part") and "2.50 s" in lines[2]


@pytest.mark.kill
@pytest.mark.serial
def test_short_run_passes(tmp_path, capsys):
    path = tmp_path / "chaos.json"
    assert main(["--real", "0", "--modelled", "3", "--json", str(path)]) == 0
    assert '"passed": true' in path.read_text()
    assert "failed=0 different=0" in capsys.readouterr().out
