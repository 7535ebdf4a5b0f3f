"""Images to tokens: patches projected, between extra tokens and position embeddings.

    z_e = t_e + q_e                                  extra tokens t (class, distillation), e < E
    z_{E+n} = W v_n + b + q_{E+n}                    v_n the normalised pixels of patch n

The patches do not overlap, so this is a convolution whose stride is its kernel. The image is filled
up to whole patches with zeros after the normalisation, that is, with the mean colour. On a CPU this
is plain PyTorch, whose convolution takes nearly all of the time; on a GPU it is
ops/patch_embed_triton.py.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from segmenter_fast.backend import resolve_backend
from segmenter_fast.ops.upsample import upcast

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def patch_embed_reference(
    images: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos_embed: Tensor,
    tokens: Tensor,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    sizes: Tensor | None = None,
) -> Tensor:
    """The definition, in plain PyTorch on any device."""
    patch = weight.shape[2]
    batch, _, height, width = images.shape
    x = images
    if x.dtype == torch.uint8:
        x = x.to(upcast(weight.new_empty(0)).dtype) / 255
    if mean is not None or std is not None:
        shift, scale = (
            torch.tensor(values, dtype=torch.float64, device=x.device).view(-1, 1, 1)
            for values in (mean or [0.0], std or [1.0])
        )
        x = upcast(x)
        x = (x - shift.to(x)) / scale.to(x)
    if sizes is not None:
        bottom, right = sizes.to(x.device).view(batch, 2, 1, 1, 1).unbind(1)
        y = torch.arange(height, device=x.device).view(1, -1, 1)
        inside = (y < bottom) & (torch.arange(width, device=x.device) < right)
        x = torch.where(inside, x, 0)
    # Not sides modulo the patch, which torch.compile cannot trace for sides that vary.
    rows, columns = (height + patch - 1) // patch, (width + patch - 1) // patch
    x = F.pad(x, (0, columns * patch - width, 0, rows * patch - height))
    x = x.to(weight.dtype if images.dtype == torch.uint8 else images.dtype)
    x = F.conv2d(x, weight, bias, stride=patch).flatten(2).transpose(1, 2)
    return torch.cat((tokens.expand(batch, -1, -1), x), dim=1) + pos_embed


def _check(images: Tensor, weight: Tensor, bias: Tensor, pos_embed: Tensor, tokens: Tensor) -> None:
    if images.ndim != 4 or 0 in images.shape[1:]:
        raise ValueError(f"images must be (B, C, H, W) with pixels, got {tuple(images.shape)}")
    channels, height, width = images.shape[1:]
    if weight.ndim != 4 or weight.shape[1] != channels or weight.shape[2] != weight.shape[3]:
        raise ValueError(
            f"weight must be (D, C, P, P) with C = {channels}, got {tuple(weight.shape)}"
        )
    d, patch = weight.shape[0], weight.shape[2]
    if tuple(bias.shape) != (d,):
        raise ValueError(f"bias must be ({d},) as weight is, got {tuple(bias.shape)}")
    if tokens.ndim != 3 or tokens.shape[::2] != (1, d):
        raise ValueError(f"tokens must be (1, E, {d}), got {tuple(tokens.shape)}")
    rows, columns = -(-height // patch), -(-width // patch)
    expected = (1, tokens.shape[1] + rows * columns, d)
    if tuple(pos_embed.shape) != expected:
        raise ValueError(
            f"pos_embed must be {expected} for {tokens.shape[1]} extra tokens and {rows} x "
            f"{columns} patches, got {tuple(pos_embed.shape)}"
        )
    for name, x in (
        ("weight", weight),
        ("bias", bias),
        ("pos_embed", pos_embed),
        ("tokens", tokens),
    ):
        if x.dtype not in FLOATS:
            raise TypeError(f"{name} must be floating point, got {x.dtype}")


def _check_options(
    images: Tensor,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    sizes: Tensor | None,
) -> None:
    batch, channels = images.shape[:2]
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != channels:
            raise ValueError(f"{name} must hold {channels} numbers, got {values!r}")
    if std is not None and 0 in std:
        raise ValueError(f"std must not hold 0, got {std!r}")
    if sizes is not None:
        if tuple(sizes.shape) != (batch, 2):
            raise ValueError(f"sizes must be ({batch}, 2), got {tuple(sizes.shape)}")
        if sizes.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"sizes must be int32 or int64, got {sizes.dtype}")


def _product_dtype(images: Tensor, weight: Tensor) -> torch.dtype:
    """Dtype that pixels and weight are multiplied in: autocast's, if it is on.

    A registered operator is opaque to autocast. Convolutions are on its list for 16 bits; float64
    stays what it is.
    """
    kind = images.device.type
    wide = torch.float64 in (images.dtype, weight.dtype)
    if torch.is_autocast_enabled(kind) and not wide:
        if images.dtype in (torch.uint8, *FLOATS):
            return torch.get_autocast_dtype(kind)
    elif images.dtype in (torch.uint8, weight.dtype):
        return weight.dtype
    raise TypeError(f"images must be uint8 or {weight.dtype} as weight is, got {images.dtype}")


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos_embed: Tensor,
    tokens: Tensor,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    sizes: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Tokens of images, of whole patches or not, with position embeddings.

    Args:
        images: (B, C, H, W) of weight's dtype, or uint8, which is divided by 255; any strides.
        weight, bias: (D, C, P, P) and (D,) of the projection.
        pos_embed: (1, E + N, D) for the N = ceil(H / P) ceil(W / P) patches in row-major order.
        tokens: (1, E, D) extra tokens, which come first.
        mean, std: of C channels: images become (images - mean) / std. None is 0 and 1.
        sizes: (B, 2) int32 or int64, height and width of each image: beyond them its pixels count
            as zeros after the normalisation. None takes all pixels.
        backend: see `segmenter_fast.backend`; "native" is the plain PyTorch of "reference".

    Returns:
        (B, E + N, D), dtype of weight, or of pos_embed and tokens where those are wider, as they
        are under autocast. Differentiable in images, weight, bias, pos_embed and tokens, once with
        Triton.

    Raises:
        ValueError: shapes that do not fit together.
        TypeError: dtypes that do not.
        BackendError: the backend named cannot run here.

    Source: Strudel et al. 2021, section 3.1; official segm/model/vit.py, PatchEmbedding, and
    segm/model/utils.py, padding.
    """
    _check(images, weight, bias, pos_embed, tokens)
    _check_options(images, mean, std, sizes)
    dtype = _product_dtype(images, weight)
    if resolve_backend(backend, images.device) == "triton":
        parameters = (weight.to(dtype), bias, pos_embed, tokens)
        return torch.ops.segmenter_fast.patch_embed_triton(images, *parameters, mean, std, sizes)
    return patch_embed_reference(images, weight, bias, pos_embed, tokens, mean, std, sizes)
