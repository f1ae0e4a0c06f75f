"""Row-wise operations: root mean square norm, rotary embedding with KV write, gated activation.

A row's result does not depend on the rows around it: every reduction runs over one contiguous row,
and exp and silu see contiguous memory only (a strided input takes another code path in torch whose
last bit differs).
"""

import torch
import torch.nn.functional as F

from kernels import checks


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See Ops.rms_norm. Computed in float32. Source: Zhang and Sennrich 2019, arXiv:1910.07467."""
    checks.shape("weight", weight, (x.shape[-1],))
    checks.contiguous("x", x)
    wide = x.float()
    scale = (wide * wide).sum(-1, keepdim=True).div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * scale).to(x.dtype).mul_(weight)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """See Ops.add_rms_norm; writes residual."""
    checks.shape("residual", residual, tuple(x.shape))
    residual.add_(x)
    return rms_norm(residual, weight, eps)


def norm_heads(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    num_q_heads: int,
    eps: float,
) -> None:
    """See Ops.norm_heads; writes qkv."""
    rows, head_dim = len(qkv), len(q_weight)
    checks.shape("k_weight", k_weight, (head_dim,))
    heads = qkv.view(rows, -1, head_dim)
    num_kv_heads = (heads.shape[1] - num_q_heads) // 2
    q, k = heads[:, :num_q_heads], heads[:, num_q_heads : num_q_heads + num_kv_heads]
    q.copy_(rms_norm(q.contiguous(), q_weight, eps))
    k.copy_(rms_norm(k.contiguous(), k_weight, eps))


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """See Ops.silu_mul."""
    width = gate_up.shape[-1] // 2
    gate = gate_up[:, :width].contiguous()
    return F.silu(gate).mul_(gate_up[:, width:])


def rotate_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x (rows, heads, head_dim), pairs (i, i + head_dim / 2); writes x.

    cos, sin (rows, head_dim), see Ops.rope_write. Source: Su et al. 2021, arXiv:2104.09864, in
    Llama's pairing."""
    wide = x.float()
    swapped = torch.roll(wide, x.shape[-1] // 2, -1).mul_(sin[:, None, :])
    turned = wide.mul_(cos[:, None, :]).add_(swapped)
    return x if turned.data_ptr() == x.data_ptr() else x.copy_(turned)


def rope_write(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv_layer: torch.Tensor,
    slots: torch.Tensor,
    num_q_heads: int,
) -> torch.Tensor:
    """See Ops.rope_write. slots (rows·2·kv_heads,) int64: rows of kv_layer seen as
    (num_blocks·2·kv_heads·block_tokens, head_dim), in the order (row, K|V, kv head)."""
    checks.contiguous("kv_layer", kv_layer)
    num_kv_heads, head_dim = kv_layer.shape[2], kv_layer.shape[4]
    checks.shape("qkv", qkv, (None, (num_q_heads + 2 * num_kv_heads) * head_dim))
    heads = qkv.view(len(qkv), num_q_heads + 2 * num_kv_heads, head_dim)
    rotate_(heads[:, : num_q_heads + num_kv_heads], cos, sin)
    fresh = heads[:, num_q_heads:].reshape(-1, head_dim)
    kv_layer.view(-1, head_dim).index_copy_(0, slots, fresh)
    return heads[:, :num_q_heads]
