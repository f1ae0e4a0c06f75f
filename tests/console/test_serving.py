"""Control loop that survives its errors, calls from threads, worker specs from options."""

import asyncio
import threading
from types import SimpleNamespace

import pytest

from console.management.commands.serve import FLEET_MAX, address, worker_specs
from console.metrics import Metrics
from console.running import RunningRequests
from console.serving import Serving
from console.snapshot import EMPTY
from console.state import ServerState
from controlplane import domain
from controlplane.errors import ConfigError
from controlplane.protocol import Policy

OPTIONS = {
    "workers": "prefill=1,decode=2",
    "engine": "fake",
    "model": "",
    "model_id": "",
    "profile": "cpu-fast",
    "dtype": "auto",
    "numerics": "",
    "device": "cpu",
    "loadable": "",
    "fleet": 0,
}


class Ticking:
    """A serving state whose tick fails as often as the test says."""

    def __init__(self, num_failures):
        self.metrics = Metrics()
        self.fleet = self
        self.snapshot = SimpleNamespace(current=EMPTY)
        self.running = RunningRequests()
        self.handled = []
        self.num_ticks = 0
        self.num_noted = 0
        self.num_failures = num_failures
        self.enough = asyncio.Event()

    def tick(self):
        self.num_ticks += 1
        if self.num_ticks <= self.num_failures:
            raise RuntimeError("a bug in the tick")

    def handle(self, event):
        self.handled.append(event)

    def note_tick(self):
        self.num_noted += 1
        if self.num_noted == 3:
            self.enough.set()


def value(metrics, name):
    return metrics.registry.get_sample_value(name)


async def test_control_loop_starts_again_after_an_error_and_counts_it(caplog):
    state = Ticking(num_failures=2)
    serving = Serving(state, drain_s=1.0, started=None)
    loop = asyncio.ensure_future(serving._supervise())
    await asyncio.wait_for(state.enough.wait(), 30)
    loop.cancel()
    await asyncio.gather(loop, return_exceptions=True)
    assert state.num_ticks == 5
    assert state.handled == [domain.PolicyChanged(Policy())]  # once, not with every tick
    assert value(state.metrics, "slackwater_control_loop_restarts_total") == 2
    assert value(state.metrics, "slackwater_event_loop_lag_seconds_count") == 5
    assert "RuntimeError: a bug in the tick" in caplog.text


def make_state(loop):
    parts = (
        *("fleet", "gateway", "live", "metrics", "snapshot", "writer", "tokenizers", "batches"),
        *("workers", "port", "profile", "started_at_s"),
    )
    return ServerState(loop=loop, **dict.fromkeys(parts))


async def test_thread_runs_a_coroutine_on_the_servers_loop():
    state = make_state(asyncio.get_running_loop())

    async def where(text):
        return text, threading.current_thread()

    text, thread = await asyncio.to_thread(state.call, where, "here")
    assert (text, thread) == ("here", threading.current_thread())


async def test_call_that_takes_too_long_raises_in_its_thread():
    state = make_state(asyncio.get_running_loop())
    with pytest.raises(TimeoutError):
        await asyncio.to_thread(state.call, asyncio.sleep, 30, timeout_s=0.01)


async def test_database_failures_of_the_snapshot_are_noted_with_their_time():
    state = make_state(asyncio.get_running_loop())
    state.fleet = SimpleNamespace(now_s=lambda: 7.0)
    state.snapshot = SimpleNamespace(num_failures=0, current=EMPTY)
    state.note_tick()
    assert (state.tick_at_s, state.database_failed_at_s) == (7.0, None)
    state.snapshot.num_failures = 1
    state.note_tick()
    assert state.database_failed_at_s == 7.0
    state.fleet = SimpleNamespace(now_s=lambda: 9.0)
    state.note_tick()
    assert (state.tick_at_s, state.database_failed_at_s) == (9.0, 7.0)


def test_each_worker_has_a_spec():
    specs = worker_specs(OPTIONS)
    assert [spec.role for spec in specs] == ["prefill", "decode", "decode"]
    assert {(spec.engine, spec.model_id, spec.profile) for spec in specs} == {
        ("fake", "modelled-8b", "cpu-fast")
    }


def test_fleet_is_one_process_with_many_modelled_workers():
    specs = worker_specs({**OPTIONS, "workers": "", "fleet": FLEET_MAX})
    assert [(spec.count, spec.profile, spec.role) for spec in specs] == [
        (FLEET_MAX, "h200-8b", "mixed")
    ]


def test_native_workers_serve_the_folder_under_its_name(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    options = {**OPTIONS, "engine": "native", "model": str(folder)}
    assert {(spec.model_dir, spec.model_id) for spec in worker_specs(options)} == {
        (str(folder), "tiny")
    }
    assert {spec.model_id for spec in worker_specs({**options, "model_id": "other"})} == {"other"}


def test_workers_take_the_devices_in_turn():
    specs = worker_specs({**OPTIONS, "device": "cuda:0,cuda:1"})
    assert [spec.device for spec in specs] == ["cuda:0", "cuda:1", "cuda:0"]
    options = specs[1].options()
    assert options[options.index("--device") + 1] == "cuda:1" and "--numerics" not in options


@pytest.mark.parametrize(
    "change",
    [
        {"workers": "chef=1"},
        {"workers": "prefill=65"},
        {"fleet": FLEET_MAX + 1},
        {"fleet": -1},
        {"engine": "native"},
        {"engine": "native", "model": "/nowhere"},
    ],
)
def test_impossible_worker_options_name_what_is_expected(change):
    with pytest.raises(ConfigError, match="expected"):
        worker_specs({**OPTIONS, **change})


@pytest.mark.parametrize(
    ("bind", "expected"),
    [
        ("127.0.0.1", "127.0.0.1:81"),
        ("0.0.0.0", "127.0.0.1:81"),
        ("10.1.2.3", "10.1.2.3:81"),
        ("::1", "[::1]:81"),
        ("::", "127.0.0.1:81"),
    ],
)
def test_address_reaches_this_server(bind, expected):
    assert address({"bind": bind}, SimpleNamespace(port=81)) == expected
