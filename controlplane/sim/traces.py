"""Recorded and synthetic workloads as streams of requests in order of arrival.

Files are Parquet with one row per request (schema: `COLUMNS`). They are read a batch of rows at a
time, however large they are. Rates are scaled without compressing time, which would hide
burstiness: up by laying shifted copies over each other, each with its own users and prompts; down
by keeping a subset of clients or sessions, or by stretching time where the source names neither.
"""

import heapq
import math
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from zlib import crc32

import pyarrow.parquet as parquet

from controlplane.sim.events import Events
from controlplane.sim.workload import arrivals

HASH_TOKENS = 512  # of one prefix block in the files
COLUMNS = ("arrival_s", "input_tokens", "output_tokens", "hash_ids", "session_id", "client_id")
ROWS_PER_READ = 4096
ROWS_HELD_MAX = 50_000  # of a file that is kept in memory: superposed copies read it often
COPIES_MAX = 1 << 16  # a copy's number is part of its blocks' names
SUB_BLOCKS_MAX = 1 << 16
TICKS_S = {"mooncake_conversation": 3.0}  # sources whose stamps stand on ticks (Mooncake's README)


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a workload. `hash_ids` name its prompt's prefixes in blocks of HASH_TOKENS:
    equal ids of one copy mean the same prompt up to there; empty where the source says nothing."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()
    client_id: str = ""
    session_id: str = ""
    copy: int = 0

    def block_names(self, block_tokens: int) -> tuple[bytes, ...]:
        """Names of the full blocks of block_tokens (a divisor of HASH_TOKENS), 8 bytes each: what
        a router's index and a worker's cache know a prefix by."""
        per_hash = HASH_TOKENS // block_tokens
        count = min(self.prompt_tokens // block_tokens, len(self.hash_ids) * per_hash)
        pack = struct.Struct("<HHi").pack
        ids, copy = self.hash_ids, self.copy
        return tuple(pack(copy, i % per_hash, ids[i // per_hash]) for i in range(count))


Rows = Callable[[], Iterator[TraceRequest]]  # a fresh pass over the requests, by time


def _user(row: TraceRequest) -> str:
    name = row.client_id or row.session_id
    return f"{row.copy} {name}" if name else ""


@dataclass(frozen=True, slots=True)
class Trace:
    """A workload that can be read again and again. Arrivals lie in [0, span_s)."""

    name: str
    rows: Rows
    span_s: float
    rate_per_s: float  # mean over the span

    def window(self, start_s: float, seconds: float) -> "Trace":
        """Only the arrivals in [start_s, start_s + seconds), which begin at 0; the rate stays that
        of the whole."""

        def rows() -> Iterator[TraceRequest]:
            for row in self.rows():
                if row.at_s >= start_s + seconds:
                    return
                if row.at_s >= start_s:
                    yield replace(row, at_s=row.at_s - start_s)

        return Trace(self.name, rows, seconds, self.rate_per_s)

    def where(self, keeps: Callable[[TraceRequest], bool]) -> "Trace":
        """Only the requests that `keeps` accepts: those that fit a model's context."""

        def rows() -> Iterator[TraceRequest]:
            return filter(keeps, self.rows())

        rate_per_s = sum(1 for _ in rows()) / self.span_s
        return Trace(self.name, rows, self.span_s, rate_per_s)

    def map(self, change: Callable[[TraceRequest], TraceRequest]) -> "Trace":
        """Every request changed, but for its time."""
        return Trace(self.name, lambda: map(change, self.rows()), self.span_s, self.rate_per_s)

    def jittered(self, tick_s: float, seed: int) -> "Trace":
        """Stamps that stand on ticks, spread uniformly over their tick; in order again."""

        def rows() -> Iterator[TraceRequest]:
            chance, held = Events(seed).random, list[tuple[float, int, TraceRequest]]()
            for index, row in enumerate(self.rows()):
                while held and held[0][0] < row.at_s:
                    yield heapq.heappop(held)[2]
                at_s = row.at_s + chance.uniform(0.0, tick_s)
                heapq.heappush(held, (at_s, index, replace(row, at_s=at_s)))
            while held:
                yield heapq.heappop(held)[2]

        return Trace(self.name, rows, self.span_s + tick_s, self.rate_per_s)

    def hastened(self, speed: float) -> "Trace":
        """Recorded stamps divided by `speed`, as peers replay a trace. It compresses time and with
        it bursts: for equal terms with them only; `scaled` is for our own figures. Raises
        ValueError for a speed that is not above 0."""
        if not 0.0 < speed < math.inf:
            raise ValueError(f"speed {speed}: expected a number above 0")

        def rows() -> Iterator[TraceRequest]:
            return (replace(row, at_s=row.at_s / speed) for row in self.rows())

        return Trace(self.name, rows, self.span_s / speed, self.rate_per_s * speed)

    def scaled(self, factor: float) -> "Trace":
        """The same workload at `factor` times its rate. Raises ValueError for a factor that asks
        for no request or for more than COPIES_MAX copies."""
        if not 0.0 < factor < COPIES_MAX:
            raise ValueError(f"scale factor {factor}: expected one in (0, {COPIES_MAX})")
        copies = math.ceil(factor)
        whole = self._superposed(copies) if copies > 1 else self
        kept = whole._thinned(factor / copies)
        return kept._stretched(kept.rate_per_s / (factor * self.rate_per_s))

    def _superposed(self, copies: int) -> "Trace":
        """Copies of the window, each turned by its share of the span: what leaves at the end comes
        in at the start."""

        def turned(copy: int) -> Iterator[TraceRequest]:
            shift_s = self.span_s * copy / copies
            for row in self.rows():
                if row.at_s >= shift_s:
                    yield replace(row, at_s=row.at_s - shift_s, copy=copy)
            for row in takewhile(lambda row: row.at_s < shift_s, self.rows()):
                yield replace(row, at_s=row.at_s - shift_s + self.span_s, copy=copy)

        def rows() -> Iterator[TraceRequest]:
            return heapq.merge(*map(turned, range(copies)), key=lambda row: row.at_s)

        return Trace(self.name, rows, self.span_s, self.rate_per_s * copies)

    def _thinned(self, share: float) -> "Trace":
        """Whole clients (or else sessions) that make at least this share of the requests, and
        hardly more; all where the source names none."""
        if share >= 1.0:
            return self
        counts = Counter(map(_user, self.rows()))
        if not all(counts):
            return self
        wanted, chosen, total = share * counts.total(), set(), 0
        left = sorted(counts, key=lambda user: (crc32(user.encode()), user))
        for user in left:
            if total + counts[user] <= wanted:
                chosen.add(user)
                total += counts[user]
        if total < wanted:
            chosen.add(min((u for u in left if u not in chosen), key=lambda u: (counts[u], u)))
        return self.where(lambda row: _user(row) in chosen)

    def _stretched(self, factor: float) -> "Trace":
        """Time runs `factor` >= 1 times as long; arrivals beyond the span are lost."""
        if factor <= 1.0:
            return self

        def rows() -> Iterator[TraceRequest]:
            for row in self.rows():
                if row.at_s * factor >= self.span_s:
                    return
                yield replace(row, at_s=row.at_s * factor)

        return Trace(self.name, rows, self.span_s, self.rate_per_s / factor)


def read(folder: str, name: str, seed: int = 0) -> Trace:
    """The workload in `folder`/`name`.parquet. Raises ValueError, in one line, when there is none
    or its columns are others."""
    if not folder:
        raise ValueError("no traces: give their folder with --traces or SLACKWATER_TRACES")
    path = Path(folder) / f"{name}.parquet"
    if not path.is_file():
        raise ValueError(f"no trace {path}: give the folder with --traces or SLACKWATER_TRACES")
    opened = read_file(path)
    tick_s = TICKS_S.get(name)
    return opened.jittered(tick_s, seed) if tick_s else opened


def read_file(path: Path) -> Trace:
    """One file, its stamps as they were recorded. Raises ValueError, in one line, when it is not
    there or its columns are others."""
    if not path.is_file():
        raise ValueError(f"no trace {path}")
    with parquet.ParquetFile(path) as file:
        missing = [column for column in COLUMNS if column not in file.schema_arrow.names]
        if missing:
            raise ValueError(f"{path} has no column {missing[0]}")
        num_rows = file.metadata.num_rows
    if not num_rows:
        raise ValueError(f"{path} has no requests")
    span_s = math.nextafter(max(row.at_s for row in _rows(path)), math.inf)
    held = tuple(_rows(path)) if num_rows <= ROWS_HELD_MAX else ()
    return Trace(path.stem, lambda: iter(held) if held else _rows(path), span_s, num_rows / span_s)


def _rows(path: Path) -> Iterator[TraceRequest]:
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(ROWS_PER_READ, columns=list(COLUMNS)):
            columns = [batch.column(name).to_pylist() for name in COLUMNS]
            for at_s, prompt, output, hash_ids, session_id, client_id in zip(*columns, strict=True):
                yield TraceRequest(
                    at_s,
                    max(1, prompt),
                    max(1, output),
                    tuple(hash_ids or ()),
                    client_id or "",
                    session_id or "",
                )


def synthetic(seed: int, rate_per_s: float, seconds: float, shared_share: float = 0.0) -> Trace:
    """Bursty arrivals of a chat service, for where no file is. `shared_share` of the requests go
    on with the prompt of one before."""

    def rows() -> Iterator[TraceRequest]:
        chance = Events(seed + 1).random
        held: list[tuple[int, ...]] = []
        next_id = 0
        for arrival in arrivals(seed, rate_per_s, seconds):
            prefix: tuple[int, ...] = ()
            if held and chance.random() < shared_share:
                prefix = held[int(chance.random() * len(held))]
            fresh = -(-arrival.prompt_tokens // HASH_TOKENS)
            hash_ids = (*prefix, *range(next_id, next_id + fresh))
            next_id += fresh
            held = [*held[-63:], hash_ids] if shared_share else held
            prompt = len(prefix) * HASH_TOKENS + arrival.prompt_tokens
            yield TraceRequest(
                arrival.at_s, prompt, arrival.output_tokens, hash_ids if shared_share else ()
            )

    return Trace("synthetic", rows, seconds, sum(1 for _ in rows()) / seconds)
