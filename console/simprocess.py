"""Runs the simulator and the kernel bench as subprocesses, so that no command loads them; their
answer comes on stdout, their progress goes to our stderr."""

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from django.conf import settings


class SimFailed(Exception):
    """The simulator gave no answer; what it said is on stderr."""


def simulate(arguments: Sequence[str]) -> dict[str, Any]:
    """The simulator's answer. Raises SimFailed."""
    done = run_module("controlplane.sim", arguments)
    if done.returncode != 0:
        raise SimFailed(f"controlplane.sim {' '.join(arguments)} ended with {done.returncode}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def run_module(module: str, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """A module of this repository in a process of its own; its stdout is kept. Ctrl-C reaches the
    module too: what it still answers is waited for; a second one ends it."""
    command = [sys.executable, "-m", module, *arguments]
    with subprocess.Popen(
        command,
        cwd=settings.BASE_DIR,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            out, _ = process.communicate()
        except KeyboardInterrupt:
            try:
                out, _ = process.communicate()
            except KeyboardInterrupt:
                process.kill()
                raise
    return subprocess.CompletedProcess(command, process.returncode, out)
