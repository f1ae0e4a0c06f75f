"""Audit: what operators have changed, and whether the chain holds."""

import json
from typing import Any

from django import forms
from django.core.paginator import Paginator
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.utils.http import urlencode
from django.views.decorators.http import require_safe

from console import audit as chain
from console.auth import operator_required
from console.models import AuditEvent
from console.pages import exports

PAGE_ROWS = 50
EXPORT_MAX = 10_000
COLUMNS = (
    *("sequence", "at", "actor", "action", "object_type", "object_id", "object_text", "words"),
    *("before", "after", "previous", "digest"),
)


class AuditFilter(forms.Form):
    """Filters of the list; all stand in the query string."""

    actor = forms.CharField(label="Who", required=False, max_length=150)
    type = forms.CharField(label="What", required=False, max_length=64)
    action = forms.ChoiceField(
        label="Action",
        required=False,
        choices=[("", "any action"), *((name, name) for name in chain.ACTIONS.values())],
        widget=forms.Select(attrs={"data-submit": ""}),
    )
    q = forms.CharField(
        label="Words", required=False, max_length=64, widget=forms.TextInput({"data-filter": ""})
    )


@operator_required
@require_safe
def audit(request: HttpRequest) -> HttpResponse:
    """Events, the newest first, as a page or as a file; the chain is checked on request."""
    form = AuditFilter(request.GET)
    form.is_valid()
    found = matching(form.cleaned_data)
    if request.GET.get("format") in exports.KINDS:
        rows = list(found.values(*COLUMNS)[:EXPORT_MAX])
        return exports.download(rows, COLUMNS, request.GET["format"], "audit")
    shown = Paginator(found, PAGE_ROWS).get_page(request.GET.get("page"))
    kept = [(k, v) for k, v in request.GET.items() if v and k not in ("page", "format", "check")]
    context = {
        "page": "audit",
        "form": form,
        "shown": shown,
        "rows": [{"event": event, "values": values_of(event)} for event in shown.object_list],
        "query": urlencode(kept),
        "is_filtered": bool(kept),
        "check": chain.first_broken() if "check" in request.GET else None,
    }
    is_part = bool(getattr(request, "htmx", False))
    return render(request, f"console/audit.html{'#results' if is_part else ''}", context)


def matching(filters: dict[str, Any]) -> QuerySet[AuditEvent]:
    """Events that pass the filters."""
    names = {"actor": "actor", "type": "object_type", "action": "action", "q": "words__icontains"}
    given = {column: filters[name] for name, column in names.items() if filters.get(name)}
    return AuditEvent.objects.filter(**given)


def values_of(event: AuditEvent) -> list[tuple[str, Any, Any]]:
    """(name, before, after) of the values that an event changed."""
    before, after = json.loads(event.before), json.loads(event.after)
    names = [name for name in after if before.get(name) != after[name]]
    return [(name, before.get(name), after[name]) for name in names]
