"""Guards at the door of an operation: shape, dtype and stride, with the numbers in the message."""

import numpy as np
import torch


def shape(name: str, tensor: torch.Tensor, expected: tuple[int | None, ...]) -> None:
    """Raise ValueError unless the shape matches; None matches any size."""
    actual = tuple(tensor.shape)
    if actual == expected:
        return
    if len(actual) != len(expected) or any(
        want is not None and want != have for want, have in zip(expected, actual, strict=True)
    ):
        raise ValueError(f"{name} has shape {actual}, expected {expected}")


def dtype(name: str, tensor: torch.Tensor, *allowed: torch.dtype) -> None:
    """Raise ValueError unless the dtype is one of `allowed`."""
    if tensor.dtype not in allowed:
        raise ValueError(f"{name} is {tensor.dtype}, expected one of {allowed}")


def contiguous(name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError unless rows lie one after the other."""
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}, expected contiguous")


def block_table(name: str, table: np.ndarray, num_tokens: int, block_tokens: int) -> None:
    """Raise ValueError unless the table has blocks for num_tokens tokens."""
    needed = -(-num_tokens // block_tokens)
    if table.ndim != 1 or len(table) < needed:
        raise ValueError(f"{name} has {table.shape} blocks, {num_tokens} tokens need {needed}")
