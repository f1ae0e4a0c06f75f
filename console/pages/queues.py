"""Queues & SLO: who waits and why, how each promise stands, what is given up when it is full."""

import json

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.utils.http import urlencode
from django.views.decorators.http import require_safe

from console.auth import operator_required
from console.forms import TenantFilter
from console.middleware import chart_page
from console.pages import cluster

NOTHING = {"classes": (), "waiting": (), "contracts": (), "overload": None}


@operator_required
@chart_page
@require_safe
def queues(request: HttpRequest) -> HttpResponse:
    """First paint from the running plane; the live socket goes on with the same filter."""
    form = TenantFilter(request.GET)
    tenant_id = form.tenant_id()
    found = cluster.queues(tenant_id)
    shown = NOTHING if found is None else found
    traces = [
        {"name": row["name"], "colour": index + 1, "stack": True}
        for index, row in enumerate(shown["classes"])
    ]
    context = {
        **shown,
        "page": "queues",
        "form": form,
        "is_serving": found is not None,
        "topics": f"overview,queues&{urlencode({'tenant': tenant_id})}",
        "traces": json.dumps(traces),
    }
    return render(request, "console/queues.html", context)
