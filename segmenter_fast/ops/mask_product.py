"""Masks: scalar products of L2-normalised patch and class vectors, layer norm over the classes.

m[n, k] = <p_n / |p_n|, c_k / |c_k|>        y = LayerNorm_k(m)
"""

import torch.nn.functional as F
from torch import Tensor


def mask_product(
    patches: Tensor, classes: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> Tensor:
    """Class masks at patch resolution.

    Args:
        patches: (B, N, D) projected patch tokens.
        classes: (B, K, D) projected class tokens.
        weight, bias: (K,) of the layer norm over classes.
        eps: added to the variance, units of the masks squared.

    Returns:
        (B, N, K), dtype of the inputs.

    Raises:
        ValueError: shapes that do not fit together.

    Source: Strudel et al. 2021, section 3.2; official segm/model/decoder.py. The layer norm stands
    before the upsampling and the softmax, as in the released code and weights.
    """
    if patches.ndim != 3 or classes.ndim != 3 or patches.shape[::2] != classes.shape[::2]:
        raise ValueError(
            "expected patches (B, N, D) and classes (B, K, D), got "
            f"{tuple(patches.shape)} and {tuple(classes.shape)}"
        )
    patches = patches / patches.norm(dim=-1, keepdim=True)
    classes = classes / classes.norm(dim=-1, keepdim=True)
    masks = patches @ classes.transpose(1, 2)
    return F.layer_norm(masks, (classes.shape[1],), weight, bias, eps)
