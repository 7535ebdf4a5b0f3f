"""Multi-head self-attention over a packed projection.

    P = softmax(Q K^T / sqrt(d))        Y = dropout(P) V

with Q, K, V read from one (B, N, 3, heads, d) tensor, the view of the qkv projection's output.
Backward, from the upstream gradient U,

    dV = P^T U      dS = P (U V^T - <U, Y>)      dQ = dS K / sqrt(d)      dK = dS^T Q / sqrt(d)

On a CPU a kernel of ours takes what it was compiled for: float32 and bfloat16, heads of 32, 64 or
128 channels, no dropout. Forward keeps two numbers per query, m and i, from which backward
computes P = 2^(S log2(e) - m) i again; no N x N matrix exists at any time. Results do not depend on
the number of threads. Everything else on a CPU is PyTorch's fused attention; on a GPU it is
ops/attention_triton.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from segmenter_fast.backend import matrix_dtype, native_module, resolve_backend
from segmenter_fast.ops.upsample import dtype_name

NATIVE_WIDTHS = (32, 64, 128)
"""Channels per head of the native kernel."""

NATIVE_DTYPES = (torch.float32, torch.bfloat16)


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


# --------------------------------------------------------------------------- forward
@torch.library.custom_op("segmenter_fast::attention", mutates_args=(), device_types="cpu")
def _attention_op(qkv: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """The values y (B, N, H d), and m and i (B, H, 2, N) float32, empty without `with_gradient`."""
    qkv = _native_input(qkv)
    y, statistics = _empty(qkv, with_gradient)
    native_module().attention(
        *_packed(qkv),
        out_ptr=y.data_ptr(),
        threads=torch.get_num_threads(),
        statistics_ptr=statistics.data_ptr() if with_gradient else 0,
    )
    return y, statistics


def _native_input(qkv: Tensor) -> Tensor:
    """`qkv` with adjacent channels, if it is one that the kernel takes."""
    _check_packed(qkv)
    if qkv.dtype not in NATIVE_DTYPES:
        raise TypeError(f"qkv must be float32 or bfloat16, got {qkv.dtype}")
    if qkv.shape[4] not in NATIVE_WIDTHS:
        raise ValueError(f"a head must have 32, 64 or 128 channels, got {qkv.shape[4]}")
    return qkv if qkv.stride(4) == 1 else qkv.contiguous()


def _packed(qkv: Tensor) -> tuple[Any, ...]:
    """The kernel's leading arguments, which describe the projection."""
    batch, n, _, heads, d = qkv.shape
    return (
        qkv.data_ptr(),
        dtype_name(qkv),
        (batch, n, heads, d),
        qkv.stride()[:4],
        d**-0.5,
    )


def _empty(qkv: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    batch, n, _, heads, d = qkv.shape
    statistics = qkv.new_empty((batch, heads, 2, n) if with_gradient else (0,), dtype=torch.float32)
    return qkv.new_empty(batch, n, heads * d), statistics


@_attention_op.register_fake
def _(qkv: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    return _empty(qkv, with_gradient)


# --------------------------------------------------------------------------- backward
@torch.library.custom_op("segmenter_fast::attention_backward", mutates_args=(), device_types="cpu")
def _attention_backward_op(upstream: Tensor, qkv: Tensor, y: Tensor, statistics: Tensor) -> Tensor:
    """Gradient of qkv, contiguous."""
    qkv, upstream = _native_input(qkv), upstream.contiguous()
    gradient = torch.empty(qkv.shape, dtype=qkv.dtype)
    native_module().attention_gradient(
        *_packed(qkv),
        out_ptr=y.data_ptr(),
        statistics_ptr=statistics.data_ptr(),
        upstream_ptr=upstream.data_ptr(),
        gradient_ptr=gradient.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return gradient


@_attention_backward_op.register_fake
def _(upstream: Tensor, qkv: Tensor, y: Tensor, statistics: Tensor) -> Tensor:
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)


def _no_second_derivative(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(
        "attention cannot be differentiated twice by the native kernel; use backend='reference' "
        "for that"
    )


_attention_backward_op.register_autograd(_no_second_derivative)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    qkv, with_gradient = inputs
    if not with_gradient:
        raise RuntimeError("qkv requires a gradient: call the operator with with_gradient=True")
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(qkv, *output)


def _backward(ctx: Any, upstream: Tensor, unused: Tensor | None) -> tuple[Tensor, None]:
    op = torch.ops.segmenter_fast.attention_backward
    return op(upstream, *ctx.saved_tensors), None


_attention_op.register_autograd(_backward, setup_context=_setup_context)


# --------------------------------------------------------------------------- public function
def attention(qkv: Tensor, dropout_p: float = 0.0, backend: str = "auto") -> Tensor:
    """Self-attention of all heads.

    Args:
        qkv: (B, N, 3, heads, d) floating point; any strides.
        dropout_p: probability of zeroing an attention weight; the caller passes 0 in evaluation.
        backend: see `segmenter_fast.backend`. `reference` writes the N x N weights out; `native`
            is our kernel in float32 and bfloat16 for heads of 32, 64 or 128 channels without
            dropout, else PyTorch's fused `scaled_dot_product_attention`; `triton` takes up to 256
            channels.

    Returns:
        (B, N, heads * d), dtype and device of `qkv`, or autocast's dtype. Differentiable, once
        with our kernels. On a CPU NaN where a score is not finite.

    Raises:
        ValueError: wrong rank, too many channels, or `dropout_p` outside [0, 1).
        TypeError: a dtype that Triton's kernels do not take.
        BackendError: the backend named cannot run here.

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
    if chosen == "native" and dropout_p == 0.0 and qkv.shape[4] in NATIVE_WIDTHS:
        dtype = matrix_dtype(qkv)
        if dtype in NATIVE_DTYPES:
            qkv = qkv.to(dtype)
            with_gradient = torch.is_grad_enabled() and qkv.requires_grad
            y, _ = torch.ops.segmenter_fast.attention(qkv, with_gradient)
            return y
    # Only an explicit "reference" writes N x N weights out: what `auto` resolves to on a device
    # without kernels of ours is PyTorch's best, and that is the fused attention.
    if backend == "reference":
        return attention_reference(qkv, dropout_p)
    batch, tokens, _, heads, width = qkv.shape
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)
    return y.transpose(1, 2).reshape(batch, tokens, heads * width)
