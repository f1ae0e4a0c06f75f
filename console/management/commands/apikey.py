"""Keys of tenants: create, list, rotate, revoke. A secret is printed once, when it is made."""

import json
from datetime import timedelta
from typing import Any

from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.utils import timezone
from rich.console import Console
from rich.table import Column, Table

from console import keys
from console.models import ApiKey, Tenant
from console.models.tenants import SCOPES

DAYS_MAX = 3_650.0
OVERLAP_HOURS = 24.0


class Command(BaseCommand):
    help = "Keys of tenants for /v1 (exit code 2: no such tenant or key)"

    def add_arguments(self, parser: CommandParser) -> None:
        actions = parser.add_subparsers(dest="action", required=True)
        create = actions.add_parser("create", help="make a key; its secret is shown once")
        create.add_argument("tenant")
        create.add_argument("--name", default="")
        create.add_argument("--scope", action="append", default=[], choices=SCOPES)
        create.add_argument("--model", action="append", default=[], help="ids it may name")
        create.add_argument("--days", type=float, help="until it expires (default: never)")
        listing = actions.add_parser("list", help="all keys, or those of one tenant")
        listing.add_argument("tenant", nargs="?")
        rotate = actions.add_parser("rotate", help="a new key; the old one expires soon")
        rotate.add_argument("public_id")
        rotate.add_argument("--overlap-hours", type=float, default=OVERLAP_HOURS)
        revoke = actions.add_parser("revoke", help="switch a key off, its running streams too")
        revoke.add_argument("public_id")
        for action in (create, listing, rotate, revoke):
            action.add_argument("--json", action="store_true")

    def handle(self, *args: Any, **options: Any) -> None:
        if options["action"] == "list":
            self.show(self.listed(options["tenant"]), options["json"])
            return
        row = getattr(self, options["action"])(options)
        if options["json"]:
            self.stdout.write(json.dumps(_json(row)))
            return
        self.stdout.write(f"{row}  {row.tenant.slug}  {_state(row)}")
        if hasattr(row, "key"):
            self.stdout.write(f"key  {row.key}")
            self.stdout.write("It is not shown again.")

    def create(self, options: dict[str, Any]) -> ApiKey:
        tenant = self.tenant(options["tenant"])
        days = options["days"]
        if days is not None and not 0 < days <= DAYS_MAX:
            raise CommandError(f"--days={days:g}: expected up to {DAYS_MAX:g}", returncode=2)
        expires_at = None if days is None else timezone.now() + timedelta(days=days)
        values = {
            "name": options["name"],
            "scopes": options["scope"],
            "model_ids": options["model"],
            "expires_at": expires_at,
        }
        try:
            ApiKey(tenant=tenant, **values).clean_fields(exclude=["public_id", "last4"])
        except ValidationError as error:
            raise CommandError("; ".join(error.messages), returncode=2) from None
        return keys.create(tenant, **values)

    def rotate(self, options: dict[str, Any]) -> ApiKey:
        old, hours = self.key(options["public_id"]), options["overlap_hours"]
        if not 0 <= hours <= 24 * 30:
            raise CommandError(f"--overlap-hours={hours:g}: expected 0 to 720", returncode=2)
        if not old.is_active or old.replaced_by is not None:
            raise CommandError(f"{old} is switched off or was rotated before", returncode=1)
        return keys.rotate(old, timedelta(hours=hours))

    def revoke(self, options: dict[str, Any]) -> ApiKey:
        row = self.key(options["public_id"])
        row.is_active = False
        row.save()
        return row

    def listed(self, slug: str | None) -> list[ApiKey]:
        rows = ApiKey.objects.select_related("tenant", "replaced_by")
        return list(rows if slug is None else rows.filter(tenant=self.tenant(slug)))

    def show(self, rows: list[ApiKey], is_json: bool) -> None:
        if is_json:
            self.stdout.write(json.dumps([_json(row) for row in rows]))
            return
        if not rows:
            self.stdout.write("No keys. Make one: manage.py apikey create TENANT")
            return
        table = Table(Column("id", no_wrap=True), "ends in", "tenant", "name", "state", "scopes")
        table.add_column("models")
        table.add_column("last used")
        for row in rows:
            used = "never" if row.last_used_at is None else f"{row.last_used_at:%Y-%m-%d %H:%M}"
            scopes, models = ", ".join(row.scopes) or "all", ", ".join(row.model_ids) or "all"
            names = (row.public_id, row.last4, row.tenant.slug, row.name)
            table.add_row(*names, _state(row), scopes, models, used)
        Console(file=self.stdout._out).print(table)

    def tenant(self, slug: str) -> Tenant:
        row = Tenant.objects.filter(slug=slug).first()
        if row is None:
            raise CommandError(f"no tenant {slug}", returncode=2)
        return row

    def key(self, public_id: str) -> ApiKey:
        row = ApiKey.objects.select_related("tenant", "replaced_by").filter(public_id=public_id)
        found = row.first()
        if found is None:
            raise CommandError(f"no key {public_id}", returncode=2)
        return found


def _state(row: ApiKey) -> str:
    if not row.is_active:
        return "revoked"
    if row.expires_at is None:
        return "active"
    word = "expired" if row.expires_at <= timezone.now() else "expires"
    return f"{word} {row.expires_at:%Y-%m-%d %H:%M}"


def _json(row: ApiKey) -> dict[str, Any]:
    answer = {
        "public_id": row.public_id,
        "tenant": row.tenant.slug,
        "name": row.name,
        "is_active": row.is_active,
        "expires_at": None if row.expires_at is None else row.expires_at.isoformat(),
        "scopes": row.scopes,
        "models": row.model_ids,
        "last_used_at": None if row.last_used_at is None else row.last_used_at.isoformat(),
    }
    return answer | ({"key": row.key} if hasattr(row, "key") else {})
