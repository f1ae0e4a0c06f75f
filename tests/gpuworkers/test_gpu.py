"""A GPU as torch and the driver describe it, through stand-ins for both: facts, load, refusals."""

from types import SimpleNamespace

import pytest
import torch

from controlplane import protocol
from controlplane.errors import ConfigError
from gpuworkers.devicefailure import DeviceFailed, device_failures, is_device_error
from gpuworkers.gpu import library, open_gpu


class NVMLError(Exception):
    pass


class Nvml:
    """The driver's library with one device; `broken` makes every question fail."""

    NVMLError = NVMLError

    def __init__(self, uuid: str = "aa-bb", broken: bool = False) -> None:
        self.uuid = uuid
        self.broken = broken

    def nvmlInit(self) -> None:
        if self.broken:
            raise NVMLError("Driver Not Loaded")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != f"GPU-{self.uuid}":
            raise NVMLError("Not Found")
        return "handle"

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:
        if self.broken:
            raise NVMLError("GPU is lost")
        return SimpleNamespace(gpu=87, memory=40)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return 512_300


class Cuda:
    """As much of torch.cuda as is asked."""

    def __init__(self, count: int = 2, capability: tuple[int, int] = (9, 0)) -> None:
        self.count = count
        self.capability = capability

    def is_available(self) -> bool:
        return self.count > 0

    def device_count(self) -> int:
        return self.count

    def get_device_properties(self, index: int) -> SimpleNamespace:
        major, minor = self.capability
        return SimpleNamespace(
            name="NVIDIA H200", major=major, minor=minor, uuid="aa-bb", total_memory=143 << 30,
            multi_processor_count=132,
        )  # fmt: skip


def test_facts_and_load_of_a_device():
    gpu = open_gpu("cuda:1", Cuda(), Nvml())
    expected = protocol.DeviceFacts("cuda", "NVIDIA H200", 143 << 30, 132, "bf16")
    assert gpu.facts("bf16") == expected
    assert gpu.load() == protocol.DeviceLoad(0.87, 512.3)


def test_a_driver_that_does_not_answer_gives_no_load():
    nvml = Nvml()
    gpu = open_gpu("cuda:0", Cuda(), nvml)
    nvml.broken = True
    assert gpu.load() is None


@pytest.mark.parametrize(
    ("cuda", "nvml", "reason"),
    [
        (Cuda(0), Nvml(), "torch finds no NVIDIA GPU here, or is a CPU build"),
        (Cuda(3), Nvml(), "this machine has 3 GPU"),
        (Cuda(8, (7, 5)), Nvml(), "compute capability 7.5, the kernels need 8.0 or later"),
        (Cuda(8), None, "nvidia-ml-py is missing; install what pyproject.toml lists"),
        (Cuda(8), Nvml(broken=True), "NVML says: Driver Not Loaded"),
        (Cuda(8), Nvml(uuid="other"), "NVML says: Not Found"),
    ],
)
def test_a_device_that_cannot_be_used_is_refused_in_one_line(cuda, nvml, reason):
    with pytest.raises(ConfigError, match=reason) as refused:
        open_gpu("cuda:3", cuda, nvml)
    assert str(refused.value).startswith("--device=cuda:3: ") and "\n" not in str(refused.value)


def test_torch_without_a_gpu_is_refused_too(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match="no NVIDIA GPU"):
        open_gpu("cuda:0", torch.cuda, None)


def test_a_library_that_is_not_installed_is_none():
    assert library("no_such_library_of_ours") is None
    assert library("json").loads("1") == 1


def test_device_errors_are_told_from_defects():
    illegal = torch.AcceleratorError("CUDA error: an illegal memory access\nmore lines")
    with pytest.raises(DeviceFailed) as failed, device_failures("cuda:0"):
        raise illegal
    assert str(failed.value) == (
        "cuda:0 failed: AcceleratorError: CUDA error: an illegal memory access"
    )
    assert not failed.value.permanent  # a restart may help
    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
        type("CUDADriverError", (RuntimeError,), {})("CUDA_ERROR_LAUNCH_FAILED"),
    ):
        assert is_device_error(error)
    with pytest.raises(RuntimeError, match="shapes") as defect, device_failures("cuda:0"):
        raise RuntimeError("shapes do not match")
    assert not isinstance(defect.value, DeviceFailed)
