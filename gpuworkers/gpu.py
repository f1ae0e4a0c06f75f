"""The NVIDIA GPU behind a worker: found by torch, described by the driver's management library.

NVML and CUDA number devices differently when CUDA_VISIBLE_DEVICES is set, so the two are matched by
the device's UUID. Nothing here imports torch or NVML; both are arguments.
"""

import importlib
import re
from dataclasses import dataclass
from typing import Any

from controlplane import protocol
from controlplane.errors import ConfigError

DEVICE = re.compile(r"cuda:(\d{1,2})")
CAPABILITY_MIN = (8, 0)  # bf16 on tensor cores, cp.async
INSTALL = "install what pyproject.toml lists under gpu"


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device, open for questions."""

    device: str  # cuda:N
    name: str
    memory_bytes: int
    num_sms: int
    nvml: Any
    handle: Any

    def facts(self, dtype_name: str) -> protocol.DeviceFacts:
        return protocol.DeviceFacts("cuda", self.name, self.memory_bytes, self.num_sms, dtype_name)

    def load(self) -> protocol.DeviceLoad | None:
        """Utilization and power now; None where the driver does not tell them."""
        try:
            rates = self.nvml.nvmlDeviceGetUtilizationRates(self.handle)
            power_mw = self.nvml.nvmlDeviceGetPowerUsage(self.handle)
        except self.nvml.NVMLError:
            return None
        return protocol.DeviceLoad(rates.gpu / 100, power_mw / 1000)


def library(name: str) -> Any:
    """An optional library, or None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def open_gpu(device: str, cuda: Any, nvml: Any) -> Gpu:
    """The device `cuda:N`. `cuda` is torch.cuda, `nvml` the module pynvml or None.

    Raises ConfigError, in one line, where this machine cannot run kernels on it."""
    match = DEVICE.fullmatch(device)
    assert match is not None, device
    index = int(match[1])
    if not cuda.is_available():
        raise ConfigError(f"--device={device}: torch finds no NVIDIA GPU here, or is a CPU build")
    if index >= cuda.device_count():
        raise ConfigError(f"--device={device}: this machine has {cuda.device_count()} GPU(s)")
    properties = cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    if capability < CAPABILITY_MIN:
        raise ConfigError(
            f"--device={device}: {properties.name} has compute capability"
            f" {capability[0]}.{capability[1]}, the kernels need {CAPABILITY_MIN[0]}.0 or later"
        )
    if nvml is None:
        raise ConfigError(f"--device={device}: nvidia-ml-py is missing; {INSTALL}")
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
    except nvml.NVMLError as error:
        raise ConfigError(f"--device={device}: the driver's NVML says: {error}") from None
    return Gpu(
        device,
        properties.name,
        properties.total_memory,
        properties.multi_processor_count,
        nvml,
        handle,
    )
