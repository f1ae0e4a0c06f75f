"""The real ControlPlane on modelled workers, with a workload's arrivals."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from controlplane import domain
from controlplane.config import ControlPlaneConfig
from controlplane.sim import hardware, steptable, traces
from controlplane.sim.replay import Client, Replay

CHAT = domain.SLOClass("chat", 0, 0.5, 0.05)
REJECTING = domain.Contract("tenant", "model", "chat", 10**9, 10**12, 10**6, when_late="reject")


def replay(*roles, client=None, contracts=(), seed=1, device=None, **settings) -> Replay:
    config = ControlPlaneConfig.from_mapping({"prefix_block_tokens": 64} | settings)
    made = Replay(
        config, device or hardware.read(""), client or Client(lambda row: CHAT, 1024), seed
    )
    for role in roles:
        made.add(role)
    if contracts:
        made.handle(domain.ContractsSet(contracts))
    return made


def check_at_rest(done: Replay) -> None:
    for member in done.members:
        assert not member.worker.held and not member.worker.decoding
        member.worker.pool.check_integrity()
        assert member.worker.pool.num_available == member.worker.pool.num_blocks
    done.plane.check_integrity()
    assert done.plane.view(done.events.now_s).requests == ()


def test_every_request_gets_its_tokens_and_nothing_is_held_afterwards():
    done = replay("mixed", "mixed")
    records = done.run(traces.synthetic(1, 8.0, 15.0).rows(), 15.0)
    assert len(records) > 100
    assert all(record.is_done and record.is_good for record in records)
    assert all(record.predicted_s_p99 > record.predicted_s > 0.0 for record in records)
    check_at_rest(done)


def test_the_same_seed_gives_the_same_records():
    runs = [replay("mixed", "mixed").run(traces.synthetic(4, 8.0, 4.0).rows(), 4.0) for _ in "ab"]
    assert runs[0] == runs[1]
    other = replay("mixed", "mixed", seed=2).run(traces.synthetic(4, 8.0, 4.0).rows(), 4.0)
    assert [item.ttft_s for item in other] != [item.ttft_s for item in runs[0]]


def test_prompts_are_handed_off_where_roles_are_split():
    link = {"transfer_bytes_per_s": 50e9, "transfer_setup_s": 0.001}
    done = replay("prefill", "decode", **link)
    records = done.run(traces.synthetic(1, 3.0, 20.0).rows(), 20.0)
    assert all(record.is_done for record in records)
    moved = [record for record in records if record.was_handed_off]
    assert len(moved) > 0.5 * len(records)
    assert done.members[1].worker.num_steps > 0
    check_at_rest(done)


def test_a_prefix_that_its_worker_holds_is_not_computed_again():
    made = traces.synthetic(1, 2.0, 40.0, shared_share=0.7)
    cold = made.map(lambda row: replace(row, hash_ids=()))
    waits_s = {}
    for name, trace in (("warm", made), ("cold", cold)):
        done = replay("mixed", client=Client(lambda row: CHAT, 1024))
        records = done.run(trace.rows(), 40.0)
        waits_s[name] = sum(record.ttft_s for record in records) / len(records)
        check_at_rest(done)
    assert waits_s["warm"] < 0.7 * waits_s["cold"]


def test_a_refused_client_comes_back_exactly_when_it_was_told_to():
    client = Client(lambda row: CHAT, 1024, retries_max=1)
    done = replay("mixed", client=client, contracts=(REJECTING,))
    records = done.run(traces.synthetic(1, 60.0, 5.0).rows(), 5.0)
    refused = [record for record in records if record.code == "late" and record.attempt == 0]
    assert len(refused) > 20
    again = {record.index: record for record in records if record.attempt == 1}
    assert set(again) == {record.index for record in refused}
    for record in refused:
        assert record.retry_after_s is not None
        assert again[record.index].at_s == pytest.approx(record.at_s + record.retry_after_s)
    assert not any(record.attempt > 1 for record in records)


def test_hardware_is_read_from_a_calibration_file_as_from_the_packaged_table(tmp_path):
    packaged = json.loads((steptable.TABLES / f"{hardware.MODEL}.json").read_text())
    (tmp_path / "h200_steps.json").write_text(json.dumps({hardware.MODEL: packaged}))
    chunks, rows, context = [(0, 512)], 32, 32 * 1000
    expected = hardware.read("").table.step_s(chunks, rows, context)
    for path in (tmp_path, tmp_path / "h200_steps.json"):
        assert hardware.read(str(path)).table.step_s(chunks, rows, context) == expected


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "no calibration"),
        ("[]", "no step times"),
        ("{}", "no step times"),
        (json.dumps({hardware.MODEL: {"gpu": "H200"}}), "no step times"),
    ],
)
def test_a_calibration_that_is_something_else_is_refused_in_one_line(tmp_path, text, problem):
    path = Path(tmp_path) / "steps.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=problem) as caught:
        hardware.read(str(path))
    assert "\n" not in str(caught.value)


def test_a_worker_knows_its_device_within_a_few_percent_when_it_joins():
    device = hardware.read("")
    done = replay("mixed", device=hardware.Hardware(device.table, is_noisy=False))
    done.run(traces.synthetic(1, 6.0, 20.0).rows(), 20.0)
    audits = done.members[0].worker.model.audits
    steps = sum(audit.steps for audit in audits.values())
    assert sum(audit.error for audit in audits.values()) / steps < 0.04
