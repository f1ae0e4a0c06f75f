"""A worker's outbox: merged, ordered, bounded."""

import msgspec

from controlplane import protocol
from gpuworkers import outbox as boxes
from gpuworkers.outbox import Outbox
from tests.gpuworkers.stubconsole import make_engine

LOAD = make_engine().load(0.0)


def report(
    request_id: str, seq: int, *ids: int, finish: protocol.FinishReason | None = None
) -> protocol.SequenceReport:
    return protocol.SequenceReport(request_id, 1, seq, list(ids), finish, 1, 0, seq + len(ids))


def step(*reports: protocol.SequenceReport, online_s: float = 0.0) -> protocol.StepReport:
    load = msgspec.structs.replace(LOAD, online_s=online_s)
    return protocol.StepReport(list(reports), load)


def drained(outbox: Outbox) -> list[protocol.FromWorker]:
    messages = []
    while outbox:
        messages.append(outbox.take())
    return messages


def test_waiting_reports_of_a_sequence_merge_into_one() -> None:
    outbox = Outbox()
    outbox.put(step(report("a", 0, 10), report("b", 5, 20), online_s=0.25))
    outbox.put(step(report("a", 1, 11, 12), online_s=0.5))
    outbox.put(step(report("a", 3, 13, finish="length"), report("b", 6, 21)))
    (merged,) = drained(outbox)
    assert merged.sequences == [
        protocol.SequenceReport("a", 1, 0, [10, 11, 12, 13], "length", 3, 0, 4),
        protocol.SequenceReport("b", 1, 5, [20, 21], None, 2, 0, 7),
    ]
    assert merged.load.online_s == 0.75
    assert not outbox


def test_ids_that_do_not_follow_on_stand_alone() -> None:
    outbox = Outbox()
    outbox.put(step(report("a", 4, 14)))
    outbox.put(step(report("a", 0, 10, 11)))  # a Resend's answer
    outbox.put(step(report("a", 2, 12)))
    (merged,) = drained(outbox)
    assert [(r.seq, r.token_ids) for r in merged.sequences] == [(4, [14]), (0, [10, 11, 12])]


def test_nothing_is_merged_behind_the_end_of_a_sequence() -> None:
    outbox = Outbox()
    outbox.put(step(report("a", 0, 10, finish="handed_off")))
    outbox.put(step(report("a", 1, 11)))
    (merged,) = drained(outbox)
    assert len(merged.sequences) == 2


def test_answers_leave_before_reports_and_goodbye_leaves_last() -> None:
    outbox = Outbox()
    beat = protocol.Heartbeat(LOAD, 0.0)
    for message in [
        protocol.Goodbye("over"), beat, step(report("a", 0, 1)), protocol.Accepted("a", 1),
    ]:  # fmt: skip
        assert outbox.put(message)
    assert drained(outbox) == [
        protocol.Accepted("a", 1), step(report("a", 0, 1)), beat, protocol.Goodbye("over"),
    ]  # fmt: skip


def test_heartbeats_merge_and_keep_every_idle_second() -> None:
    outbox = Outbox()
    for _ in range(3):
        outbox.put(protocol.Heartbeat(msgspec.structs.replace(LOAD, idle_s=1.0), 0.5))
    (beat,) = drained(outbox)
    assert beat.load.idle_s == 3.0 and beat.busy_s == 0.5


def test_ids_that_wait_are_bounded() -> None:
    outbox = Outbox()
    ids = list(range(protocol.RESEND_TOKENS_MAX))
    count = boxes.TOKENS_MAX // len(ids)
    assert all(outbox.put(step(report(f"r{number}", 0, *ids))) for number in range(count))
    assert outbox.num_tokens == boxes.TOKENS_MAX
    assert not outbox.put(step(report("one more", 0, 1)))


def test_reports_and_messages_that_wait_are_bounded() -> None:
    outbox = Outbox()
    reports = [report(f"r{number}", 0, 1) for number in range(boxes.REPORTS_MAX)]
    assert outbox.put(step(*reports)) and not outbox.put(step(report("one more", 0, 1)))
    outbox = Outbox()
    for number in range(boxes.MESSAGES_MAX):
        assert outbox.put(protocol.Accepted(f"r{number}", 1))
    assert not outbox.put(protocol.Accepted("one more", 1))


def test_a_full_outbox_leaves_in_frames_that_the_protocol_allows() -> None:
    outbox = Outbox()
    ids = [2**31] * protocol.RESEND_TOKENS_MAX  # five bytes each
    count = boxes.TOKENS_MAX // len(ids)
    for number in range(count):
        outbox.put(step(report(f"{'r' * 60}{number}", 0, *ids), online_s=1.0))
    frames = drained(outbox)
    assert all(len(protocol.encode(frame)) <= protocol.FRAME_BYTES_MAX for frame in frames)
    assert sum(len(r.token_ids) for frame in frames for r in frame.sequences) == boxes.TOKENS_MAX
    assert sum(frame.load.online_s for frame in frames) == count
    many = Outbox()
    many.put(step(*[report(f"{'r' * 200}{n}", 0, 1) for n in range(boxes.REPORTS_MAX)]))
    assert all(len(protocol.encode(f)) <= protocol.FRAME_BYTES_MAX for f in drained(many))


def test_emptied_outbox_keeps_only_last_words() -> None:
    outbox = Outbox()
    outbox.put(step(report("a", 0, 1)))
    outbox.put(protocol.Drained())
    assert drained(outbox.emptied()) == [protocol.Drained()]
