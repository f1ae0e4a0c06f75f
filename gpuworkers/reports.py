"""Reports of sequences, and the ids of ended ones, kept for a while to be sent again."""

from collections import OrderedDict
from dataclasses import dataclass

from controlplane import protocol
from gpuworkers.sequence import Sequence

Key = tuple[str, int]


def report(
    sequence: Sequence,
    num_ids: int,
    finish_reason: protocol.FinishReason | None = None,
    prefill_tokens: int = 0,
) -> protocol.SequenceReport:
    """A report of the newest `num_ids` output ids."""
    seq = sequence.output_tokens - num_ids
    return protocol.SequenceReport(
        sequence.request_id,
        sequence.epoch,
        seq,
        sequence.token_ids[sequence.prompt_tokens + seq :],
        finish_reason,
        prefill_tokens,
        sequence.cached_tokens,
        sequence.computed_tokens,
        sequence.logprobs_from(seq),
        sequence.prefill_gpu_s,
        sequence.decode_gpu_s,
    )


@dataclass(frozen=True, slots=True)
class _Ended:
    output_ids: list[int]
    finish_reason: protocol.FinishReason
    cached_tokens: int
    context_tokens: int
    logprobs: list[protocol.TokenLogprobs | None]
    prefill_gpu_s: float
    decode_gpu_s: float


class EndedSequences:
    """The last `kept_max` sequences that ended; older ones are forgotten."""

    def __init__(self, kept_max: int) -> None:
        self._kept_max = kept_max
        self._ended: OrderedDict[Key, _Ended] = OrderedDict()

    def __contains__(self, key: Key) -> bool:
        return key in self._ended

    def add(self, sequence: Sequence, finish_reason: protocol.FinishReason) -> None:
        """Keep the ids of a sequence that has just ended."""
        self._ended[sequence.key] = _Ended(
            sequence.output_ids,
            finish_reason,
            sequence.cached_tokens,
            sequence.computed_tokens,
            sequence.logprobs_from(0),
            sequence.prefill_gpu_s,
            sequence.decode_gpu_s,
        )
        if len(self._ended) > self._kept_max:
            self._ended.popitem(last=False)

    def forget(self, key: Key) -> None:
        self._ended.pop(key, None)

    def resend(self, key: Key, seq: int) -> protocol.SequenceReport | None:
        """Output ids from index `seq` on, with the end; None when unknown."""
        ended = self._ended.get(key)
        if ended is None:
            return None
        return protocol.SequenceReport(
            *key,
            seq,
            ended.output_ids[seq:],
            ended.finish_reason,
            0,
            ended.cached_tokens,
            ended.context_tokens,
            ended.logprobs[seq:],
            ended.prefill_gpu_s,
            ended.decode_gpu_s,
        )

    def live(self) -> list[protocol.LiveSequence]:
        """As a reconnecting worker tells them: their ids can still be asked for."""
        return [
            protocol.LiveSequence(*key, len(ended.output_ids)) for key, ended in self._ended.items()
        ]
