"""Fleet: joins, dispatch, delivery through the journal, gaps, moves, what is stored."""

from console import jointokens
from console.facts import PlanFact
from console.fleet import CLOSE_RESTARTING, LINKS_MAX, RESEND_AFTER_S, STALLED_AFTER_S, Fleet
from console.generation import LiveRequest, Mailbox, Tokens
from console.metrics import Metrics
from console.transport import MemoryLink
from console.writer import WorkerFact
from controlplane import domain, protocol
from controlplane.config import ControlPlaneConfig
from controlplane.journal import Journal
from controlplane.plane import ControlPlane
from tests.factories import make_hello, make_load, make_request


class Facts:
    """Keeps what the writer would store."""

    def __init__(self):
        self.facts = []

    def put(self, fact):
        self.facts.append(fact)


class Rig:
    """A fleet with a clock that the test moves, and workers made of MemoryLinks."""

    def __init__(self):
        self.at_s = 100.0
        self.writer = Facts()
        self.metrics = Metrics()
        plane = ControlPlane(ControlPlaneConfig(), b"s" * 32)
        self.fleet = Fleet(plane, self.metrics, self.writer, lambda: self.at_s, lambda: 0.5)

    def join(self, connection_id, role="mixed", **hello):
        link = MemoryLink()
        self.fleet.connected(connection_id, link)
        token = hello.pop("token", None) or jointokens.mint(connection_id)
        resume = hello.get("resume")
        message = make_hello(role, name=connection_id, token=None if resume else token, **hello)
        self.fleet.received(connection_id, message)
        return link

    def submit(self, request_id="r1", output_tokens_max=8, **facts):
        request = make_request(
            request_id, output_tokens_max=output_tokens_max, arrived_at_s=self.at_s, **facts
        )
        live = LiveRequest(
            request=request,
            prompt_ids=list(range(request.prompt_tokens)),
            sampling=protocol.Sampling(output_tokens_max=output_tokens_max),
            targets=protocol.ClassTargets("interactive", 0, 4.0, 0.2),
            salt=b"salt",
            journal=Journal(output_tokens_max),
            events=Mailbox(output_tokens_max + 64),
        )
        self.fleet.submit(live)
        return live

    def report(self, connection_id, live, seq, ids, finish=None, epoch=None, cached=0):
        epoch = live.journal.epoch if epoch is None else epoch
        sequence = protocol.SequenceReport(
            live.request_id, epoch, seq, ids, finish, 0, cached, 32 + seq
        )
        self.fleet.received(connection_id, protocol.StepReport([sequence], make_load()))

    def ticks(self, seconds):
        for _ in range(round(seconds * 10)):
            self.at_s += 0.1
            self.fleet.tick()

    def heartbeat(self, connection_id):
        self.fleet.received(connection_id, protocol.Heartbeat(make_load(), 0.0))


def events(live):
    """What the gateway would read now."""
    found = []
    while (event := live.events.take_now()) is not None:
        found.append(event)
    return found


def tokens(live):
    return [event for event in events(live) if isinstance(event, Tokens)]


def sent(link, kind):
    return [message for message in link.sent if isinstance(message, kind)]


# --- joining -------------------------------------------------------------------------------------


def test_worker_with_a_token_is_welcomed_and_seen():
    rig = Rig()
    link = rig.join("c1")
    assert isinstance(link.sent[0], protocol.Welcome)
    assert [worker.worker_id for worker in rig.fleet.view().workers] == [link.sent[0].worker_id]


def test_worker_without_a_good_token_is_refused_with_the_reason():
    rig = Rig()
    link = rig.join("c1", token="wrong")
    assert "not one of this installation" in sent(link, protocol.Refused)[0].reason
    assert link.closed is not None
    assert rig.fleet.view().workers == ()


def test_token_lets_one_worker_in():
    rig, token = Rig(), jointokens.mint("w")
    rig.join("c1", token=token)
    assert "used before" in sent(rig.join("c2", token=token), protocol.Refused)[0].reason


def test_token_of_a_worker_that_the_plane_refused_stays_good():
    rig, token = Rig(), jointokens.mint("w")
    refused = rig.join("c1", token=token, versions=(999,))
    assert sent(refused, protocol.Refused)
    assert sent(rig.join("c2", token=token), protocol.Welcome)


