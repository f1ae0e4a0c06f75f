"""Brings contracts from their rows to the plane, and what was spent of them before a restart."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

from django.db.models import Q, Sum

from console.models import ContractRow, RequestRecord
from console.snapshot import Snapshot
from controlplane.contracts import Preview
from controlplane.domain import Contract, ContractsSet, Spent
from controlplane.ledger import price_usd

BILLED = ("completed", "cancelled")


def month_of(now: datetime) -> str:
    """Name of the budget period, UTC."""
    return now.astimezone(UTC).strftime("%Y-%m")


def spent_since(contracts: Sequence[Contract], now: datetime) -> tuple[Spent, ...]:
    """What finished requests of this month used, by contract; reads the database."""
    start = now.astimezone(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    spent = []
    for contract in contracts:
        tenant_id, model_id, class_name = contract.key
        used = RequestRecord.objects.filter(
            Q(status__in=BILLED),
            arrived_at__gte=start,
            tenant_id=tenant_id,
            model_id=model_id,
            class_name=class_name,
            decode_worker__gt="",
            is_demo_history=False,
        ).aggregate(prompt=Sum("prompt_tokens"), output=Sum("output_tokens"))
        prompt, output = used["prompt"] or 0, used["output"] or 0
        spent.append(Spent(contract.key, prompt + output, price_usd(contract, prompt, output)))
    return tuple(spent)


class ContractFeed:
    """Gives the plane's next ContractsSet when rows or the month have changed, else None."""

    def __init__(self) -> None:
        self._given: tuple[Contract, ...] = ()

    def start(self, snapshot: Snapshot, now: datetime) -> ContractsSet:
        """The first one; reads the database, so not on the loop."""
        self._given = in_force(snapshot, now)
        return ContractsSet(self._given, spent_since(self._given, now))

    def next(self, snapshot: Snapshot, now: datetime) -> ContractsSet | None:
        contracts = in_force(snapshot, now)
        if contracts == self._given:
            return None
        self._given = contracts
        return ContractsSet(contracts)


def in_force(snapshot: Snapshot, now: datetime) -> tuple[Contract, ...]:
    period = month_of(now)
    if all(contract.period == period for contract in snapshot.contracts):
        return snapshot.contracts
    return tuple(replace(contract, period=period) for contract in snapshot.contracts)


def changed(row: ContractRow, snapshot: Snapshot) -> list[Contract]:
    """All contracts as they would be with this row in place of its former self."""
    new = row.as_domain("")
    return [item for item in snapshot.contracts if item.key != new.key] + [new]


def effect_text(preview: Preview) -> str:
    """What a change does to a model's capacity, for the operator."""
    if preview.capacity is None:
        return f"No live worker serves {preview.model_id}: its contracts are not backed."
    return (
        f"{preview.model_id}: contracts need {preview.committed_after:.2f} GPU-s/s, before"
        f" {preview.committed_before:.2f}, of {preview.capacity.gpu_s_per_s:.2f} that"
        f" {preview.capacity.num_workers} live workers give; {preview.kv_after} of"
        f" {preview.capacity.kv_tokens} KV tokens."
    )
