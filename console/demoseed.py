"""Rows and secrets of the demo: operator, tenant, key, model, scaled classes; safe to repeat.

What a person needs to log in is kept in `demo.json` (0600) of the demo's var folder, because the
database has only hashes of it.
"""

import json
import os
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path

from django.contrib.auth.hashers import check_password
from django.contrib.auth.models import User
from django.core.management.base import CommandError

from console.auth import mint_key, parse_key, secret_hmac
from console.models import ApiKey, Quota, SLOClassRow, Tenant
from console.models.fleet import DEFAULT_CLASSES, ensure_default_classes

MODEL_ID = "smollm2-135m"
ADMIN = "admin"
TENANT = "demo"
DEFAULT_CLASS = "interactive"
CONCURRENCY_MAX = 64
SCALED_NOTE = "scaled for this device"


@dataclass(frozen=True, slots=True)
class Login:
    """What the banner prints and `make demo-info` repeats."""

    admin: str
    password: str
    tenant: str
    api_key: str
    url: str = ""
    model_folder: str = ""


def state_path(var: Path) -> Path:
    return var / "demo.json"


def read_login(var: Path) -> Login | None:
    """The login of an earlier start, or None. Raises CommandError for a file that is not ours."""
    path = state_path(var)
    if not path.exists():
        return None
    try:
        return Login(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CommandError(f"{path} is unreadable ({error}): run make clean-demo") from None


def write_login(var: Path, login: Login) -> None:
    """Whole or not at all, and readable by its owner only."""
    temporary = state_path(var).with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        json.dump(asdict(login), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, state_path(var))


def seed(var: Path, url: str, model_folder: Path) -> Login:
    """Creates what is absent and keeps what is there; the key changes only when it is lost."""
    ensure_default_classes()
    tenant, _ = Tenant.objects.get_or_create(
        slug=TENANT,
        defaults={
            "name": "Demo",
            "default_class": SLOClassRow.objects.get(name=DEFAULT_CLASS),
        },
    )
    Quota.objects.get_or_create(tenant=tenant, defaults={"concurrency_max": CONCURRENCY_MAX})
    known = read_login(var)
    login = Login(
        admin=ADMIN,
        password=_ensure_admin(known),
        tenant=TENANT,
        api_key=_ensure_key(tenant, known),
        url=url,
        model_folder=str(model_folder),
    )
    write_login(var, login)
    return login


def _ensure_admin(known: Login | None) -> str:
    """The operator's password: the known one when it still opens the account, else a new one."""
    user, _ = User.objects.get_or_create(username=ADMIN)
    if known is not None and check_password(known.password, user.password):
        return known.password
    password = secrets.token_urlsafe(12)
    user.is_staff = user.is_superuser = True
    user.set_password(password)
    user.save()
    return password


def _ensure_key(tenant: Tenant, known: Login | None) -> str:
    """The tenant's key: the known one when its row is there and alive, else a new one."""
    parsed = parse_key(known.api_key) if known is not None else None
    if known is not None and parsed is not None:
        row = ApiKey.objects.filter(public_id=parsed.public_id, is_active=True).first()
        if row is not None and bytes(row.secret_hmac) == secret_hmac(parsed.secret):
            return known.api_key
    minted = mint_key()
    ApiKey.objects.create(
        tenant=tenant,
        name="demo",
        public_id=minted.public_id,
        secret_hmac=minted.secret_hmac,
        last4=minted.last4,
    )
    return minted.text


def scale_classes(ttft_s: float, itl_s: float) -> None:
    """Raises the targets that this device cannot meet to what was measured, and says so.

    Shipped targets stay where the device is fast enough."""
    ensure_default_classes()
    for shipped in DEFAULT_CLASSES:
        if shipped.get("is_batch"):
            continue
        targets = {
            "ttft_s_p99": max(shipped["ttft_s_p99"], ttft_s),
            "itl_s_p99": max(shipped["itl_s_p99"], itl_s),
        }
        is_scaled = any(targets[name] > shipped[name] for name in targets)
        row = SLOClassRow.objects.get(name=shipped["name"])
        row.ttft_s_p99, row.itl_s_p99 = targets["ttft_s_p99"], targets["itl_s_p99"]
        row.note = SCALED_NOTE if is_scaled else ""
        row.save()
