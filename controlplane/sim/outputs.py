"""Laws of the journal (I3, I9), tried on drawn reports: late, twice, out of order, of other epochs.

What has come is kept here by index, the plain way, and compared after every report.
"""

from dataclasses import dataclass, field

from controlplane.journal import ENDS, PENDING_TOKENS_MAX, Journal
from controlplane.protocol import FinishReason, TokenLogprobs
from controlplane.sim.events import Chance

JOURNALS = 5
REPORTS = 30
TOKENS_MAX = 24
REPORT_TOKENS_MAX = 5
AHEAD_TOKENS_MAX = 6  # of a report that comes too early
LONG_SHARE = 0.03  # of the journals: reports are so long that not all can be kept ahead of a gap
REASONS: tuple[FinishReason, ...] = (*ENDS, "handed_off", "error")


@dataclass(slots=True)
class Counted:
    """The journal counted again."""

    limit: int
    epoch: int = 1
    known: dict[int, int] = field(default_factory=dict)  # ids by index, the first to come
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    end: tuple[int, FinishReason] | None = None
    missing_since_s: float | None = None
    num_dropped: int = 0

    def ids(self) -> list[int]:
        """Up to the first that is missing."""
        found: list[int] = []
        while len(found) in self.known:
            found.append(self.known[len(found)])
        return found

    def finish_reason(self) -> FinishReason | None:
        return self.end[1] if self.end is not None and len(self.ids()) >= self.end[0] else None

    def move(self, epoch: int) -> None:
        if epoch == self.epoch:
            return
        self.epoch, self.end, self.missing_since_s = epoch, None, None
        self.known = dict(enumerate(self.ids()))
        self.logprobs = {i: entry for i, entry in self.logprobs.items() if i in self.known}

    def take(
        self,
        epoch: int,
        seq: int,
        token_ids: list[int],
        now_s: float,
        reason: FinishReason | None,
        logprobs: list[TokenLogprobs],
    ) -> None:
        before = len(self.ids())
        if epoch != self.epoch or self.finish_reason() is not None:
            self.num_dropped += 1
            return
        if reason in ENDS and self.end is None:
            self.end = (min(seq + len(token_ids), self.limit), reason)
        inside = {index: i for index, i in enumerate(token_ids, seq) if index < self.limit}
        has_repeat = bool(token_ids) and seq < before
        if seq > before:  # what was kept ahead leaves less room
            room = PENDING_TOKENS_MAX - sum(index >= before for index in self.known)
            new = [seq - 1, *(index for index in inside if index not in self.known)]
            last = new[room] if room < len(new) else self.limit  # what follows finds it full
            inside = {index: i for index, i in inside.items() if index <= last}
        is_cut = seq > before and len(inside) < len(token_ids)
        self.num_dropped += has_repeat or is_cut
        self.known = inside | self.known
        new_logprobs = {index: e for index, e in enumerate(logprobs, seq) if index < self.limit}
        self.logprobs = new_logprobs | self.logprobs
        after = len(self.ids())
        has_gap = len(self.known) > after or (self.end is not None and after < self.end[0])
        if not has_gap:
            self.missing_since_s = None
        elif self.missing_since_s is None or after > before:
            self.missing_since_s = now_s


def check(chance: Chance) -> None:
    for _ in range(JOURNALS):
        _check(chance)


def _check(chance: Chance) -> None:
    """One request that now and then goes to another worker."""
    is_long = chance.random() < LONG_SHARE
    limit = 3 * PENDING_TOKENS_MAX if is_long else chance.randint(1, TOKENS_MAX)
    report_max = 2 * PENDING_TOKENS_MAX if is_long else REPORT_TOKENS_MAX
    journal, counted = Journal(limit, epoch=1), Counted(limit)
    for number in range(REPORTS):
        if chance.random() < 0.1:
            epoch = counted.epoch + chance.randrange(2)
            journal.move(epoch)
            counted.move(epoch)
        epoch = counted.epoch if chance.random() < 0.9 else counted.epoch + chance.choice((-1, 1))
        seq = chance.randint(max(0, journal.next_seq - 2), journal.next_seq + AHEAD_TOKENS_MAX)
        seq = journal.next_seq if chance.random() < 0.4 else seq
        # Each epoch has its own ids, so it shows whose were kept.
        ids = [10_000 * epoch + seq + offset for offset in range(chance.randint(0, report_max))]
        reason = chance.choice(REASONS) if chance.random() < 0.1 else None
        logprobs = [TokenLogprobs(-float(i), [], []) for i in ids] if chance.random() < 0.5 else []
        start = journal.next_seq
        fresh = journal.accept(epoch, seq, ids, float(number), reason, logprobs)
        counted.take(epoch, seq, ids, float(number), reason, logprobs)
        what = f"report {number} of epoch {epoch} from {seq} on"
        assert journal.ids == counted.ids(), f"I3: {journal.ids} after {what}, {counted}"
        assert fresh == journal.ids[start:], f"I3: {fresh} is new by {what}, {journal.ids}"
        assert journal.finish_reason == counted.finish_reason(), f"I3: ended by {what}, {counted}"
        assert journal.logprobs == counted.logprobs, f"I3: logprobs by {what}, {counted}"
        since_s = journal.missing_since_s
        assert since_s == counted.missing_since_s, f"I3: a gap since {since_s}: {what}, {counted}"
        dropped = journal.dropped_reports
        assert dropped == counted.num_dropped, f"I9: {dropped} dropped after {what}, {counted}"
