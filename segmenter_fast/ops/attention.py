"""Multi-head self-attention over a packed projection.

    P = softmax(Q K^T / sqrt(d))        Y = dropout(P) V

with Q, K, V read from one (B, N, 3, heads, d) tensor, the view of the qkv projection's output.
On a CPU PyTorch's fused attention takes it, on a GPU ops/attention_triton.py.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from segmenter_fast.backend import matrix_dtype, resolve_backend


def _check_packed(qkv: Tensor) -> None:
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv must be (B, N, 3, heads, d), got {tuple(qkv.shape)}")


def attention_weights(qkv: Tensor, queries: slice | Sequence[int] | None = None) -> Tensor:
    """Softmax probabilities softmax(Q K^T / sqrt(d)), of all rows or some.

    Args:
        qkv: (B, N, 3, heads, d) floating point.
        queries: the rows that are wanted; None is all N.

    Returns:
        (B, heads, N, N), or with as many rows as there are queries; rows sum to 1.

    Raises:
        ValueError: wrong rank.

    Source: official segm/model/blocks.py, Attention.
    """
    _check_packed(qkv)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    if queries is not None:
        q = q[:, :, queries]
    return ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(dim=-1)


def attention_reference(qkv: Tensor, dropout_p: float = 0.0) -> Tensor:
    """The definition: N x N probabilities, written out."""
    batch, tokens, _, heads, width = qkv.shape
    weights = F.dropout(attention_weights(qkv), dropout_p)
    v = qkv[:, :, 2].transpose(1, 2)
    return (weights @ v).transpose(1, 2).reshape(batch, tokens, heads * width)


def attention(qkv: Tensor, dropout_p: float = 0.0, backend: str = "auto") -> Tensor:
    """Self-attention of all heads.

    Args:
        qkv: (B, N, 3, heads, d) floating point; any strides.
        dropout_p: probability of zeroing an attention weight; the caller passes 0 in evaluation.
        backend: see `segmenter_fast.backend`. `reference` writes the N x N weights out; `native`
            is PyTorch's fused `scaled_dot_product_attention`; `triton` takes up to 256 channels.

    Returns:
        (B, N, heads * d), dtype and device of `qkv`, or autocast's dtype. Differentiable, once
        with Triton.

    Raises:
        ValueError: wrong rank, too many channels, or `dropout_p` outside [0, 1).
        TypeError: a dtype that Triton's kernels do not take.

    Source: Strudel et al. 2021, section 3.1; official segm/model/blocks.py, Attention.
    """
    _check_packed(qkv)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    chosen = resolve_backend(backend, qkv.device)
    if chosen == "triton":
        qkv = qkv.to(matrix_dtype(qkv))
        with_gradient = torch.is_grad_enabled() and qkv.requires_grad
        # Drawn on the device, so that nobody waits; without dropout nothing reads it.
        seed = torch.randint(2**62, (int(dropout_p > 0),), device=qkv.device)
        y, _ = torch.ops.segmenter_fast.attention_triton(qkv, seed, dropout_p, with_gradient)
        return y
    # Only an explicit "reference" writes N x N weights out: what `auto` resolves to on a device
    # without kernels of ours is PyTorch's best, and that is the fused attention.
    if backend == "reference":
        return attention_reference(qkv, dropout_p)
    batch, tokens, _, heads, width = qkv.shape
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)
    return y.transpose(1, 2).reshape(batch, tokens, heads * width)
