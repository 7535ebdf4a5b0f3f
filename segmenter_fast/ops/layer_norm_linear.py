"""A linear layer of normed tokens: what makes queries, keys and values.

    y = LayerNorm(x) w^T + b

On a CPU these are PyTorch's, on a GPU ops/layer_norm_linear_triton.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from segmenter_fast.backend import matrix_dtype, resolve_backend


def layer_norm_linear_reference(
    x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """The definition, in plain PyTorch on any device."""
    return F.linear(F.layer_norm(x, gamma.shape, gamma, beta, eps), weight, bias)


def layer_norm_linear(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """Layer norm of the last dimension, then a linear layer.

    Args:
        x: (..., D) floating point, any strides.
        gamma, beta: (D,) of the norm.
        weight, bias: (N, D) and (N,) of the linear layer.
        eps: added to the variance, units of x squared.
        backend: see `segmenter_fast.backend`; "native" is the plain PyTorch of "reference".

    Returns:
        (..., N), dtype of the weight, or autocast's. Differentiable, once with Triton.

    Raises:
        ValueError: shapes that do not fit together.
        TypeError: dtypes that do not fit together, where Triton serves.

    Source: Strudel et al. 2021, section 3.1; official segm/model/blocks.py, Block and Attention.
    """
    width = x.shape[-1]
    shapes = [tuple(t.shape) for t in (gamma, beta, weight, bias)]
    if shapes != [(width,), (width,), (len(weight), width), (len(weight),)]:
        raise ValueError(
            f"expected gamma and beta ({width},), weight (N, {width}) and bias (N,), got "
            + ", ".join(map(str, shapes))
        )
    if resolve_backend(backend, x.device) == "triton":
        dtype = matrix_dtype(x)
        return torch.ops.segmenter_fast.layer_norm_linear_triton(
            x, gamma, beta, weight.to(dtype), bias.to(dtype), eps
        )
    return layer_norm_linear_reference(x, gamma, beta, weight, bias, eps)
