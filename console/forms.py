"""Validation of what operators type and of filters in the query string."""

from datetime import timedelta
from typing import Any

from django import forms
from django.db.models import Q
from django.http import QueryDict

from console.models import AlertRule, RequestRecord, Tenant

RANGES = {
    "15m": timedelta(minutes=15),
    "1h": timedelta(hours=1),
    "6h": timedelta(hours=6),
    "24h": timedelta(hours=24),
    "7d": timedelta(days=7),
    "all": None,
}
RANGE_DEFAULT = "24h"
ROUTING_RANGE = "1h"
STATUSES = ("completed", "cancelled", "failed", "rejected", "expired")
ROLES = (("prefill", "prefill"), ("decode", "decode"), ("mixed", "mixed"))
DEVICES = (("cpu", "cpu"), ("cuda:0", "cuda:0"))
PLAN_KINDS = ("role", "model", "start", "drain")
PLANNER = "planner"  # in `by`, where no operator stands
ENGINES = (("native", "native"), ("fake", "fake (modelled time)"))


def _choices(any_word: str, values: Any) -> list[tuple[str, str]]:
    return [("", any_word), *((value, value) for value in values)]


class HistoryFilter(forms.Form):
    """Filters of the request history; every field is optional and stands in the query string."""

    q = forms.CharField(label="Request id", required=False, max_length=64, strip=True)
    range = forms.ChoiceField(
        label="Arrived", required=False, choices=[(key, key) for key in RANGES]
    )
    status = forms.ChoiceField(
        label="Status", required=False, choices=_choices("any status", STATUSES)
    )
    split = forms.ChoiceField(
        label="Placement",
        required=False,
        choices=_choices("any placement", ("local", "handoff")),
    )
    tenant = forms.CharField(label="Tenant", required=False, max_length=64)
    key = forms.CharField(label="Key id", required=False, max_length=8)
    model = forms.CharField(label="Model", required=False, max_length=128)
    reason = forms.CharField(label="Reason", required=False, max_length=64)
    worker = forms.CharField(label="Worker", required=False, max_length=64)

    def __init__(self, query: QueryDict, class_names: list[str]) -> None:
        data = query.copy()
        data.setdefault("range", RANGE_DEFAULT)
        super().__init__(data)
        self.fields["class"] = forms.ChoiceField(
            label="Class", required=False, choices=_choices("any class", class_names)
        )
        self.fields["demo"] = forms.BooleanField(label="with demo history", required=False)
        self.fields["reason"].widget.attrs["placeholder"] = "queue_full, stop …"
        self.fields["q"].widget.attrs.update({"data-filter": "", "placeholder": "starts with …"})
        for name in ("range", "status", "split", "class", "demo"):
            self.fields[name].widget.attrs["data-submit"] = ""

    def values(self) -> dict[str, Any]:
        """The accepted filters; a value that is no choice filters nothing."""
        self.is_valid()
        return {**self.cleaned_data, "range": self.cleaned_data.get("range") or RANGE_DEFAULT}


class PlanFilter(forms.Form):
    """Filters of the plan's history, in the query string."""

    kind = forms.ChoiceField(
        label="Change", required=False, choices=_choices("any change", PLAN_KINDS)
    )
    by = forms.ChoiceField(
        label="By", required=False, choices=_choices("anybody", ("planner", "operators"))
    )
    carried = forms.ChoiceField(
        label="Carried out", required=False, choices=_choices("or not", ("yes", "shadow only"))
    )
    worker = forms.CharField(label="Worker", required=False, max_length=64)

    def __init__(self, query: QueryDict) -> None:
        super().__init__(query.copy())
        for name in ("kind", "by", "carried"):
            self.fields[name].widget.attrs["data-submit"] = ""
        self.fields["worker"].widget.attrs["data-filter"] = ""

    def conditions(self) -> Q:
        """Of PlanRecord; a value that is no choice filters nothing."""
        self.is_valid()
        asked = self.cleaned_data
        made = Q()
        if asked.get("kind"):
            made &= Q(kind=asked["kind"])
        if asked.get("worker"):
            made &= Q(worker_id=asked["worker"])
        if asked.get("carried"):
            made &= Q(is_shadow=asked["carried"] != "yes")
        if asked.get("by"):
            is_planner = Q(by=PLANNER)
            made &= is_planner if asked["by"] == "planner" else ~is_planner
        return made


class RoutingFilter(forms.Form):
    """Whose decisions of which time, in the query string."""

    range = forms.ChoiceField(
        label="Arrived", required=False, choices=[(key, key) for key in RANGES]
    )
    tenant = forms.CharField(label="Tenant", required=False, max_length=64)
    model = forms.CharField(label="Model", required=False, max_length=128)
    demo = forms.BooleanField(label="with demo history", required=False)

    def __init__(self, query: QueryDict) -> None:
        data = query.copy()
        data.setdefault("range", ROUTING_RANGE)
        super().__init__(data)
        self.fields["tenant"].widget.attrs["data-filter"] = ""
        for name in ("range", "demo"):
            self.fields[name].widget.attrs["data-submit"] = ""

    def values(self) -> dict[str, Any]:
        """The accepted filters, named as in the history; what is no choice filters nothing."""
        self.is_valid()
        chosen = {**self.cleaned_data, "range": self.cleaned_data.get("range") or ROUTING_RANGE}
        return {**chosen, "demo": "on" if chosen.get("demo") else ""}


class AlertRuleForm(forms.ModelForm):
    """When a rule opens an alert."""

    class Meta:
        model = AlertRule
        fields = ("threshold", "for_s", "is_active")


class TenantFilter(forms.Form):
    """One tenant only, in the query string."""

    tenant = forms.CharField(
        label="Tenant",
        required=False,
        max_length=64,
        widget=forms.TextInput(attrs={"data-filter": "", "placeholder": "all tenants"}),
    )

    def tenant_id(self) -> str:
        return self.cleaned_data.get("tenant", "") if self.is_valid() else ""


class AddWorkerForm(forms.Form):
    """What the join command shall say. The token is made when this is sent."""

    name = forms.RegexField(
        label="Name",
        regex=r"^[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?$",
        initial="worker-1",
        error_messages={"invalid": "Lower-case letters, digits, '.', '_' and '-', at most 64."},
    )
    role = forms.ChoiceField(label="Role", choices=ROLES, initial="mixed")
    device = forms.ChoiceField(label="Device", choices=DEVICES, initial="cpu")
    engine = forms.ChoiceField(label="Engine", choices=ENGINES, initial="native")


class RoleForm(forms.Form):
    """The role a worker shall take."""

    role = forms.ChoiceField(label="New role", choices=ROLES)


class PlaygroundKeyForm(forms.Form):
    """For which tenant a short-lived key is made."""

    tenant = forms.ModelChoiceField(
        queryset=Tenant.objects.filter(is_active=True), to_field_name="slug"
    )


def known_classes() -> list[str]:
    """Class names that stored requests carry, also of classes deleted since."""
    names = RequestRecord.objects.order_by().values_list("class_name", flat=True).distinct()
    return sorted(names)
