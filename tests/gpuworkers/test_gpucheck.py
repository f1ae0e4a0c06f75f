"""The check for GPU machines: phases, budget, what is kept when one fails, and no GPU at all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpuworkers import gpucheck
from gpuworkers.gpucheck import PHASES, PHASES_DEFAULT, failed, run_phases, summary

ROOT = Path(__file__).parent.parent.parent


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_phase_gets_its_limit_or_what_is_left_of_the_budget():
    clock, limits, kept = Clock(), [], []

    def run(name: str, limit_s: float) -> dict:
        limits.append((name, limit_s))
        clock.now_s += 120.0
        return {"is_right": True, "table": [f"of {name}"]}

    names = ["kernels right", "greedy", "kernels fast", "engine qwen3-8b"]
    answers = run_phases(names, run, clock, 300.0, lambda a: kept.append(list(a)))
    assert limits == [("kernels right", 150.0), ("greedy", 120.0), ("kernels fast", 60.0)]
    assert kept == [names[:count] for count in (1, 2, 3, 4)]  # after each, not at the end only
    assert answers["greedy"]["seconds"] == 120.0
    assert answers["engine qwen3-8b"]["error"] == "not started: the time budget is spent"


def test_the_table_tells_which_phase_failed_and_its_last_words():
    answers = {
        "greedy": {"is_right": True, "seconds": 3.2, "table": ["32 of 32 outputs equal"]},
        "kernels fast": failed(
            "ended with -6",
            "Traceback\ntorch.AcceleratorError: CUDA error: misaligned address\nframe #28: _start",
        ),
        "kernels right": failed("ended with 1", "a line\nthe last line\n"),
        "engine qwen3-8b": failed("no answer within 9 s", ""),
    }
    assert summary(answers) == [
        "--- greedy: ok, 3 s",
        "32 of 32 outputs equal",
        "--- kernels fast: FAILED, 0 s",
        "ended with -6",
        "torch.AcceleratorError: CUDA error: misaligned address",
        "--- kernels right: FAILED, 0 s",
        "ended with 1",
        "the last line",
        "--- engine qwen3-8b: FAILED, 0 s",
        "no answer within 9 s",
        "and said nothing",
    ]


def test_sanitizers_and_the_peer_are_asked_for_by_name():
    assert [name for name in PHASES if name not in PHASES_DEFAULT] == [
        "peer llama-3.1-8b",
        "sanitizer memcheck",
        "sanitizer racecheck",
    ]


def test_a_child_that_ends_without_an_answer_is_a_failed_phase(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    answer = gpucheck.run_child("greedy", 60.0)
    assert not answer["is_right"] and answer["error"] == "ended with 1"


def test_a_child_that_takes_too_long_is_ended():
    answer = gpucheck.run_child("greedy", 0.01)
    assert answer["error"] == "no answer within 0 s" and not answer["is_right"]


def test_an_unknown_phase_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        gpucheck.main(["--phases", "greedy,tea"])
    assert stopped.value.code == 2
    assert "--phases: tea: expected kernels right, greedy" in capsys.readouterr().err


def test_without_a_gpu_it_is_one_line_and_nothing_is_written(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "gpuworkers.gpucheck", "--out", str(tmp_path / "out.json")],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and done.stderr == ""
    assert done.stdout.count("\n") == 1 and "no NVIDIA GPU" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_it_needs_nothing_that_a_bare_gpu_machine_lacks():
    """torch, numpy, CuPy and the standard library: no wire format, no tokenizer, no console."""
    code = "import json, sys, gpuworkers.gpucheck; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = {name.split(".")[0] for name in json.loads(done.stdout)}
    assert not loaded & {"msgspec", "safetensors", "tokenizers", "websockets", "django", "pynvml"}
