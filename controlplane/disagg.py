"""Conditional disaggregation: does another worker compute the prompt, or the one that decodes?

A prompt computed on the decode worker takes step time from the rows that decode there; computed
elsewhere it costs the transfer of its KV. Source: algorithms.md 2d. Prefill itself costs about the
same on either side, so it cancels.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

from controlplane.config import ControlPlaneConfig
from controlplane.domain import Candidate
from controlplane.latency import prompt_token_s
from controlplane.registry import Worker

TOKENS_NEVER = 1 << 30  # a threshold no prompt reaches: the transfer costs more than it saves


@dataclass(slots=True)
class TransferRates:
    """Measured seconds per byte of each (prefill worker, decode worker); bounded, oldest out."""

    config: ControlPlaneConfig
    _rates: OrderedDict[tuple[str, str], float] = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        return len(self._rates)

    def seconds_per_byte(self, pair: tuple[str, str]) -> float:
        return self._rates.get(pair, 1.0 / self.config.transfer_bytes_per_s)

    def observe(self, pair: tuple[str, str], num_bytes: int, seconds: float) -> None:
        """Learn from a transfer of that many bytes of KV, beyond the set-up that each costs."""
        assert num_bytes > 0, num_bytes
        weight = self.config.transfer_weight
        measured = max(0.0, seconds - self.config.transfer_setup_s) / num_bytes
        rate = (1.0 - weight) * self.seconds_per_byte(pair) + weight * measured
        self._rates[pair] = rate
        self._rates.move_to_end(pair)
        if len(self._rates) > self.config.pairs_max:
            self._rates.popitem(last=False)

    def transfer_s(self, pair: tuple[str, str], num_bytes: int) -> float:
        return self.config.transfer_setup_s + num_bytes * self.seconds_per_byte(pair)


def can_pair(prefill: Worker, decode: Worker, model_id: str) -> bool:
    """Their KV is the same bytes: same model, block size and number format."""
    return (
        prefill.worker_id != decode.worker_id
        and prefill.hello.handoff_address is not None
        and prefill.hello.block_tokens == decode.hello.block_tokens
        and prefill.hello.device.dtype == decode.hello.device.dtype
        and prefill.model(model_id).weights_sha256 == decode.model(model_id).weights_sha256
        and prefill.model(model_id).kv_bytes_per_token == decode.model(model_id).kv_bytes_per_token
    )


def threshold_tokens(
    decode: Worker,
    rows_stalled: int,
    transfer_per_token_s: float,
    config: ControlPlaneConfig,
) -> int:
    """Uncached tokens from which handing off is worth its transfer, at least the floor.

    A local prompt of u tokens stalls `rows_stalled` decode rows (one that is expected, when there
    is none now) for u·g seconds; handing off costs setup + u·transfer.
    """
    saved_s = config.handoff_gain * prompt_token_s(decode.step_model) * max(1, rows_stalled)
    saved_s -= transfer_per_token_s
    if saved_s <= 0.0:
        return TOKENS_NEVER
    tokens = config.transfer_setup_s / saved_s
    return max(config.handoff_tokens_min, min(TOKENS_NEVER, int(tokens) + 1))


def choose(
    uncached_tokens: int,
    threshold: int,
    local: Candidate,
    remote: Candidate,
    ttft_s_left: float,
    config: ControlPlaneConfig,
) -> tuple[bool, str]:
    """Whether to hand off, and the sentence that says why."""
    times = (
        f"TTFT {remote.ttft_s * 1000.0:.0f} ms by {remote.worker_id},"
        f" {local.ttft_s * 1000.0:.0f} ms locally, target {ttft_s_left * 1000.0:.0f} ms"
    )
    is_local_timely = local.ttft_s <= ttft_s_left
    is_remote_timely = remote.ttft_s <= ttft_s_left
    if is_remote_timely and not is_local_timely and uncached_tokens >= config.handoff_tokens_min:
        return True, f"{uncached_tokens} uncached tokens are in time only when handed off: {times}"
    if uncached_tokens < threshold:
        return False, (
            f"{uncached_tokens} uncached tokens are below the handoff threshold of {threshold}"
            if threshold < TOKENS_NEVER
            else f"{uncached_tokens} uncached tokens: a transfer from {remote.worker_id} costs more"
            " than it saves"
        )
    is_local_sooner = local.ttft_s < config.spill_share * remote.ttft_s
    if not is_remote_timely and (is_local_timely or is_local_sooner):
        return False, f"{uncached_tokens} uncached tokens stay local: {times}"
    return True, f"{uncached_tokens} uncached tokens reach the threshold of {threshold}: {times}"
