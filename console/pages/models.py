"""Models: who serves each, what it costs, code that calls it; price and retirement."""

from typing import Any

from django.conf import settings
from django.contrib import messages
from django.db import transaction
from django.forms import ModelForm
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.http import require_http_methods, require_safe

from console import audit, snippets
from console.auth import operator_required
from console.models import Model
from console.pages import cluster
from controlplane import domain

VALUE_FIELDS = ("max_model_len", "gpu_hour_usd", "is_active")


class ModelValuesForm(ModelForm):
    """What can be changed of a model; without `is_active` it is retired."""

    class Meta:
        model = Model
        fields = VALUE_FIELDS


@operator_required
@require_safe
def models(request: HttpRequest) -> HttpResponse:
    """Every model with the workers that have it now."""
    view = cluster.view()
    workers = () if view is None else view.workers
    url = snippets.base_url(request)
    context = {
        "page": "models",
        "rows": [shown(model, workers, url) for model in Model.objects.all()],
        "is_serving": view is not None,
    }
    return render(request, "console/models.html", context)


def shown(model: Model, workers: tuple[domain.WorkerView, ...], url: str) -> dict[str, Any]:
    """A model's row: its workers, its state, its price with where it comes from."""
    having = [
        {"worker": worker, "max_model_len": loaded.max_model_len}
        for worker in workers
        for loaded in worker.models
        if loaded.model_id == model.model_id
    ]
    is_live = any(item["worker"].status == "live" for item in having)
    return {
        "model": model,
        "workers": having,
        "state": "disabled" if not model.is_active else "live" if is_live else "no_data",
        "price_usd": settings.GPU_HOUR_USD if model.gpu_hour_usd is None else model.gpu_hour_usd,
        "snippets": snippets.of_chat(url, model.model_id),
    }


@operator_required
@require_http_methods(["GET", "HEAD", "POST"])
def edit(request: HttpRequest, pk: int) -> HttpResponse:
    """Change length, price or whether it may be named."""
    row = get_object_or_404(Model, pk=pk)
    before = {name: getattr(row, name) for name in VALUE_FIELDS}
    form = ModelValuesForm(request.POST or None, instance=row)
    if request.method == "POST" and form.is_valid():
        after = {name: getattr(row, name) for name in VALUE_FIELDS}
        words = audit.changes(before, after)
        if words:
            with transaction.atomic():
                form.save()
                audit.record(request.user, row, words, before=before, after=after)
            cluster.refresh()
        messages.success(request, f"{row.model_id}: {words or 'nothing changed'}.")
        return redirect("pages:models")
    return render(
        request, "console/model_edit.html", {"page": "models", "form": form, "name": row.model_id}
    )