def test_reconnect_with_the_resume_secret_keeps_the_id_and_closes_the_older_socket():
    rig = Rig()
    first = rig.join("c1")
    welcome = first.sent[0]
    proof = protocol.ResumeProof(welcome.worker_id, welcome.resume_secret)
    second = rig.join("c2", resume=proof)
    assert second.sent[0].worker_id == welcome.worker_id
    assert second.sent[0].epoch > welcome.epoch
    assert first.closed is not None
    rig.fleet.disconnected("c1")  # the old socket's end changes nothing
    assert [worker.status for worker in rig.fleet.view().workers] == ["live"]


def test_frame_before_the_welcome_closes_the_connection():
    rig, link = Rig(), MemoryLink()
    rig.fleet.connected("c1", link)
    rig.heartbeat("c1")
    assert link.closed is not None


def test_connections_beyond_the_maximum_are_refused_for_now():
    rig = Rig()
    for index in range(LINKS_MAX):
        rig.fleet.connected(f"x{index}", MemoryLink())
    link = MemoryLink()
    rig.fleet.connected("one-more", link)
    assert not sent(link, protocol.Refused)[0].permanent
    assert link.closed is not None


# --- a request -----------------------------------------------------------------------------------


def test_request_is_dispatched_with_prompt_sampling_and_salt():
    rig = Rig()
    link = rig.join("c1")
    live = rig.submit()
    (assign,) = sent(link, protocol.Assign)
    assert (assign.request_id, assign.stage, assign.epoch) == ("r1", "full", live.epoch)
    assert (assign.prompt_ids, assign.delivered) == (live.prompt_ids, [])
    assert (assign.sampling, assign.salt) == (live.sampling, b"salt")
    assert live.placement.decode_worker == link.sent[0].worker_id
    assert live.waited_s == 0.0


def test_ids_arrive_once_and_in_order_with_one_finish():
    rig = Rig()
    rig.join("c1")
    live = rig.submit(output_tokens_max=4)
    events(live)
    rig.report("c1", live, 0, [10], cached=16)
    rig.report("c1", live, 0, [10])
    rig.report("c1", live, 1, [11, 12])
    rig.report("c1", live, 3, [13], finish="length")
    rig.report("c1", live, 3, [13], finish="length")
    assert tokens(live) == [Tokens([10], None), Tokens([11, 12], None), Tokens([13], "length")]
    assert live.cached_tokens == 16


def test_report_of_an_older_epoch_or_unknown_request_is_ignored():
    rig = Rig()
    rig.join("c1")
    live = rig.submit()
    events(live)
    rig.report("c1", live, 0, [10], epoch=live.epoch - 1)
    rig.fleet.finished(live, "cancelled")
    rig.report("c1", live, 0, [10])
    assert tokens(live) == []


def test_end_of_a_request_that_still_runs_is_told_to_its_worker():
    rig = Rig()
    link = rig.join("c1")
    live = rig.submit()
    rig.fleet.finished(live, "completed")
    rig.fleet.finished(live, "completed")
    assert sent(link, protocol.Cancel) == [protocol.Cancel("r1", live.epoch)]
    assert rig.fleet.requests == {}
    assert rig.fleet.view().requests == ()


def test_gap_is_asked_again_once_per_period_and_closed_by_the_answer():
    rig = Rig()
    link = rig.join("c1")
    live = rig.submit()
    rig.report("c1", live, 0, [10])
    rig.report("c1", live, 2, [12])
    rig.ticks(RESEND_AFTER_S + 0.2)
    assert sent(link, protocol.Resend) == [protocol.Resend("r1", live.epoch, 1)]
    rig.report("c1", live, 1, [11])
    assert live.journal.ids == [10, 11, 12]
    rig.ticks(2 * RESEND_AFTER_S)
    assert len(sent(link, protocol.Resend)) == 1


