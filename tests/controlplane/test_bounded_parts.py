"""The plane's bounded transfer rates on their own."""

import pytest

from controlplane.config import ControlPlaneConfig
from controlplane.disagg import TransferRates


def test_transfer_rate_moves_towards_what_is_measured_and_is_bounded():
    config = ControlPlaneConfig(
        pairs_max=2, transfer_bytes_per_s=1e9, transfer_weight=0.5, transfer_setup_s=0.02
    )
    rates = TransferRates(config)
    assert rates.transfer_s(("a", "b"), 10**9) == pytest.approx(1.02)
    for _ in range(20):
        rates.observe(("a", "b"), 10**6, 0.03, 0.0)  # 10 ms beyond the set-up
    assert rates.seconds_per_byte(("a", "b")) == pytest.approx(1e-8, rel=1e-3)
    rates.observe(("a", "c"), 10**6, 0.03, 0.0)
    rates.observe(("a", "d"), 10**6, 0.5, 0.0)
    assert len(rates) == 2
    assert rates.seconds_per_byte(("a", "b")) > 2e-8, "the oldest is one of many again"
