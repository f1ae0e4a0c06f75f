"""Seven days of invented history, marked as such, so that no page of a fresh demo is empty.

Live figures never read it: every row has `is_demo_history`. The same seed gives the same rows.
"""

import math
import random
from datetime import datetime, timedelta
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import transaction
from django.utils import timezone

from console.models import Batch, BatchLine, File, PlanRecord, RequestRecord, Tenant

DAYS = 7
REQUESTS_PER_DAY = 240
BATCH_SHARE = 0.3
INSERT_ROWS = 500
HOUR_S = 3600.0
# Class, tier, share of interactive requests, typical TTFT and ITL in ms: shapes, not measurements.
CLASSES = (
    ("interactive", "priority", 0.6, 220.0, 24.0),
    ("standard", "default", 0.3, 480.0, 40.0),
    ("flex", "flex", 0.1, 1500.0, 60.0),
)
HANDOFF_PROMPT_TOKENS = 128


class Command(BaseCommand):
    help = "Fill the history pages with marked, invented rows (kept as they are when present)"

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--tenant", default="demo")
        parser.add_argument("--model", default="smollm2-135m")
        parser.add_argument("--seed", type=int, default=1)
        parser.add_argument("--days", type=int, default=DAYS)

    def handle(self, *args: Any, **options: Any) -> None:
        if not 1 <= options["days"] <= 31:
            raise CommandError("--days: expected 1 to 31", returncode=2)
        tenant = Tenant.objects.filter(slug=options["tenant"]).first()
        if tenant is None:
            raise CommandError(f"no tenant {options['tenant']!r}: create it first", returncode=2)
        if RequestRecord.objects.filter(is_demo_history=True).exists():
            self._say("history is there already", options)
            return
        chance = random.Random(options["seed"])
        # Until an hour ago: what is newer belongs to the live system.
        end = timezone.now().replace(minute=0, second=0, microsecond=0) - timedelta(hours=1)
        with transaction.atomic():
            records = history(chance, tenant.slug, options["model"], end, options["days"])
            RequestRecord.objects.bulk_create(records, batch_size=INSERT_ROWS)
            PlanRecord.objects.bulk_create(plans(chance, end, options["days"]))
            make_batch(tenant, options["model"], end)
        self._say(f"{len(records)} requests of {options['days']} days", options)

    def _say(self, text: str, options: dict[str, Any]) -> None:
        if options["verbosity"] > 0:
            self.stdout.write(text)


def history(
    chance: random.Random, tenant_id: str, model_id: str, end: datetime, days: int
) -> list[RequestRecord]:
    """Requests over `days` before `end`, busier by day than by night."""
    records = []
    for index in range(days * REQUESTS_PER_DAY):
        at = end - timedelta(seconds=chance.random() * days * 24 * HOUR_S)
        daylight = 0.5 - 0.5 * math.cos(2 * math.pi * (at.hour + at.minute / 60) / 24)
        if chance.random() < 0.25 + 0.75 * daylight:
            records.append(_record(chance, index, tenant_id, model_id, at))
    records.sort(key=lambda record: record.arrived_at)
    return records


def _record(
    chance: random.Random, index: int, tenant_id: str, model_id: str, at: datetime
) -> RequestRecord:
    is_batch = chance.random() < BATCH_SHARE
    draw, chosen = chance.random(), CLASSES[0]
    for row in CLASSES:
        chosen, draw = row, draw - row[2]
        if draw < 0:
            break
    class_name, tier, _, ttft_ms, itl_ms = chosen
    if is_batch:
        class_name, tier, ttft_ms, itl_ms = "batch", "batch", 4_000.0, 90.0
    prompt_tokens = round(chance.choice((24, 320)) * chance.uniform(0.6, 1.6))
    output_tokens = 16 if is_batch else chance.randint(16, 48)
    is_failed = chance.random() < 0.004
    ttft_ms *= chance.lognormvariate(0.0, 0.35)
    itl_ms_mean = itl_ms * chance.lognormvariate(0.0, 0.15)
    is_handoff = prompt_tokens >= HANDOFF_PROMPT_TOKENS and not is_batch
    queue_ms = ttft_ms * chance.uniform(0.02, 0.2)
    return RequestRecord(
        request_id=f"demo-{index:06d}",
        tenant_id=tenant_id,
        model_id=model_id,
        class_name=class_name,
        service_tier=tier,
        endpoint="batch" if is_batch else "chat",
        is_batch=is_batch,
        stream=not is_batch,
        status="failed" if is_failed else "completed",
        finish_reason="" if is_failed else "length",
        error_code="retries_exhausted" if is_failed else "",
        prompt_tokens=prompt_tokens,
        output_tokens=0 if is_failed else output_tokens,
        arrived_at=at,
        queue_ms=queue_ms,
        ttft_ms=None if is_failed else ttft_ms,
        itl_ms_p99=None if is_failed else itl_ms_mean * 1.5,
        itl_ms_mean=None if is_failed else itl_ms_mean,
        e2e_ms=ttft_ms + itl_ms_mean * (output_tokens - 1),
        split="handoff" if is_handoff else "local",
        prefill_worker="w1" if is_handoff else "w2",
        decode_worker="w2",
        handoff_bytes=prompt_tokens * 23_040 if is_handoff else 0,
        handoff_ms=prompt_tokens * 0.05 if is_handoff else None,
        predicted_ttft_ms=ttft_ms * chance.uniform(0.8, 1.1),
        is_demo_history=True,
    )


def plans(chance: random.Random, end: datetime, days: int) -> list[PlanRecord]:
    """One change of role and back on each day."""
    records = []
    for day in range(days):
        at = end - timedelta(days=day, seconds=chance.random() * 6 * HOUR_S)
        for role_before, role_after, minutes, why in (
            ("decode", "prefill", 0, "prefill demand 1.3 s/s exceeds one worker"),
            ("prefill", "decode", 40, "prefill demand 0.4 s/s fits one worker"),
        ):
            records.append(
                PlanRecord(
                    at=at + timedelta(minutes=minutes),
                    worker_id="w2",
                    role_before=role_before,
                    role_after=role_after,
                    by="planner",
                    reason=why,
                    is_demo_history=True,
                )
            )
    return records


def make_batch(tenant: Tenant, model_id: str, end: datetime) -> None:
    """A finished batch of yesterday, without files: its lines were invented."""
    created_at = end - timedelta(days=1)
    file = File.objects.create(
        file_id="file-demo-history",
        tenant=tenant,
        filename="nightly.jsonl",
        purpose="batch",
        path="",
        num_bytes=0,
        created_at=created_at,
    )
    batch = Batch.objects.create(
        batch_id="batch_demo_history",
        tenant=tenant,
        input_file=file,
        endpoint="/v1/chat/completions",
        model_id=model_id,
        completion_window="24h",
        status="completed",
        num_lines=24,
        created_at=created_at,
        expires_at=created_at + timedelta(days=1),
        ended_at=created_at + timedelta(minutes=12),
        is_demo_history=True,
    )
    BatchLine.objects.bulk_create(
        BatchLine(
            batch=batch,
            line_index=index,
            custom_id=f"doc-{index:03d}",
            model_id=model_id,
            body={},
            status="completed",
            attempts=1,
            ended_at=created_at + timedelta(seconds=30 * (index + 1)),
        )
        for index in range(24)
    )
