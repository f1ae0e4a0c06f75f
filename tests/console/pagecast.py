"""Rows and people that tests of pages need; each call makes valid ones with plain defaults."""

from datetime import timedelta

from django.contrib.auth import get_user_model
from django.test import Client
from django.utils import timezone

from console.models import (
    Batch,
    BatchLine,
    File,
    PlanRecord,
    RequestRecord,
    SLOClassRow,
    Tenant,
)
from console.models.fleet import ensure_default_classes

CANDIDATE = {
    "worker_id": "w1",
    "role": "prefill",
    "eligible": True,
    "reason": "",
    "queue_s": 0.1,
    "prefill_s": 0.2,
    "transfer_s": 0.01,
    "ttft_s": 0.31,
    "itl_s": 0.02,
    "cached_tokens": 64,
    "free_blocks": 900,
    "score": 0.9,
    "ttft_s_p99": 0.4,
    "itl_added_s": 0.002,
    "hit_blocks": 4,
}
DECISION = {
    "request_id": "r1",
    "epoch": 1,
    "outcome": "placed",
    "reason": "w1 computes, w2 decodes: shortest predicted TTFT of 0.31 s",
    "split_reason": "400 uncached tokens are over the threshold of 128",
    "waited_s": 0.02,
    "uncached_tokens": 400,
    "handoff_threshold_tokens": 128,
    "placement": {
        "split": "handoff",
        "prefill_worker": "w1",
        "decode_worker": "w2",
        "predicted_ttft_s": 0.31,
        "predicted_itl_s": 0.02,
    },
    "candidates": [
        CANDIDATE,
        {**CANDIDATE, "worker_id": "w3", "eligible": False, "reason": "draining", "score": 0.0},
    ],
    "tier": "guaranteed",
    "bound": "cost",
    "cause": "submitted",
    "after_s": 0.02,
    "retry_after_s": None,
}
OUTCOME = {
    "status": "completed",
    "is_met": True,
    "output_tokens": 20,
    "ttft_s": 0.3,
    "ttft_s_predicted": 0.33,
    "ttft_s_p99_predicted": 0.42,
    "itl_s_p99": 0.025,
    "itl_s_predicted": 0.02,
    "transfer_s": 0.012,
    "transfer_s_predicted": 0.01,
}
EXPLAINED = {
    "request_id": "r1",
    "tenant_id": "acme",
    "model_id": "m",
    "class_name": "interactive",
    "prompt_tokens": 400,
    "output_tokens_max": 64,
    "ttft_s_target": 0.5,
    "itl_s_target": 0.03,
    "records": [DECISION],
    "records_left_out": 0,
    "transfers": [{"epoch": 1, "bytes": 5 << 20, "took_s": 0.012}],
    "outcome": OUTCOME,
    "counterfactuals": [
        {
            "kind": "class",
            "name": "flex",
            "is_met": True,
            "ttft_s": 0.42,
            "itl_s": 0.02,
            "text": "flex: in time",
        }
    ],
}


def client_of(name="ada", is_staff=True):
    user = get_user_model().objects.create_user(name)  # no password: hashing one is slow
    get_user_model().objects.filter(pk=user.pk).update(is_staff=is_staff)
    client = Client(SERVER_NAME="localhost")
    client.force_login(user)
    return client


def make_record(request_id="r1", **changes):
    values = {
        "tenant_id": "acme",
        "model_id": "m",
        "class_name": "interactive",
        "service_tier": "priority",
        "endpoint": "chat",
        "stream": True,
        "status": "completed",
        "finish_reason": "stop",
        "prompt_tokens": 400,
        "output_tokens": 20,
        "arrived_at": timezone.now() - timedelta(seconds=5),
        "queue_ms": 20.0,
        "ttft_ms": 300.0,
        "itl_ms_mean": 20.0,
        "itl_ms_p99": 25.0,
        "e2e_ms": 1000.0,
        "split": "handoff",
        "prefill_worker": "w1",
        "decode_worker": "w2",
        "handoff_bytes": 5 << 20,
        "handoff_ms": 10.0,
        "predicted_ttft_ms": 310.0,
        "decision": EXPLAINED,
    }
    return RequestRecord.objects.create(request_id=request_id, **(values | changes))


def make_plan(**changes):
    values = {
        "at": timezone.now(),
        "worker_id": "w1",
        "role_before": "prefill",
        "role_after": "decode",
        "by": "planner",
        "reason": "long prompts ended",
    }
    return PlanRecord.objects.create(**(values | changes))


def make_tenant(slug="acme"):
    ensure_default_classes()
    standard = SLOClassRow.objects.get(name="standard")
    return Tenant.objects.create(slug=slug, name=slug.title(), default_class=standard)


def make_batch(statuses=("completed", "pending"), **changes):
    tenant = Tenant.objects.filter(slug="acme").first() or make_tenant()
    now = timezone.now()
    number = Batch.objects.count()
    file = File.objects.create(
        file_id=f"file-{number}",
        tenant=tenant,
        filename="lines.jsonl",
        purpose="batch",
        path="/nowhere",
        num_bytes=10,
        created_at=now,
    )
    values = {
        "batch_id": f"batch_{number}",
        "endpoint": "/v1/chat/completions",
        "model_id": "m",
        "completion_window": "24h",
        "num_lines": len(statuses),
        "created_at": now - timedelta(seconds=60),
        "expires_at": now + timedelta(hours=1),
    }
    batch = Batch.objects.create(tenant=tenant, input_file=file, **(values | changes))
    for index, status in enumerate(statuses):
        BatchLine.objects.create(
            batch=batch,
            line_index=index,
            custom_id=f"line-{index}",
            model_id="m",
            body={},
            status=status,
            error={"code": "tenant_concurrency", "message": "busy"} if status == "failed" else None,
        )
    return batch
