"""Playground: the browser itself calls `/v1` with a tenant's key; the session opens no `/v1`."""

from datetime import timedelta

from django.contrib.admin.models import ADDITION
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import render
from django.utils import timezone
from django.views.decorators.http import require_POST, require_safe

from console import audit, keys
from console.auth import operator_required
from console.forms import PlaygroundKeyForm
from console.models import ApiKey, Model, SLOClassRow, Tenant
from console.pages import cluster

KEY_LIFE = timedelta(hours=1)
KEYS_MAX = 20  # playground keys alive at one time; the oldest is ended for the next


@operator_required
@require_safe
def playground(request: HttpRequest) -> HttpResponse:
    """The page; everything on it happens in playground.js."""
    context = {
        "page": "playground",
        "models": Model.objects.filter(is_active=True),
        "classes": SLOClassRow.objects.filter(is_batch=False),
        "tenants": Tenant.objects.filter(is_active=True),
        "key_minutes": int(KEY_LIFE.total_seconds() // 60),
    }
    return render(request, "console/playground.html", context)


@operator_required
@require_POST
def key(request: HttpRequest) -> HttpResponse:
    """Make a key of the chosen tenant that ends within the hour; the answer shows it once."""
    form = PlaygroundKeyForm(request.POST)
    if not form.is_valid():
        return JsonResponse({"error": "Choose a tenant."}, status=400)
    tenant, now = form.cleaned_data["tenant"], timezone.now()
    name = f"playground of {request.user.get_username()}"[:128]
    alive = ApiKey.objects.filter(name=name, is_active=True, expires_at__gt=now)
    oldest = alive.order_by("-created_at").values_list("pk", flat=True)[KEYS_MAX - 1 :]
    ApiKey.objects.filter(pk__in=list(oldest)).update(is_active=False)
    row = keys.create(tenant, name=name, expires_at=now + KEY_LIFE)
    audit.record(request.user, row, "made for the playground", ADDITION)
    cluster.refresh()
    answer = {"key": row.key, "tenant": tenant.slug, "expires_at": row.expires_at.isoformat()}
    return JsonResponse(answer, headers={"cache-control": "no-store"})
