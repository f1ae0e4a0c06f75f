"""What the demo's load sends and when: an open-loop stream of chats, and lines of a batch job.

Everything is drawn from one seed, so that a run can be repeated. Arrivals do not wait for answers.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from console.tokens import ModelTokenizer

RATE_PER_S_MAX = 1.0
SHORT_TOKENS_MAX = 48  # the whole prompt with its template
LONG_TOKENS = (256, 600)
OUTPUT_TOKENS = (16, 48)
TEMPLATE_TOKENS_MAX = 20  # what the chat template and the system message add
SYSTEM = "Answer briefly."
# From here on phases alternate, so that the planner has a reason to move a worker, and back.
SHIFT_AFTER_S = 240.0
SHIFT_PHASE_S = 180.0
LONG_SHARE = 0.5
LONG_SHARE_SHIFTED = 0.0
BATCH_LINES = 300
BATCH_OUTPUT_TOKENS = 16
# Classes as clients choose them; every tile of the Overview shall have data.
TIERS = ("priority", "default", "priority", "flex", "priority")

SENTENCES = """
The tide turns twice a day, and for a few minutes the water in the harbour stands still.
A pilot who knows the hour can bring a long ship through a narrow gate without a tug.
When the current runs hard, small boats keep to the shore and wait for the calm.
The lighthouse keeper wrote the height of the water in a book every morning and every night.
Fishermen mend nets while they wait, because waiting is the cheapest time to do slow work.
Between two rushes of people a good kitchen peels, chops and boils what will be needed later.
An old clock on the quay shows not the time of day but the hours until the next high water.
The harbour master sells the quiet hours for less and keeps the busy ones for the ferries.
If a crane breaks, another takes over the load where the first one stopped and nothing is dropped.
Rain upstream reaches the estuary two days later and pushes the turn of the tide by minutes.
A ferry promises to leave on the hour; a barge promises only to arrive before the end of the week.
Children race paper boats in the slack water because every boat then has the same chance.
The engineer measured the flow for a year before she said how many ships the lock could pass.
Salt marshes store the flood and give it back slowly, so the town behind them stays dry.
A captain asks three questions of any harbour: how deep, how busy, and who goes first.
The night shift moves coal, grain and sand, since sand does not mind in which order it travels.
Every signal flag has one meaning, and a sailor who invents a second one is put ashore.
The map of the channel is drawn anew each spring, for the sand has moved under the water.
Two pilots guide the longest ships: one takes them to the gate, the other takes them on from there.
In fog the bell is rung at a fixed pace, so that silence itself becomes a message.
""".strip().splitlines()
QUESTIONS = (
    "Say in one sentence what this is about.",
    "What should a captain remember?",
    "Continue the story.",
    "Give the text a title and explain it.",
)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A chat that is sent `at_s` after the load began, whatever else is running."""

    at_s: float
    user_text: str
    is_long: bool
    output_tokens_max: int
    service_tier: str

    def body(self, model_id: str) -> dict[str, Any]:
        return chat_body(model_id, self.user_text, self.output_tokens_max, self.service_tier)


def chat_body(model_id: str, user_text: str, output_tokens_max: int, tier: str) -> dict[str, Any]:
    """A streamed chat with a short system message, which keeps the template short."""
    return {
        "model": model_id,
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": user_text},
        ],
        "max_tokens": output_tokens_max,
        "service_tier": tier,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


class Prompts:
    """Texts of a wanted number of tokens, cut at random places from the sentences above."""

    def __init__(self, tokenizer: ModelTokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids = tokenizer.encode(" ".join(SENTENCES)) * 3
        self._starts = len(self._ids) // 3

    def text(self, num_tokens: int, chance: random.Random) -> str:
        question = chance.choice(QUESTIONS)
        rest = max(1, num_tokens - len(self._tokenizer.encode(question)) - 1)
        start = chance.randrange(self._starts)
        pieces = (self._tokenizer.pieces[i] for i in self._ids[start : start + rest])
        return f"{b''.join(pieces).decode(errors='ignore')}\n{question}"

    def text_of(self, num_tokens: int, seed: int) -> str:
        """The same text for the same seed."""
        return self.text(num_tokens - TEMPLATE_TOKENS_MAX, random.Random(seed))


def long_share(at_s: float) -> float:
    """Half of the prompts are long, until SHIFT_AFTER_S; then phases without and with them."""
    if at_s < SHIFT_AFTER_S:
        return LONG_SHARE
    phase = int((at_s - SHIFT_AFTER_S) // SHIFT_PHASE_S)
    return LONG_SHARE_SHIFTED if phase % 2 == 0 else LONG_SHARE


def arrivals(prompts: Prompts, rate_per_s: float, seed: int) -> Iterator[Arrival]:
    """Endless; gaps vary by half around their mean. Long and short take turns of equal share."""
    assert 0 < rate_per_s <= RATE_PER_S_MAX, f"{rate_per_s} requests/s, at most {RATE_PER_S_MAX}"
    chance = random.Random(seed)
    at_s, owed, index = 0.0, 0.0, 0
    while True:
        share = long_share(at_s)
        owed += share
        is_long = owed >= 1.0
        owed -= is_long
        yield Arrival(
            at_s=at_s,
            user_text=prompts.text(prompt_tokens(is_long, chance), chance),
            is_long=is_long,
            output_tokens_max=chance.randint(*OUTPUT_TOKENS),
            service_tier=TIERS[index % len(TIERS)],
        )
        index += 1
        at_s += chance.uniform(0.5, 1.5) / rate_per_s


def prompt_tokens(is_long: bool, chance: random.Random) -> int:
    """Tokens of the user's text, so that text and template keep the promised lengths."""
    if is_long:
        return chance.randint(LONG_TOKENS[0] + 4, LONG_TOKENS[1] - TEMPLATE_TOKENS_MAX - 4)
    return chance.randint(14, SHORT_TOKENS_MAX - TEMPLATE_TOKENS_MAX)


def batch_lines(prompts: Prompts, model_id: str, seed: int, num_lines: int = BATCH_LINES) -> bytes:
    """A batch file of short jobs in OpenAI's line format."""
    chance = random.Random(seed)
    lines = []
    for index in range(num_lines):
        user_text = prompts.text(prompt_tokens(is_long=False, chance=chance), chance)
        body = {
            "model": model_id,
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": user_text},
            ],
            "max_tokens": BATCH_OUTPUT_TOKENS,
        }
        lines.append(
            {
                "custom_id": f"line-{index:04d}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": body,
            }
        )
    return "".join(f"{json.dumps(line)}\n" for line in lines).encode()
