"""Keys of tenants: find, make, rotate, revoke; a secret is shown once, when it is made."""

from collections import Counter
from datetime import datetime, timedelta
from typing import Any

from django.contrib import messages
from django.contrib.admin.models import ADDITION
from django.core.paginator import Paginator
from django.db import transaction
from django.db.models import Q, QuerySet
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.utils import timezone
from django.utils.http import urlencode
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_http_methods, require_safe

from console import audit, limits, snippets
from console import keys as stored
from console.auth import operator_required
from console.models import ApiKey, Model
from console.models.tenants import CONCURRENCY_DEFAULT
from console.pages import cluster
from console.pages.keyforms import KeyFilter, NewKeyForm, RotateForm

PAGE_ROWS = 50
EXPIRING = timedelta(days=7)


@operator_required
@require_safe
def keys(request: HttpRequest) -> HttpResponse:
    """Keys that pass the filters, each with its state and the limit that would refuse it next."""
    form, now = KeyFilter(request.GET), timezone.now()
    pages = Paginator(matching(form.values(), now), PAGE_ROWS)
    shown = pages.get_page(request.GET.get("page"))
    kept = [(name, value) for name, value in request.GET.items() if value and name != "page"]
    tightest = tightest_limits(shown.object_list)
    context = {
        "page": "keys",
        "form": form,
        "rows": [
            {"key": key, "state": state_of(key, now), "limit": tightest.get(key.tenant.slug)}
            for key in shown.object_list
        ],
        "shown": shown,
        "query": urlencode(kept),
        "is_filtered": bool(kept),
    }
    is_part = bool(getattr(request, "htmx", False))
    return render(request, f"console/keys.html{'#results' if is_part else ''}", context)


def matching(filters: dict[str, Any], now: datetime) -> QuerySet[ApiKey]:
    """Keys that pass the filters, the newest first."""
    found = ApiKey.objects.select_related("tenant__quota", "replaced_by")
    found = found.order_by("-created_at", "-pk")
    if filters.get("q"):
        found = found.filter(
            Q(public_id__startswith=filters["q"]) | Q(name__istartswith=filters["q"])
        )
    if filters.get("tenant"):
        found = found.filter(tenant__slug=filters["tenant"])
    soon = Q(expires_at__gt=now, expires_at__lte=now + EXPIRING)
    by_state = {
        "active": Q(is_active=True) & (Q(expires_at=None) | Q(expires_at__gt=now + EXPIRING)),
        "expiring": Q(is_active=True) & soon,
        "expired": Q(is_active=True, expires_at__lte=now),
        "revoked": Q(is_active=False),
    }
    chosen = by_state.get(filters.get("state", ""))
    return found if chosen is None else found.filter(chosen)


def state_of(key: ApiKey, now: datetime) -> str:
    """As the filter calls it."""
    if not key.is_active:
        return "revoked"
    if key.expires_at is None or key.expires_at > now + EXPIRING:
        return "active"
    return "expired" if key.expires_at <= now else "expiring"


def tightest_limits(shown: Any) -> dict[str, limits.Limit | None]:
    """For each tenant of these keys the limit that it meets first; keys share their tenant's."""
    view = cluster.view()
    if view is None:
        return {}
    running = Counter(request.tenant_id for request in view.requests)
    by_tenant: dict[str, list[limits.Limit]] = {}
    for key in shown:
        tenant = key.tenant
        quota = getattr(tenant, "quota", None)
        most = CONCURRENCY_DEFAULT if quota is None else quota.concurrency_max
        by_tenant[tenant.slug] = [limits.Limit("in flight", running[tenant.slug], most)]
    for account in cluster.accounts():
        if account.contract.tenant_id in by_tenant:
            by_tenant[account.contract.tenant_id] += limits.of_account(account)
    return {slug: limits.binding(found) for slug, found in by_tenant.items()}


@operator_required
@never_cache
@require_http_methods(["GET", "HEAD", "POST"])
def add(request: HttpRequest) -> HttpResponse:
    """Make a key; the answer shows its secret once, and code that uses it."""
    form = NewKeyForm(request.POST or None, initial={"tenant": request.GET.get("tenant")})
    if request.method == "POST" and form.is_valid():
        asked = form.cleaned_data
        days = asked["days"]
        with transaction.atomic():
            made = stored.create(
                asked["tenant"],
                name=asked["name"],
                scopes=asked["scopes"],
                model_ids=asked["model_ids"],
                expires_at=None if days is None else timezone.now() + timedelta(days=days),
            )
            audit.record(request.user, made, "created", ADDITION)
        cluster.refresh()
        return _made(request, made)
    return render(request, "console/key_add.html", {"page": "keys", "form": form})


@operator_required
@never_cache
@require_http_methods(["GET", "HEAD", "POST"])
def rotate(request: HttpRequest, public_id: str) -> HttpResponse:
    """Say what a rotation does, then make the new key; the old one ends after the overlap."""
    old = get_object_or_404(ApiKey.objects.select_related("tenant"), public_id=public_id)
    if not old.is_active or old.replaced_by_id is not None:
        messages.error(request, f"{old} is revoked or was rotated before.")
        return redirect("pages:keys")
    form = RotateForm(request.POST or None)
    if request.method == "POST" and form.is_valid():
        hours = form.cleaned_data["overlap_hours"]
        with transaction.atomic():
            made = stored.rotate(old, timedelta(hours=hours))
            audit.record(request.user, old, f"rotated to {made}, ends within {hours} h")
            audit.record(request.user, made, f"created in place of {old}", ADDITION)
        cluster.refresh()
        return _made(request, made, old)
    return render(
        request,
        "console/key_order.html",
        {
            "page": "keys",
            "order": "rotate",
            "key": old,
            "form": form,
            "effects": [
                "A new key with the same tenant, scopes and models is made and shown once.",
                "Until the overlap ends both keys are good; then the old one is refused.",
            ],
        },
    )


@operator_required
@require_http_methods(["GET", "HEAD", "POST"])
def revoke(request: HttpRequest, public_id: str) -> HttpResponse:
    """Say what it does, then switch the key off."""
    key = get_object_or_404(ApiKey.objects.select_related("tenant"), public_id=public_id)
    if request.method == "POST":
        if ApiKey.objects.filter(pk=key.pk, is_active=True).update(is_active=False):
            audit.record(request.user, key, "revoked")
            cluster.refresh()
            messages.success(request, f"{key} is revoked.")
        else:
            messages.error(request, f"{key} was revoked before.")
        return redirect("pages:keys")
    effects = [
        "New requests with it are refused with 401 from now on.",
        "Streams that run under it are ended.",
        "Its requests, batches and cost stay; they go on naming it.",
    ]
    context = {"page": "keys", "order": "revoke", "key": key, "effects": effects}
    return render(request, "console/key_order.html", context)


def _made(request: HttpRequest, made: ApiKey, old: ApiKey | None = None) -> HttpResponse:
    """The page that shows a secret; it is nowhere afterwards."""
    known = Model.objects.filter(is_active=True).values_list("model_id", flat=True).first()
    model_id = made.model_ids[0] if made.model_ids else known or snippets.MODEL_UNKNOWN
    url = snippets.base_url(request)
    context = {
        "page": "keys",
        "key": made,
        "old": old,
        "base_url": url,
        "snippets": snippets.of_chat(url, model_id),
    }
    return render(request, "console/key_made.html", context)
