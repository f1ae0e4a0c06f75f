"""Before the demo: settings of the environment, its own var folder, the times of its start."""

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from django.conf import settings
from django.core.management.base import CommandError

FOLDER = "demo"
SECONDS_MAX = 7 * 86_400.0
FLEET_MAX = 512


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """DEMO_SECONDS, DEMO_JSON, DEMO_LOAD and FLEET of the environment."""

    seconds: float | None
    json_path: Path | None
    has_load: bool
    num_modelled: int


def read_options(environ: Mapping[str, str]) -> DemoOptions:
    """Raises CommandError, naming the variable and what it may be."""
    load = environ.get("DEMO_LOAD") or "1"
    if load not in ("0", "1"):
        raise CommandError(f"DEMO_LOAD={load}: expected 0 or 1")
    json_path = environ.get("DEMO_JSON")
    if json_path and not Path(json_path).resolve().parent.is_dir():
        raise CommandError(f"DEMO_JSON={json_path}: its folder does not exist")
    return DemoOptions(
        seconds=_number(environ, "DEMO_SECONDS", SECONDS_MAX),
        json_path=Path(json_path).resolve() if json_path else None,
        has_load=load == "1",
        num_modelled=int(_number(environ, "FLEET", FLEET_MAX) or 0),
    )


def _number(environ: Mapping[str, str], key: str, most: float) -> float | None:
    raw = environ.get(key)
    if not raw:
        return None
    try:
        value = float(raw)
    except ValueError:
        value = -1.0
    if not 0 < value <= most:
        raise CommandError(f"{key}={raw}: expected a number above 0 and at most {most:.0f}")
    return value


def move_into_own_folder() -> None:
    """Starts this command again with the demo's var folder and without the shell's database."""
    is_own = settings.SLACKWATER_VAR.name == FOLDER
    if is_own and not os.environ.get("DATABASE_URL") and not os.environ.get("REDIS_URL"):
        return
    environ = {k: v for k, v in os.environ.items() if k not in ("DATABASE_URL", "REDIS_URL")}
    if not is_own:
        environ["SLACKWATER_VAR"] = str(settings.SLACKWATER_VAR / FOLDER)
    os.execve(sys.executable, [sys.executable, "-u", *sys.argv], environ)


def process_age_s() -> float:
    """Seconds since this process began, for honest start-up times; 0 where /proc is missing."""
    try:
        stat = Path("/proc/self/stat").read_text()
        uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return 0.0
    started_ticks = int(stat.rpartition(")")[2].split()[19])
    return max(0.0, uptime_s - started_ticks / os.sysconf("SC_CLK_TCK"))


class PhaseTimer:
    """Names and lengths of the phases of the start."""

    def __init__(self, age_s: float) -> None:
        self._started_at_s = time.monotonic() - age_s
        self._phase_at_s = self._started_at_s
        self._phases: list[tuple[str, float]] = []

    def end_phase(self, name: str, length_s: float | None = None) -> None:
        """The phase ends now, or ended `length_s` after the one before."""
        now_s = time.monotonic() if length_s is None else self._phase_at_s + length_s
        self._phases.append((name, now_s - self._phase_at_s))
        self._phase_at_s = now_s

    def total_s(self) -> float:
        return self._phase_at_s - self._started_at_s

    def line(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self._phases)
        return f"first token after {self.total_s():.1f} s: {parts}"
