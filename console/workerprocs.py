"""Workers of this machine as subprocesses: started, restarted with backoff, stopped.

Each runs in a session of its own, so a Ctrl-C reaches the server only, and ends by itself when the
server is gone. It gets a fresh join token for each start and no secret of the server.
"""

import asyncio
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from controlplane.errors import ConfigError
from controlplane.protocol import Role

WORKERS_MAX = 64  # processes of one server
RESTART_S_MIN, RESTART_S_MAX = 0.5, 30.0  # doubles with each failure in a row
STEADY_S = 5.0  # a process that lived so long starts the count again
POLL_S = 0.1
LOG_BYTES_MAX = 4 << 20  # a longer log is moved to .old before a start
LAST_LINES = 8
EXIT_FOR_GOOD = {2: "wrong setting", 3: "refused by the console"}
# What a worker may see of the server's environment: never keys, peppers or database addresses.
ENVIRONMENT = (
    "PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV", "PYTHONPATH", "LD_LIBRARY_PATH",
    "DYLD_LIBRARY_PATH", "XDG_CACHE_HOME", "SLACKWATER_CACHE", "CUDA_VISIBLE_DEVICES",
    "CUDA_HOME", "CUDA_PATH",
)  # fmt: skip
ROOT = Path(__file__).resolve().parent.parent

ProcState = Literal["starting", "running", "waiting", "ended", "stopped"]
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """How to start one worker process; the fields are `python -m gpuworkers`' options."""

    role: Role
    engine: Literal["native", "fake"] = "native"
    model_dir: str = ""
    model_id: str = ""
    count: int = 1
    profile: str = ""
    dtype: str = "auto"
    numerics: str = ""
    kv_tokens: int = 0
    threads: int = 1
    nice: int = 0
    device: str = "cpu"
    name: str = ""  # before the number in the worker's name; default: the role
    loadable: tuple[str, ...] = ()  # models it can load instead: ids (fake) or id=folder (native)

    def options(self) -> list[str]:
        pairs = {
            "--role": self.role,
            "--engine": self.engine,
            "--model": self.model_dir,
            "--model-id": self.model_id,
            "--count": str(self.count),
            "--profile": self.profile,
            "--dtype": self.dtype,
            "--numerics": self.numerics,
            "--device": self.device,
            "--kv-tokens": str(self.kv_tokens),
            "--threads": str(self.threads),
            "--nice": str(self.nice),
            "--loadable": ",".join(self.loadable),
        }
        return [word for pair in pairs.items() if pair[1] for word in pair]


@dataclass(frozen=True, slots=True)
class ProcView:
    """A worker process as pages and the banner show it."""

    name: str
    role: Role
    state: ProcState
    pid: int | None
    restarts: int
    last_lines: tuple[str, ...]  # of its log, after it ended by itself


def parse_workers(text: str) -> list[Role]:
    """`prefill=1,decode=2` as one role for each worker. Raises ConfigError."""
    roles: list[Role] = []
    known = {str(role): role for role in get_args(Role)}
    for part in filter(None, text.split(",")):
        role, _, number = part.partition("=")
        if role not in known or not number.isdecimal() or int(number) > WORKERS_MAX:
            raise ConfigError(f"--workers={text}: expected for example prefill=1,decode=1")
        roles += [known[role]] * int(number)
    if len(roles) > WORKERS_MAX:
        raise ConfigError(f"--workers={text}: at most {WORKERS_MAX} workers")
    return roles


