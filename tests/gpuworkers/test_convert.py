"""Conversion of a GGUF model: whole or not at all, once, checked."""

import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter, TokenType
from safetensors.torch import load_file
from tokenizers import Tokenizer

from gpuworkers import convert
from gpuworkers.models.config import read_config
from gpuworkers.models.llama import load_llama
from gpuworkers.weights import WeightFiles
from kernels.torchops.backend import TorchOps

TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab", "Ġ"]
HIDDEN, HEADS, KV_HEADS, WIDTH = 16, 4, 2, 24


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp stores Q and K: the halves of each head interleaved."""
    rows, columns = weight.shape
    return (
        weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A one-layer model; returns its tensors under the names and layout of the output."""
    source = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        return source.standard_normal(shape).astype(np.float32)

    kv_size = HIDDEN * KV_HEADS // HEADS
    q, k = random(HIDDEN, HIDDEN), random(kv_size, HIDDEN)
    layer = {
        "attn_v": random(kv_size, HIDDEN),
        "attn_output": random(HIDDEN, HIDDEN),
        "ffn_gate": random(WIDTH, HIDDEN),
        "ffn_up": random(WIDTH, HIDDEN),
        "ffn_down": random(HIDDEN, WIDTH),
        "attn_norm": random(HIDDEN),
        "ffn_norm": random(HIDDEN),
    }
    model = {"token_embd": random(len(TOKENS), HIDDEN), "output_norm": random(HIDDEN)}
    writer = GGUFWriter(path, "llama")
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_feed_forward_length(WIDTH)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_context_length(64)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    control, normal = TokenType.CONTROL, TokenType.NORMAL
    writer.add_token_types([control] * 3 + [normal] * (len(TOKENS) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages }}")
    writer.add_tensor("blk.0.attn_q.weight", permuted(q, HEADS))
    writer.add_tensor("blk.0.attn_k.weight", permuted(k, KV_HEADS))
    for name, tensor in layer.items():
        writer.add_tensor(f"blk.0.{name}.weight", tensor)
    for name, tensor in model.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {
        "model.layers.0.self_attn.q_proj.weight": q,
        "model.layers.0.self_attn.k_proj.weight": k,
        "model.layers.0.mlp.down_proj.weight": layer["ffn_down"],
        "model.embed_tokens.weight": model["token_embd"],
    }


@pytest.fixture
def gguf(tmp_path) -> Path:
    path = tmp_path / "model.gguf"
    write_gguf(path)
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def converted(gguf: Path, out: Path) -> list[str]:
    lines: list[str] = []
    convert.convert(gguf, out, digest(gguf), lines.append)
    return lines


def test_a_converted_folder_holds_the_same_model(tmp_path):
    gguf, out = tmp_path / "model.gguf", tmp_path / "out"
    expected = write_gguf(gguf)
    assert converted(gguf, out)[0] == "1/4 checking model.gguf"
    tensors = load_file(out / "model.safetensors")
    for name, values in expected.items():
        assert torch.equal(tensors[name], torch.from_numpy(values).bfloat16()), name
    config = read_config(out)
    assert config.num_layers == 1 and config.tie_word_embeddings and config.eos_token_ids == {2}
    load_llama(config, WeightFiles(out), torch.float32, TorchOps())


def test_the_tokenizer_and_chat_template_come_along(gguf, tmp_path):
    out = tmp_path / "out"
    converted(gguf, out)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert tokenizer.encode("<|im_start|>ab a").ids == [1, 5, 6, 3]
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == "{{ messages }}" and settings["eos_token"] == "<|im_end|>"


def test_a_second_run_changes_nothing(gguf, tmp_path):
    out = tmp_path / "out"
    converted(gguf, out)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert converted(gguf, out) == [f"{out} is there already"]
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_a_changed_file_is_refused_before_anything_is_written(gguf, tmp_path):
    with pytest.raises(convert.ConvertError, match="sha256 is"):
        convert.convert(gguf, tmp_path / "out", "0" * 64, lambda line: None)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.tmp-*"))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(convert.ConvertError, match=r"gone.gguf: No such file"):
        convert.convert(tmp_path / "gone.gguf", tmp_path / "out", "0" * 64, lambda line: None)


def test_a_broken_gguf_leaves_nothing_behind(tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF but not really" * 10)
    with pytest.raises(ValueError):
        converted(broken, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.gguf", "out.lock"]


def test_leftovers_of_a_killed_run_are_removed_and_foreign_folders_are_not(gguf, tmp_path):
    leftover = tmp_path / "out.tmp-killed"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    converted(gguf, tmp_path / "out")
    assert not leftover.exists()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    with pytest.raises(convert.ConvertError, match="not a converted model: remove it"):
        converted(gguf, foreign)
    assert foreign.exists()


def test_processes_that_convert_at_once_make_one_folder(gguf, tmp_path):
    out = tmp_path / "out"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=converted, args=(gguf, out)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert convert.is_converted(out) and not list(tmp_path.glob("*.tmp-*"))


def test_the_default_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SLACKWATER_CACHE", str(tmp_path / "own"))
    assert convert.default_folder() == tmp_path / "own" / "smollm2-135m"
    monkeypatch.delenv("SLACKWATER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert convert.default_folder() == tmp_path / "xdg" / "slackwater" / "smollm2-135m"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert convert.default_folder() == tmp_path / ".cache" / "slackwater" / "smollm2-135m"


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "gpuworkers.convert", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | environment,
        check=False,
    )


def test_the_command_prints_the_folder_last_and_errors_on_one_line(gguf, tmp_path):
    refused = command("--gguf", str(gguf), "--out", str(tmp_path / "new"))
    assert refused.returncode == 1 and "sha256 is" in refused.stderr
    assert refused.stderr.count("\n") == 1 and "Traceback" not in refused.stderr
    out = tmp_path / "cache" / convert.FOLDER_NAME
    converted(gguf, out)
    done = command(SLACKWATER_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == str(out)
