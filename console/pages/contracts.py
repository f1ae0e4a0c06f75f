"""Contracts and quotas: limits, use now, error budget; a change is previewed, saved, undone."""

import json
from typing import Any

from django.contrib import messages
from django.contrib.admin.models import ADDITION, CHANGE
from django.db import transaction
from django.forms import ModelForm
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.urls import reverse
from django.utils.http import urlencode
from django.views.decorators.http import require_http_methods, require_POST, require_safe

from console import audit, contracts, limits, state
from console.auth import operator_required
from console.models import AuditEvent, ContractRow
from console.pages import cluster
from controlplane.contracts import COMMIT_SHARE, Preview
from controlplane.ledger import AccountView

KEY_FIELDS = ("tenant", "model", "slo_class")
VALUE_FIELDS = (
    *("requests_per_min", "tokens_per_min", "concurrency_max", "attainment", "over_limit"),
    *("when_late", "budget_tokens", "budget_usd", "usd_per_million_prompt"),
    "usd_per_million_output",
)


class ContractForm(ModelForm):
    """Values of one contract; whose it is stands fast once it is made."""

    class Meta:
        model = ContractRow
        fields = [*KEY_FIELDS, *VALUE_FIELDS]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.instance.pk is not None:
            for name in KEY_FIELDS:
                del self.fields[name]


@operator_required
@require_safe
def contracts_list(request: HttpRequest) -> HttpResponse:
    """Every contract with its limits, the fullest marked, and where its promise stands."""
    found = ContractRow.objects.select_related("tenant", "model", "slo_class")
    tenant = request.GET.get("tenant", "")
    if tenant:
        found = found.filter(tenant__slug=tenant)
    accounts = {account.contract.key: account for account in cluster.accounts()}
    rows = [shown(row, accounts) for row in found]
    changed = request.GET.get("changed", "")
    context = {
        "page": "contracts",
        "rows": rows,
        "tenant": tenant,
        "is_serving": state.get() is not None,
        "undoable": undoable(int(changed)) if changed.isdecimal() else None,
    }
    return render(request, "console/contracts.html", context)


def shown(row: ContractRow, accounts: dict[Any, AccountView]) -> dict[str, Any]:
    """A row with its account, None when it is not in force, and its limits."""
    account = accounts.get((row.tenant.slug, row.model.model_id, row.slo_class.name))
    found = [] if account is None else limits.of_account(account)
    tightest = limits.binding(found)
    return {
        "row": row,
        "account": account,
        "limits": [{"limit": limit, "is_binding": limit is tightest} for limit in found],
    }


@operator_required
@require_http_methods(["GET", "HEAD", "POST"])
def edit(request: HttpRequest, pk: int | None = None) -> HttpResponse:
    """A contract's values: `preview` says what they would commit, `save` puts them in force."""
    row = None if pk is None else get_object_or_404(_rows(), pk=pk)
    before = {} if row is None else values_of(row)
    initial = {"requests_per_min": 60, "tokens_per_min": 60_000, "concurrency_max": 16}
    form = ContractForm(request.POST or None, instance=row, initial=initial if row is None else {})
    previews: tuple[Preview, ...] = ()
    words = ""
    if request.method == "POST" and form.is_valid():
        previews = preview(form.instance)
        words = audit.changes(before, values_of(form.instance))
        refusals = [item.refusal for item in previews if item.refusal and item.capacity]
        for refusal in refusals:
            form.add_error(None, refusal.message)
        if "save" in request.POST and not refusals:
            return _save(request, form.instance, before, words or "nothing changed")
    context = {
        "page": "contracts",
        "form": form,
        "row": row,
        "words": words,
        "previews": [{"preview": item, "text": contracts.effect_text(item)} for item in previews],
        "commit_ratio": COMMIT_SHARE,
        "is_serving": state.get() is not None,
    }
    return render(request, "console/contract_edit.html", context)


def preview(row: ContractRow) -> tuple[Preview, ...]:
    """What all contracts would commit with this row as it is; nothing changes."""
    current = state.get()
    if current is None:
        return ()
    found = cluster.preview(contracts.changed(row, current.snapshot.refresh()))
    return tuple(item for item in found if item.model_id == row.model.model_id)


@operator_required
@require_POST
def undo(request: HttpRequest, pk: int) -> HttpResponse:
    """Give a contract the values that it had before its newest change."""
    row = get_object_or_404(_rows(), pk=pk)
    event = undoable(pk)
    if event is None:
        messages.error(request, f"{row} has changed since, or has no change to undo.")
        return redirect("pages:contracts")
    before = values_of(row)
    for name, value in json.loads(event.before).items():
        setattr(row, name, value)
    for item in preview(row):
        if item.refusal is not None and item.capacity is not None:
            messages.error(request, f"Not undone: {item.refusal.message}")
            return redirect("pages:contracts")
    return _save(request, row, before, f"undone: {audit.changes(before, values_of(row))}")


def undoable(pk: int) -> AuditEvent | None:
    """The newest event of a contract, when its values before are known and it still is as after."""
    event = AuditEvent.objects.filter(object_type="contractrow", object_id=str(pk)).first()
    row = ContractRow.objects.filter(pk=pk).first()
    if event is None or row is None or event.before == "{}":
        return None
    return event if json.loads(event.after) == values_of(row) else None


def values_of(row: ContractRow) -> dict[str, Any]:
    """The values that can be changed, by name."""
    return {name: getattr(row, name) for name in VALUE_FIELDS}


def _rows() -> Any:
    return ContractRow.objects.select_related("tenant", "model", "slo_class")


def _save(
    request: HttpRequest, row: ContractRow, before: dict[str, Any], words: str
) -> HttpResponse:
    """Store, audit, put in force, and go back to the list."""
    is_new = row.pk is None
    with transaction.atomic():
        row.save()
        audit.record(
            request.user,
            row,
            "created" if is_new else words,
            ADDITION if is_new else CHANGE,
            before=before,
            after=values_of(row),
        )
    cluster.refresh()
    messages.success(request, f"{row}: {'created' if is_new else words}.")
    return redirect(reverse("pages:contracts") + "?" + urlencode({"changed": row.pk}))
