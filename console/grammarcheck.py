"""The child process of `console.grammars.GrammarChecker`: one grammar a line in, its fate out.

python -m console.grammarcheck    ends with its standard input
"""

import json
import resource
import sys
import time

from llguidance import LLMatcher, LLParserLimits

from controlplane.protocol import GRAMMAR_FUEL_MAX, GRAMMAR_ITEMS_MAX

MEMORY_BYTES_MAX = 1 << 30  # of address space
ERROR_CHARS_MAX = 300


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES_MAX, MEMORY_BYTES_MAX))
    limits = LLParserLimits(
        initial_lexer_fuel=GRAMMAR_FUEL_MAX, step_max_items=GRAMMAR_ITEMS_MAX, verbose_errors=False
    )
    for line in sys.stdin.buffer:
        started_at_s = time.process_time()
        is_bad, messages = LLMatcher.validate_grammar_with_warnings(json.loads(line), limits=limits)
        seconds = time.process_time() - started_at_s
        error = messages[0] if is_bad else ""
        found = {"error": " ".join(error.split())[:ERROR_CHARS_MAX], "seconds": seconds}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
