"""Membership: joining, refusal, resume, fencing, expiry by silence, drain and role orders."""

import pytest

from controlplane import domain, protocol
from tests.controlplane.rig import Rig, of, placement
from tests.factories import CPU_STEP, MODEL, make_hello, make_load

LIVE = protocol.LiveSequence


def refused(commands: list[domain.Command]) -> protocol.Refused:
    (greet,) = of(domain.Greet, commands)
    assert isinstance(greet.message, protocol.Refused), greet
    return greet.message


def test_welcome_carries_id_epoch_credit_and_policy():
    rig = Rig(batch_rows_max=7)
    (greet,) = of(domain.Greet, rig.hello(make_hello("decode")))
    assert greet.connection_id == "c1"
    welcome = greet.message
    assert (welcome.worker_id, welcome.epoch) == ("w1", 1)
    assert welcome.credit_frames == protocol.CREDIT_FRAMES
    assert welcome.policy == protocol.Policy(batch_rows_max=7)
    assert len(welcome.resume_secret) == 64


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        ({"versions": (99,)}, "speaks protocol [99], this console 1"),
        ({"token": None}, "join token or a resume proof"),
        ({"models": ()}, "nothing to serve"),
        ({"num_blocks": 0}, "nothing to serve"),
        ({"block_tokens": 0}, "nothing to serve"),
        ({"step_model": protocol.StepModel(0.0, 0.0, 0.0)}, "predicts no time"),
        ({"step_model": protocol.StepModel(float("nan"), 0.0, 0.0)}, "predicts no time"),
        ({"resume": protocol.ResumeProof("w9", "x")}, "w9 is not known any more"),
    ],
)
def test_unfit_hello_is_refused_for_good_with_the_reason(facts, text):
    rig = Rig()
    message = refused(rig.hello(make_hello(**facts)))
    assert message.permanent and text in message.reason
    assert rig.plane.view(0.0).workers == ()


def test_wrong_resume_secret_is_refused_and_the_member_stays():
    rig = Rig()
    rig.join("decode")
    proof = protocol.ResumeProof("w1", "0" * 64)
    assert "wrong resume secret" in refused(rig.hello(make_hello(resume=proof))).reason
    assert rig.worker("w1").status == "live" and rig.worker("w1").epoch == 1


def test_other_weights_under_a_served_name_are_refused():
    rig = Rig()
    rig.join("decode")
    other = protocol.ModelFacts(MODEL.model_id, "b" * 64, 2048, 49_152, 46_080)
    assert "worker w1 serves aaaa" in refused(rig.hello(make_hello(models=(other,)))).reason
    rig.close("w1")
    rig.join("decode", models=(other,))


def test_worker_over_the_limit_is_refused_for_now():
    rig = Rig(workers_max=2)
    rig.join(), rig.join()
    message = refused(rig.hello(make_hello()))
    assert not message.permanent and "2 workers joined already" in message.reason
    assert len(rig.plane.view(0.0).workers) == 2
    rig.rejoin("w1")
    assert rig.worker("w1").epoch == 2, "a member may always come back"


def test_resume_keeps_the_id_raises_the_epoch_and_closes_the_older_connection():
    rig = Rig()
    rig.join("decode")
    commands = rig.rejoin("w1", role="decode")
    assert isinstance(commands[0], domain.CloseWorker), "before the id means the new connection"
    assert isinstance(commands[1], domain.Greet) and commands[1].message.epoch == 2
    assert rig.handle(domain.WorkerClosed("w1", 1)) == []
    assert rig.worker("w1").status == "live"


def test_resume_keeps_role_and_drain_orders():
    rig = Rig()
    rig.join("decode")
    rig.handle(domain.RoleOrdered("w1", "prefill", "ann"))
    rig.handle(domain.DrainOrdered("w1", "ann"))
    rig.close("w1")
    commands = rig.rejoin("w1", role="decode")
    assert of(domain.SendRole, commands) == [domain.SendRole("w1", "prefill")]
    assert of(domain.SendDrain, commands) == [domain.SendDrain("w1")]
    assert rig.worker("w1").status == "draining"


def test_messages_of_an_older_epoch_change_nothing():
    rig = Rig()
    rig.join("decode")
    rig.submit()
    rig.rejoin("w1", role="decode", sequences=(LIVE("r1", 1, 2),))
    before = rig.plane.view(rig.now_s)
    for message in (
        make_load(kv_blocks_free=1),
        protocol.Rejected("r1", 1, "no_kv_room", 0),
        protocol.Drained(),
        protocol.Goodbye("bye"),
    ):
        assert rig.send("w1", message, epoch=1) == []
    assert rig.plane.view(rig.now_s) == before


