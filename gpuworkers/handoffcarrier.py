"""How the bytes of a layer get from one worker to the other: through the connection, or on one host
through shared memory that the sender owns.

The shared memory is an anonymous file (memfd): it has no name to leak or to guess, dies with the
sender, and is opened by the receiver through /proc, which lets only the same user in. Checksums go
over the connection for both carriers, so the receiver waits for a layer in the same way.
"""

import asyncio
import hashlib
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gpuworkers.handoffwire import CHECKSUM_BYTES, HandoffError

SHARED_BYTES_MAX = 1 << 27  # of one transfer; a larger one goes through the connection
NO_HOST = bytes(16)  # a receiver that wants no shared memory


class Outlet(Protocol):
    """The sender's side of one transfer. `place` goes into the header: process and descriptor."""

    place: tuple[int, int]

    async def put(self, layer: int, data: bytes) -> None:
        """Hand the layer over; the checksum follows by the caller."""
        ...

    def close(self) -> None: ...


class Inlet(Protocol):
    """The receiver's side."""

    async def get(self, layer: int) -> tuple[bytes, bytes]:
        """The layer's bytes and the checksum that came with them."""
        ...

    def close(self) -> None: ...


def host_identity() -> bytes:
    """Equal for two processes that see one another under /proc; NO_HOST where that cannot be."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    try:
        seen = f"{boot.read_text()}{os.readlink(namespace)}{os.getuid()}"
    except OSError:
        return NO_HOST
    if not hasattr(os, "memfd_create"):
        return NO_HOST
    return hashlib.blake2b(seen.encode(), digest_size=len(NO_HOST)).digest()


class TcpOutlet:
    """Layers go through the connection."""

    place = (0, 0)

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer

    async def put(self, layer: int, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    def close(self) -> None:
        """The connection belongs to the transfer."""


@dataclass(slots=True)
class TcpInlet:
    reader: asyncio.StreamReader
    layer_bytes: int

    async def get(self, layer: int) -> tuple[bytes, bytes]:
        data = await self.reader.readexactly(self.layer_bytes)
        return data, await self.reader.readexactly(CHECKSUM_BYTES)

    def close(self) -> None:
        """The connection belongs to the transfer."""


class SharedOutlet:
    """All layers lie one after the other in an anonymous file of this process."""

    def __init__(self, num_layers: int, layer_bytes: int) -> None:
        self._layer_bytes = layer_bytes
        self._descriptor = os.memfd_create("slackwater-kv", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._descriptor, num_layers * layer_bytes)
            self._shared = mmap.mmap(self._descriptor, num_layers * layer_bytes)
        except OSError:
            os.close(self._descriptor)
            raise
        self.place = (os.getpid(), self._descriptor)

    async def put(self, layer: int, data: bytes) -> None:
        start = layer * self._layer_bytes
        self._shared[start : start + self._layer_bytes] = data

    def close(self) -> None:
        self._shared.close()
        os.close(self._descriptor)


class SharedInlet:
    """Reads the peer's file. Raises HandoffError where it is not there or of another size."""

    def __init__(
        self,
        place: tuple[int, int],
        num_layers: int,
        layer_bytes: int,
        reader: asyncio.StreamReader,
    ) -> None:
        self._layer_bytes = layer_bytes
        self._reader = reader
        process, descriptor = place
        path = f"/proc/{process}/fd/{descriptor}"
        try:
            opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise HandoffError("unreachable", f"{path}: {error.strerror}") from None
        try:
            size = os.fstat(opened).st_size
            if size != num_layers * layer_bytes:
                raise HandoffError("malformed", f"{path} has {size} bytes")
            self._shared = mmap.mmap(opened, size, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise HandoffError("unreachable", f"{path}: {error}") from None
        finally:
            os.close(opened)

    async def get(self, layer: int) -> tuple[bytes, bytes]:
        """The checksum is sent when the layer is in place."""
        shown = await self._reader.readexactly(CHECKSUM_BYTES)
        start = layer * self._layer_bytes
        return self._shared[start : start + self._layer_bytes], shown

    def close(self) -> None:
        self._shared.close()
