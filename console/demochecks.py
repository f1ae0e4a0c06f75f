"""What must be true before the demo starts: disk, memory, a free port, a converted model."""

import errno
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from django.core.management.base import CommandError

PORT_FIRST = 8000
PORT_LAST = 8020
DISK_BYTES_MIN = 1_000_000_000  # converted model 0.3 GB, database, logs, static files
MEMORY_BYTES_MIN = 4_000_000_000  # two workers in fp32 with 0.75 GB of KV each, server, load


def check_disk(folder: Path, needed_bytes: int = DISK_BYTES_MIN) -> None:
    """Raises CommandError when the disk of `folder` is too full."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise CommandError(
            f"only {free_bytes / 1e9:.1f} GB free in {existing}, the demo needs"
            f" {needed_bytes / 1e9:.1f} GB: free some disk and run it again"
        )


def check_memory(available_bytes: int | None, needed_bytes: int = MEMORY_BYTES_MIN) -> None:
    """Raises CommandError when the machine says that it has too little; None: it does not say."""
    if available_bytes is not None and available_bytes < needed_bytes:
        raise CommandError(
            f"only {available_bytes / 1e9:.1f} GB of memory available, the demo's two workers need"
            f" {needed_bytes / 1e9:.1f} GB: close something and run it again"
        )


def available_memory_bytes(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Memory that can be had without swapping; None where the system does not tell."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def choose_port(asked: int | None, bind: str = "127.0.0.1") -> int:
    """The asked port, else the first free one of 8000 to 8020. Raises CommandError."""
    if asked is not None:
        if asked and not is_free(asked, bind):
            raise CommandError(
                f"port {asked} is taken: name a free one, PORT={asked + 1} make demo"
            )
        return asked
    for port in range(PORT_FIRST, PORT_LAST + 1):
        if is_free(port, bind):
            return port
    raise CommandError(
        f"ports {PORT_FIRST} to {PORT_LAST} are all taken: name a free one, PORT=9000 make demo"
    )


def is_free(port: int, bind: str) -> bool:
    """True when a server could listen there now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((bind, port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise CommandError(f"cannot listen on {bind}:{port}: {error.strerror}") from None
    return True


def convert_model(say: Callable[[str], None], root: Path) -> Path:
    """Runs the converter, which is quick when the model is there; gives the model's folder."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "gpuworkers.convert"],
        cwd=root,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    last = ""
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            if last:
                say(last)
            last = line.rstrip()
    if process.wait() != 0:
        raise CommandError(f"the demo model was not converted: {last or 'no output'}")
    folder = Path(last)
    if not folder.is_dir():
        raise CommandError(f"the converter named no folder but {last!r}: run make setup again")
    return folder
