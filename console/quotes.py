"""Quotes of batches: the certificate of `controlplane` on the rows of open batches and capacity."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from django.db.models import Avg, Count

from console.capacitybins import Capacity, capacity_of
from console.models import Batch, BatchLine, RequestRecord
from console.models.files import BATCH_ENDED
from controlplane import certificate
from controlplane.certificate import Admitted, Demand, Finish, Refused
from controlplane.harvest import cost_tokens

BYTES_PER_TOKEN = 4.0  # of prompts, before they are tokenised
OUTPUT_RECORDS, OUTPUT_RECORDS_MIN = 200, 20  # batch lines that the usual output comes from
OUTPUT_TOKENS_UNKNOWN = 512  # of a line without a limit, until then
BIAS, LINE_CV = 0.25, 0.6  # start values: error of a file's mean line as estimated, and of one line
HORIZON_S = 7 * 86_400.0
INFLOW = timedelta(days=7)  # work of so many days is expected to keep coming
ENDED_MAX = 450  # ended batches that intervals are made of


@dataclass(frozen=True, slots=True)
class Work:
    """A file's lines in cost tokens, as estimated before any has run."""

    num_lines: int
    line_tokens: float
    line_tokens_max: float


@dataclass(frozen=True, slots=True)
class Quote:
    """What can be promised; times are seconds from now."""

    outcome: Admitted | Refused
    finish: Finish  # as it would be at the deadline asked for, or else at the one offered

    @property
    def earliest_s(self) -> float | None:
        return self.outcome.earliest_s if isinstance(self.outcome, Refused) else None


def usual_output_tokens(model_id: str) -> float | None:
    """Mean output of the newest batch lines of a model; None with too few of them."""
    newest = RequestRecord.objects.filter(is_batch=True, model_id=model_id, status="completed")
    ids = newest.order_by("-arrived_at", "-id").values("pk")[:OUTPUT_RECORDS]
    found = RequestRecord.objects.filter(pk__in=ids).aggregate(
        n=Count("pk"), mean=Avg("output_tokens")
    )
    return found["mean"] if found["n"] >= OUTPUT_RECORDS_MIN else None


def work_of(sizes: Sequence[tuple[int, int | None]], model_id: str) -> Work:
    """`sizes` are (prompt bytes, output limit) of the lines."""
    usual = usual_output_tokens(model_id)
    tokens = []
    for prompt_bytes, limit in sizes:
        output = float(OUTPUT_TOKENS_UNKNOWN if limit is None else limit)
        output = output if usual is None else min(usual, output if limit is not None else usual)
        tokens.append(cost_tokens(prompt_bytes / BYTES_PER_TOKEN, output))
    return Work(len(tokens), sum(tokens) / len(tokens), max(tokens))


def quote(model_id: str, work: Work, deadline_s: float, now: datetime) -> Quote | None:
    """Of a file that would be submitted now; None while nothing has been measured."""
    found = capacity_of(model_id, now)
    if found is None:
        return None
    queue = [demand for _, demand in open_demands(model_id, found, now)]
    job = demand_of(work.num_lines, work.line_tokens, work.line_tokens_max, found, deadline_s)
    forecast = found.forecast(HORIZON_S)
    outcome = certificate.certify(queue, job, forecast)
    if isinstance(outcome, Refused) and outcome.earliest_s is not None:
        job = Demand(outcome.earliest_s, job.mean_s, job.var_s2, job.run_s)
    expected = certificate.finish(
        queue, job, forecast, inflow(model_id, found, now), ratios(model_id)
    )
    return Quote(outcome, expected)


def demand_of(
    num_left: int,
    line_tokens: float,
    line_tokens_max: float,
    found: Capacity,
    deadline_s: float,
    done: tuple[int, float] = (0, 0.0),
) -> Demand:
    """`done` are lines and their cost tokens."""
    lines = certificate.Lines(
        num_left, line_tokens * found.token_s, BIAS, LINE_CV, done[0], done[1] * found.token_s
    )
    mean_s, var_s2 = lines.left()
    return Demand(max(0.0, deadline_s), mean_s, var_s2, line_tokens_max * found.token_s)


