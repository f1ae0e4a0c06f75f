"""What work costs: measured GPU seconds, whose they were, and their price.

*Attributed*: each request pays its measured seconds; what a lane spent beyond its requests (host
time, overshoot) is spread over them; idle time is paid by interactive work by its share of the peak
minute, since that is what the GPUs stand there for. *Incremental cash*: the GPUs are there anyway,
so batch pays only its share of what a step costs with any rows. Both add up to what all GPUs cost.
Source: algorithms.md 2i. Everything here is arithmetic on minutes; costbook.py gathers them.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from console.facts import CostFact, GpuFact

SECONDS_PER_HOUR = 3600.0
MILLION = 1_000_000
NOBODY = "(unattributed)"  # time of a lane or of an idle GPU that no request stands for

Key = tuple[str, str, str]  # tenant, model, class
Dimension = Literal["tenant", "model", "class"]
DIMENSIONS: tuple[Dimension, ...] = ("tenant", "model", "class")


def busy_usd(busy_s: float, gpu_hour_usd: float) -> float:
    """Price of `busy_s` device seconds at an hourly price."""
    assert busy_s >= 0 and gpu_hour_usd >= 0, f"busy_s={busy_s} gpu_hour_usd={gpu_hour_usd}"
    return busy_s * gpu_hour_usd / SECONDS_PER_HOUR


def usd_per_million(busy_s: float, gpu_hour_usd: float, num_tokens: int) -> float | None:
    """Dollars for a million tokens like these `num_tokens`; None when there were none."""
    assert num_tokens >= 0, f"num_tokens={num_tokens}"
    if num_tokens == 0:
        return None
    return busy_usd(busy_s, gpu_hour_usd) / num_tokens * MILLION


@dataclass(slots=True)
class CostLine:
    """Cost of one tenant, model and class, or of a sum of them."""

    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    prefill_gpu_s: float = 0.0  # as requests were charged
    decode_gpu_s: float = 0.0
    gpu_s: float = 0.0  # attributed, idle time included
    idle_gpu_s: float = 0.0  # of them
    usd: float = 0.0  # attributed
    cash_usd: float = 0.0  # incremental cash

    def add(self, other: "CostLine") -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens

    def per_million(self, usd: float, tokens: int) -> float | None:
        return usd / tokens * MILLION if tokens else None

    def row(self) -> dict[str, float | int | None]:
        """As it is shown and printed."""
        return {
            "requests": self.requests,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "prefill_gpu_s": round(self.prefill_gpu_s, 6),
            "decode_gpu_s": round(self.decode_gpu_s, 6),
            "gpu_s": round(self.gpu_s, 6),
            "idle_gpu_s": round(self.idle_gpu_s, 6),
            "usd": round(self.usd, 9),
            "cash_usd": round(self.cash_usd, 9),
            "usd_per_million_tokens": self.per_million(self.usd, self.tokens),
            "usd_per_million_output_tokens": self.per_million(self.usd, self.output_tokens),
            "cash_usd_per_million_tokens": self.per_million(self.cash_usd, self.tokens),
        }


@dataclass(slots=True)
class _Model:
    """All minutes of one model."""

    online_s: float = 0.0
    batch_s: float = 0.0
    batch_fixed_s: float = 0.0
    idle_s: float = 0.0
    usd: float = 0.0
    lines: dict[Key, CostLine] = field(default_factory=dict)
    is_batch: dict[Key, bool] = field(default_factory=dict)
    minutes: dict[datetime, dict[Key, float]] = field(default_factory=lambda: defaultdict(dict))

    @property
    def total_s(self) -> float:
        return self.online_s + self.batch_s + self.idle_s

    def peak_shares(self) -> dict[Key, float]:
        """Shares of interactive work in the minute with most of it; empty without any."""
        peak = max(self.minutes.values(), key=lambda work: sum(work.values()), default={})
        total_s = sum(peak.values())
        return {key: seconds / total_s for key, seconds in peak.items()} if total_s else {}


def attribute(costs: Iterable[CostFact], gpus: Iterable[GpuFact]) -> dict[Key, CostLine]:
    """Who pays what of these minutes: `costs` of requests that ended, `gpus` as workers told."""
    models: dict[str, _Model] = defaultdict(_Model)
    for gpu in gpus:
        model = models[gpu.model_id]
        model.online_s += gpu.online_s
        model.batch_s += gpu.batch_s
        model.batch_fixed_s += gpu.batch_fixed_s
        model.idle_s += gpu.idle_s
        model.usd += busy_usd(gpu.online_s + gpu.batch_s + gpu.idle_s, gpu.gpu_hour_usd)
    for cost in costs:
        model = models[cost.model_id]
        key = (cost.tenant_id, cost.model_id, cost.class_name)
        line = model.lines.setdefault(key, CostLine())
        line.requests += cost.requests
        line.prompt_tokens += cost.prompt_tokens
        line.output_tokens += cost.output_tokens
        line.prefill_gpu_s += cost.prefill_gpu_s
        line.decode_gpu_s += cost.decode_gpu_s
        model.is_batch[key] = cost.is_batch
        if not cost.is_batch:
            work = model.minutes[cost.minute]
            work[key] = work.get(key, 0.0) + cost.prefill_gpu_s + cost.decode_gpu_s
    lines: dict[Key, CostLine] = {}
    for model_id, model in models.items():
        _price(model_id, model)
        lines |= model.lines
    return lines


def _price(model_id: str, model: _Model) -> None:
    usd_per_s = model.usd / model.total_s if model.total_s else 0.0
    shares = model.peak_shares()
    _spread(model_id, model, False, model.online_s)
    _spread(model_id, model, True, model.batch_s)
    batch_s = sum(line.gpu_s for key, line in model.lines.items() if model.is_batch[key])
    rest_s = model.total_s - model.batch_fixed_s if model.batch_s else model.total_s
    for key, share in shares.items():
        line = model.lines[key]
        line.idle_gpu_s = share * model.idle_s
        line.gpu_s += line.idle_gpu_s
        line.cash_usd = share * rest_s * usd_per_s
    if not shares and rest_s > 0.0:  # no interactive request has ended: nobody stands for it
        line = _nobody(model_id, model, False)
        line.idle_gpu_s = model.idle_s
        line.gpu_s += model.idle_s
        line.cash_usd = rest_s * usd_per_s
    for key, line in model.lines.items():
        if model.is_batch[key] and batch_s:
            line.cash_usd = line.gpu_s / batch_s * model.batch_fixed_s * usd_per_s
        line.usd = line.gpu_s * usd_per_s


def _spread(model_id: str, model: _Model, is_batch: bool, lane_s: float) -> None:
    """All seconds of a lane on its requests, by what each was charged."""
    keys = [key for key, batch in model.is_batch.items() if batch == is_batch]
    charged = {key: model.lines[key].prefill_gpu_s + model.lines[key].decode_gpu_s for key in keys}
    total_s = sum(charged.values())
    for key, seconds in charged.items():
        model.lines[key].gpu_s = lane_s * seconds / total_s if total_s else 0.0
    if lane_s > 0.0 and not total_s:
        _nobody(model_id, model, is_batch).gpu_s = lane_s


def _nobody(model_id: str, model: _Model, is_batch: bool) -> CostLine:
    key = (NOBODY, model_id, "batch" if is_batch else NOBODY)
    model.is_batch[key] = is_batch
    return model.lines.setdefault(key, CostLine())


def by(lines: dict[Key, CostLine], dimensions: Sequence[Dimension]) -> dict[Key, CostLine]:
    """Sums over everything but these dimensions, which are empty in the keys of others."""
    sums: dict[Key, CostLine] = {}
    for key, line in lines.items():
        parts = zip(DIMENSIONS, key, strict=True)
        tenant, model, name = (part if dim in dimensions else "" for dim, part in parts)
        sums.setdefault((tenant, model, name), CostLine()).add(line)
    return sums
