"""Runs the simulator as a subprocess, so that the server never loads it; its answer is one JSON
object on stdout, its progress goes to our stderr."""

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
    command = [sys.executable, "-m", "controlplane.sim", *arguments]
    done = subprocess.run(
        command,
        cwd=settings.BASE_DIR,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SimFailed(f"controlplane.sim {' '.join(arguments)} ended with {done.returncode}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer
