"""A folder of random weights: a worker and the server can read it."""

import dataclasses
import json

import pytest
import torch

from console.tokens import FolderTokenizer
from gpuworkers import randomfolder
from gpuworkers.models.config import read_config
from gpuworkers.models.llama import load_llama
from gpuworkers.randommodel import LLAMA_8B, QWEN3_8B, SMALL, RandomWeights
from gpuworkers.weights import WeightFiles
from kernels.torchops.backend import TorchOps

TINY = dataclasses.replace(SMALL, vocab_size=64, hidden_size=32, num_layers=2, head_dim=16,
                           num_q_heads=2, num_kv_heads=1, intermediate_size=48)  # fmt: skip


@pytest.fixture
def tokenizer(tmp_path):
    """Ten byte-level letters and a merge."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    vocab = {char: index for index, char in enumerate("abcdefgh")} | {"ab": 8, "<|end|>": 9}
    definition = {
        "version": "1.0",
        "added_tokens": [
            {"id": 9, "content": "<|end|>", "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False, "special": True},
        ],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                          "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                    "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": ["a b"]},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def test_the_written_folder_holds_the_weights_that_the_shape_has(tokenizer, tmp_path):
    out = tmp_path / "model"
    randomfolder.write(TINY, tokenizer, out, "cpu")
    assert read_config(out) == TINY
    with torch.no_grad():
        ops = TorchOps()
        written = load_llama(TINY, WeightFiles(out), torch.bfloat16, ops)
        made = load_llama(TINY, RandomWeights("cpu", "cpu"), torch.bfloat16, ops)
    assert torch.equal(written._norm, made._norm)
    assert torch.equal(written._embedding, made._embedding)


@pytest.mark.parametrize("config", [LLAMA_8B, QWEN3_8B], ids=["llama", "qwen3"])
def test_its_config_says_the_same_shape(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(randomfolder.config_json(config)))
    assert read_config(tmp_path) == config


def test_every_id_of_the_model_has_text_and_encoding_stays_what_it_was(tokenizer, tmp_path):
    out = tmp_path / "model"
    before = FolderTokenizer(tokenizer).encode("abcab")
    randomfolder.write(TINY, tokenizer, out, "cpu")
    widened = FolderTokenizer(out)
    assert widened.encode("abcab") == before
    assert widened.vocab_size == TINY.vocab_size
    assert widened.pieces[63] == b" ~63"


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer, tmp_path, capsys):
    definition = json.loads((tokenizer / "tokenizer.json").read_text())
    with pytest.raises(ValueError, match="ids up to 9, the model 8"):
        randomfolder.widen(definition, 8)
