"""A model folder that cannot be served is refused by a message that names what is wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpuworkers.models.config import ModelError, read_config
from gpuworkers.models.llama import load_llama
from gpuworkers.weights import INDEX, WeightFiles
from kernels.torchops.backend import TorchOps
from tests.gpuworkers.tinyllama import CONFIG, write_tiny

FILE = "model.safetensors"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def load(folder):
    return load_llama(read_config(folder), WeightFiles(folder), torch.float32, TorchOps())


@pytest.fixture
def folder(tmp_path):
    return write_tiny(tmp_path / "model")


def rewrite(folder, **changes):
    """Replace tensors by name; None removes one."""
    tensors = load_file(folder / FILE) | changes
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / FILE)


def test_the_shape_is_read_from_config_json(folder):
    config = read_config(folder)
    assert (config.num_layers, config.num_q_heads, config.num_kv_heads) == (2, 6, 2)
    assert config.head_dim == 16 and config.eos_token_ids == {2}


def test_several_eos_ids_and_the_newer_place_of_rope_theta_are_read(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 5e5}
    config = read_config(write_tiny(tmp_path, eos_token_id=[2, 9], rope_parameters=rope))
    assert config.eos_token_ids == {2, 9} and config.rope_theta == 5e5


def test_no_eos_id_means_none(tmp_path):
    assert read_config(write_tiny(tmp_path, eos_token_id=None)).eos_token_ids == frozenset()


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"model_type": "mamba"}, "model_type must be one of 'llama', 'qwen3', is 'mamba'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"attention_bias": "yes"}, "attention_bias='yes', expected true or false"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "only LlamaForCausalLM"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor=None"),
        ({"rope_scaling": "llama3"}, "rope_scaling='llama3', expected an object"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope scaling"),
        ({"vocab_size": 0}, "vocab_size=0, expected a positive whole number"),
        ({"hidden_size": "96"}, "hidden_size='96'"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps=-1.0"),
        ({"num_key_value_heads": 4}, "do not fit together"),
        ({"head_dim": 15}, "do not fit together"),
        ({"eos_token_id": 512}, "outside the vocabulary"),
        ({"eos_token_id": ["x"]}, "outside the vocabulary"),
    ],
)
def test_an_unsupported_or_impossible_config_is_refused(folder, changes, message):
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    with pytest.raises(ModelError, match=message):
        read_config(folder)


def test_a_missing_or_broken_config_is_refused(tmp_path, folder):
    with pytest.raises(ModelError, match=r"config.json: No such file"):
        read_config(tmp_path / "nowhere")
    for text, message in (
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        (" " * 2_000_000, "larger"),
    ):
        (folder / "config.json").write_text(text)
        with pytest.raises(ModelError, match=message):
            read_config(folder)


def test_a_missing_tensor_is_named(folder):
    rewrite(folder, **{Q_PROJ: None})
    with pytest.raises(ModelError, match=f"tensor {Q_PROJ} is missing"):
        load(folder)


def test_a_wrong_shape_is_named_with_both_shapes(folder):
    rewrite(folder, **{Q_PROJ: torch.zeros(96, 95)})
    with pytest.raises(ModelError, match=r"shape \(96, 95\), expected \(96, 96\)"):
        load(folder)


def test_a_wrong_dtype_is_named(folder):
    rewrite(folder, **{Q_PROJ: torch.zeros(96, 96, dtype=torch.int32)})
    with pytest.raises(ModelError, match="is torch.int32"):
        load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(folder, value):
    rewrite(folder, **{Q_PROJ: torch.full((96, 96), value)})
    with pytest.raises(ModelError, match="not finite"):
        load(folder)


def test_a_folder_without_or_with_broken_weights_is_refused(folder):
    (folder / FILE).write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00notjson!")
    with pytest.raises(ModelError, match=FILE):
        WeightFiles(folder)
    (folder / FILE).unlink()
    with pytest.raises(ModelError, match="no \\*.safetensors file"):
        WeightFiles(folder)


def test_weights_may_lie_in_several_files_but_each_once(folder):
    tensors = load_file(folder / FILE)
    names = sorted(tensors)
    (folder / FILE).unlink()
    save_file({n: tensors[n] for n in names[:5]}, folder / "a.safetensors")
    save_file({n: tensors[n] for n in names[5:]}, folder / "b.safetensors")
    load(folder)
    save_file({names[0]: tensors[names[0]]}, folder / "c.safetensors")
    with pytest.raises(ModelError, match="also in another file"):
        WeightFiles(folder)


def sharded(folder, **changes) -> None:
    """Two shards and their index; `changes` replace entries of the weight map."""
    tensors = load_file(folder / FILE)
    names = sorted(tensors)
    (folder / FILE).unlink()
    parts = {"one.safetensors": names[:5], "two.safetensors": names[5:]}
    for file_name, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file_name)
    entries = {name: file_name for file_name, part in parts.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"weight_map": entries | changes}))


def test_shards_are_found_by_their_index_and_other_files_left_alone(folder):
    sharded(folder)
    save_file({"stray": torch.zeros(1)}, folder / "stray.safetensors")
    load(folder)
    assert [path.name for path in WeightFiles(folder).paths] == [
        "one.safetensors",
        "two.safetensors",
    ]


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"extra": "one.safetensors"}, "tensor extra of .* is missing"),
        ({Q_PROJ: "one.safetensors"}, f"tensor {Q_PROJ} is not where"),
        ({Q_PROJ: "three.safetensors"}, "three.safetensors"),
        ({Q_PROJ: "../one.safetensors"}, "is said to be in '../one.safetensors'"),
        ({Q_PROJ: "pytorch_model.bin"}, "is said to be in 'pytorch_model.bin'"),
        ({Q_PROJ: 7}, "is said to be in 7"),
    ],
)
def test_an_index_that_is_not_true_is_refused(folder, changes, message):
    sharded(folder, **changes)
    with pytest.raises(ModelError, match=message):
        WeightFiles(folder)


def test_an_index_without_a_map_is_refused(folder):
    (folder / INDEX).write_text("{}")
    with pytest.raises(ModelError, match="no weight_map"):
        WeightFiles(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_folder_with_nothing_but_pickles_is_refused_with_the_reason(folder, name):
    (folder / FILE).rename(folder / name)
    with pytest.raises(ModelError, match=f"{name} is a pickle, which can run code"):
        WeightFiles(folder)


def test_the_end_of_a_turn_is_read_from_generation_config(folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    assert read_config(folder).eos_token_ids == {2, 5, 7}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 9999}))
    with pytest.raises(ModelError, match="generation_config.json: eos_token_id=9999"):
        read_config(folder)


def test_equal_files_have_equal_hashes(tmp_path):
    one, same, other = (write_tiny(tmp_path / str(i), seed=i // 2) for i in range(3))
    hashes = [WeightFiles(folder).sha256() for folder in (one, same, other)]
    assert hashes[0] == hashes[1] != hashes[2]