def test_gap_that_stays_moves_the_request_to_another_worker():
    rig = Rig()
    links = {"c1": rig.join("c1"), "c2": rig.join("c2")}
    live = rig.submit()
    first = next(name for name, link in links.items() if sent(link, protocol.Assign))
    other = links["c2" if first == "c1" else "c1"]
    rig.report(first, live, 0, [10])
    rig.report(first, live, 2, [12])
    for _ in range(round(STALLED_AFTER_S) + 2):
        rig.ticks(1.0)
        for name in links:
            rig.heartbeat(name)
    (assign,) = sent(other, protocol.Assign)
    assert assign.delivered == [10]
    assert assign.epoch == live.epoch
    assert sent(links[first], protocol.Cancel)


def test_lost_worker_hands_its_request_on_with_what_was_delivered():
    rig = Rig()
    links = {"c1": rig.join("c1"), "c2": rig.join("c2")}
    live = rig.submit()
    first = next(name for name, link in links.items() if sent(link, protocol.Assign))
    second = "c2" if first == "c1" else "c1"
    before = live.epoch
    rig.report(first, live, 0, [10, 11])
    rig.fleet.disconnected(first)
    (assign,) = sent(links[second], protocol.Assign)
    assert (assign.delivered, assign.epoch) == ([10, 11], live.epoch)
    assert live.epoch > before
    assert live.failovers == 1
    rig.report(second, live, 2, [12], finish="stop")
    assert tokens(live)[-1] == Tokens([12], "stop")


def handoff():
    """A prompt that c1 computes and c2 goes on with."""
    rig = Rig()
    rig.join("c1", "prefill")
    rig.join("c2", "decode")
    live = rig.submit(prompt_tokens=400)
    assert live.placement.split == "handoff"
    events(live)
    return rig, live


def test_first_id_of_a_handoff_waits_until_decoding_begins():
    rig, live = handoff()
    rig.report("c1", live, 0, [10])
    assert tokens(live) == []
    done = protocol.HandoffDone(live.request_id, live.epoch, 25, 1000, 0.1)
    rig.fleet.received("c2", done)
    assert tokens(live) == [Tokens([10], None)]
    rig.report("c2", live, 1, [11])
    assert tokens(live) == [Tokens([11], None)]


def test_first_id_is_not_held_behind_later_ones():
    rig, live = handoff()
    done = protocol.HandoffDone(live.request_id, live.epoch, 25, 1000, 0.1)
    rig.fleet.received("c2", done)
    rig.report("c1", live, 0, [10])  # its socket was slower
    rig.report("c2", live, 1, [11])
    assert tokens(live) == [Tokens([10], None), Tokens([11], None)]


def test_first_id_goes_out_when_the_prefill_worker_is_lost():
    rig, live = handoff()
    rig.report("c1", live, 0, [10])
    rig.fleet.disconnected("c1")
    assert tokens(live) == [Tokens([10], None)]


def test_first_id_goes_out_and_on_when_the_decode_worker_is_lost_before_it_begins():
    rig, live = handoff()
    other = rig.join("c3", "decode")
    rig.report("c1", live, 0, [10])
    rig.fleet.disconnected("c2")
    assert tokens(live) == [Tokens([10], None)]
    (assign,) = sent(other, protocol.Assign)
    assert (assign.delivered, assign.epoch) == ([10], live.epoch)
    rig.report("c1", live, 0, [10], epoch=live.epoch - 1)  # resent by the worker that had it
    rig.report("c3", live, 1, [11], finish="stop")
    assert tokens(live) == [Tokens([11], "stop")]


def test_held_id_of_a_request_that_ended_is_forgotten():
    rig, live = handoff()
    rig.report("c1", live, 0, [10])
    rig.fleet.finished(live, "cancelled")
    assert tokens(live) == []
    assert rig.fleet._held == {}


def test_handoff_that_fails_after_the_last_id_moves_nothing():
    rig, live = handoff()
    rig.report("c1", live, 0, [10], finish="stop")
    epoch = live.epoch
    rig.fleet.received("c2", protocol.HandoffFailed(live.request_id, epoch, "refused"))
    assert live.epoch == epoch
    assert tokens(live) == [Tokens([10], "stop")]


def test_handoff_that_fails_before_it_moves_the_request():
    rig, live = handoff()
    rig.report("c1", live, 0, [10])
    epoch = live.epoch
    rig.fleet.received("c2", protocol.HandoffFailed(live.request_id, epoch, "refused"))
    assert live.epoch > epoch
    assert tokens(live) == [Tokens([10], None)]


