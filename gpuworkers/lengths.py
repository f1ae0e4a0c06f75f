"""How long outputs become: the history of ended sequences, asked for one that is still running.

Source: Past-Future scheduling, arXiv:2507.10150, which samples from the history; here a quantile of
it, so that the same history gives the same admission.
"""

from bisect import bisect_right
from collections import deque

HISTORY_MAX = 256  # ended sequences remembered
HISTORY_MIN = 16  # below it, and among fewer longer ones, the limit of the request stands in
QUANTILE = 0.9


class OutputLengths:
    """The output lengths of the last sequences that ended."""

    def __init__(self, history_max: int = HISTORY_MAX) -> None:
        self._history: deque[int] = deque(maxlen=history_max)
        self._ordered: list[int] = []  # of the history, sorted when asked
        self._is_ordered = True

    def add(self, output_tokens: int) -> None:
        """A sequence ended with that many output ids."""
        self._history.append(output_tokens)
        self._is_ordered = False

    def predict(self, output_tokens: int, output_tokens_max: int) -> int:
        """Output tokens that a sequence with `output_tokens` will have: the QUANTILE of the longer
        ones in the history, at most its limit."""
        if not self._is_ordered:
            self._ordered = sorted(self._history)
            self._is_ordered = True
        longer = bisect_right(self._ordered, output_tokens)
        count = len(self._ordered) - longer
        if count < HISTORY_MIN:
            return output_tokens_max
        return min(output_tokens_max, self._ordered[longer + int(QUANTILE * (count - 1))])
