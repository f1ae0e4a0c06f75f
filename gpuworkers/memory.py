"""How the memory of a GPU is shared out at start: weights, workspace, reserve, and the rest is KV.

Pure arithmetic: what does not fit is refused before anything is loaded.
"""

from controlplane.errors import ConfigError
from gpuworkers.models.config import LlamaConfig

RESERVE_BYTES = 1 << 30  # captured graphs, cuBLAS workspaces, code of kernels
RESERVE_SHARE = 0.02  # of the free memory: fragments of torch's allocator
STEP_ROWS = 8192  # token rows of the largest step that has to fit
SAMPLED_ROWS = 320  # of them with logits: the largest of stepper.BUCKETS
LOGITS_BYTES = 2 + 4 + 4  # an entry as bf16, as float32, and once more where logits are edited
KV_TOKENS_MIN = 1024  # a worker with less is of no use


def weight_bytes(config: LlamaConfig, itemsize: int) -> int:
    """Bytes of all parameters but norms and biases, which the reserve covers."""
    hidden, width = config.hidden_size, config.intermediate_size
    heads = 2 * config.num_q_heads + 2 * config.num_kv_heads
    layer = hidden * heads * config.head_dim + 3 * hidden * width
    tables = 1 if config.tie_word_embeddings else 2
    numbers = config.num_layers * layer + tables * config.vocab_size * hidden
    # While a layer loads, its largest fused weight exists twice.
    return (numbers + 2 * hidden * width) * itemsize


def workspace_bytes(config: LlamaConfig, itemsize: int) -> int:
    """Most that is alive at once in a forward pass of STEP_ROWS rows: two hidden states and a
    residual, around either the attention's or the MLP's intermediates; then the logits."""
    hidden, width = config.hidden_size, config.intermediate_size
    attention = (2 * config.num_q_heads + 2 * config.num_kv_heads) * config.head_dim
    row = (3 * hidden + max(attention, 3 * width)) * itemsize + 2 * config.head_dim * 4
    return STEP_ROWS * row + SAMPLED_ROWS * config.vocab_size * LOGITS_BYTES


def kv_tokens(config: LlamaConfig, itemsize: int, free_bytes: int, wanted_tokens: int = 0) -> int:
    """Tokens of KV that a device with `free_bytes` holds beside the model; wanted_tokens, where
    not 0, if they fit. Raises ConfigError with the sizes."""
    token_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize
    weights, workspace = weight_bytes(config, itemsize), workspace_bytes(config, itemsize)
    reserve = RESERVE_BYTES + int(free_bytes * RESERVE_SHARE)
    room = free_bytes - weights - workspace - reserve
    tokens = max(0, room) // token_bytes
    needed = wanted_tokens or KV_TOKENS_MIN
    if tokens < needed:
        raise ConfigError(
            f"{_gib(free_bytes)} free on the device: weights {_gib(weights)}, workspace"
            f" {_gib(workspace)}, reserve {_gib(reserve)} leave KV room for {tokens} tokens,"
            f" wanted {needed}"
        )
    return wanted_tokens or tokens


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