def test_messages_of_an_unknown_worker_change_nothing():
    rig = Rig()
    assert rig.handle(domain.WorkerMessage("w7", 1, make_load())) == []
    assert rig.handle(domain.WorkerClosed("w7", 1)) == []
    assert rig.handle(domain.RoleOrdered("w7", "decode", "ann")) == []
    assert rig.handle(domain.DrainOrdered("w7", "ann")) == []


def test_silence_stops_new_work_first_and_then_ends_the_membership():
    rig = Rig()
    rig.join("decode")
    rig.tick(1.5)
    assert rig.worker("w1").status == "live"
    rig.tick(0.2)
    assert rig.worker("w1").status == "suspect"
    queued = of(domain.Decided, rig.submit())[0]
    assert isinstance(queued.outcome, domain.Queued)
    assert "nothing heard for 1.7 s" in queued.record.reason
    assert of(domain.CloseWorker, rig.tick(1.3)) == []
    (close,) = of(domain.CloseWorker, rig.tick(0.1))
    assert close.worker_id == "w1" and "silent for 3.1 s" in close.reason
    assert rig.worker("w1").status == "lost"


def test_slow_steps_are_given_more_time():
    rig = Rig()
    rig.join("decode")
    rig.send("w1", make_load(predicted_s=2.0))
    rig.tick(3.9)
    assert rig.worker("w1").status == "live"
    rig.tick(0.2)
    assert rig.worker("w1").status == "suspect"
    rig.tick(3.8)
    assert rig.worker("w1").status == "suspect"
    rig.tick(0.2)
    assert rig.worker("w1").status == "lost"


def test_word_from_a_suspect_makes_it_live_and_starts_what_waits():
    rig = Rig()
    rig.join("decode")
    rig.tick(2.0)
    rig.submit()
    assert placement(rig.send("w1", make_load())).decode_worker == "w1"
    assert rig.worker("w1").status == "live"


def test_step_that_does_not_end_counts_although_heartbeats_go_on():
    rig = Rig()
    rig.join("decode")
    for busy_s in range(1, 11):
        rig.tick(1.0)
        rig.send("w1", protocol.Heartbeat(make_load(), float(busy_s)))
        assert rig.worker("w1").status == ("live" if busy_s <= 5 else "suspect")
    rig.send("w1", protocol.Heartbeat(make_load(), 10.5))
    (close,) = of(domain.CloseWorker, rig.tick(0.1))
    assert "one step has run for 10.5 s" in close.reason


def test_own_stall_is_not_held_against_workers():
    rig = Rig()
    rig.join("decode")
    rig.tick(1.0, heard=("w1",))
    rig.now_s += 30.0
    assert of(domain.CloseWorker, rig.handle(domain.Tick())) == []
    assert rig.worker("w1").status == "live"
    assert of(domain.CloseWorker, rig.tick(3.1)) != []


def test_fenced_worker_is_ignored_until_it_joins_again():
    rig = Rig()
    rig.join("decode")
    rig.tick(3.2)
    assert rig.worker("w1").status == "lost"
    assert rig.send("w1", make_load()) == []
    assert rig.worker("w1").status == "lost"
    commands = rig.rejoin("w1", role="decode")
    assert of(domain.CloseWorker, commands) == []
    assert rig.worker("w1").status == "live" and rig.worker("w1").epoch == 2


def test_lost_worker_is_forgotten_after_its_time_and_its_proof_with_it():
    rig = Rig(lost_kept_s=10.0)
    rig.join("decode")
    rig.close("w1")
    rig.tick(9.0)
    assert rig.worker("w1").status == "lost"
    rig.tick(1.5)
    assert rig.plane.view(rig.now_s).workers == ()
    proof = protocol.ResumeProof("w1", rig.welcomes["w1"].resume_secret)
    assert "not known any more" in refused(rig.hello(make_hello(resume=proof))).reason
    assert rig.join("decode") == "w2", "ids are never given twice"


def test_goodbye_moves_the_requests_and_removes_the_worker():
    rig = Rig()
    rig.join("decode"), rig.join("decode")
    rig.submit()
    assert placement(rig.send("w1", protocol.Goodbye("SIGTERM"))).decode_worker == "w2"
    assert [view.worker_id for view in rig.plane.view(0.0).workers] == ["w2"]
    assert rig.handle(domain.WorkerClosed("w1", 1)) == []


