"""The step table of a GPU: in the simulator's form, every cell the shape that it stands for."""

import json
from types import SimpleNamespace

import msgspec

from controlplane.sim.steptable import StepTable, TableFile
from gpuworkers import gpusteps

HEAD = {
    "name": "n", "source": "s", "model": "m", "gpu": "g", "tp": 1, "kv_bytes_per_token": 1,
    "weight_gb": 1.0,
}  # fmt: skip


class LinearBench:
    """A millisecond for a decoding row, another for 1000 tokens of anything."""

    def decode(self, rows: int, context: int):
        return SimpleNamespace(device_s=1e-3 * rows * (1 + context / 1000))

    def mixed(self, tokens: int, start: int, rows: int, context: int) -> float:
        return 1e-3 * ((tokens + start) / 1000 + rows * (1 + context / 1000))


def test_the_simulator_reads_the_table_and_finds_the_measured_steps_in_it():
    data = json.dumps(HEAD | gpusteps.measure(LinearBench())).encode()
    table = StepTable(msgspec.json.decode(data, type=TableFile))
    assert round(1e3 * table.step_s([], 64, 64 * 4096), 3) == 326.144
    assert round(1e3 * table.step_s([(0, 512)], 0, 0), 3) == 0.512
    assert round(1e3 * table.step_s([(1024, 2048)], 0, 0), 3) == 3.072
    assert round(1e3 * table.step_s([(0, 512)], 32, 32 * 1024), 3) == 65.28
