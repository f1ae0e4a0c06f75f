"""Conditional disaggregation: does another worker compute the prompt, or the one that decodes?

A prompt computed on the decode worker takes step time from the rows that decode there; computed
elsewhere it costs the transfer of its KV. Source: algorithms.md 2d. Prefill itself costs about the
same on either side, so it cancels.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from controlplane.config import ControlPlaneConfig
from controlplane.domain import Candidate
from controlplane.latency import prompt_token_s
from controlplane.registry import Worker

TOKENS_NEVER = 1 << 30  # a threshold no prompt reaches: the transfer costs more than it saves


Pair = tuple[str, str]  # prefill worker, decode worker


@dataclass(slots=True)
class _Link:
    """What a transfer costs beyond its prompt's computation."""

    setup_s: float
    s_per_byte: float
    seen_at_s: float
    num_seen: int = 0

    def observe(self, num_bytes: int, seconds: float, weight_min: float) -> None:
        """Towards one transfer, the first of which replaces what was assumed. The least that any
        took is the set-up; bytes cost the rest."""
        self.num_seen += 1
        weight = max(weight_min, 1.0 / self.num_seen)
        if seconds < self.setup_s:
            self.setup_s += weight * (seconds - self.setup_s)
        measured = max(0.0, seconds - self.setup_s) / num_bytes
        self.s_per_byte += weight * (measured - self.s_per_byte)


@dataclass(slots=True)
class TransferRates:
    """Measured cost of moving KV, by pair; bounded, oldest out. Before a pair is measured it is
    taken for the mean of the others, and before any is, for what the configuration says.

    Because a link that is taken for slow carries nothing and so is never measured, a prompt that
    will be in time either way, or late either way, tries each pair now and then."""

    config: ControlPlaneConfig
    _links: OrderedDict[Pair, _Link] = field(default_factory=OrderedDict)
    _all: _Link | None = None
    _tried_at_s: OrderedDict[Pair, float] = field(default_factory=OrderedDict)
    _is_apart: OrderedDict[str, bool] = field(default_factory=OrderedDict)  # newest choice

    def __len__(self) -> int:
        return max(len(self._links), len(self._tried_at_s), len(self._is_apart))

    def _link(self, pair: Pair) -> _Link:
        config = self.config
        found = self._links.get(pair) or self._all
        return found or _Link(config.transfer_setup_s, 1.0 / config.transfer_bytes_per_s, 0.0)

    def setup_s(self, pair: Pair) -> float:
        return self._link(pair).setup_s

    def seconds_per_byte(self, pair: Pair) -> float:
        return self._link(pair).s_per_byte

    def transfer_s(self, pair: Pair, num_bytes: int) -> float:
        link = self._link(pair)
        return link.setup_s + num_bytes * link.s_per_byte

    def observe(self, pair: Pair, num_bytes: int, seconds: float, now_s: float) -> None:
        """A transfer of that many bytes ended, `seconds` after its prompt was computed."""
        assert num_bytes > 0, num_bytes
        link = self._links.get(pair)
        if link is None:
            before = self._link(pair)
            link = self._links[pair] = _Link(before.setup_s, before.s_per_byte, now_s)
        if self._all is None:
            self._all = _Link(link.setup_s, link.s_per_byte, now_s)
        for item in (link, self._all):
            item.observe(num_bytes, seconds, self.config.transfer_weight)
            item.seen_at_s = now_s
        self._links.move_to_end(pair)
        self._drop(self._links)

    def is_due(self, pair: Pair, now_s: float) -> bool:
        """Nothing is known of the link, or nothing new: a prompt should try it."""
        link = self._links.get(pair)
        known_at_s = link.seen_at_s if link else float("-inf")
        tried_at_s = self._tried_at_s.get(pair, float("-inf"))
        return now_s - max(known_at_s, tried_at_s) >= self.config.transfer_stale_s

    def chosen(self, pair: Pair, is_handoff: bool, now_s: float) -> None:
        """A prompt goes through the pair, or stays on the decode worker though it might have."""
        if is_handoff:
            self._tried_at_s[pair] = now_s
            self._tried_at_s.move_to_end(pair)
            self._drop(self._tried_at_s)
        self._is_apart[pair[1]] = is_handoff
        self._is_apart.move_to_end(pair[1])
        self._drop(self._is_apart)

    def is_apart(self, decode_worker: str) -> bool:
        """Was the newest prompt of this decode worker computed elsewhere?"""
        return self._is_apart.get(decode_worker, False)

    def _drop(self, entries: OrderedDict[Any, Any]) -> None:
        if len(entries) > self.config.pairs_max:
            entries.popitem(last=False)


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
    setup_s: float,
    transfer_per_token_s: float,
    is_apart: bool,
    config: ControlPlaneConfig,
) -> int:
    """Uncached tokens from which handing off is worth its transfer, at least the floor.

    A local prompt of u tokens stalls `rows_stalled` decode rows (one that is expected, when there
    is none now) for u·g seconds; handing off costs setup + u·transfer. Whichever way the newest
    prompt went (`is_apart`: elsewhere) the next one goes too, unless the other way costs 10 % less.
    """
    gain = 1.0 / config.handoff_gain if is_apart else config.handoff_gain
    saved_s = gain * prompt_token_s(decode.step_model) * max(1, rows_stalled)
    saved_s -= transfer_per_token_s
    if saved_s <= 0.0:
        return TOKENS_NEVER
    tokens = setup_s / saved_s
    return max(config.handoff_tokens_min, min(TOKENS_NEVER, int(tokens) + 1))


def choose(
    uncached_tokens: int,
    threshold: int,
    local: Candidate,
    remote: Candidate,
    ttft_s_left: float,
    is_due: bool,
    config: ControlPlaneConfig,
) -> tuple[bool, str]:
    """Whether to hand off, and the sentence that says why. In time means at p99; `is_due`: the
    link should be tried, by a prompt that has nothing to lose."""
    times = (
        f"TTFT {remote.ttft_s * 1000.0:.0f} ms by {remote.worker_id},"
        f" {local.ttft_s * 1000.0:.0f} ms locally, target {ttft_s_left * 1000.0:.0f} ms"
    )
    if uncached_tokens < config.handoff_tokens_min:
        return False, (
            f"{uncached_tokens} uncached tokens are below the handoff threshold of {threshold}"
        )
    limit_s = (1.0 - config.late_margin) * ttft_s_left
    is_local_timely = local.ttft_s_p99 <= limit_s
    is_remote_timely = remote.ttft_s_p99 <= limit_s
    if is_remote_timely and not is_local_timely:
        return True, f"{uncached_tokens} uncached tokens are in time only when handed off: {times}"
    is_local_sooner = local.ttft_s < config.spill_share * remote.ttft_s
    is_dear = uncached_tokens < threshold
    if not is_dear and (is_remote_timely or not (is_local_timely or is_local_sooner)):
        return (
            True,
            f"{uncached_tokens} uncached tokens reach the threshold of {threshold}: {times}",
        )
    if is_due and is_remote_timely == is_local_timely:
        return True, f"{uncached_tokens} uncached tokens measure an unknown link: {times}"
    if not is_dear:
        return False, f"{uncached_tokens} uncached tokens stay local: {times}"
    if threshold < TOKENS_NEVER:
        return False, (
            f"{uncached_tokens} uncached tokens are below the handoff threshold of {threshold}"
        )
    return False, (
        f"{uncached_tokens} uncached tokens: a transfer from {remote.worker_id} costs more than it"
        " saves"
    )
