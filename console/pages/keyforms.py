"""What operators choose about keys."""

from typing import Any

from django import forms
from django.http import QueryDict

from console.models import Model, Tenant
from console.models.tenants import MODEL_IDS_MAX, SCOPES

DAYS_MAX = 3_650
OVERLAP_HOURS_DEFAULT = 24
OVERLAP_HOURS_MAX = 720
STATES = ("active", "expiring", "expired", "revoked")


class KeyFilter(forms.Form):
    """Filters of the list; all stand in the query string."""

    q = forms.CharField(label="Name or id", required=False, max_length=64)
    tenant = forms.CharField(label="Tenant", required=False, max_length=64)
    state = forms.ChoiceField(
        label="State",
        required=False,
        choices=[("", "any state"), *((name, name) for name in STATES)],
    )

    def __init__(self, query: QueryDict) -> None:
        super().__init__(query)
        self.fields["q"].widget.attrs.update({"data-filter": "", "placeholder": "starts with …"})
        self.fields["state"].widget.attrs["data-submit"] = ""

    def values(self) -> dict[str, Any]:
        """The accepted filters; a value that is no choice filters nothing."""
        self.is_valid()
        return self.cleaned_data


class NewKeyForm(forms.Form):
    """A key that is made when this is sent."""

    tenant = forms.ModelChoiceField(
        label="Tenant", queryset=Tenant.objects.filter(is_active=True), to_field_name="slug"
    )
    name = forms.CharField(label="Name", max_length=128, required=False)
    days = forms.IntegerField(
        label="Ends after (days)", required=False, min_value=1, max_value=DAYS_MAX
    )
    scopes = forms.MultipleChoiceField(
        label="Scopes (none: everything)",
        required=False,
        choices=[(name, name) for name in SCOPES],
        widget=forms.CheckboxSelectMultiple,
    )
    model_ids = forms.MultipleChoiceField(
        label="Models (none: all)",
        required=False,
        widget=forms.SelectMultiple(attrs={"size": 4}),
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fields["days"].widget.attrs["placeholder"] = "never"
        known = Model.objects.filter(is_active=True).values_list("model_id", flat=True)
        self.fields["model_ids"].choices = [(name, name) for name in known]

    def clean_model_ids(self) -> list[str]:
        chosen = self.cleaned_data["model_ids"]
        if len(chosen) > MODEL_IDS_MAX:
            raise forms.ValidationError(f"At most {MODEL_IDS_MAX} models.")
        return chosen


class RotateForm(forms.Form):
    """How long the old key lives on beside the new one."""

    overlap_hours = forms.IntegerField(
        label="Overlap (hours)",
        initial=OVERLAP_HOURS_DEFAULT,
        min_value=0,
        max_value=OVERLAP_HOURS_MAX,
    )
