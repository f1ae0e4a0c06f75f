"""The planner against fixed splits: phases follow each other, figures compare what they say."""

import pyarrow
import pyarrow.parquet as parquet
import pytest

from controlplane.sim import hardware, split
from controlplane.sim.split import OURS, Phase, Result, Setting
from controlplane.sim.traces import COLUMNS, TraceRequest

NAMES = ("long", "short")


@pytest.fixture
def setting(tmp_path):
    """Two phases of 20 s: prompts of 3,000 tokens, then answers of 200."""
    for name, prompt, output in (("long", 3_000, 8), ("short", 200, 200)):
        times = [index * 0.5 for index in range(80)]
        rows = {
            "arrival_s": times,
            "input_tokens": [prompt] * len(times),
            "output_tokens": [output] * len(times),
            "hash_ids": [[] for _ in times],
            "session_id": [None] * len(times),
            "client_id": [None] * len(times),
        }
        assert set(rows) == set(COLUMNS)
        types = {"hash_ids": pyarrow.list_(pyarrow.int32()), "session_id": pyarrow.string()}
        types["client_id"] = pyarrow.string()
        columns = {key: pyarrow.array(value, types.get(key)) for key, value in rows.items()}
        parquet.write_table(pyarrow.table(columns), tmp_path / f"{name}.parquet")
    phases = (Phase("long", 0.0, 2.0, 64), Phase("short", 10.0, 1.0, 512))
    return Setting(str(tmp_path), "", phases, 20.0)


def test_phases_follow_each_other_at_their_own_rate_and_limit(setting):
    rows = list(split.arrivals(setting))
    assert [row.at_s for row in rows] == sorted(row.at_s for row in rows)
    first = [row for row in rows if row.at_s < 20.0]
    assert len(first) == 80 and len(rows) == 120
    assert {row.client_id for row in first} == {"64"}
    assert {row.client_id for row in rows[80:]} == {"512"}


@pytest.mark.parametrize("name", ["2P6D", "mixed", OURS])
def test_a_policy_serves_every_request_of_both_phases(setting, name):
    result = split.play(setting, name)
    assert result.requests == (80, 40) and result.good == (80, 40)
    assert 0.0 < result.itl_ms_p99 <= 30.0
    assert (result.handed_off > 0) == (name == "2P6D") or name == OURS
    assert result.flips == 0 or name == OURS


def test_the_target_of_a_long_prompt_follows_its_own_prefill():
    slo_of = split.slo_of(hardware.read(""))
    short, long = (slo_of(TraceRequest(0.0, tokens, 1)) for tokens in (500, 30_000))
    assert short.ttft_s_p99 == 0.5 and long.ttft_s_p99 > 2.0
    assert short.itl_s_p99 == long.itl_s_p99 == 0.03


def result(name: str, good: tuple[int, ...], itl_ms: float = 20.0) -> Result:
    return Result(name, (100, 100), good, good, good, itl_ms, 0, 0)


def test_figures_compare_with_the_best_of_each_phase_and_the_best_over_all(setting):
    results = {name: result(name, (10, 10)) for name in split.STATICS}
    results["1P7D"] = result("1P7D", (20, 90))
    results["6P2D"] = result("6P2D", (80, 20))
    results["mixed"] = result("mixed", (70, 70), 25.0)
    results[OURS] = result(OURS, (76, 90), 22.0)
    figures = split.figures(setting, results)
    assert figures["split_long_vs_best_static"] == pytest.approx(0.95)
    assert figures["split_short_best_static"] == "1P7D"
    assert figures["split_vs_best_static_worst_phase"] == pytest.approx(0.95)
    assert figures["split_best_single"] == "1P7D"
    assert figures["split_vs_best_single"] == pytest.approx(166 / 110)
    assert figures["split_vs_mixed"] == pytest.approx(166 / 140)
    assert (figures["split_itl_ms_p99"], figures["split_itl_ms_p99_mixed"]) == (22.0, 25.0)
