"""Clients under chaos: the official client with retries off, and what an undisturbed run said."""

import threading
import time
from dataclasses import dataclass, field

import httpx
import openai

from console.demoload import SENTENCES
from tests.e2e.harness import Server, Streamed, stream_openai

LOGPROB_ERROR_MAX = 1e-3
LONG_TEXT = " ".join(SENTENCES[:8])  # long enough to be prefilled apart


def bodies(model_id: str, output_tokens: int, has_logprobs: bool) -> list[dict]:
    """Short and long prompts, greedy and seeded, and one that a stop string may end; where the
    engine has them, some with logprobs."""
    made = []
    for index in range(6):
        text = f"{index} {LONG_TEXT}" if index % 3 == 1 else f"Tell me more about tide {index}."
        body = {
            "model": model_id,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": output_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
        }
        if index in (2, 3, 4):
            body |= {"temperature": 0.8, "seed": 40 + index}
        if index == 5:
            body |= {"stop": [" the ", "zq"]}
        if has_logprobs and index in (0, 1, 3):
            body |= {"logprobs": True, "top_logprobs": 2}
        made.append(body)
    return made


@dataclass
class Seen:
    """One stream under chaos; times on this process's monotonic clock."""

    body_index: int
    began_at_s: float
    ended_at_s: float
    arrived_at_s: list[float] = field(default_factory=list)  # of its chunks
    error: str = ""
    difference: str = ""  # from the undisturbed run

    def longest_gap(self, from_s: float, to_s: float) -> tuple[float, float]:
        """Begin and end of the longest gap between chunks that touches this time."""
        pairs = zip(self.arrived_at_s, self.arrived_at_s[1:], strict=False)
        near = [(a, b) for a, b in pairs if b >= from_s and a <= to_s]
        return max(near, key=lambda pair: pair[1] - pair[0], default=(0.0, 0.0))


@dataclass
class Load:
    """Threads that send one body after the other until `stop`; an error does not end them."""

    server: Server
    bodies: list[dict]
    num_clients: int
    undisturbed: list[Streamed] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    _is_over: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _next: int = 0

    def learn(self) -> None:
        """Each body once, with nothing going wrong."""
        self.undisturbed = [stream_openai(self.server, body) for body in self.bodies]
        for stream in self.undisturbed:
            assert not stream.error and stream.is_contiguous(), stream.error

    def start(self) -> None:
        for _ in range(self.num_clients):
            thread = threading.Thread(target=self._run, daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self, limit_s: float) -> int:
        """Lets running streams end; how many did not within the limit."""
        self._is_over.set()
        ends_at_s = time.monotonic() + limit_s
        for thread in self._threads:
            thread.join(max(0.0, ends_at_s - time.monotonic()))
        return sum(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        while not self._is_over.is_set():
            with self._lock:
                index = self._next % len(self.bodies)
                self._next += 1
            seen = self._one(index)
            with self._lock:
                self.seen.append(seen)

    def _one(self, index: int) -> Seen:
        began_at_s = time.monotonic()
        stream, error = Streamed(), ""
        try:
            stream = stream_openai(self.server, self.bodies[index])
            error = stream.error
        except (openai.OpenAIError, httpx.HTTPError) as failure:
            error = f"{type(failure).__name__}: {failure}"
        difference = "" if error else differs(self.undisturbed[index], stream)
        ended_at_s = time.monotonic()
        return Seen(index, began_at_s, ended_at_s, stream.arrived_at_s, error, difference)


def differs(expected: Streamed, seen: Streamed) -> str:
    """What of a stream is not as in the undisturbed run; empty when nothing."""
    if not seen.is_contiguous():
        return f"chunks {seen.chunks} repeat or skip an id"
    for name in ("token_ids", "text", "finish_reasons", "num_done"):
        if getattr(seen, name) != getattr(expected, name):
            return f"{name} {getattr(seen, name)!r}, undisturbed {getattr(expected, name)!r}"
    pairs = list(zip(seen.logprobs, expected.logprobs, strict=False))
    if len(seen.logprobs) != len(expected.logprobs) or any(
        abs(one - other) > LOGPROB_ERROR_MAX for one, other in pairs
    ):
        return f"logprobs {seen.logprobs}, undisturbed {expected.logprobs}"
    if seen.usage["completion_tokens"] != expected.usage["completion_tokens"]:
        return f"usage {seen.usage}, undisturbed {expected.usage}"
    return ""