def open_demands(model_id: str, found: Capacity, now: datetime) -> list[tuple[Batch, Demand]]:
    """Open batches with what is left of them. One that is paused asks for nothing."""
    batches = Batch.objects.filter(model_id=model_id, status="in_progress", is_paused=False)
    lines = BatchLine.objects.filter(batch__in=batches).order_by()
    counts: dict[int, dict[str, int]] = {batch.pk: {} for batch in batches}
    for pk, status, n in lines.values_list("batch", "status").annotate(n=Count("id")):
        counts[pk][status] = n
    demands = []
    for batch in batches:
        of = counts[batch.pk]
        num_left = of.get("pending", 0) + of.get("claimed", 0)
        done = (of.get("completed", 0), batch.done_tokens)
        deadline_s = (batch.expires_at - now).total_seconds()
        tokens, most = batch.line_tokens, batch.line_tokens_max
        demands.append((batch, demand_of(num_left, tokens, most, found, deadline_s, done)))
    return demands


def inflow(model_id: str, found: Capacity, now: datetime) -> list[tuple[float, float]]:
    """(deadline in s, GPU-seconds per s) of what was submitted in the last days."""
    rates: dict[float, float] = {}
    recent = Batch.objects.filter(
        model_id=model_id, created_at__gte=now - INFLOW, is_demo_history=False
    )
    first = recent.order_by("created_at").values_list("created_at", flat=True).first()
    if first is None or now - first < timedelta(days=1):
        return []  # too little to call it a rate
    for batch in recent:
        window_s = (batch.expires_at - batch.created_at).total_seconds()
        work_s = batch.num_lines * batch.line_tokens * found.token_s
        rates[window_s] = rates.get(window_s, 0.0) + work_s / (now - first).total_seconds()
    return sorted(rates.items())


def ratios(model_id: str) -> certificate.FinishRatios:
    """How the newest ended batches compare with what was expected of them."""
    found = certificate.FinishRatios()
    ended = Batch.objects.filter(model_id=model_id, status="completed", expected_s__gt=0.0)
    for batch in reversed(ended.order_by("-ended_at")[:ENDED_MAX]):
        found.observe(batch.expected_s, (batch.ended_at - batch.created_at).total_seconds())
    return found


def assess(now: datetime) -> dict[str, float]:
    """Test every open promise again and store slack and ETA of its batch; gives the least slack of
    each model."""
    open_ones = Batch.objects.exclude(status__in=BATCH_ENDED).filter(is_paused=False)
    models = sorted(set(open_ones.values_list("model_id", flat=True)))
    least: dict[str, float] = {}
    for model_id in models:
        found = capacity_of(model_id, now)
        if found is None:
            continue
        pairs = open_demands(model_id, found, now)
        if not pairs:
            continue
        queue = [demand for _, demand in pairs]
        forecast = found.forecast(max(demand.deadline_s for demand in queue))
        slacks = certificate.slack_by(queue, forecast)
        least[model_id] = min(slack for _, slack in slacks)
        coming, known = inflow(model_id, found, now), ratios(model_id)
        for index, (batch, demand) in enumerate(pairs):
            bearing = [slack for at_s, slack in slacks if at_s >= demand.deadline_s]
            others = [*queue[:index], *queue[index + 1 :]]
            ends = certificate.finish(others, demand, forecast, coming, known)
            Batch.objects.filter(pk=batch.pk).update(
                slack=min(min(bearing), SLACK_MAX), eta=now + timedelta(seconds=ends.expected_s)
            )
    return least


SLACK_MAX = 1_000.0  # stored for a batch that asks for almost nothing


def store_level(model_id: str, level: int) -> None:
    """How far batch goes for the open batches of a model."""
    running = Batch.objects.filter(model_id=model_id, status="in_progress")
    running.exclude(level=level).update(level=level)
