"""Policies on the same recorded work."""

import pytest

from controlplane.sim import comparison
from controlplane.sim.comparison import Setting
from controlplane.sim.peer import PeerWorker
from tests.controlplane.test_traces import row, write


def quiet(line: str) -> None:
    pass


@pytest.fixture
def setting(tmp_path) -> Setting:
    rows = [row(0.5 * (i // 3), input_tokens=600 * (1 + i % 7)) for i in range(40)]
    write(tmp_path, "mooncake_conversation", rows)
    return Setting(tmp_path / "mooncake_conversation.parquet", 2.0, 3)


def test_stamps_are_divided_and_nothing_else_about_them_changes(setting):
    assert [item.at_s for item in setting.rows] == [0.25 * (i // 3) for i in range(40)]
    assert setting.output_tokens_max == 4 * 5


def test_round_robin_gives_each_worker_every_nth_request(setting, monkeypatch):
    given = []
    monkeypatch.setattr(PeerWorker, "run", lambda self, rows: given.append(list(rows)) or iter(()))
    comparison.run(setting, ["peer_round_robin"], 1, quiet)
    assert given == [list(setting.rows[i::3]) for i in range(3)]


@pytest.mark.parametrize("timing", comparison.TIMINGS)
def test_a_row_for_each_policy_and_seed_and_the_same_bytes_again(setting, timing):
    answers = [
        comparison.run(Setting(setting.path, 2.0, 3, timing), ["peer_round_robin"], 2, quiet)
        for _ in range(2)
    ]
    assert answers[0] == answers[1] and not answers[0]["partial"]
    first, second = answers[0]["rows"]
    assert (first["policy"], first["seed"], second["seed"]) == ("peer_round_robin", 1, 2)
    assert first["requests"] == first["answered"] == 40


def test_an_interrupted_run_keeps_its_rows_and_says_so(setting, monkeypatch):
    def interrupted(setting, seed, gaps):
        if seed == 2:
            raise KeyboardInterrupt
        return comparison.peer_round_robin(setting, seed, gaps)

    monkeypatch.setitem(comparison.POLICIES, "peer_round_robin", interrupted)
    answer = comparison.run(setting, ["peer_round_robin"], 3, quiet)
    assert answer["partial"] and [found["seed"] for found in answer["rows"]] == [1]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"policies": ["best"]}, "policy 'best': expected slackwater, peer_round_robin"),
        ({"timing": "none"}, "timing 'none': expected one of peer"),
        ({"workers": 0}, "workers=0"),
        ({"speed": 0.0}, "speed 0.0"),
    ],
)
def test_what_cannot_be_run_is_said_in_one_line(setting, change, problem):
    policies = change.pop("policies", ["peer_round_robin"])
    changed = Setting(**{"path": setting.path, **change})
    with pytest.raises(ValueError, match=problem) as caught:
        comparison.run(changed, policies, 1, quiet)
    assert "\n" not in str(caught.value)


def test_more_requests_than_are_kept_are_refused(setting, monkeypatch):
    monkeypatch.setattr(comparison, "REQUESTS_MAX", 39)
    with pytest.raises(ValueError, match="more than 39 requests"):
        comparison.run(setting, ["peer_round_robin"], 1, quiet)
