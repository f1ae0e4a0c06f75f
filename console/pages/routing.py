"""Routing: which class went to which worker, how much of its prompts was cached, and what decided,
from the stored decisions of the last minutes."""

from collections import Counter, defaultdict
from typing import Any

from django.db.models import Avg, Count, QuerySet, Sum
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.utils import timezone
from django.utils.http import urlencode
from django.views.decorators.http import require_safe

from console import explaining
from console.auth import operator_required
from console.forms import RoutingFilter
from console.models import RequestRecord
from console.pages.requests import matching

ROWS_MAX = 10_000  # newest requests that are counted
DECISIONS_MAX = 2_000  # newest decisions that are read
WORKERS_SHOWN = 12  # columns; the busiest
PAIRS_SHOWN = 12
REASONS_SHOWN = 12


@operator_required
@require_safe
def routing(request: HttpRequest) -> HttpResponse:
    """The page; filters stand in the address, numbers link to their requests."""
    form = RoutingFilter(request.GET)
    filters = form.values()
    placed = matching(filters, timezone.now()).exclude(split="")
    flows = list(
        _newest(placed, ROWS_MAX)
        .values("class_name", "split", "prefill_worker", "decode_worker")
        .annotate(
            n=Count("pk"),
            ttft_ms=Avg("ttft_ms"),
            prompt=Sum("prompt_tokens"),
            cached=Sum("cached_tokens"),
            moves=Sum("failovers"),
            num_bytes=Sum("handoff_bytes"),
            handoff_ms=Avg("handoff_ms"),
        )
    )
    workers = busiest_workers(flows)
    kept = {name: value for name, value in filters.items() if value}
    context = {
        "page": "routing",
        "form": form,
        "filters": filters,
        "rows_max": ROWS_MAX,
        "decisions_max": DECISIONS_MAX,
        "num_placed": sum(flow["n"] for flow in flows),
        "workers": workers,
        "classes": class_rows(flows, workers, kept),
        "pairs": pair_rows(flows),
        "reasons": reason_rows(placed),
    }
    return render(request, "console/routing.html", context)


def busiest_workers(flows: list[dict[str, Any]]) -> list[str]:
    """Where most was decoded, at most WORKERS_SHOWN, by name."""
    counts: Counter[str] = Counter()
    for flow in flows:
        counts[flow["decode_worker"]] += flow["n"]
    return sorted((name for name, _ in counts.most_common(WORKERS_SHOWN)), key=_by_number)


def class_rows(
    flows: list[dict[str, Any]], workers: list[str], kept: dict[str, str]
) -> list[dict[str, Any]]:
    """A row for each class, a cell for each worker: the share of the class that it decoded."""
    by_class: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for flow in flows:
        by_class[flow["class_name"]].append(flow)
    rows = []
    for name, mine in sorted(by_class.items()):
        total = sum(flow["n"] for flow in mine)
        counts: Counter[str] = Counter()
        for flow in mine:
            counts[flow["decode_worker"]] += flow["n"]
        prompt = sum(flow["prompt"] for flow in mine)
        timed = [flow for flow in mine if flow["ttft_ms"] is not None]
        num_timed = sum(flow["n"] for flow in timed)
        rows.append(
            {
                "name": name,
                "n": total,
                "query": urlencode({**kept, "class": name}),
                "cells": [
                    {
                        "n": counts[worker],
                        "share": counts[worker] / total,
                        "query": urlencode({**kept, "class": name, "worker": worker}),
                    }
                    for worker in workers
                ],
                "others": total - sum(counts[worker] for worker in workers),
                "hit_ratio": sum(flow["cached"] for flow in mine) / prompt if prompt else None,
                "handoff_ratio": sum(f["n"] for f in mine if f["split"] == "handoff") / total,
                "ttft_ms": sum(f["ttft_ms"] * f["n"] for f in timed) / num_timed
                if num_timed
                else None,
                "moves": sum(flow["moves"] for flow in mine),
            }
        )
    return rows


def pair_rows(flows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Handoffs by pair of workers, most frequent first."""
    pairs: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for flow in flows:
        if flow["split"] == "handoff":
            pairs[flow["prefill_worker"], flow["decode_worker"]].append(flow)
    rows = []
    for (prefill, decode), mine in pairs.items():
        timed = [flow for flow in mine if flow["handoff_ms"] is not None]
        num_timed = sum(flow["n"] for flow in timed)
        total_ms = sum(flow["handoff_ms"] * flow["n"] for flow in timed)
        rows.append(
            {
                "prefill": prefill,
                "decode": decode,
                "n": sum(flow["n"] for flow in mine),
                "num_bytes": sum(flow["num_bytes"] for flow in mine),
                "handoff_ms": total_ms / num_timed if num_timed else None,
            }
        )
    rows.sort(key=lambda row: (-row["n"], row["prefill"], row["decode"]))
    return rows[:PAIRS_SHOWN]


def reason_rows(placed: QuerySet[RequestRecord]) -> list[dict[str, Any]]:
    """What decided the first placement of the newest requests, with its words."""
    found = _newest(placed, DECISIONS_MAX)
    counts: Counter[tuple[str, str]] = Counter()
    for bound, cause, n in found.values_list(
        "decision__records__0__bound", "decision__records__0__cause"
    ).annotate(n=Count("pk")):
        counts[bound or "", cause or ""] += n
    total = counts.total()
    return [
        {
            "bound": bound or "not stored",
            "words": explaining.BOUNDS.get(bound, bound or "its decision was not kept"),
            "cause": explaining.CAUSES.get(cause, cause),
            "n": n,
            "share": n / total,
        }
        for (bound, cause), n in counts.most_common(REASONS_SHOWN)
    ]


def _newest(found: QuerySet[RequestRecord], limit: int) -> QuerySet[RequestRecord]:
    """Of the newest rows only: what a page costs does not grow with the table."""
    newest = found.order_by("-arrived_at", "-id").values("pk")[:limit]
    return RequestRecord.objects.filter(pk__in=newest).order_by()


def _by_number(name: str) -> tuple[int, str]:
    return (len(name), name)
