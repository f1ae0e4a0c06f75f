"""Batch sequences in the engine: what is left over, in turn, and given back when asked for."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane import protocol
from controlplane.latency import step_s
from gpuworkers.engine import EngineConfig, RunResult
from gpuworkers.scheduler import Plan
from tests.gpuworkers.enginekit import BATCH, EngineBench, ScriptedRunner


def small(num_blocks: int = 16, rows_max: int = 64) -> EngineBench:
    policy = protocol.Policy(batch_rows_max=rows_max)
    return EngineBench(ScriptedRunner(num_blocks), EngineConfig(policy=policy))


def held(bench: EngineBench) -> int:
    return bench.engine.load(0.0).kv_blocks_held_batch


def test_batch_waits_for_blocks_and_leaves_the_reserve():
    bench = small()
    for index in range(6):
        bench.assign(f"b{index}", 40, 8, targets=BATCH)
    bench.step()
    assert held(bench) == 12  # 4 of 3 blocks; a fifth would leave 1 of the 2 in reserve
    bench.run_dry()
    assert all(bench.finish_reasons(f"b{index}") == ["length"] for index in range(6))


def test_a_batch_line_that_can_never_fit_is_refused_at_once():
    bench = small()
    answer = bench.assign("b", 200, 40, targets=BATCH)
    assert isinstance(answer, protocol.Rejected) and answer.reason == "too_long"


def test_an_online_arrival_takes_blocks_from_the_latest_batch_sequences():
    bench = small()
    for index in range(4):
        bench.assign(f"b{index}", 40, 8, targets=BATCH)
        bench.now_s += 0.01
    for _ in range(3):
        bench.step()
    assert held(bench) == 12
    assert isinstance(bench.assign("online", 100, 12), protocol.Accepted)
    bench.engine.check_integrity()
    assert held(bench) == 9
    bench.run_dry()
    assert len(bench.output("online")) == 12


def test_a_preempted_sequence_gives_the_same_ids_as_an_undisturbed_one():
    undisturbed = small()
    undisturbed.assign("b", 40, 20, targets=BATCH)
    undisturbed.run_dry()
    bench = small(num_blocks=8)
    bench.assign("b", 40, 20, targets=BATCH)
    for _ in range(8):
        bench.step()
    done = len(bench.output("b"))
    assert 0 < done < 20
    bench.assign("online", 100, 10, salt=b"other")
    assert held(bench) == 0
    bench.run_dry()
    assert bench.output("b") == undisturbed.output("b")
    assert bench.finish_reasons("b") == ["length"]


def test_online_never_waits_for_batch_but_is_refused_when_online_holds_all():
    bench = small(num_blocks=8)
    bench.assign("b", 40, 8, targets=BATCH)
    bench.step()
    assert isinstance(bench.assign("a", 60, 40, salt=b"a"), protocol.Accepted)
    answer = bench.assign("c", 40, 8, salt=b"c")
    assert isinstance(answer, protocol.Rejected) and answer.reason == "no_kv_room"


def test_a_transfer_in_progress_is_not_preempted():
    bench = small(num_blocks=8)
    assert isinstance(bench.assign("b", 60, 8, stage="decode", targets=BATCH), protocol.Accepted)
    answer = bench.assign("online", 60, 8)
    assert isinstance(answer, protocol.Rejected) and answer.reason == "no_kv_room"
    bench.engine.installed("b", 1, [60], bench.now_s)
    assert isinstance(bench.assign("online", 60, 8), protocol.Accepted)
    bench.run_dry()
    assert len(bench.output("b")) == 7  # its KV came from a peer; what it lost is computed here


class TimedRunner(ScriptedRunner):
    """Steps take what the step model says, so that there is nothing else to learn."""

    STEP = protocol.StepModel(0.010, 0.010, 0.0)

    def run(self, plan: Plan, layer_written=None) -> RunResult:
        return replace(super().run(plan), modelled_s=step_s(self.STEP, plan.features))


def test_batch_rows_take_turns_where_a_step_has_no_room_for_all():
    bench = EngineBench(TimedRunner(), step=TimedRunner.STEP)
    for index in range(6):
        bench.assign(f"b{index}", 4, 30, targets=BATCH)
    while not all(bench.output(f"b{index}") for index in range(6)):
        bench.step()
    before = [len(bench.output(f"b{index}")) for index in range(6)]
    bench.assign("online", 4, 24, ignore_eos=True)
    rows = []
    while not bench.finish_reasons("online"):
        bench.step()
        rows.append(sum(row.sequence.is_batch for row in bench.runner.plans[-1].rows))
    assert 0 < max(rows) < 6
    gained = [len(bench.output(f"b{index}")) - before[index] for index in range(6)]
    assert max(gained) - min(gained) <= 1 and min(gained) > 1, gained


def test_no_more_batch_sequences_run_than_the_policy_allows():
    bench = small(num_blocks=64, rows_max=2)
    for index in range(5):
        bench.assign(f"b{index}", 20, 6, targets=BATCH)
    bench.step()
    assert held(bench) == 4
    bench.run_dry()
    assert all(len(bench.output(f"b{index}")) == 6 for index in range(5))


def test_batch_seconds_are_charged_apart():
    bench = small(num_blocks=64)
    bench.assign("b", 20, 6, targets=BATCH)
    bench.run_dry()
    load = bench.engine.load(0.0)
    assert load.online_s == 0.0 and load.batch_s > 0.0


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_mix_of_work_ends_and_conserves_blocks(data):
    """Random arrivals, cancels, transfers and steps on a small pool; everything left then ends."""
    bench = small(num_blocks=20, rows_max=4)
    open_requests: dict[str, str] = {}
    for index in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["assign", "assign", "step", "step", "cancel", "peer"]))
        if action == "assign":
            name, is_batch = f"r{index}", data.draw(st.booleans())
            stage = data.draw(st.sampled_from(["full", "full", "prefill", "decode"]))
            kwargs = {"targets": BATCH} if is_batch else {}
            size = data.draw(st.integers(1, 90))
            answer = bench.assign(name, size, data.draw(st.integers(1, 30)), stage=stage, **kwargs)
            if isinstance(answer, protocol.Accepted):
                open_requests[name] = stage
        elif action == "step":
            bench.step()
        elif open_requests:
            name = data.draw(st.sampled_from(sorted(open_requests)))
            if action == "cancel":
                bench.engine.cancel(name, 1)
                del open_requests[name]
            else:
                bench.engine.installed(name, 1, [60], bench.now_s)
                bench.engine.handed_off(name, 1)
        bench.engine.check_integrity()
    for _ in range(50):
        bench.run_dry()
        for name in open_requests:
            bench.engine.installed(name, 1, [60], bench.now_s)
            bench.engine.handed_off(name, 1)
        if bench.engine.is_idle():
            break
    assert bench.engine.is_idle() and bench.engine.pool.num_available == 20
    assert all(len(bench.finish_reasons(name)) == 1 for name in open_requests)
