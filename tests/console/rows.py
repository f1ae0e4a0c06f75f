"""Rows with plain defaults for tests of the console; a test names only what it is about."""

import json
from pathlib import Path
from typing import Any

from django.contrib.auth.models import User
from django.utils import timezone

from console import batchfiles
from console.auth import MintedKey, mint_key
from console.models import ApiKey, ApiToken, Batch, Model, Quota, SLOClassRow, Tenant
from console.models.fleet import ensure_default_classes

MODEL_ID = "tiny"


def make_tenant(slug: str = "acme", concurrency_max: int = 8, **values: Any) -> Tenant:
    ensure_default_classes()
    values.setdefault("default_class", SLOClassRow.objects.get(name="interactive"))
    tenant = Tenant.objects.create(slug=slug, name=slug.title(), **values)
    Quota.objects.create(tenant=tenant, concurrency_max=concurrency_max)
    return tenant


def make_key(tenant: Tenant, **values: Any) -> MintedKey:
    minted = mint_key()
    ApiKey.objects.create(
        tenant=tenant,
        public_id=minted.public_id,
        secret_hmac=minted.secret_hmac,
        last4=minted.last4,
        **values,
    )
    return minted


def make_model(model_id: str = MODEL_ID, **values: Any) -> Model:
    values.setdefault("max_model_len", 512)
    return Model.objects.create(model_id=model_id, **values)


def make_operator(name: str = "olga") -> User:
    return User.objects.create_user(name, is_staff=True, is_superuser=True)


def make_token(user: User, **values: Any) -> str:
    minted = mint_key("op-sw")
    ApiToken.objects.create(
        user=user,
        public_id=minted.public_id,
        secret_hmac=minted.secret_hmac,
        last4=minted.last4,
        **values,
    )
    return minted.text


def line(custom_id: str, **body: Any) -> dict[str, Any]:
    """One valid line of a batch file."""
    body.setdefault("model", MODEL_ID)
    body.setdefault("messages", [{"role": "user", "content": f"say {custom_id}"}])
    body.setdefault("max_tokens", 4)
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    return path


def make_batch(tenant: Tenant, folder: Path, num_lines: int = 3, window: str = "24h") -> Batch:
    path = write_lines(folder / "in.jsonl", [line(f"c{index}") for index in range(num_lines)])
    batch = batchfiles.submit(tenant, path, window, timezone.now(), [MODEL_ID])
    assert isinstance(batch, Batch), batch
    return batch
