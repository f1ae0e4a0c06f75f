"""Alerts: what fires, who has seen it, what was resolved, and the rules that decide."""

from typing import Any

from django.contrib import messages
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.utils import timezone
from django.views.decorators.http import require_POST, require_safe

from console import audit
from console.auth import operator_required
from console.forms import AlertRuleForm
from console.models import Alert, AlertRule

RESOLVED_SHOWN = 50
OPEN_SHOWN = 200


@operator_required
@require_safe
def alerts(request: HttpRequest) -> HttpResponse:
    """Open alerts, the newest that were resolved, and the rules."""
    known = Alert.objects.select_related("rule")
    is_part = request.GET.get("part") == "rows"
    context: dict[str, Any] = {
        "page": "alerts",
        "open": known.filter(resolved_at=None)[:OPEN_SHOWN],
        "resolved": known.exclude(resolved_at=None).order_by("-resolved_at", "-id")[
            :RESOLVED_SHOWN
        ],
    }
    if not is_part:
        context["rules"] = [
            {"rule": rule, "form": AlertRuleForm(instance=rule, auto_id=f"rule-{rule.pk}-%s")}
            for rule in AlertRule.objects.all()
        ]
    return render(request, f"console/alerts.html{'#rows' if is_part else ''}", context)


@operator_required
@require_POST
def acknowledge(request: HttpRequest, alert_id: int) -> HttpResponse:
    """Somebody has seen it; it stays open until its cause is gone."""
    alert = get_object_or_404(Alert.objects.select_related("rule"), pk=alert_id)
    firing = Alert.objects.filter(pk=alert.pk, state="firing")
    seen = {"acknowledged_at": timezone.now(), "acknowledged_by": request.user.get_username()}
    if firing.update(state="acknowledged", **seen) == 1:
        audit.record(request.user, alert, "acknowledged")
        messages.success(request, f"{alert} is acknowledged.")
    else:
        messages.error(request, f"{alert} was acknowledged or resolved already.")
    return redirect("pages:alerts")


@operator_required
@require_POST
def rule(request: HttpRequest, rule_id: int) -> HttpResponse:
    """Change a rule; it holds from the next look on."""
    row = get_object_or_404(AlertRule, pk=rule_id)
    form = AlertRuleForm(request.POST, instance=row)
    if not form.is_valid():
        wrong = "; ".join(text for texts in form.errors.values() for text in texts)
        messages.error(request, f"{row} is unchanged: {wrong}")
        return redirect("pages:alerts")
    form.save()
    state = "on" if row.is_active else "off"
    words = f"threshold {row.threshold:g}, for {row.for_s:g} s, {state}"
    audit.record(request.user, row, words)
    messages.success(request, f"{row}: {words}.")
    return redirect("pages:alerts")
