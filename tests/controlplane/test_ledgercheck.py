"""A small cluster accounts for all of its GPU time, and a worker that loses 2 % of it is found."""

import json
from pathlib import Path

import pytest

from controlplane.latency import StepFeatures, step_s
from controlplane.sim import h200, ledgercheck
from controlplane.sim.__main__ import main
from controlplane.sim.steptable import TABLES

SMALL = {"num_workers": 2, "seconds": 30.0}


def test_interactive_batch_and_measured_idle_are_the_wall_time():
    figures = ledgercheck.run(**SMALL)
    assert figures["ledger_is_balanced"] and abs(figures["ledger_loss_worst"]) < 0.002
    shares = [figures[f"{lane}_share"] for lane in ("interactive", "batch", "idle")]
    assert all(share > 0.02 for share in shares), shares
    assert 0.98 < figures["charged_to_requests"] <= 1.0  # what is missing was not yet reported


def test_a_deliberate_loss_of_two_percent_fails():
    figures = ledgercheck.run(**SMALL, rate_per_worker=4.0, lost_share=0.02)
    assert not figures["ledger_is_balanced"]
    assert 0.015 < figures["ledger_loss_worst"] < 0.0201


def test_it_is_a_command_that_takes_the_calibration(tmp_path, capsys):
    name = "llama-3.1-8b-bf16-tp1"
    calibration = tmp_path / "steps.json"
    table = json.loads((TABLES / f"{name}.json").read_text())
    calibration.write_text(json.dumps({name: table}))
    arguments = ["--calibration", str(calibration), "--workers", "1", "--seconds", "25"]
    assert main(["ledger", *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["ledger_is_balanced"]
    calibration.write_text(json.dumps({"other": {}}))
    with pytest.raises(ValueError, match=f"no table '{name}', it has other"):
        h200.read_table(Path(calibration))


def test_the_fitted_step_model_is_near_the_table():
    table = h200.read_table(None)
    model = h200.step_model(table)
    for chunk, rows, context in ((0, 64, 4096), (1024, 32, 1024), (2048, 0, 0), (0, 1, 1024)):
        features = StepFeatures(rows, rows * context)
        features = features.with_tokens(0, chunk) if chunk else features
        chunks = [(0, chunk)] if chunk else []
        exact_s = table.step_s(chunks, rows, rows * context)
        assert step_s(model, features) == pytest.approx(exact_s, rel=0.05)
