"""Times decode steps of transformers' continuous batching on a model of the same shape."""

import importlib
from collections.abc import Callable
from typing import Any

import torch

from gpuworkers.enginebench import StepTime
from gpuworkers.models.config import LlamaConfig

SHAPES = ((1, 1024), (32, 1024), (128, 1024))  # (batch, tokens of prompt)
OUTPUTS = (16, 80)  # output tokens of two runs; their difference is decode steps alone


def make_model(config: LlamaConfig, device: str) -> Any:
    """A Llama of random weights, bf16, on the device. Raises ImportError without transformers."""
    transformers = importlib.import_module("transformers")
    shape = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_q_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_model_len,
        rms_norm_eps=config.rms_norm_eps,
        dtype="bfloat16",
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(shape).eval()
    torch.set_default_dtype(torch.float32)
    return model


def time_decode(model: Any, batch: int, prompt_tokens: int, clock: Callable[[], float]) -> StepTime:
    """A decode step of `batch` sequences, by two runs that differ in their output alone."""
    transformers = importlib.import_module("transformers")
    vocab = model.config.vocab_size
    prompts = [[(row + i) % vocab for i in range(prompt_tokens)] for row in range(batch)]
    seconds = []
    for output_tokens in (2, *OUTPUTS):  # the first run warms up
        generation = transformers.GenerationConfig(
            max_new_tokens=output_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        started_at_s = clock()
        made = model.generate_batch(prompts, generation_config=generation)
        seconds.append(clock() - started_at_s)
        lengths = {len(output.generated_tokens) for output in made.values()}
        if len(made) != batch or lengths != {output_tokens}:
            raise RuntimeError(f"{len(made)} outputs of {lengths} tokens, not {output_tokens}")
    step_s = (seconds[2] - seconds[1]) / (OUTPUTS[1] - OUTPUTS[0])
    return StepTime("transformers", batch, prompt_tokens, step_s, step_s)
