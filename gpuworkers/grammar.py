"""Which ids a guided sequence may draw next, from its grammar and its output ids so far.

A grammar is llguidance's JSON form, made and checked by the server (`console/grammars.py`) under
the same limits. A matcher follows its sequence by consuming its new ids; one that is not kept any
more, or whose sequence was resumed elsewhere, is made again from the ids alone, so masks are the
same after a failover.
"""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from controlplane.protocol import GRAMMAR_FUEL_MAX, GRAMMAR_ITEMS_MAX
from gpuworkers.gpu import library
from gpuworkers.sequence import Sequence

_llguidance = library("llguidance")  # a GPU host set up by hand may lack it: no guided decoding

WORD_BITS = 32
MATCHERS_MAX = 512  # kept between steps; one for each online and batch sequence of an engine
GRAMMARS_MAX = 64  # compiled ones kept, from which matchers are copied


class Grammars:
    """The grammars of one model's vocabulary. Not thread safe: one engine thread."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._num_words = -(-vocab_size // WORD_BITS)
        self._limits = _llguidance.LLParserLimits(
            initial_lexer_fuel=GRAMMAR_FUEL_MAX,
            step_max_items=GRAMMAR_ITEMS_MAX,
            verbose_errors=False,
        )
        self._compiled: OrderedDict[str, Any] = OrderedDict()
        self._matchers: OrderedDict[tuple[str, int], tuple[Any, int]] = OrderedDict()

    @classmethod
    def of_folder(
        cls, folder: Path, vocab_size: int, eos_token_ids: frozenset[int]
    ) -> "Grammars | None":
        """None for a model folder without a tokenizer: its ids have no text to match."""
        path = folder / "tokenizer.json"
        if _llguidance is None or not path.is_file() or not eos_token_ids:
            return None
        tokenizer = _llguidance.LLTokenizer(
            path.read_text(), n_vocab=vocab_size, eos_token=sorted(eos_token_ids)
        )
        return cls(tokenizer, vocab_size)

    def masks(self, sequences: list[Sequence]) -> np.ndarray:
        """(sequences, words) int32, bit i of word j for id 32·j + i. All zero where the grammar
        cannot go on: the ids so far do not match it, or it broke a limit."""
        words = np.zeros((len(sequences), self._num_words), dtype=np.int32)
        for row, sequence in enumerate(sequences):
            matcher = self._matcher(sequence)
            if not matcher.is_error():
                matcher.unsafe_compute_mask_ptr(words[row].ctypes.data, words[row].nbytes)
            if matcher.is_error():
                words[row] = 0
        return words

    def _matcher(self, sequence: Sequence) -> Any:
        """The sequence's matcher after all of its output ids."""
        known = self._matchers.pop(sequence.key, None)
        if known is None or known[1] > sequence.output_tokens:
            known = (self._compile(sequence.sampling.grammar).deep_copy(), 0)
        matcher, consumed = known
        fresh = sequence.output_ids[consumed:]
        if fresh:
            matcher.consume_tokens(fresh)
        self._matchers[sequence.key] = (matcher, sequence.output_tokens)
        if len(self._matchers) > MATCHERS_MAX:
            self._matchers.popitem(last=False)
        return matcher

    def _compile(self, grammar: str) -> Any:
        matcher = self._compiled.pop(grammar, None)
        if matcher is None:
            matcher = _llguidance.LLMatcher(
                self._tokenizer, grammar, log_level=0, limits=self._limits
            )
        self._compiled[grammar] = matcher
        if len(self._compiled) > GRAMMARS_MAX:
            self._compiled.popitem(last=False)
        return matcher
