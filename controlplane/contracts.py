"""What contracts promise against what the cluster can give: refusal with numbers, and a preview.

A contract asks for GPU-seconds per second and for KV tokens. Both are priced at the marginal cost
of the step model (algorithms.md 2g), so a contract is judged in the same unit as the cluster.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from controlplane.domain import Contract, Rejected
from controlplane.latency import prompt_context_token_s, prompt_token_s
from controlplane.protocol import StepModel

COMMIT_SHARE = 0.9  # of capacity that guarantees may add up to (algorithms.md 2g)
MINUTE_S = 60.0
EFFICIENCY_MIN = 0.05  # of a step on a device too slow for the ITL target


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the live workers of one model give, by their own step models."""

    model_id: str
    num_workers: int
    kv_tokens: int
    step_model: StepModel  # of the slowest worker: contracts are priced at it

    @property
    def gpu_s_per_s(self) -> float:
        return float(self.num_workers)


@dataclass(frozen=True, slots=True)
class Preview:
    """What a change of contracts does to one model's capacity, before it is made."""

    model_id: str
    committed_before: float  # GPU-seconds per second
    committed_after: float
    kv_before: int  # tokens
    kv_after: int
    capacity: Capacity | None  # None: no worker serves the model

    @property
    def refusal(self) -> Rejected | None:
        """Why the change would promise more than there is; None when it fits, or takes away."""
        if self.capacity is None:
            if self.committed_after <= self.committed_before:
                return None
            return Rejected("over_commit", f"no live worker serves {self.model_id}", None)
        given = COMMIT_SHARE * self.capacity.gpu_s_per_s
        if self.committed_after > max(given, self.committed_before):
            text = (
                f"contracts for {self.model_id} would need {self.committed_after:.2f} GPU-s/s,"
                f" {self.committed_before:.2f} before; {self.capacity.num_workers} workers give"
                f" {self.capacity.gpu_s_per_s:.2f}, of which {COMMIT_SHARE:.0%} may be promised"
            )
            return Rejected("over_commit", text, None)
        if self.kv_after > max(self.capacity.kv_tokens, self.kv_before):
            text = (
                f"contracts for {self.model_id} would hold {self.kv_after} KV tokens at once,"
                f" {self.kv_before} before; the workers have {self.capacity.kv_tokens}"
            )
            return Rejected("over_commit", text, None)
        return None


def demand_gpu_s(contract: Contract, model: StepModel) -> float:
    """GPU-seconds per second of the contract at its full rate: all tokens it may use a minute,
    split by its output share, at their marginal cost, in steps as long as its ITL target, of which
    the fixed part serves nobody (eta of algorithms.md 2a)."""
    tokens = contract.tokens_per_min
    output = contract.output_share * tokens
    mean_tokens = tokens / contract.requests_per_min
    mean_prompt = (1.0 - contract.output_share) * mean_tokens
    prompt_s = prompt_token_s(model) + prompt_context_token_s(model) * mean_prompt / 32.0
    mean_context = mean_prompt + 0.5 * contract.output_share * mean_tokens
    output_s = prompt_token_s(model) + model.per_context_token_s * mean_context
    output_s += model.per_sequence_s
    efficiency = max(1.0 - model.base_s / contract.itl_s, EFFICIENCY_MIN)
    return ((tokens - output) * prompt_s + output * output_s) / MINUTE_S / efficiency


def kv_tokens(contract: Contract) -> int:
    """KV tokens that its concurrent requests hold, each of mean size."""
    return int(contract.concurrency_max * contract.tokens_per_min / contract.requests_per_min)


def preview(
    before: Iterable[Contract], after: Iterable[Contract], capacities: Sequence[Capacity]
) -> tuple[Preview, ...]:
    """One row per model that a contract names, in order of name. Batch contracts promise a budget
    and no rate of service, so they commit nothing."""
    old = [contract for contract in before if not contract.is_batch]
    new = [contract for contract in after if not contract.is_batch]
    by_model = {capacity.model_id: capacity for capacity in capacities}
    rows = []
    for model_id in sorted({contract.model_id for contract in old + new}):
        capacity = by_model.get(model_id)
        price = capacity.step_model if capacity else _FREE
        mine = [[item for item in side if item.model_id == model_id] for side in (old, new)]
        seconds = [sum(demand_gpu_s(item, price) for item in side) for side in mine]
        tokens = [sum(kv_tokens(item) for item in side) for side in mine]
        if capacity is None:  # nothing to price with: more or fewer tokens is all there is to say
            seconds = [sum(float(item.tokens_per_min) for item in side) for side in mine]
        rows.append(Preview(model_id, seconds[0], seconds[1], tokens[0], tokens[1], capacity))
    return tuple(rows)


_FREE = StepModel(1.0, 0.0, 0.0)
