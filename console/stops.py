"""Text of one output as it grows: decoded id by id, cut before a stop string.

Ids after the one that completed a stop string are dropped: neither delivered nor billed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from console.tokens import IncrementalDecoder, ModelTokenizer


class StopMatcher:
    """Finds stop strings across chunk boundaries; holds back what could become one.

    The text it gives does not depend on how the input is cut: the first stop string to be complete
    wins, the longest if several are complete at the same character."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """Text that may go out now, and whether a stop string is complete; then nothing follows."""
        if not self._stops:
            return text, False
        text = self._held + text
        ends = [
            (start + len(stop), start)
            for stop in self._stops
            if (start := text.find(stop)) >= 0
        ]  # fmt: skip
        if ends:
            self._held = ""
            return text[: min(ends)[1]], True
        held = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def flush(self) -> str:
        """What was held back, when the output ended without a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`; stops are at most 64 bytes."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of some ids. `num_ids` of them count; `is_stopped` when a stop string is complete."""

    text: str
    num_ids: int
    is_stopped: bool


class OutputText:
    """Decoder and stop matcher of one output."""

    def __init__(self, tokenizer: ModelTokenizer, stops: Sequence[str], tokens_min: int) -> None:
        self._decoder = IncrementalDecoder(tokenizer)
        self._matcher = StopMatcher(stops)
        self._tokens_min = tokens_min  # no stop string counts before as many ids
        self._num_ids = 0

    def feed(self, token_ids: Sequence[int], is_last: bool) -> Piece:
        """Text that these ids add; `is_last` brings out what was held back."""
        texts: list[str] = []
        for index, token_id in enumerate(token_ids, 1):
            text = self._decoder.push(token_id)
            self._num_ids += 1
            if self._num_ids >= self._tokens_min:
                text, is_stopped = self._matcher.feed(text)
                if is_stopped:
                    return Piece("".join((*texts, text)), index, True)
            texts.append(text)
        if is_last:
            text, is_stopped = self._matcher.feed(self._decoder.flush())
            texts.append(text)
            if is_stopped:
                return Piece("".join(texts), len(token_ids), True)
            texts.append(self._matcher.flush())
        return Piece("".join(texts), len(token_ids), False)
