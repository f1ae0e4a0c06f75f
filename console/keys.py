"""Making, rotating and switching off tenants' keys, for the API, the pages and the command."""

from datetime import datetime, timedelta
from typing import Any

from django.db import models, transaction
from django.utils import timezone

from console.auth import MintedKey, mint_key
from console.models import ApiKey, Tenant


def create(tenant: Tenant, **values: Any) -> ApiKey:
    """A new key; its text is on the row's attribute `key`, and nowhere afterwards."""
    minted: MintedKey = mint_key()
    row = ApiKey.objects.create(
        tenant=tenant,
        public_id=minted.public_id,
        secret_hmac=minted.secret_hmac,
        last4=minted.last4,
        **values,
    )
    row.key = minted.text
    return row


def rotate(old: ApiKey, overlap: timedelta) -> ApiKey:
    """A new key with the same rights; the old one expires after the overlap, or when it would."""
    with transaction.atomic():
        new = create(old.tenant, name=old.name, scopes=old.scopes, model_ids=old.model_ids)
        ends_at = timezone.now() + overlap
        old.expires_at = ends_at if old.expires_at is None else min(old.expires_at, ends_at)
        old.replaced_by = new
        old.save()
    return new


def store_used(used_at: dict[str, datetime]) -> None:
    """When keys were used; not a change of theirs, so snapshots stay as they are."""
    rows = models.QuerySet(ApiKey)
    for public_id, at in used_at.items():
        rows.filter(public_id=public_id).update(last_used_at=at)
