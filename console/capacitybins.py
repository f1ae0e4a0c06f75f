"""The history of capacity: quarter-hour rows, and what the control plane forecasts from them."""

from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta

from django.db.models import F

from console.facts import HarvestFact
from console.models import CapacityBin
from controlplane import capacity, certificate

BIN_S = 900.0
BINS = int(capacity.DAY_S / BIN_S)
KEPT = timedelta(days=capacity.DAYS_MAX)
SATURATED = 0.9  # share of a bin in which lines waited: what it then gave is all it could give
SUMS = ("seconds", "worker_s", "member_s", "online_s", "batch_s", "batch_tokens", "backlog_s")


def add_harvest(fact: HarvestFact) -> None:
    """Add to the row of its quarter hour; a new row takes the oldest ones' place."""
    values = asdict(fact)
    key = {"model_id": fact.model_id, "start": start_of(fact.at)}
    sums = {name: values[name] for name in SUMS}
    row, is_new = CapacityBin.objects.get_or_create(**key, defaults=sums)
    if is_new:
        CapacityBin.objects.filter(start__lt=key["start"] - KEPT).delete()
    else:
        CapacityBin.objects.filter(pk=row.pk).update(**{n: F(n) + sums[n] for n in SUMS})


def start_of(at: datetime) -> datetime:
    return datetime.fromtimestamp(at.timestamp() // BIN_S * BIN_S, UTC)


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the rows of a model say now."""

    profile: capacity.Profile
    supply: capacity.Supply
    token_s: float  # GPU-seconds per cost token of batch
    today: tuple[float | None, ...]  # online share of the bins so far
    now: datetime

    def forecast(self, horizon_s: float) -> certificate.Forecast:
        now = self.now.astimezone(UTC)
        at_s = 3600.0 * now.hour + 60.0 * now.minute + now.second
        return self.profile.forecast(
            now.weekday(), at_s, self.today, self.supply, max(horizon_s, 2 * BIN_S)
        )


def capacity_of(model_id: str, now: datetime) -> Capacity | None:
    """None while too little has been measured: no worker's time, or no batch line's cost."""
    rows = list(CapacityBin.objects.filter(model_id=model_id, start__gte=now - KEPT))
    seen = [row for row in rows if row.worker_s > 0.0]
    tokens = sum(row.batch_tokens for row in seen)
    batch_s = sum(row.batch_s for row in seen)
    if tokens <= 0.0 or batch_s <= 0.0:
        return None
    days: dict[datetime, list[float | None]] = {}
    for row in seen:
        start = row.start.astimezone(UTC)
        day = start.replace(hour=0, minute=0, second=0)
        place = int((start - day).total_seconds() / BIN_S)
        days.setdefault(day, [None] * BINS)[place] = min(1.0, row.online_s / row.worker_s)
    past = [capacity.Day(day.weekday(), tuple(bins)) for day, bins in sorted(days.items())]
    profile = capacity.fit(past, BIN_S)
    assert profile is not None, "rows with worker time, but no day"
    midnight = now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    num_bins = int((now - midnight).total_seconds() / BIN_S)
    today = tuple(days.get(midnight, [None] * BINS)[:num_bins])
    newest = seen[-1]
    full = [row for row in seen if row.backlog_s >= SATURATED * row.seconds]
    left_s = sum(row.worker_s - row.online_s for row in full)
    phi = min(1.0, sum(row.batch_s for row in full) / left_s) if left_s > 0.0 else capacity.PHI
    member_s = sum(row.member_s for row in seen)
    supply = capacity.Supply(
        num_workers=newest.member_s / newest.seconds,
        ceiling=1.0,  # batch's share of a step's fixed time is part of what its lines cost
        phi=phi,
        failed=1.0 - sum(row.worker_s for row in seen) / member_s,
    )
    return Capacity(profile, supply, batch_s / tokens, today, now)
