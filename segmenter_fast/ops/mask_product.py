"""Masks: scalar products of L2-normalised patch and class vectors, layer norm over the classes.

    m[n, k] = <p_n / |p_n|, c_k / |c_k|>        y = LayerNorm_k(m)

On a CPU this is plain PyTorch, whose matrix product takes nearly all of the time; on a GPU it is
ops/mask_product_triton.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from segmenter_fast.backend import matrix_dtype, resolve_backend


def mask_product_reference(
    patches: Tensor, classes: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """The definition, in plain PyTorch on any device."""
    patches = patches / patches.norm(dim=-1, keepdim=True)
    classes = classes / classes.norm(dim=-1, keepdim=True)
    masks = patches @ classes.transpose(1, 2)
    return F.layer_norm(masks, (classes.shape[1],), weight, bias, eps)


def mask_product(
    patches: Tensor,
    classes: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """Class masks at patch resolution.

    Args:
        patches: (B, N, D) projected patch tokens, floating point, any strides.
        classes: (B, K, D) projected class tokens, of the same dtype.
        weight, bias: (K,) of the layer norm over classes.
        eps: added to the variance, units of the masks squared.
        backend: see `segmenter_fast.backend`; "native" is the plain PyTorch of "reference".

    Returns:
        (B, N, K), dtype of the inputs; float32 under autocast, and with Triton wherever weight and
        bias are; NaN where a vector is 0. Differentiable, once with Triton.

    Raises:
        ValueError: shapes that do not fit together.
        TypeError: patches and classes of two dtypes, where Triton serves.
        BackendError: the backend named cannot run here.

    Source: Strudel et al. 2021, section 3.2; official segm/model/decoder.py. The layer norm stands
    before the upsampling and the softmax, as in the released code and weights.
    """
    if patches.ndim != 3 or classes.ndim != 3 or patches.shape[::2] != classes.shape[::2]:
        raise ValueError(
            "expected patches (B, N, D) and classes (B, K, D), got "
            f"{tuple(patches.shape)} and {tuple(classes.shape)}"
        )
    n_cls = classes.shape[1]
    if tuple(weight.shape) != (n_cls,) or tuple(bias.shape) != (n_cls,):
        raise ValueError(
            f"expected weight and bias ({n_cls},) for {n_cls} classes, got "
            f"{tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    if resolve_backend(backend, patches.device) == "triton":
        dtype = matrix_dtype(patches)
        if torch.is_autocast_enabled(patches.device.type) and patches.dtype != torch.float64:
            # CUDA's autocast has layer norm in float32.
            weight, bias = weight.float(), bias.float()
        inputs = (patches.to(dtype), classes.to(dtype), weight, bias)
        with_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        return torch.ops.segmenter_fast.mask_product_triton(*inputs, eps, with_gradient)[0]
    return mask_product_reference(patches, classes, weight, bias, eps)
