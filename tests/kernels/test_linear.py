"""Linear layers: equal to the reference, and bitwise equal rows for every number of rows."""

import pytest
import torch

from kernels.reference import ReferenceOps
from kernels.torchops import linear


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference(x: torch.Tensor, weight: torch.Tensor, bias=None) -> torch.Tensor:
    ops = ReferenceOps()
    return ops.linear(x, ops.pack(weight, bias))


@pytest.fixture(scope="module", params=["packed", "plain", "transposed"])
def weight(request) -> linear.PackedWeight:
    if request.param == "packed" and not linear.has_packing(torch.float32):
        return linear.pack(random(160, 96), "plain")
    return linear.pack(random(160, 96), request.param)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 15, 16, 17, 256, 257, 300])
def test_linear_agrees_with_the_reference(rows, weight):
    x = random(rows, 96, seed=rows)
    tile = linear.probe_tile([weight], torch.float32)
    expected = reference(x, random(160, 96))
    assert torch.allclose(linear.linear(x, weight, tile), expected, atol=1e-4)


@pytest.mark.parametrize("layout", ["packed", "plain", "transposed"])
def test_a_bias_is_added_to_every_row(layout):
    if layout == "packed" and not linear.has_packing(torch.float32):
        layout = "plain"
    weight, bias = random(160, 96), random(160, seed=1)
    packed = linear.pack(weight, layout, bias)
    x = random(5, 96, seed=2)
    assert torch.allclose(linear.linear(x, packed, 1), reference(x, weight, bias), atol=1e-4)


def test_rows_are_bitwise_equal_for_every_number_of_rows_up_to_33(weight):
    tile = linear.probe_tile([weight], torch.float32)
    x = random(300, 96)
    whole = linear.linear(x, weight, tile)
    for rows in [*range(1, 34), 64, 255, 256, 257]:
        assert torch.equal(linear.linear(x[:rows], weight, tile), whole[:rows]), rows
        assert torch.equal(linear.linear(x[-rows:], weight, tile), whole[-rows:]), rows


def test_without_a_safe_tile_every_call_has_the_same_number_of_rows(weight):
    x = random(40, 96)
    whole = linear.linear(x, weight, None)
    for rows in (1, 3, 16, 17, 33):
        assert torch.equal(linear.linear(x[:rows], weight, None), whole[:rows])


def test_a_vocabulary_sized_layer_is_called_with_at_most_the_probed_rows():
    wide = linear.pack(random(linear.WIDE_OUT, 8), "plain")
    assert wide.rows_max == linear.WIDE_ROWS
    x = random(linear.WIDE_ROWS + 1, 8)
    expected = reference(x, random(linear.WIDE_OUT, 8))
    assert torch.allclose(linear.linear(x, wide, 1), expected, atol=1e-4)


def test_probe_names_the_smallest_tile_whose_multiples_agree(weight, monkeypatch):
    multiply = linear.multiply

    def uneven(x: torch.Tensor, packed: linear.PackedWeight) -> torch.Tensor:
        """As a library whose small calls round differently."""
        return multiply(x, packed) * (1.0 + 1e-6 * (len(x) % 8 != 0))

    monkeypatch.setattr(linear, "multiply", uneven)
    assert linear.probe_tile([weight], torch.float32) == 8
    monkeypatch.setattr(linear, "multiply", lambda x, w: multiply(x, w) * (1.0 + 1e-6 * len(x)))
    assert linear.probe_tile([weight], torch.float32) is None
