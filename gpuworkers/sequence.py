"""A request as the engine runs it: its ids, how much KV of them exists, and what comes next."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from controlplane.protocol import (
    Assign,
    ClassTargets,
    FinishReason,
    Sampling,
    Stage,
    TokenLogprobs,
)

# waiting: no blocks yet (batch only) · running: may be planned · arriving: KV comes from a peer
# leased: prompt computed, a peer fetches the KV
Phase = Literal["waiting", "running", "arriving", "leased"]

# Of a paced row's ITL target that a plan may use: steps may last longer than they were planned.
PACED_SHARE = 0.8


@dataclass(slots=True, eq=False)
class Sequence:
    """token_ids = prompt, then ids delivered before this epoch, then ids sampled here.

    KV of [0, computed_tokens) is valid; [computed_tokens, len(token_ids)) is to be computed.
    """

    request_id: str
    epoch: int
    stage: Stage
    salt: bytes
    sampling: Sampling
    targets: ClassTargets
    token_ids: list[int]
    prompt_tokens: int
    delivered_tokens: int
    arrived_at_s: float
    phase: Phase = "waiting"
    computed_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens found in the prefix cache
    preempted_tokens: int = 0  # tokens that had KV when it was preempted, until it starts again
    last_token_at_s: float | None = None
    saved_s: float = 0.0  # by which its tokens are ahead of one per ITL target, if it is paced
    block_ids: list[int] = field(default_factory=list)  # token order; online: all it will need
    hashes: list[bytes] = field(default_factory=list)  # names of its full blocks, so far
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)  # by output index
    prefill_gpu_s: float = 0.0  # of steps here that computed its prompt, or computed it again
    decode_gpu_s: float = 0.0

    @property
    def key(self) -> tuple[str, int]:
        return (self.request_id, self.epoch)

    @property
    def is_batch(self) -> bool:
        return self.targets.is_batch

    @property
    def output_ids(self) -> list[int]:
        """Every output id, delivered ones included."""
        return self.token_ids[self.prompt_tokens :]

    @property
    def output_tokens(self) -> int:
        """Number of output ids; also the output index of the next one."""
        return len(self.token_ids) - self.prompt_tokens

    @property
    def handoff_tokens(self) -> int:
        """Tokens whose KV a handoff carries: prompt and delivered ids."""
        return self.prompt_tokens + self.delivered_tokens

    @property
    def pending_tokens(self) -> int:
        return len(self.token_ids) - self.computed_tokens

    @property
    def is_decoding(self) -> bool:
        """All KV exists but that of the newest output id: one row a step."""
        return self.output_tokens > 0 and self.pending_tokens == 1

    @property
    def tokens_max(self) -> int:
        """Tokens whose KV this worker will ever hold; the last output id never needs any."""
        if self.stage == "prefill":
            return self.handoff_tokens
        return max(len(self.token_ids), self.prompt_tokens + self.sampling.output_tokens_max - 1)

    @property
    def first_token_due_at_s(self) -> float:
        return self.arrived_at_s + self.targets.ttft_s_left

    def next_token_due_at_s(self) -> float:
        """One ITL target after the token before; a paced class may spend on it what its tokens
        have saved since the first, up to its longest gap (algorithms.md 2a, paced borrowing)."""
        if self.last_token_at_s is None:
            return self.first_token_due_at_s
        targets = self.targets
        gap_s = targets.itl_s
        if targets.gap_s_max > 0.0:
            gap_s = min(PACED_SHARE * gap_s + self.saved_s, targets.step_s)
        return self.last_token_at_s + gap_s

    def token_came(self, now_s: float) -> None:
        """An output id was sampled."""
        if self.last_token_at_s is not None and self.targets.gap_s_max > 0.0:
            gap_s = now_s - self.last_token_at_s
            self.saved_s = max(0.0, self.saved_s + self.targets.itl_s - gap_s)
        self.last_token_at_s = now_s

    def append(self, token_id: int, logprob: TokenLogprobs | None) -> None:
        """The next output id, with its logprobs where the request asks for them."""
        if logprob is not None:
            self.logprobs[self.output_tokens] = logprob
        self.token_ids.append(token_id)

    def logprobs_from(self, output_index: int) -> list[TokenLogprobs | None]:
        """One for each output id from that index on; none at all when not asked for."""
        if self.sampling.logprobs is None:
            return []
        return [self.logprobs.get(index) for index in range(output_index, self.output_tokens)]

    def finish_reason(self, eos_token_ids: Collection[int]) -> FinishReason | None:
        """Does the newest output id end the sequence, and why?"""
        if self.output_tokens == 0:
            return None
        newest = self.token_ids[-1]
        if self.output_tokens >= max(1, self.sampling.output_tokens_min):
            is_eos = newest in eos_token_ids and not self.sampling.ignore_eos
            if is_eos or newest in self.sampling.stop_token_ids:
                return "stop"
        return "length" if self.output_tokens >= self.sampling.output_tokens_max else None


def from_assign(message: Assign, now_s: float) -> Sequence:
    """The sequence that an Assign describes, nothing computed and no blocks yet."""
    return Sequence(
        request_id=message.request_id,
        epoch=message.epoch,
        stage=message.stage,
        salt=message.salt,
        sampling=message.sampling,
        targets=message.targets,
        token_ids=[*message.prompt_ids, *message.delivered],
        prompt_tokens=len(message.prompt_ids),
        delivered_tokens=len(message.delivered),
        arrived_at_s=now_s,
    )
