"""Tenants, keys, models and classes as one immutable value that the request path reads.

The serving process never asks the database for them: a thread looks once a second whether a row
changed and then puts a new `Snapshot` in place of the old one.
"""

import hashlib
import hmac
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from django.conf import settings
from django.db import DatabaseError, close_old_connections, connections
from django.db.models import Count, Max

from console.models import ApiKey, ContractRow, Model, Quota, SLOClassRow, Tenant
from console.models.tenants import CONCURRENCY_DEFAULT
from controlplane.domain import Contract, SLOClass

logger = logging.getLogger(__name__)

POLL_S = 1.0
_TABLES: tuple[type[Any], ...] = (Tenant, ApiKey, Quota, Model, SLOClassRow, ContractRow)

Version = tuple[tuple[int, datetime | None], ...]


@dataclass(frozen=True, slots=True)
class TenantFacts:
    """An active tenant; `tenant_id` is its slug, `salt` keeps its prefix cache to itself."""

    tenant_id: str
    name: str
    default_class: str
    concurrency_max: int
    salt: bytes
    weight: float = 1.0  # of its share where tenants wait for each other


@dataclass(frozen=True, slots=True)
class KeyFacts:
    """A key as stored; auth.verify decides whether it is good now."""

    public_id: str
    tenant_id: str
    secret_hmac: bytes
    is_active: bool
    expires_at: datetime | None
    last4: str
    scopes: frozenset[str] = frozenset()  # empty: everything
    model_ids: frozenset[str] = frozenset()  # empty: all

    def may(self, scope: str) -> bool:
        return not self.scopes or scope in self.scopes

    def may_name(self, model_id: str) -> bool:
        return not self.model_ids or model_id in self.model_ids


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A model that may be named in requests; `folder` is empty for modelled engines."""

    model_id: str
    folder: str
    max_model_len: int  # tokens
    gpu_hour_usd: float
    is_active: bool


@dataclass(frozen=True, slots=True)
class ClassFacts:
    """An SLO class with the `service_tier` that selects it."""

    slo: SLOClass
    service_tier: str
    price_factor: float
    note: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a request is checked against; keyed by slug, public id, model id and class name."""

    tenants: Mapping[str, TenantFacts]
    keys: Mapping[str, KeyFacts]
    models: Mapping[str, ModelFacts]
    classes: Mapping[str, ClassFacts]
    contracts: tuple[Contract, ...] = ()  # without a budget period: console.contracts names it

    @classmethod
    def load(cls) -> "Snapshot":
        """Read the rows; called in a thread, never on the event loop."""
        tenants = Tenant.objects.filter(is_active=True).select_related("default_class", "quota")
        return cls(
            tenants={row.slug: _tenant_facts(row) for row in tenants},
            keys={
                row.public_id: KeyFacts(
                    public_id=row.public_id,
                    tenant_id=row.tenant.slug,
                    secret_hmac=bytes(row.secret_hmac),
                    is_active=row.is_active,
                    expires_at=row.expires_at,
                    last4=row.last4,
                    scopes=frozenset(row.scopes),
                    model_ids=frozenset(row.model_ids),
                )
                for row in ApiKey.objects.select_related("tenant")
            },
            models={row.model_id: _model_facts(row) for row in Model.objects.all()},
            classes={
                row.name: ClassFacts(row.as_domain(), row.service_tier, row.price_factor, row.note)
                for row in SLOClassRow.objects.all()
            },
            contracts=tuple(
                row.as_domain("")
                for row in ContractRow.objects.filter(tenant__is_active=True).select_related(
                    "tenant", "model", "slo_class"
                )
            ),
        )

    def class_of_tier(self, service_tier: str) -> ClassFacts | None:
        """The class that serves a tier; tiers are unique among classes."""
        for facts in self.classes.values():
            if facts.service_tier == service_tier:
                return facts
        return None

    def gpu_hour_usd(self, model_id: str) -> float:
        """Price of a worker that serves this model."""
        facts = self.models.get(model_id)
        return settings.GPU_HOUR_USD if facts is None else facts.gpu_hour_usd


EMPTY = Snapshot(tenants={}, keys={}, models={}, classes={})


def tenant_salt(tenant_id: str) -> bytes:
    """First link of a tenant's prefix hash chain: no tenant can guess another's."""
    message = f"salt|{tenant_id}".encode()
    return hmac.new(settings.SLACKWATER_PLANE_SECRET, message, hashlib.sha256).digest()


def read_version() -> Version:
    """(rows, latest change) of each table: differs after any insert, update or delete."""
    versions = []
    for table in _TABLES:
        found = table.objects.aggregate(n=Count("pk"), latest=Max("updated_at"))
        versions.append((found["n"], found["latest"]))
    return tuple(versions)


def _tenant_facts(row: Tenant) -> TenantFacts:
    quota = getattr(row, "quota", None)
    return TenantFacts(
        tenant_id=row.slug,
        name=row.name,
        default_class=row.default_class.name,
        concurrency_max=CONCURRENCY_DEFAULT if quota is None else quota.concurrency_max,
        salt=tenant_salt(row.slug),
        weight=row.weight,
    )


def _model_facts(row: Model) -> ModelFacts:
    price = settings.GPU_HOUR_USD if row.gpu_hour_usd is None else row.gpu_hour_usd
    return ModelFacts(row.model_id, row.folder, row.max_model_len, price, row.is_active)


class SnapshotKeeper:
    """Owns `current` and the thread that renews it; readers just read the attribute.

    While the database is away the last good snapshot stays in force.
    """

    def __init__(
        self, poll_s: float = POLL_S, on_change: Callable[[Snapshot], None] | None = None
    ) -> None:
        self.current = EMPTY
        self.num_failures = 0
        self._poll_s = poll_s
        self._on_change = on_change
        self._version: Version | None = None
        self._looked_at_s = -math.inf
        self._lock = threading.Lock()  # one loader at a time: the thread, or a caller of refresh
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Load once (a failure is raised here), then look for changes in a thread."""
        self.refresh()
        self._thread = threading.Thread(target=self._poll, name="snapshot", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def refresh(self) -> Snapshot:
        """Look now; for callers in threads that have just changed a row."""
        with self._lock:
            version = read_version()
            if version != self._version:
                self.current = Snapshot.load()
                self._version = version
                if self._on_change is not None:
                    self._on_change(self.current)
            self._looked_at_s = time.monotonic()
        return self.current

    def age_s(self) -> float:
        """Seconds since the rows were last seen to agree with `current`; infinite before that."""
        return time.monotonic() - self._looked_at_s

    def _poll(self) -> None:
        try:
            while not self._stop.wait(self._poll_s):
                close_old_connections()
                try:
                    self.refresh()
                except DatabaseError as error:
                    self.num_failures += 1
                    logger.warning("snapshot not renewed failures=%d: %s", self.num_failures, error)
        finally:
            connections.close_all()
