"""The gateway in the simulation: a journal per request, and what its client got, id by id.

It asserts at once when an id is repeated, skipped or wrong, and when an output ends too early.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from controlplane import domain, protocol
from controlplane.journal import Journal
from controlplane.sim.events import Events
from controlplane.sim.worker import Key, output_id

RESEND_S, STALLED_S = 0.5, 2.0  # console/fleet.py


@dataclass(slots=True)
class Stream:
    """A client's request: what it was given so far, and its one end."""

    request: domain.GenerateRequest
    prompt_ids: list[int]
    tokens: int  # of its true output, at which a stop string ends it; nobody else knows
    journal: Journal
    end: str = ""
    is_gap_watched: bool = False
    progressed_epoch: int = 0
    decode_worker: str = ""

    @property
    def ids(self) -> list[int]:
        return self.journal.ids

    @property
    def epoch(self) -> int:
        return self.journal.epoch

    @property
    def has_gap(self) -> bool:
        return not self.end and self.journal.missing_since_s is not None


class Clients:
    """Owner of the streams. `handle` tells the plane, `ask_again` has a worker send all its ids."""

    def __init__(
        self,
        events: Events,
        handle: Callable[[domain.Event], None],
        ask_again: Callable[[str, Key], None],
        reached: set[str],
    ) -> None:
        self._events = events
        self._handle = handle
        self._ask_again = ask_again
        self._reached = reached
        self.streams: dict[str, Stream] = {}

    def submit(self, request: domain.GenerateRequest, tokens: int, prompt_ids: list[int]) -> None:
        journal = Journal(request.output_tokens_max)
        self.streams[request.request_id] = Stream(request, prompt_ids, tokens, journal)
        self._handle(domain.Submit(request))

    def cancel(self, request_id: str) -> None:
        """The client goes away."""
        stream = self.streams[request_id]
        if not stream.end:
            stream.end = "cancelled"
            self._handle(domain.Finished(request_id, "cancelled", len(stream.ids)))

    def dispatched(self, command: domain.Dispatch) -> Stream:
        stream = self.streams[command.request_id]
        assert not stream.end, f"I1: {command.request_id} was dispatched after its end"
        stream.journal.move(command.epoch)
        stream.decode_worker = command.worker_id  # of two stages decode is dispatched last
        return stream

    def rejected(self, request_id: str, code: str) -> None:
        stream = self.streams[request_id]
        assert not stream.end, f"I1: {request_id} ended as {stream.end} and was rejected"
        stream.end = code

    def report(self, worker_id: str, report: protocol.SequenceReport) -> None:
        stream = self.streams[report.request_id]
        if stream.end:
            return
        journal, start, dropped = stream.journal, len(stream.ids), stream.journal.dropped_reports
        now_s = self._events.now_s
        fresh = journal.accept(
            report.epoch, report.seq, report.token_ids, now_s, report.finish_reason
        )
        is_current = report.epoch == stream.epoch
        assert is_current or not fresh, f"I9: ids of an older epoch count: {report}"
        assert journal.ids[start:] == fresh, f"I3: {fresh} of {report}"
        if is_current and journal.dropped_reports > dropped:
            self._reached.add("duplicate dropped")
        if fresh and not start:
            ttft_s = now_s - stream.request.arrived_at_s
            self._handle(domain.FirstToken(report.request_id, ttft_s))
        if fresh and stream.epoch > 1 and stream.progressed_epoch != stream.epoch:
            stream.progressed_epoch = stream.epoch
            self._handle(domain.Progressed(report.request_id, stream.epoch))
        for index, token_id in enumerate(fresh, start):
            expected = output_id(stream.prompt_ids, index)
            assert token_id == expected, f"I3: {token_id} for {expected} in {report}"
            if index + 1 == stream.tokens:  # a stop string: what follows is dropped
                stream.end = "completed"
                self._handle(domain.Finished(report.request_id, "completed", stream.tokens))
                return
        assert journal.finish_reason is None, f"I3: {report} ends {stream}"
        if is_current and report.finish_reason == "error":
            self._reached.add("sequence failed")
            self._handle(domain.SequenceFailed(worker_id, report.request_id, report.epoch))
        if stream.has_gap:
            self._watch_gap(stream)

    def _watch_gap(self, stream: Stream) -> None:
        """As console/fleet.py: ask again after half a second, move the request after two."""
        if stream.is_gap_watched:
            return
        stream.is_gap_watched = True
        self._reached.add("gap")
        key = (stream.request.request_id, stream.epoch)
        self._events.after(RESEND_S, partial(self._resend, stream, key))
        self._events.after(STALLED_S, partial(self._give_up, stream, key))

    def _resend(self, stream: Stream, key: Key) -> None:
        if stream.has_gap and stream.epoch == key[1]:
            self._ask_again(stream.decode_worker, key)

    def _give_up(self, stream: Stream, key: Key) -> None:
        stream.is_gap_watched = False
        if stream.has_gap and stream.epoch == key[1]:
            self._reached.add("stalled")
            self._handle(domain.Stalled(*key))
        elif stream.has_gap:  # it has moved meanwhile
            self._watch_gap(stream)
