"""What a worker has to say and may not say yet: merged, ordered and bounded."""

from collections import deque

import msgspec

from controlplane import protocol

MESSAGES_MAX = 8192  # answers and handoff messages that wait for credit
REPORTS_MAX = 8192  # merged sequence reports that wait
TOKENS_MAX = 262_144  # ids in them
FRAME_TOKENS_MAX = 65_536  # of one StepReport: at most 5 bytes each, so within FRAME_BYTES_MAX
FRAME_REPORTS_MAX = 1024


def merge_loads(older: protocol.WorkerLoad, newer: protocol.WorkerLoad) -> protocol.WorkerLoad:
    """The newer state with the seconds of both."""
    return msgspec.structs.replace(
        newer,
        online_s=older.online_s + newer.online_s,
        batch_s=older.batch_s + newer.batch_s,
        idle_s=older.idle_s + newer.idle_s,
    )


def without_seconds(load: protocol.WorkerLoad) -> protocol.WorkerLoad:
    """The same state, its seconds already reported."""
    return msgspec.structs.replace(load, online_s=0.0, batch_s=0.0, idle_s=0.0)


class Outbox:
    """What waits for credit or for the socket. Step reports merge, so a console that reads slowly
    costs bounded memory and still gets every id, in order.

    Order out: answers and handoff messages, then reports, then the last heartbeat, Drained and
    Goodbye."""

    def __init__(self) -> None:
        self._messages: deque[protocol.FromWorker] = deque()
        self._reports: deque[protocol.SequenceReport] = deque()
        self._newest: dict[tuple[str, int], int] = {}  # position of a sequence's newest report
        self._taken = 0  # reports taken so far: position of self._reports[0]
        self._tokens = 0
        self._load: protocol.WorkerLoad | None = None
        self._heartbeat: protocol.Heartbeat | None = None
        self._last: list[protocol.FromWorker] = []

    def __bool__(self) -> bool:
        return bool(self._messages or self._load or self._heartbeat or self._last)

    @property
    def num_tokens(self) -> int:
        return self._tokens

    def put(self, message: protocol.FromWorker) -> bool:
        """False when a maximum is reached: the caller reconnects, and the console asks again for
        what it misses."""
        match message:
            case protocol.StepReport(sequences=sequences, load=load):
                self._load = merge_loads(self._load, load) if self._load else load
                for report in sequences:
                    self._merge(report)
                return len(self._reports) <= REPORTS_MAX and self._tokens <= TOKENS_MAX
            case protocol.Heartbeat(load=load):
                if self._heartbeat is not None:
                    load = merge_loads(self._heartbeat.load, load)
                self._heartbeat = protocol.Heartbeat(load, message.busy_s)
            case protocol.Drained() | protocol.Goodbye():
                if message not in self._last:
                    self._last.append(message)
            case _:
                self._messages.append(message)
        return len(self._messages) <= MESSAGES_MAX

    def _merge(self, new: protocol.SequenceReport) -> None:
        """Appends to the sequence's newest report where the ids follow on, else stands alone."""
        key = (new.request_id, new.epoch)
        self._tokens += len(new.token_ids)
        position = self._newest.get(key, -1)
        if position >= self._taken:
            old = self._reports[position - self._taken]
            token_ids = old.token_ids + new.token_ids
            is_next = new.seq == old.seq + len(old.token_ids) and old.finish_reason is None
            if is_next and len(token_ids) <= protocol.RESEND_TOKENS_MAX:
                self._reports[position - self._taken] = protocol.SequenceReport(
                    new.request_id,
                    new.epoch,
                    old.seq,
                    token_ids,
                    new.finish_reason,
                    old.prefill_tokens + new.prefill_tokens,
                    new.cached_tokens,
                    new.context_tokens,
                    old.logprobs + new.logprobs,
                    new.prefill_gpu_s,
                    new.decode_gpu_s,
                )
                return
        self._newest[key] = self._taken + len(self._reports)
        self._reports.append(new)

    def take(self) -> protocol.FromWorker:
        """The next frame's message; the outbox is not empty."""
        if self._messages:
            return self._messages.popleft()
        if self._load is not None:
            return self._take_report(self._load)
        if self._heartbeat is not None:
            heartbeat, self._heartbeat = self._heartbeat, None
            return heartbeat
        return self._last.pop(0)

    def _take_report(self, load: protocol.WorkerLoad) -> protocol.StepReport:
        sequences: list[protocol.SequenceReport] = []
        tokens = 0
        while self._reports and len(sequences) < FRAME_REPORTS_MAX:
            if sequences and tokens + len(self._reports[0].token_ids) > FRAME_TOKENS_MAX:
                break
            report = self._reports.popleft()
            self._taken += 1
            tokens += len(report.token_ids)
            sequences.append(report)
        self._tokens -= tokens
        self._load = without_seconds(load) if self._reports else None
        if not self._reports:
            self._newest.clear()
        return protocol.StepReport(sequences, load)

    def sequences(self) -> list[protocol.LiveSequence]:
        """Sequences with ids that wait here, for the Hello of a reconnect."""
        ends = {(r.request_id, r.epoch): r.seq + len(r.token_ids) for r in self._reports}
        return [protocol.LiveSequence(*key, end) for key, end in ends.items()]

    def emptied(self) -> "Outbox":
        """An outbox that keeps nothing of this one but Drained and Goodbye."""
        fresh = Outbox()
        fresh._last = self._last
        return fresh
