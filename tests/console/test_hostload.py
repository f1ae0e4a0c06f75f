"""How full the console is: lasting lag, waiting writes, memory and disk as shares of a limit."""

from console.hostload import LAG_S_MAX, HostMeter


def test_one_late_turn_is_no_overload_and_lasting_lag_is(tmp_path):
    host = HostMeter(tmp_path)
    host.observe_lag(3.0)
    assert host.signals(0, 10)["loop"] < 0.5
    for _ in range(60):
        host.observe_lag(LAG_S_MAX)
    assert host.signals(0, 10)["loop"] > 0.95
    for _ in range(60):
        host.observe_lag(0.0)
    assert host.signals(0, 10)["loop"] < 0.05


def test_signals_are_shares_of_their_limits(tmp_path):
    signals = HostMeter(tmp_path).signals(5, 10)
    assert set(signals) == {"loop", "database", "memory", "disk"}
    assert signals["database"] == 0.5 and 0.0 < signals["memory"] < 1.0
    assert all(share >= 0.0 for share in signals.values())


def test_a_folder_that_is_gone_is_told_and_stops_nothing(tmp_path, caplog):
    host = HostMeter(tmp_path / "missing")
    assert host.signals(0, 10)["disk"] == 0.0
    assert "free space of" in caplog.text
