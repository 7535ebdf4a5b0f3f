"""A linear layer whose result is added to the stream of tokens: what ends an attention.

    y = x + s (v w^T + b)

with s one factor per image, for stochastic depth. On a CPU this is PyTorch's, on a GPU
ops/linear_residual_triton.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from segmenter_fast.backend import matrix_dtype, resolve_backend


def linear_residual_reference(
    v: Tensor, weight: Tensor, bias: Tensor, x: Tensor, scale: Tensor | None = None
) -> Tensor:
    """The definition, in plain PyTorch on any device."""
    branch = F.linear(v, weight, bias)
    return x + (branch if scale is None else branch * scale[:, None, None].to(branch))


def linear_residual(
    v: Tensor,
    weight: Tensor,
    bias: Tensor,
    x: Tensor,
    scale: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The stream of tokens, with a linear layer's result added.

    Args:
        v: (B, N, C) floating point, what the layer is applied to.
        weight, bias: (D, C) and (D,).
        x: (B, N, D) floating point, the stream.
        scale: (B,) factors of the images' branches; None is 1. No gradient flows to it.
        backend: see `segmenter_fast.backend`; "native" is the plain PyTorch of "reference".

    Returns:
        (B, N, D); with Triton in the stream's dtype. Differentiable, once with Triton.

    Raises:
        ValueError: shapes that do not fit together.
        TypeError: dtypes that do not fit together, where Triton serves.

    Source: official segm/model/blocks.py, Block and Attention; stochastic depth by Huang et al.
    2016.
    """
    good = (*v.shape[:-1], len(weight)) == tuple(x.shape) and x.ndim == 3
    good &= tuple(weight.shape) == (x.shape[-1], v.shape[-1]) and tuple(bias.shape) == x.shape[-1:]
    if not good or (scale is not None and tuple(scale.shape) != x.shape[:1]):
        raise ValueError(
            "expected v (B, N, C), weight (D, C), bias (D,), x (B, N, D) and scale (B,) or None, "
            f"got {tuple(v.shape)}, {tuple(weight.shape)}, {tuple(bias.shape)}, {tuple(x.shape)} "
            f"and {None if scale is None else tuple(scale.shape)}"
        )
    if resolve_backend(backend, x.device) == "triton":
        dtype = matrix_dtype(v)
        return torch.ops.segmenter_fast.linear_residual_triton(
            v.to(dtype), weight.to(dtype), bias.to(dtype), x, scale
        )
    return linear_residual_reference(v, weight, bias, x, scale)