def test_request_without_a_worker_ends_as_a_decision():
    rig = Rig()
    live = rig.submit()
    rig.ticks(1.0)
    outcomes = [event.outcome for event in events(live)]
    assert isinstance(outcomes[0], domain.Queued | domain.Rejected)


# --- what is kept --------------------------------------------------------------------------------


def test_role_flip_reaches_the_worker_and_is_stored_with_its_author():
    rig = Rig()
    link = rig.join("c1", role="prefill")
    worker_id = link.sent[0].worker_id
    rig.fleet.handle(domain.RoleOrdered(worker_id, "decode", "alice"))
    assert sent(link, protocol.SetRole) == [protocol.SetRole("decode")]
    (plan,) = [fact for fact in rig.writer.facts if isinstance(fact, PlanFact)]
    assert (plan.worker_id, plan.role_before, plan.role_after) == (worker_id, "prefill", "decode")
    assert plan.by == "alice"


def test_worker_rows_are_written_when_something_changed_only():
    rig = Rig()
    rig.join("c1")
    rig.ticks(0.5)
    rig.fleet.disconnected("c1")
    rig.ticks(0.5)
    rows = [fact for fact in rig.writer.facts if isinstance(fact, WorkerFact)]
    assert [row.status for row in rows] == ["live", "lost"]


def test_workers_are_told_that_the_console_restarts():
    rig = Rig()
    link = rig.join("c1")
    rig.fleet.close_links()
    assert link.closed[0] == CLOSE_RESTARTING


def test_drain_refuses_new_requests():
    rig = Rig()
    rig.join("c1")
    rig.fleet.handle(domain.ServerDraining())
    (decided,) = events(rig.submit())
    assert decided.outcome.code == "draining"


def test_request_above_its_rate_reaches_its_worker_behind_all_that_may_be_in_time():
    """One that is only predicted to be late keeps its deadline at the worker."""
    rig = Rig()
    link = rig.join("c1")
    model_id = make_request().model_id
    contract = domain.Contract("acme", model_id, "interactive", 1, 6_000, 10)
    rig.fleet.handle(domain.ContractsSet((contract,)))
    for name in ("within", "above"):
        rig.submit(name, prompt_tokens=32, output_tokens_max=8)
    strict = domain.SLOClass("strict", 0, ttft_s_p99=0.01, itl_s_p99=0.2)
    rig.submit("late", slo=strict)
    assigned = [item for item in link.sent if isinstance(item, protocol.Assign)]
    assert {item.request_id: item.targets.ttft_s_left for item in assigned} == {
        "within": 4.0,
        "above": 0.0,
        "late": 4.0,
    }


def test_contract_bills_what_was_delivered_and_is_judged_by_its_gaps():
    rig = Rig()
    rig.join("c1")
    model_id = make_request().model_id
    contract = domain.Contract("acme", model_id, "interactive", 60, 6_000, 10)
    rig.fleet.handle(domain.ContractsSet((contract,)))
    live = rig.submit(prompt_tokens=32, output_tokens_max=8)
    rig.report("c1", live, 0, [1, 2, 3, 4])
    rig.fleet.first_token(live, 0.5)
    live.delivered_tokens, live.itl_s_p99 = 3, 0.1  # a stop string took the last id
    rig.fleet.finished(live, "completed")
    (account,) = rig.fleet.accounts()
    assert (account.spent_tokens, account.held_tokens) == (35, 0)
    assert (account.num_met, account.num_missed) == (1, 0)
    (row,) = rig.fleet.preview([contract])
    assert row.refusal is None and row.capacity.num_workers == 1


def test_plane_hears_once_that_a_moved_request_goes_on():
    """Until then nothing else starts beside it: it may have killed its worker."""
    rig = Rig()
    rig.join("c1")
    live = rig.submit("r1")
    link = rig.join("c2")
    rig.fleet.disconnected("c1")
    rig.submit("r2")
    started = [item.request_id for item in link.sent if isinstance(item, protocol.Assign)]
    assert started == ["r1"]
    rig.report("c2", live, 0, [5])
    rig.report("c2", live, 1, [6])
    started = [item.request_id for item in link.sent if isinstance(item, protocol.Assign)]
    assert started == ["r1", "r2"] and live.progressed_epoch == 2
