"""LiveStats: percentiles over a window, targets met or missed, None where there is nothing."""

import dataclasses
import json
from datetime import UTC, datetime

import pytest

from console.facts import RequestFact
from console.live import CLASSES_MAX, LiveStats, WindowHistogram, WindowSums, worker_row
from controlplane import domain, protocol

STANDARD = domain.SLOClass("standard", 1, ttft_s_p99=0.5, itl_s_p99=0.06)
BATCH = domain.SLOClass("batch", 3, 86_400.0, 60.0, is_batch=True, deadline_s=86_400.0)
LOAD = protocol.WorkerLoad(
    role="decode",
    step_index=7,
    predicted_s=0.02,
    measured_s=0.021,
    online_s=3.0,
    batch_s=1.0,
    idle_s=0.5,
    rows_online=2,
    rows_batch=5,
    running_online=2,
    running_batch=5,
    waiting_online=1,
    waiting_batch=0,
    prefill_tokens_waiting=0,
    context_tokens_running=100,
    kv_blocks_total=100,
    kv_blocks_free=60,
    kv_blocks_cached=15,
    kv_blocks_held_batch=5,
    step_model=protocol.StepModel(0.01, 0.0, 0.0),
)
WORKER = domain.WorkerView(
    worker_id="w1",
    epoch=1,
    name="decode-1",
    engine="fake",
    engine_version="1",
    role="decode",
    status="live",
    device=protocol.DeviceFacts("modelled", "modelled H200", 1, 1, "fp16"),
    models=(),
    block_tokens=16,
    num_blocks=100,
    handoff_address=None,
    heard_ago_s=0.01234,
    load=LOAD,
    requests=3,
    exception="",
)


MODEL = protocol.ModelFacts("m", "a" * 64, 2048, 49_152, 46_080)


def replaced(worker, **changes):
    """The same worker with other values."""
    return dataclasses.replace(worker, **changes)


def fact(**changes):
    values = {
        "request_id": "r1",
        "tenant_id": "acme",
        "key_id": "k",
        "model_id": "m",
        "class_name": "standard",
        "service_tier": "default",
        "endpoint": "chat",
        "is_batch": False,
        "stream": True,
        "status": "completed",
        "finish_reason": "stop",
        "error_code": "",
        "prompt_tokens": 10,
        "cached_tokens": 0,
        "output_tokens": 5,
        "arrived_at": datetime.now(UTC),
        "queue_ms": 1.0,
        "ttft_ms": 100.0,
        "itl_ms_p99": 20.0,
        "itl_ms_mean": 10.0,
        "e2e_ms": 200.0,
        "split": "local",
        "prefill_worker": "w1",
        "decode_worker": "w1",
        "failovers": 0,
        "handoff_bytes": 0,
        "handoff_ms": 0.0,
        "handoff_recomputed_tokens": 0,
        "predicted_ttft_ms": 90.0,
    }
    return RequestFact(**{**values, **changes})


class Stand:
    """LiveStats with a clock and a cluster that the test moves."""

    def __init__(self, classes=(STANDARD, BATCH), workers=()):
        self.now_s = 1_000.0
        self.classes = list(classes)
        self.view = domain.ClusterView(tuple(workers), (), (("standard", 2),), ())
        self.stats = LiveStats(
            lambda: self.classes, lambda: self.view, gpu_hour_usd=3.6, clock=lambda: self.now_s
        )

    def frame(self):
        return self.stats.frame(self.now_s)

    def row(self, name="standard"):
        return next(row for row in self.frame()["classes"] if row["name"] == name)


# --- windows -------------------------------------------------------------------------------------


def test_sums_forget_a_second_when_it_leaves_the_window():
    sums = WindowSums(1, window_s=3)
    for second, amount in enumerate((1, 2, 4, 8)):
        sums.add(0, amount, now_s=second + 0.5)
    assert sums.totals == [14]
    sums.expire(5.0)
    assert sums.totals == [8]
    sums.expire(6.0)
    assert sums.totals == [0]


def test_sums_of_fractions_return_to_exactly_zero():
    sums = WindowSums(1, window_s=2)
    for tenth in range(10):
        sums.add(0, 0.1, now_s=tenth / 10)
    sums.add(0, 0.7, now_s=1.0)
    sums.expire(10.0)
    assert sums.totals == [0]


def test_quantile_without_data_is_none():
    assert WindowHistogram((1.0, 2.0)).quantile(0.5, now_s=0.0) is None


@pytest.mark.parametrize(
    ("values_s", "q", "expected_s"),
    [
        ((0.5,), 0.5, 0.5),  # half way into [0, 1]
        ((0.5, 0.5), 0.5, 0.5),
        ((0.5, 1.5), 0.5, 1.0),
        ((0.5, 1.5), 0.99, 1.98),
        ((1.0,), 1.0, 1.0),  # a bound belongs to the bucket below it
        ((1.5, 3.0, 3.0, 3.0), 0.5, 2 + 2 / 3),
        ((9.0,), 0.99, 4.0),  # beyond the last bound: that bound
    ],
)
def test_quantile_interpolates_in_its_bucket(values_s, q, expected_s):
    histogram = WindowHistogram((1.0, 2.0, 4.0))
    for value_s in values_s:
        histogram.observe(value_s, now_s=0.0)
    assert histogram.quantile(q, now_s=0.0) == pytest.approx(expected_s)


# --- classes -------------------------------------------------------------------------------------


def test_class_without_requests_has_no_data_and_no_numbers():
    row = Stand().row()
    assert row["status"] == "no_data"
    assert row["requests"] == 0
    for key in ("ttft_ms_p50", "ttft_ms_p99", "itl_ms_p50", "itl_ms_p99", "attainment"):
        assert row[key] is None
    assert (row["ttft_target_ms"], row["itl_target_ms"]) == (500.0, 60.0)


