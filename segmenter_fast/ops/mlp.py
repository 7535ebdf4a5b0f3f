"""The two linear layers of a transformer block, from the stream of tokens back to it.

    y = x + s (GELU(LayerNorm(x) w1^T + b1) w2^T + b2)        GELU(z) = z Phi(z)

with Phi the normal distribution's, and s one factor per image, for stochastic depth. On a CPU these
are PyTorch's, on a GPU ops/mlp_triton.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from segmenter_fast.backend import matrix_dtype, resolve_backend


def mlp_reference(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    eps: float,
    scale: Tensor | None = None,
) -> Tensor:
    """The definition, in plain PyTorch on any device."""
    z = F.linear(F.layer_norm(x, gamma.shape, gamma, beta, eps), w1, b1)
    branch = F.linear(F.gelu(z), w2, b2)
    return x + (branch if scale is None else branch * scale[:, None, None].to(branch))


def mlp(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The stream of tokens, with the feed-forward branch added.

    Args:
        x: (B, N, D) floating point, the stream.
        gamma, beta: (D,) of the norm.
        w1, b1: (F, D) and (F,).
        w2, b2: (D, F) and (D,).
        eps: added to the variance, units of x squared.
        scale: (B,) factors of the images' branches; None is 1. No gradient flows to it.
        backend: see `segmenter_fast.backend`; "native" is the plain PyTorch of "reference".

    Returns:
        (B, N, D); with Triton in the stream's dtype. Differentiable, once with Triton.

    Raises:
        ValueError: shapes that do not fit together.
        TypeError: dtypes that do not fit together, where Triton serves.

    Source: Strudel et al. 2021, section 3.1; official segm/model/blocks.py, Block and FeedForward.
    """
    shapes = [tuple(t.shape) for t in (gamma, beta, w1, b1, w2, b2)]
    width, hidden = x.shape[-1], len(w1)
    expected = [(width,), (width,), (hidden, width), (hidden,), (width, hidden), (width,)]
    if x.ndim != 3 or shapes != expected or (scale is not None and scale.shape != x.shape[:1]):
        raise ValueError(
            "expected x (B, N, D), gamma and beta (D,), w1 (F, D), b1 (F,), w2 (D, F), b2 (D,) and "
            f"scale (B,) or None, got {tuple(x.shape)}, {', '.join(map(str, shapes))} and "
            f"{None if scale is None else tuple(scale.shape)}"
        )
    if resolve_backend(backend, x.device) == "triton":
        dtype = matrix_dtype(x)
        weights = (t.to(dtype) for t in (w1, b1, w2, b2))
        with_gradient = torch.is_grad_enabled() and any(
            t.requires_grad for t in (x, gamma, beta, w1, b1, w2, b2)
        )
        op = torch.ops.segmenter_fast.mlp_triton
        return op(x, gamma, beta, *weights, eps, scale, with_gradient)[0]
    return mlp_reference(x, gamma, beta, w1, b1, w2, b2, eps, scale)
