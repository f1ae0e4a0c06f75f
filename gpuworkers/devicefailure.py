"""Tells errors of a device from defects of ours, so that a worker can end with the reason."""

import contextlib
from collections.abc import Iterator

from controlplane.errors import SlackwaterError

# By name, so that nothing is imported here: torch's two, CuPy's three.
DEVICE_ERRORS = frozenset(
    ("AcceleratorError", "OutOfMemoryError", "CUDARuntimeError", "CUDADriverError", "CUBLASError")
)


class DeviceFailed(SlackwaterError):
    """The device or its driver broke off work; nothing that this process holds there is usable."""

    permanent = False


def is_device_error(error: RuntimeError) -> bool:
    """Did CUDA, cuBLAS or the driver fail, rather than our code?"""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & DEVICE_ERRORS) or str(error).startswith("CUDA error")


@contextlib.contextmanager
def device_failures(device: str) -> Iterator[None]:
    """Work on the device: its errors leave as DeviceFailed with their first line."""
    try:
        yield
    except RuntimeError as error:
        if not is_device_error(error):
            raise
        reason = str(error).strip().split("\n", 1)[0]
        raise DeviceFailed(f"{device} failed: {type(error).__name__}: {reason}") from error
