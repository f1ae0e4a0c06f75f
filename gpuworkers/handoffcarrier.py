"""How the bytes of a piece get to the other worker: through the connection, or on one host through
shared memory.

The receiver owns the shared memory: an anonymous file (memfd) with room for PIECES_AHEAD_MAX
pieces, whose place it tells with its request. It has no name, cannot shrink, and is gone when both
sides have closed it or died. The sender opens it through /proc, which lets only the same user in,
and takes it only if it begins with the token told: a sender on another host finds none, and uses
the connection. Everything but the bytes goes over the connection for both carriers.
"""

import asyncio
import contextlib
import fcntl
import mmap
import os
import secrets
from collections.abc import Iterator
from typing import Protocol

from gpuworkers.handoffwire import NOWHERE, PIECES_AHEAD_MAX, TOKEN_BYTES, HandoffError, Place

SEGMENT_NAME = "slackwater-kv"
SEGMENTS_MAX = 32  # open at a time in one worker; further transfers use the connection
FIRST_SLOT = 4096  # offset behind the token: a page


class Outlet(Protocol):
    """The sender's side of one transfer."""

    carrier: str

    def put(self, index: int, head: bytes, data: bytes) -> None:
        """The index-th piece: its bytes and, over the connection, the head that announces them.
        The caller has seen piece `index - PIECES_AHEAD_MAX` confirmed."""
        ...

    def close(self) -> None: ...


class Inlet(Protocol):
    """The receiver's side."""

    async def get(self, index: int, num_bytes: int) -> bytes:
        """The bytes of the index-th piece, whose head has arrived."""
        ...


class TcpOutlet:
    """Bytes follow their head."""

    carrier = "tcp"

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer

    def put(self, index: int, head: bytes, data: bytes) -> None:
        self._writer.write(head)
        self._writer.write(data)

    def close(self) -> None:
        """The connection belongs to the transfer."""


class TcpInlet:
    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader

    async def get(self, index: int, num_bytes: int) -> bytes:
        return await self._reader.readexactly(num_bytes)


class SharedOutlet:
    """Bytes go into the slots of the peer's memory in turn."""

    carrier = "shared"

    def __init__(self, shared: mmap.mmap, slot_bytes: int, writer: asyncio.StreamWriter) -> None:
        self._shared = shared
        self._slot_bytes = slot_bytes
        self._writer = writer

    def put(self, index: int, head: bytes, data: bytes) -> None:
        start = _slot_start(index, self._slot_bytes)
        self._shared[start : start + len(data)] = data
        self._writer.write(head)

    def close(self) -> None:
        self._shared.close()


class Segment:
    """The receiver's memory for one transfer, and its side of it."""

    def __init__(self, slot_bytes: int) -> None:
        """Raises OSError where the system has no memory or descriptor left."""
        size = _segment_bytes(slot_bytes)
        self._slot_bytes = slot_bytes
        self._descriptor = os.memfd_create(SEGMENT_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._descriptor, size)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, seals)
            self._shared = mmap.mmap(self._descriptor, size)
        except OSError:
            os.close(self._descriptor)
            raise
        token = secrets.token_bytes(TOKEN_BYTES)
        self._shared[:TOKEN_BYTES] = token
        self.place = Place(os.getpid(), self._descriptor, token)

    async def get(self, index: int, num_bytes: int) -> bytes:
        start = _slot_start(index, self._slot_bytes)
        return self._shared[start : start + num_bytes]  # a copy: the peer can change it no more

    def close(self) -> None:
        self._shared.close()
        os.close(self._descriptor)


class Segments:
    """Shared memory that one worker offers to its peers, so many at a time."""

    def __init__(self, open_max: int = SEGMENTS_MAX) -> None:
        self.num_open = 0
        self._open_max = open_max

    @contextlib.contextmanager
    def opened(self, slot_bytes: int) -> Iterator[Segment | None]:
        """A Segment, or None where there can be none now."""
        segment = None
        if self.num_open < self._open_max and hasattr(os, "memfd_create"):
            with contextlib.suppress(OSError):  # the connection will do
                segment = Segment(slot_bytes)
        if segment is None:
            yield None
            return
        self.num_open += 1
        try:
            yield segment
        finally:
            self.num_open -= 1
            segment.close()


def attach(place: Place, slot_bytes: int, writer: asyncio.StreamWriter) -> Outlet:
    """Shared memory where the peer's place is on this host and as it says, else the connection."""
    shared = None if place == NOWHERE else _open(place, _segment_bytes(slot_bytes))
    if shared is None:
        return TcpOutlet(writer)
    return SharedOutlet(shared, slot_bytes, writer)


def _open(place: Place, size: int) -> mmap.mmap | None:
    path = f"/proc/{place.process}/fd/{place.descriptor}"
    try:
        if not os.readlink(path).startswith(f"/memfd:{SEGMENT_NAME}"):
            return None  # another host's numbers
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        # A file that could shrink would end us with SIGBUS.
        if not fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            return None
        if os.fstat(descriptor).st_size != size:
            return None
        shared = mmap.mmap(descriptor, size)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    if shared[:TOKEN_BYTES] != place.token:
        shared.close()
        return None
    return shared


def inlet_of(carrier: str, segment: Segment | None, reader: asyncio.StreamReader) -> Inlet:
    """The side that fits what the peer chose. Raises HandoffError."""
    if carrier == "tcp":
        return TcpInlet(reader)
    if segment is None:
        raise HandoffError("malformed", "shared memory that nobody offered")
    return segment


def _slot_start(index: int, slot_bytes: int) -> int:
    return FIRST_SLOT + index % PIECES_AHEAD_MAX * slot_bytes


def _segment_bytes(slot_bytes: int) -> int:
    return _slot_start(PIECES_AHEAD_MAX - 1, slot_bytes) + slot_bytes
