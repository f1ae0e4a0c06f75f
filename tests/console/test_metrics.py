"""/metrics counts what the stored facts count."""

from prometheus_client.parser import text_string_to_metric_families

from console.metrics import Metrics, answer
from tests.console.test_live import WORKER, fact


def samples(metrics):
    """Name and labels to value."""
    text = metrics.render().decode()
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_counters_equal_the_sums_of_the_facts():
    metrics = Metrics()
    facts = [
        fact(),
        fact(split="handoff", handoff_bytes=1_000, handoff_ms=5.0, failovers=1),
        fact(split="handoff", handoff_bytes=500, handoff_recomputed_tokens=40),
        fact(status="rejected", split="", output_tokens=0, queue_ms=None),
        fact(class_name="batch", is_batch=True, output_tokens=16),
    ]
    for one in facts:
        metrics.observe_fact(one)
    found = samples(metrics)
    assert found["slackwater_requests_total", "completed", "standard"] == 3
    assert found["slackwater_requests_total", "rejected", "standard"] == 1
    assert found["slackwater_placements_total", "handoff", "standard"] == 2
    assert found["slackwater_placements_total", "local", "standard"] == 1
    assert found["slackwater_placements_total", "batch", "local"] == 1
    assert found["slackwater_handoff_bytes_total",] == sum(one.handoff_bytes for one in facts)
    assert found["slackwater_handoff_recomputed_tokens_total",] == 40
    assert found["slackwater_failovers_total",] == 1
    assert found["slackwater_tokens_total", "interactive", "output"] == 15
    assert found["slackwater_tokens_total", "batch", "output"] == 16
    assert found["slackwater_tokens_total", "interactive", "prompt"] == 40
    assert found["slackwater_batch_lines_total", "completed"] == 1
    assert found["slackwater_queue_wait_seconds_count",] == 4


def test_latencies_fall_into_their_buckets():
    metrics = Metrics()
    metrics.observe_ttft("standard", 0.25)
    metrics.observe_itl("standard", 0.0025)
    found = samples(metrics)
    assert found["slackwater_ttft_seconds_bucket", "0.25", "standard"] == 1
    assert found["slackwater_ttft_seconds_bucket", "0.1", "standard"] == 0
    assert found["slackwater_itl_seconds_bucket", "0.0025", "standard"] == 1


def test_state_that_no_worker_is_in_disappears():
    metrics = Metrics()
    metrics.set_workers((WORKER, WORKER))
    assert samples(metrics)["slackwater_workers", "decode", "live"] == 2
    metrics.set_workers(())
    assert ("slackwater_workers", "decode", "live") not in samples(metrics)


async def test_answer_is_prometheus_text():
    sent = []

    async def send(message):
        sent.append(message)

    await answer(Metrics(), send)
    assert sent[0]["status"] == 200
    assert dict(sent[0]["headers"])[b"content-type"].startswith(b"text/plain")
    assert b"slackwater_event_loop_lag_seconds_bucket" in sent[1]["body"]
