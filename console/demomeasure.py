"""What this device can promise: short measurements through our own `/v1` before the load begins."""

import asyncio
import statistics
import time
from dataclasses import dataclass

import httpx

from console import demoseed
from console.democlient import Answer, stream_chat
from console.demoload import LONG_SHARE, LONG_TOKENS, Prompts, chat_body

CALIBRATION_S = 5.0
PROMPT_TOKENS = 256
ROWS = 4
OUTPUT_TOKENS = 24
TIER = "flex"  # its shipped targets are loose enough that steps are not cut short to meet them
# Targets on a device that cannot meet the shipped classes: so many times the unloaded 256-token
# prefill, and the unloaded step of four rows.
TTFT_FACTOR = 4.0
ITL_FACTOR = 3.0
RATE_PER_S = 0.65  # where the device keeps up
PREFILL_BUSY_MAX = 0.52  # of the prefill worker's time, so that queues stay short


@dataclass(frozen=True, slots=True)
class Measured:
    """Unloaded, end to end through our own `/v1`; medians."""

    prefill_s: float
    step_s: float

    @property
    def ttft_s(self) -> float:
        return TTFT_FACTOR * self.prefill_s

    @property
    def itl_s(self) -> float:
        return ITL_FACTOR * self.step_s

    def __str__(self) -> str:
        return (
            f"{PROMPT_TOKENS}-token prefill {1000 * self.prefill_s:.0f} ms, step of {ROWS} rows"
            f" {1000 * self.step_s:.0f} ms"
        )


async def measure(client: httpx.AsyncClient, prompts: Prompts) -> Measured | None:
    """Prompts of 256 tokens one by one for half of the time, then four streams side by side."""
    prefills_s: list[float] = []
    ends_at_s = time.monotonic() + CALIBRATION_S / 2
    while time.monotonic() < ends_at_s:
        text = prompts.text_of(PROMPT_TOKENS, seed=len(prefills_s))
        answer = await stream_chat(client, chat_body(demoseed.MODEL_ID, text, 1, TIER))
        if answer.error or answer.ttft_s is None:
            return None
        prefills_s.append(answer.ttft_s)
    streams: list[Answer] = await asyncio.gather(
        *(
            stream_chat(
                client,
                chat_body(
                    demoseed.MODEL_ID,
                    prompts.text_of(2 * OUTPUT_TOKENS, i),
                    OUTPUT_TOKENS,
                    TIER,
                ),
            )
            for i in range(ROWS)
        )
    )
    gaps_s = [gap_s for answer in streams for gap_s in answer.gaps_s]
    if not gaps_s or any(answer.error for answer in streams):
        return None
    return Measured(statistics.median(prefills_s), statistics.median(gaps_s))


def load_rate(measured: Measured | None) -> float:
    """Chats per second that leave the prefill worker some air: long prompts are its work."""
    if measured is None:
        return RATE_PER_S
    long_prefill_s = measured.prefill_s * (sum(LONG_TOKENS) / 2) / PROMPT_TOKENS
    return min(RATE_PER_S, PREFILL_BUSY_MAX / (LONG_SHARE * long_prefill_s))
