"""Layer norm over the channels of each token.

    y = (x - mean(x)) / sqrt(var(x) + eps) weight + bias

On a CPU this is PyTorch's, on a GPU ops/layer_norm_triton.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from segmenter_fast.backend import resolve_backend


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The definition, in plain PyTorch on any device."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, backend: str = "auto"
) -> Tensor:
    """Layer norm of the last dimension.

    Args:
        x: (..., D) floating point.
        weight, bias: (D,).
        eps: added to the variance, units of x squared.
        backend: see `segmenter_fast.backend`; "native" is the plain PyTorch of "reference".

    Returns:
        (..., D), dtype of x; float32 under autocast. Differentiable, once with Triton.

    Raises:
        ValueError: weight or bias is not (D,).
        TypeError: a dtype that Triton's kernels do not take.

    Source: Strudel et al. 2021, section 3.1; official segm/model/blocks.py, Block.
    """
    width = x.shape[-1]
    if tuple(weight.shape) != (width,) or tuple(bias.shape) != (width,):
        raise ValueError(
            f"expected weight and bias ({width},), got {tuple(weight.shape)} and "
            f"{tuple(bias.shape)}"
        )
    if resolve_backend(backend, x.device) == "triton":
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            x = x.float()
        with_gradient = torch.is_grad_enabled() and any(
            one.requires_grad for one in (x, weight, bias)
        )
        op = torch.ops.segmenter_fast.layer_norm_triton
        return op(x, weight, bias, eps, with_gradient)[0]
    return layer_norm_reference(x, weight, bias, eps)
