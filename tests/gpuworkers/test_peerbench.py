"""The peer's decode step by two runs of different length; the model keeps its own time."""

from types import SimpleNamespace

import pytest
import torch

from gpuworkers import peerbench
from gpuworkers.peerbench import make_model, time_decode
from gpuworkers.randommodel import SMALL


class Peer:
    """generate_batch takes 5 s for the prompts and 0.25 s for each output token."""

    config = SimpleNamespace(vocab_size=100)

    def __init__(self, missing: int = 0) -> None:
        self.now_s = 0.0
        self.missing = missing
        self.runs: list[int] = []

    def generate_batch(self, prompts, generation_config):
        count = generation_config.max_new_tokens
        self.now_s += 5.0 + 0.25 * count
        self.runs.append(count)
        output = SimpleNamespace(generated_tokens=[1] * (count - self.missing))
        return {str(row): output for row in range(len(prompts))}


def test_prompts_and_start_are_not_counted():
    peer = Peer()
    found = time_decode(peer, 3, 20, lambda: peer.now_s)
    assert found.wall_s == pytest.approx(0.25)
    assert (found.kind, found.batch, found.tokens) == ("transformers", 3, 20)
    assert peer.runs == [2, *peerbench.OUTPUTS]


def test_outputs_that_ended_early_are_no_measurement():
    with pytest.raises(RuntimeError, match="not 2"):
        time_decode(Peer(missing=1), 3, 20, lambda: 0.0)


def test_the_peers_model_has_our_shape_in_bfloat16():
    model = make_model(SMALL, "cpu")
    weight = model.model.layers[0].self_attn.k_proj.weight
    assert weight.shape == (2 * 64, 512) and weight.dtype == torch.bfloat16
    assert model.config.max_position_embeddings == 2048
    assert torch.get_default_dtype() == torch.float32