class WorkerProcs:
    """The worker processes of one server. Event loop's thread only: on Linux a worker's life is
    bound to the thread that started it."""

    def __init__(
        self,
        specs: Sequence[WorkerSpec],
        join_url: Callable[[], str],
        mint_token: Callable[[str], str],
        logs_dir: Path,
        environ: Mapping[str, str],
        restart: bool = True,
        ended: Callable[[str, str], None] = lambda name, reason: None,
    ) -> None:
        """`ended` hears of a process that will not be started again, and why."""
        self._specs = specs
        self._join_url = join_url  # asked at each start: the port is known once the server listens
        self._mint_token = mint_token
        self._logs_dir = logs_dir
        self._environ = {key: environ[key] for key in ENVIRONMENT if key in environ}
        self._restart = restart
        self._ended = ended
        self._procs: dict[str, _Proc] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Starts a process for each spec and keeps it running."""
        for spec in self._specs:
            self.add(spec)

    def add(self, spec: WorkerSpec, name: str = "") -> str:
        """Starts one more and returns its name. Raises ConfigError at WORKERS_MAX."""
        if len(self._procs) >= WORKERS_MAX:
            raise ConfigError(f"{WORKERS_MAX} worker processes run already")
        if not name:
            same = sum(
                (proc.spec.name, proc.spec.role) == (spec.name, spec.role)
                for proc in self._procs.values()
            )
            name = f"{spec.name or spec.role}-{same + 1}"
        assert name not in self._procs, f"two workers {name}"
        proc = _Proc(name, spec, self._logs_dir / f"worker-{name}.log")
        self._procs[name] = proc
        self._begin(self._keep(proc))
        return name

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def leave(self, name: str) -> None:
        """Do not start it again once it has ended; an unknown name is gone already."""
        if proc := self._procs.get(name):
            proc.is_leaving = True

    def remove(self, name: str, grace_s: float) -> None:
        """Ends a process: SIGTERM now, SIGKILL after grace_s; an unknown name is gone already."""
        if proc := self._procs.get(name):
            proc.is_leaving = True
            self._begin(self._end(proc, grace_s))

    async def _end(self, proc: "_Proc", grace_s: float) -> None:
        """`_keep` forgets the process when it is gone."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + grace_s
        proc.signal(signal.SIGTERM)
        while proc.is_alive() and loop.time() < deadline_s:
            await asyncio.sleep(POLL_S / 2)
        proc.kill()

    def views(self) -> list[ProcView]:
        return [proc.view() for proc in self._procs.values()]

    async def stop(self, grace_s: float) -> None:
        """SIGTERM to all, SIGKILL to those still there after grace_s."""
        tasks = set(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + grace_s
        for proc in self._procs.values():
            proc.state = "stopped"
            proc.signal(signal.SIGTERM)
        while any(proc.is_alive() for proc in self._procs.values()) and loop.time() < deadline_s:
            await asyncio.sleep(POLL_S / 2)
        self.kill()

    def kill(self) -> None:
        """SIGKILL to every process, and to what it started."""
        for proc in self._procs.values():
            proc.kill()

    async def _keep(self, proc: "_Proc") -> None:
        """One process after the other, until it ends for good."""
        loop = asyncio.get_running_loop()
        failures = 0
        while True:
            tokens = [self._mint_token(proc.name) for _ in range(proc.spec.count)]
            environ = self._environ | {"SLACKWATER_JOIN_TOKEN": ",".join(tokens)}
            proc.start(self._join_url(), environ)
            started_at_s = loop.time()
            while proc.is_alive():
                await asyncio.sleep(POLL_S)
            lived_s = loop.time() - started_at_s
            code = proc.ended()
            logger.warning(
                "worker ended name=%s code=%s lived_s=%.1f log=%s last=%s",
                proc.name, code, lived_s, proc.log_path, " | ".join(proc.last_lines),
            )  # fmt: skip
            if proc.is_leaving:
                del self._procs[proc.name]
                return
            if not self._restart or code in EXIT_FOR_GOOD:
                self._ended(proc.name, f"exit code {code}: {' '.join(proc.last_lines[-1:])}")
                return
            failures = 0 if lived_s >= STEADY_S else failures + 1
            proc.state = "waiting"
            await asyncio.sleep(pause_s(failures))
            if proc.is_leaving:
                del self._procs[proc.name]
                return
            proc.restarts += 1


def pause_s(failures: int) -> float:
    """Before the next start, after so many processes in a row that lived shorter than STEADY_S."""
    return min(RESTART_S_MAX, RESTART_S_MIN * 2.0 ** min(failures, 10))


class _Proc:
    """One worker process and its log."""

    def __init__(self, name: str, spec: WorkerSpec, log_path: Path) -> None:
        self.name = name
        self.spec = spec
        self.log_path = log_path
        self.state: ProcState = "starting"
        self.restarts = 0
        self.is_leaving = False  # it is not started again
        self.last_lines: tuple[str, ...] = ()
        self._process: subprocess.Popen[bytes] | None = None

    def view(self) -> ProcView:
        pid = self._process.pid if self._process and self.is_alive() else None
        return ProcView(self.name, self.spec.role, self.state, pid, self.restarts, self.last_lines)

    def start(self, join_url: str, environ: dict[str, str]) -> None:
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        if self.log_path.exists() and self.log_path.stat().st_size > LOG_BYTES_MAX:
            self.log_path.replace(self.log_path.with_suffix(".old"))
        command = [sys.executable, "-u", "-m", "gpuworkers", "--join", join_url]
        command += ["--name", self.name, "--exit-with-parent", str(os.getpid())]
        threads = str(self.spec.threads)
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command + self.spec.options(),
                cwd=ROOT,
                env=environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.state = "running"
        logger.info("worker started name=%s pid=%d", self.name, self._process.pid)

    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def ended(self) -> int | None:
        """Exit code (negative: the signal); keeps the log's last lines for views."""
        assert self._process is not None
        self.state = "ended"
        with self.log_path.open("rb") as log:
            log.seek(max(0, self.log_path.stat().st_size - 4096))
            lines = log.read().decode("utf-8", "replace").splitlines()
        self.last_lines = tuple(lines[-LAST_LINES:])
        return self._process.returncode

    def signal(self, number: signal.Signals) -> None:
        if self._process is not None and self.is_alive():
            self._process.send_signal(number)

    def kill(self) -> None:
        """The whole session of the process, and waits for it."""
        if self._process is None:
            return
        if self.is_alive():
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
