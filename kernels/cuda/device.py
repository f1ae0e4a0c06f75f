"""The CUDA backend on one GPU of this machine."""

import torch

from kernels.cuda.backend import CudaOps
from kernels.cuda.cupylauncher import CupyLauncher


def cuda_ops(device: torch.device) -> CudaOps:
    """Operations on `device`, cuda:N."""
    assert device.index is not None, device
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    return CudaOps(CupyLauncher(device.index), device, num_sms)
