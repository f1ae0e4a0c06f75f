"""Which run of which process holds a claim, and whether that run can still be alive."""

import os
import secrets
import socket
from pathlib import Path


def new_incarnation() -> str:
    """A name for this run of this process: host, process id, its start time, and chance."""
    pid = os.getpid()
    return f"{socket.gethostname()[:64]}:{pid}:{_start_time(pid) or 0}:{secrets.token_hex(4)}"


def is_dead(incarnation: str) -> bool:
    """True when that run is certainly over: its process is gone from this host.

    On another host nothing is certain, and the claim's lease decides."""
    host, pid, start_time, _ = incarnation.rsplit(":", 3)
    if host != socket.gethostname()[:64]:
        return False
    now = _start_time(int(pid))
    if now is not None:
        return now != int(start_time)  # the process id was given to another process
    return not _is_running(int(pid))


def _start_time(pid: int) -> int | None:
    """Start of a process in clock ticks since boot; None where /proc does not tell, 0 for one that
    has ended but was not yet waited for."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # begins with the third field, the state
    return 0 if fields[0] in "ZX" else int(fields[19])


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
