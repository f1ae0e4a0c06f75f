"""A small cluster accounts for all of its GPU time, and a worker that loses 2 % of it is found."""

import json

from controlplane.sim import ledgercheck
from controlplane.sim.__main__ import main

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


def test_it_is_a_command(capsys):
    assert main(["ledger", "--workers", "1", "--seconds", "25"]) == 0
    assert json.loads(capsys.readouterr().out)["ledger_is_balanced"]