def test_draining_worker_gets_nothing_and_finishes_what_it_has():
    rig = Rig()
    rig.join("decode")
    rig.submit("r1")
    assert rig.handle(domain.DrainOrdered("w1", "ann")) == [domain.SendDrain("w1")]
    assert rig.handle(domain.DrainOrdered("w1", "ann")) == []
    assert rig.worker("w1").status == "draining" and rig.worker("w1").requests == 1
    queued = of(domain.Decided, rig.submit("r2"))[0]
    assert isinstance(queued.outcome, domain.Queued) and "draining" in queued.record.reason
    rig.finish("r1")
    rig.send("w1", protocol.Drained())
    assert rig.worker("w1").status == "drained"
    assert rig.worker("w1").requests == 0
    assert of(domain.Dispatch, rig.tick(1.0, heard=("w1",))) == []


def test_role_order_is_an_admission_mask_that_loses_nothing():
    rig = Rig()
    rig.join("prefill"), rig.join("decode")
    rig.submit("r1", prompt_tokens=300)
    commands = rig.handle(domain.RoleOrdered("w1", "decode", "ann"))
    assert commands[0] == domain.SendRole("w1", "decode")
    assert commands[1] == domain.PlanChanged("w1", "prefill", "decode", "ann", "ordered by ann")
    assert rig.worker("w1").role == "decode" and rig.worker("w1").requests == 1
    assert rig.request("r1").phase == "prefill"
    assert placement(rig.submit("r2", prompt_tokens=300)).split == "local"
    assert rig.handle(domain.RoleOrdered("w1", "decode", "ann")) == []


def test_plans_are_kept_newest_first_up_to_their_limit():
    rig = Rig(plans_max=3)
    rig.join("prefill")
    for index in range(5):
        role = "decode" if index % 2 == 0 else "prefill"
        rig.handle(domain.RoleOrdered("w1", role, f"ann{index}"))
    assert [plan.by for plan in rig.plane.view(0.0).plans] == ["ann4", "ann3", "ann2"]


def test_view_shows_what_hello_and_reports_said():
    rig = Rig()
    rig.join("decode", name="box-1")
    load = make_load(running_online=2)
    rig.send("w1", load)
    rig.now_s = 0.5
    view = rig.worker("w1")
    assert (view.name, view.role, view.status, view.load) == ("box-1", "decode", "live", load)
    assert view.heard_ago_s == 0.5 and view.models == (MODEL,)


def test_reported_step_model_replaces_the_one_of_hello():
    rig = Rig()
    rig.join("mixed")
    slow = protocol.StepModel(2 * CPU_STEP.base_s, 2 * CPU_STEP.per_token_s, 0.0)
    first = placement(rig.submit("r1", prompt_tokens=10)).predicted_itl_s
    rig.finish("r1")
    rig.send("w1", make_load(step_model=slow))
    second = placement(rig.submit("r2", prompt_tokens=10)).predicted_itl_s
    assert second == pytest.approx(2 * first, rel=0.01)


@pytest.mark.parametrize(
    "facts",
    [
        {"step_model": protocol.StepModel(float("nan"), 0.0, 0.0)},
        {"step_model": protocol.StepModel(0.0, 0.003, 0.0)},
        {"predicted_s": float("inf")},
        {"predicted_s": -1.0},
        {"online_s": float("nan")},
        {"prefill_tokens_waiting": -5},
        {"kv_blocks_free": -1},
    ],
)
def test_report_with_impossible_numbers_is_left_aside(facts):
    rig = Rig()
    rig.join("mixed")
    sound = make_load(running_online=1)
    rig.send("w1", sound)
    rig.now_s = 1.0
    rig.send("w1", make_load(**facts))
    assert rig.worker("w1").load == sound and rig.worker("w1").heard_ago_s == 0.0
    assert placement(rig.submit()).decode_worker == "w1"


def test_changed_policy_reaches_those_who_are_here_and_those_who_join_later():
    rig = Rig(batch_rows_max=7)
    rig.join("decode")
    rig.join("prefill")
    changed = protocol.Policy(kappa=0.8, tau_idle_s=0.1)
    expected = protocol.Policy(kappa=0.8, tau_idle_s=0.1, batch_rows_max=7)
    sent = of(domain.SendPolicy, rig.handle(domain.PolicyChanged(changed)))
    assert sent == [domain.SendPolicy("w1", expected), domain.SendPolicy("w2", expected)]
    (greet,) = of(domain.Greet, rig.hello(make_hello("decode")))
    assert greet.message.policy == expected


def test_worker_that_refuses_because_it_drains_gets_nothing_more():
    """An order of an earlier console, which this one knows nothing of."""
    rig = Rig()
    rig.join("decode"), rig.join("decode")
    rig.submit("r1")
    (dispatch,) = of(domain.Dispatch, rig.commands)
    commands = rig.send(dispatch.worker_id, protocol.Rejected("r1", 1, "draining", 40))
    assert rig.worker(dispatch.worker_id).status == "draining"
    assert of(domain.Dispatch, commands)[0].worker_id != dispatch.worker_id