def test_class_within_its_targets_is_ok_however_wide_the_bucket():
    stand = Stand()
    for _ in range(200):
        stand.stats.observe_ttft("standard", 0.499)  # the bucket of /metrics is (0.25, 0.5]
        stand.stats.observe_itl(
            "standard", 0.059, stand.now_s
        )  # and (0.05, 0.075], wider than the target
    row = stand.row()
    assert row["status"] == "ok"
    assert row["itl_ms_p99"] <= 60.0


@pytest.mark.parametrize(("num_late", "status"), [(1, "ok"), (2, "missed")])
def test_class_is_missed_when_more_than_one_in_a_hundred_is_late(num_late, status):
    stand = Stand()
    for index in range(100):
        stand.stats.observe_ttft("standard", 0.501 if index < num_late else 0.1)
    assert stand.row()["status"] == status


def test_percentiles_leave_with_their_window():
    stand = Stand()
    stand.stats.observe_ttft("standard", 0.1)
    stand.stats.observe_itl("standard", 0.01, stand.now_s)
    assert stand.row()["ttft_ms_p50"] is not None
    stand.now_s += 61
    assert stand.row()["status"] == "no_data"


def test_attainment_counts_requests_within_both_targets():
    stand = Stand()
    stand.stats.observe_request(fact())
    stand.stats.observe_request(fact(ttft_ms=501.0))
    stand.stats.observe_request(fact(itl_ms_p99=61.0))
    stand.stats.observe_request(fact(status="failed", ttft_ms=None))
    stand.stats.observe_request(fact(itl_ms_p99=None))  # one token has no gap
    stand.stats.observe_request(fact(status="cancelled"))
    row = stand.row()
    assert (row["attainment"], row["requests"]) == (0.4, 5)


def test_changed_target_begins_new_statistics():
    stand = Stand()
    stand.stats.observe_ttft("standard", 0.4)
    stand.classes[0] = domain.SLOClass("standard", 1, ttft_s_p99=0.3, itl_s_p99=0.06)
    assert stand.row()["status"] == "no_data"
    stand.stats.observe_ttft("standard", 0.4)
    assert stand.row()["status"] == "missed"


def test_unknown_class_is_not_kept():
    stand = Stand()
    stand.stats.observe_ttft("gone", 0.1)
    stand.stats.observe_itl("gone", 0.1, stand.now_s)
    stand.stats.observe_request(fact(class_name="gone"))
    assert [row["name"] for row in stand.frame()["classes"]] == ["standard", "batch"]
    assert stand.frame()["counters"]["requests_total"] == 1


def test_classes_beyond_the_maximum_have_no_statistics():
    classes = [domain.SLOClass(f"c{i}", 1, 0.5, 0.06) for i in range(CLASSES_MAX + 1)]
    stand = Stand(classes)
    assert len(stand.frame()["classes"]) == CLASSES_MAX


# --- the frame -----------------------------------------------------------------------------------


def test_token_rates_follow_the_lanes_and_go_to_zero_when_load_stops():
    stand = Stand()
    for _ in range(10):
        stand.stats.observe_tokens(False, 3, stand.now_s)
        stand.stats.observe_tokens(True, 2, stand.now_s)
        stand.now_s += 1
    stand.now_s -= 1
    assert stand.frame()["tokens_per_s"] == {"interactive": 3.0, "batch": 2.0}
    stand.now_s += 11
    assert stand.frame()["tokens_per_s"] == {"interactive": 0.0, "batch": 0.0}
    assert stand.frame()["counters"]["tokens_interactive"] == 30


def test_dollars_come_from_the_measured_time_of_each_lane_and_idle_time_is_interactive():
    stand = Stand()
    assert stand.frame()["usd_per_million"] == {"interactive": None, "batch": None}
    stand.stats.observe_load(LOAD, stand.now_s)
    stand.stats.observe_tokens(False, 1_000, stand.now_s)
    stand.stats.observe_tokens(True, 2_000, stand.now_s)
    usd = stand.frame()["usd_per_million"]
    assert usd == {"interactive": pytest.approx(3.5), "batch": pytest.approx(0.5)}
    stand.now_s += 61
    assert stand.frame()["usd_per_million"] == {"interactive": None, "batch": None}


def test_counters_rise_by_exactly_what_ended():
    stand = Stand()
    stand.stats.observe_request(fact())
    stand.stats.observe_request(fact(split="handoff", failovers=2))
    stand.stats.observe_request(fact(status="failed", split=""))
    stand.stats.observe_request(fact(is_batch=True, class_name="batch"))
    counters = stand.frame()["counters"]
    assert counters["requests_total"] == 4
    assert (counters["completed"], counters["failed"]) == (3, 1)
    assert (counters["placements_local"], counters["placements_handoff"]) == (2, 1)
    assert (counters["failovers"], counters["batch_lines"]) == (2, 1)


def test_frame_is_json_and_numbered():
    stand = Stand(workers=(WORKER,))
    first, second = stand.frame(), stand.frame()
    assert json.loads(json.dumps(first, allow_nan=False))["topic"] == "overview"
    assert second["seq"] == first["seq"] + 1
    assert first["queued"] == {"standard": 2}


def test_worker_row_shows_load_of_the_last_report():
    row = worker_row(WORKER)
    assert row["kv_used_ratio"] == 0.25
    assert (row["running"], row["waiting"], row["batch_rows"], row["step_ms"]) == (7, 1, 5, 21.0)


def test_worker_row_before_the_first_report_has_no_numbers():
    row = worker_row(replaced(WORKER, load=None))
    assert [row[key] for key in ("kv_used_ratio", "running", "waiting", "batch_rows")] == [None] * 4
