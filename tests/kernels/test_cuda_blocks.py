"""Whole blocks move between the KV arrays and one buffer, bit by bit."""

import pytest
import torch

from kernels.cuda.blockcopy import BlockCopier
from kernels.ops import Heads
from tests.kernels.cudakit import cache

HEADS = Heads(3, 1, 16)


def copier(kit, num_layers: int = 3) -> tuple[BlockCopier, list[torch.Tensor]]:
    layers = [kit.on(cache(9, HEADS, seed=layer)) for layer in range(num_layers)]
    kit.allow(layers)
    return BlockCopier(kit.launcher, layers), layers


@pytest.mark.parametrize("ids", [[4], [8, 0, 5], list(range(9))])
def test_blocks_of_all_layers_are_gathered_in_the_order_asked(kit, ids):
    made, layers = copier(kit)
    buffer = torch.zeros(3, len(ids), made.block_bytes, dtype=torch.uint8, device=kit.device)
    made.gather(torch.tensor(ids, dtype=torch.int32, device=kit.device), buffer)
    for layer, part in zip(layers, buffer, strict=True):
        assert torch.equal(part.view(torch.bfloat16).view(len(ids), *layer.shape[1:]), layer[ids])


def test_scattering_what_was_gathered_moves_blocks_and_touches_no_other(kit):
    made, layers = copier(kit)
    before = [layer.clone() for layer in layers]
    buffer = torch.zeros(3, 2, made.block_bytes, dtype=torch.uint8, device=kit.device)
    made.gather(torch.tensor([7, 2], dtype=torch.int32, device=kit.device), buffer)
    made.scatter(torch.tensor([0, 4], dtype=torch.int32, device=kit.device), buffer)
    for layer, old in zip(layers, before, strict=True):
        assert torch.equal(layer[[0, 4]], old[[7, 2]])
        assert torch.equal(layer[[1, 2, 3, 5, 6, 7, 8]], old[[1, 2, 3, 5, 6, 7, 8]])


def test_no_blocks_are_no_work_and_wrong_buffers_are_refused(kit):
    made, _ = copier(kit)
    none = torch.zeros(0, dtype=torch.int32, device=kit.device)
    made.gather(none, torch.zeros(3, 0, made.block_bytes, dtype=torch.uint8, device=kit.device))
    one = torch.zeros(1, dtype=torch.int32, device=kit.device)
    with pytest.raises(ValueError, match="buffer has shape"):
        made.gather(one, torch.zeros(3, 2, made.block_bytes, dtype=torch.uint8))
    with pytest.raises(ValueError, match="block_ids is torch.int64"):
        made.gather(one.long(), torch.zeros(3, 1, made.block_bytes, dtype=torch.uint8))
    with pytest.raises(ValueError, match="layer has shape"):
        BlockCopier(kit.launcher, [torch.zeros(2, 8), torch.zeros(3, 8)])
