"""Accepted token ids of one running request, in memory: duplicates dropped, gaps named.

The journal is what makes a request survive its worker: ids enter here before a chunk is written,
and a new worker gets prompt + journal. It lives as long as the request and dies with the console.
"""

from collections.abc import Sequence

from controlplane.protocol import FinishReason, TokenLogprobs

ENDS: tuple[FinishReason, ...] = ("stop", "length")
PENDING_TOKENS_MAX = 1024  # ids kept ahead of a gap; more are dropped, for `Resend` brings them


class Journal:
    """Output ids of a request by output index. One owner: the event loop.

    Invariant: `ids` is output [0, len(ids)), each index written once and never changed.
    """

    def __init__(self, output_tokens_max: int, epoch: int = 0) -> None:
        self.output_tokens_max = output_tokens_max
        self.epoch = epoch
        self.ids: list[int] = []
        self.missing_since_s: float | None = None  # when the open gap was first seen
        self.dropped_reports = 0  # other epochs, duplicates, ids past a limit
        self.logprobs: dict[int, TokenLogprobs] = {}  # by output index, where they were asked for
        self._ahead: dict[int, int] = {}
        self._end: tuple[int, FinishReason] | None = None

    @property
    def next_seq(self) -> int:
        """Output index of the first id that is not here yet: what `Resend` asks for."""
        return len(self.ids)

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the output ended, once every id before the end has arrived; None until then."""
        if self._end is not None and len(self.ids) >= self._end[0]:
            return self._end[1]
        return None

    def move(self, epoch: int) -> None:
        """The request goes to another worker: reports of older epochs count no more.

        Ids ahead of a gap are forgotten with their logprobs, for the new worker computes from the
        gap on, and may sample others."""
        assert epoch >= self.epoch, f"epoch of a request went back from {self.epoch} to {epoch}"
        if epoch > self.epoch:
            self.epoch = epoch
            self._ahead.clear()
            kept = range(len(self.ids))
            self.logprobs = {i: entry for i, entry in self.logprobs.items() if i in kept}
            self._end = None
            self.missing_since_s = None

    def accept(
        self,
        epoch: int,
        seq: int,
        token_ids: Sequence[int],
        now_s: float,
        finish_reason: FinishReason | None = None,
        logprobs: Sequence[TokenLogprobs | None] = (),
    ) -> list[int]:
        """Takes ids [seq, seq + len) and returns those that now follow what was here, in order.
        `logprobs` has one entry for each id or none at all; the first to come is kept.

        Only reports of the current epoch count, see `move`. Only `stop` and `length` end the
        output; other reasons end what one worker does for it. Reports after the end change
        nothing."""
        if epoch != self.epoch or self.finish_reason is not None:
            self.dropped_reports += 1
            return []
        if finish_reason in ENDS and self._end is None:
            self._end = (min(seq + len(token_ids), self.output_tokens_max), finish_reason)
        for index, entry in enumerate(logprobs, seq):
            if entry is not None and index < self.output_tokens_max:
                self.logprobs.setdefault(index, entry)
        start = len(self.ids)
        if seq <= start:
            fresh = token_ids[start - seq :]
            self.ids.extend(fresh[: self.output_tokens_max - start])
            if len(fresh) < len(token_ids):
                self.dropped_reports += 1
        else:
            self._keep_ahead(seq, token_ids)
        self._close_gap()
        has_gap = bool(self._ahead) or (self._end is not None and len(self.ids) < self._end[0])
        if not has_gap:
            self.missing_since_s = None
        elif self.missing_since_s is None or len(self.ids) > start:
            self.missing_since_s = now_s
        return self.ids[start:]

    def _keep_ahead(self, seq: int, token_ids: Sequence[int]) -> None:
        for index, token_id in enumerate(token_ids, seq):
            if index < self.output_tokens_max and len(self._ahead) < PENDING_TOKENS_MAX:
                self._ahead.setdefault(index, token_id)
            else:
                self.dropped_reports += 1
                return

    def _close_gap(self) -> None:
        if not self._ahead:
            return
        for index in [index for index in self._ahead if index < len(self.ids)]:
            del self._ahead[index]
        while (token_id := self._ahead.pop(len(self.ids), None)) is not None:
            self.ids.append(token_id)
