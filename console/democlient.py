"""A streaming client of our own `/v1`, as the demo uses it: times and counts of one answer."""

import json
import time
from dataclasses import dataclass
from typing import Any

import httpx

CONNECT_S_MAX = 5.0
READ_S_MAX = 120.0  # longest silence in an answer


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed chat. `error` is empty when it ended with a finish reason and [DONE]."""

    error: str
    text: str = ""
    finish_reason: str = ""
    ttft_s: float | None = None
    gaps_s: tuple[float, ...] = ()  # between chunks with text
    prompt_tokens: int = 0
    output_tokens: int = 0


def new_client(base_url: str, api_key: str) -> httpx.AsyncClient:
    """One pool for all requests; proxies named in the environment are not for loopback."""
    return httpx.AsyncClient(
        base_url=base_url,
        headers={"authorization": f"Bearer {api_key}"},
        timeout=httpx.Timeout(READ_S_MAX, connect=CONNECT_S_MAX),
        limits=httpx.Limits(max_connections=None),
        trust_env=False,
    )


async def stream_chat(client: httpx.AsyncClient, body: dict[str, Any]) -> Answer:
    """Sends one chat and reads its stream; every failure is an Answer with an error."""
    reader = Reader(time.monotonic())
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                return Answer(error=f"HTTP {response.status_code} {text[:200]}")
            async for line in response.aiter_lines():
                reader.line(line, time.monotonic())
    except httpx.HTTPError as error:
        return reader.answer(f"{type(error).__name__}: {error}")
    return reader.answer("")


class Reader:
    """Gathers the events of one stream."""

    def __init__(self, sent_at_s: float) -> None:
        self._sent_at_s = sent_at_s
        self._heard_at_s: float | None = None
        self._ttft_s: float | None = None
        self._gaps_s: list[float] = []
        self._text: list[str] = []
        self._finish_reason = ""
        self._error = ""
        self._usage: dict[str, int] = {}
        self._is_done = False

    def line(self, line: str, now_s: float) -> None:
        if line == "data: [DONE]":
            self._is_done = True
        elif line.startswith("data: "):
            self._event(json.loads(line[6:]), now_s)

    def _event(self, event: dict[str, Any], now_s: float) -> None:
        if "error" in event:
            self._error = event["error"]["message"]
        self._usage = event.get("usage") or self._usage
        for choice in event.get("choices", []):
            self._finish_reason = choice.get("finish_reason") or self._finish_reason
            text = choice["delta"].get("content")
            if text:
                self._heard(text, now_s)

    def _heard(self, text: str, now_s: float) -> None:
        if self._heard_at_s is None:
            self._ttft_s = now_s - self._sent_at_s
        else:
            self._gaps_s.append(now_s - self._heard_at_s)
        self._heard_at_s = now_s
        self._text.append(text)

    def answer(self, failure: str) -> Answer:
        missing = "" if self._is_done and self._finish_reason else "the stream ended early"
        return Answer(
            error=failure or self._error or missing,
            text="".join(self._text),
            finish_reason=self._finish_reason,
            ttft_s=self._ttft_s,
            gaps_s=tuple(self._gaps_s),
            prompt_tokens=self._usage.get("prompt_tokens", 0),
            output_tokens=self._usage.get("completion_tokens", 0),
        )
