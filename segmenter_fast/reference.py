"""Segmenter in plain functions: the specification.

Read it beside the paper (Strudel et al., ICCV 2021). Every function takes the parameters as the
official `state_dict` names them and computes what evaluation mode computes, at full resolution and
without a thought for speed. The modules, the kernels and the checkpoints are held to it.

Shapes: B images, N = h * w patches, D channels, K classes, E extra tokens (class; distillation).
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from segmenter_fast.config import SegmenterConfig

State = Mapping[str, Tensor]


def linear(x: Tensor, p: State, name: str) -> Tensor:
    """The affine map x W^T + b."""
    return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])


def layer_norm(x: Tensor, p: State, name: str, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(var + eps), scaled and shifted, over the last dimension."""
    weight, bias = p[f"{name}.weight"], p[f"{name}.bias"]
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def attention(x: Tensor, p: State, name: str, heads: int) -> tuple[Tensor, Tensor]:
    """softmax(Q K^T / sqrt(d)) V, and the softmax itself (B, heads, N, N)."""
    batch, tokens, dim = x.shape
    qkv = linear(x, p, f"{name}.qkv").reshape(batch, tokens, 3, heads, dim // heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) * (dim // heads) ** -0.5).softmax(-1)
    out = (weights @ v).transpose(1, 2).reshape(batch, tokens, dim)
    return linear(out, p, f"{name}.proj"), weights


def block(x: Tensor, p: State, name: str, heads: int, eps: float = 1e-5) -> Tensor:
    """Equations 1 and 2: a = MSA(LN(x)) + x, then MLP(LN(a)) + a."""
    x = x + attention(layer_norm(x, p, f"{name}.norm1", eps), p, f"{name}.attn", heads)[0]
    hidden = F.gelu(linear(layer_norm(x, p, f"{name}.norm2", eps), p, f"{name}.mlp.fc1"))
    return x + linear(hidden, p, f"{name}.mlp.fc2")


def embed(images: Tensor, p: State, config: SegmenterConfig) -> Tensor:
    """Section 3.1: patches projected, extra tokens before them, position embeddings added."""
    batch, _, height, width = images.shape
    P = config.patch_size
    w, b = p["encoder.patch_embed.proj.weight"], p["encoder.patch_embed.proj.bias"]
    patches = images.reshape(batch, 3, height // P, P, width // P, P).permute(0, 2, 4, 1, 3, 5)
    x = patches.reshape(batch, -1, 3 * P * P) @ w.flatten(1).T + b

    names = ["encoder.cls_token"] + ["encoder.dist_token"] * config.distilled
    x = torch.cat([p[name].expand(batch, -1, -1) for name in names] + [x], dim=1)

    position = p["encoder.pos_embed"]
    if position.shape[1] != x.shape[1]:  # the official test: the count, not the shape of the grid
        extra, grid = position[:, : len(names)], position[:, len(names) :]
        grid = grid.unflatten(1, config.grid_size).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(height // P, width // P), mode="bilinear")
        position = torch.cat((extra, grid.flatten(2).transpose(1, 2)), dim=1)
    return x + position


def encoder(images: Tensor, p: State, config: SegmenterConfig) -> Tensor:
    """Section 3.1: (B, 3, H, W) to patch tokens (B, N, D)."""
    x = embed(images, p, config)
    for i in range(config.n_layers):
        x = block(x, p, f"encoder.blocks.{i}", config.n_heads, config.norm_eps)
    return layer_norm(x, p, "encoder.norm", config.norm_eps)[:, 1 + config.distilled :]


def decoder_tokens(x: Tensor, p: State) -> Tensor:
    """Section 3.2: projected patch tokens, then the K class embeddings."""
    classes = p["decoder.cls_emb"].expand(x.shape[0], -1, -1)
    return torch.cat((linear(x, p, "decoder.proj_dec"), classes), dim=1)


def mask_transformer(x: Tensor, p: State, config: SegmenterConfig) -> Tensor:
    """Section 3.2: masks are scalar products of L2-normalised patch and class vectors, (B, N, K).

    The layer norm over classes comes here, before upsampling and softmax, as in the official code;
    the paper's text puts it after them.
    """
    x = decoder_tokens(x, p)
    for i in range(config.decoder_n_layers):
        x = block(x, p, f"decoder.blocks.{i}", config.decoder_n_heads)
    x = layer_norm(x, p, "decoder.decoder_norm")
    patches = F.normalize(x[:, : -config.n_cls] @ p["decoder.proj_patch"], dim=-1, eps=0)
    classes = F.normalize(x[:, -config.n_cls :] @ p["decoder.proj_classes"], dim=-1, eps=0)
    return layer_norm(patches @ classes.transpose(1, 2), p, "decoder.mask_norm")


def pad(images: Tensor, patch_size: int) -> Tensor:
    """Zeros at the right and bottom; the images are normalised already."""
    height, width = images.shape[2:]
    return F.pad(images, (0, -width % patch_size, 0, -height % patch_size))


def patch_logits(images: Tensor, p: State, config: SegmenterConfig) -> Tensor:
    """Class scores of every patch of the padded images, (B, K, h, w)."""
    images = pad(images, config.patch_size)
    x = encoder(images, p, config)
    if config.decoder == "linear":
        masks = linear(x, p, "decoder.head")
    else:
        masks = mask_transformer(x, p, config)
    rows = images.shape[2] // config.patch_size
    return masks.unflatten(1, (rows, -1)).permute(0, 3, 1, 2)


def logits(images: Tensor, p: State, config: SegmenterConfig) -> Tensor:
    """Class scores of every pixel, (B, K, H, W): bilinear upsampling, padding cut off."""
    height, width = images.shape[2:]
    size = pad(images, config.patch_size).shape[2:]
    # Contiguous, because PyTorch's bilinear kernel is several times slower on class-last memory.
    coarse = patch_logits(images, p, config).contiguous()
    return F.interpolate(coarse, size=size, mode="bilinear")[:, :, :height, :width]


def labels(images: Tensor, p: State, config: SegmenterConfig) -> Tensor:
    """(B, H, W) int64: the class of the largest probability."""
    return logits(images, p, config).softmax(1).argmax(1)


def loss(images: Tensor, target: Tensor, p: State, config: SegmenterConfig) -> Tensor:
    """Mean cross-entropy over the pixels whose target is not 255."""
    return F.cross_entropy(logits(images, p, config), target.long(), ignore_index=255)


def encoder_attention(images: Tensor, p: State, config: SegmenterConfig, layer: int) -> Tensor:
    """(B, heads, E + N, E + N) softmax of an encoder block."""
    x = embed(images, p, config)
    for i in range(layer):
        x = block(x, p, f"encoder.blocks.{i}", config.n_heads, config.norm_eps)
    name = f"encoder.blocks.{layer}"
    return attention(
        layer_norm(x, p, f"{name}.norm1", config.norm_eps), p, f"{name}.attn", config.n_heads
    )[1]


def decoder_attention(images: Tensor, p: State, config: SegmenterConfig, layer: int) -> Tensor:
    """(B, heads, N + K, N + K) softmax of a mask transformer block."""
    x, heads = decoder_tokens(encoder(images, p, config), p), config.decoder_n_heads
    for i in range(layer):
        x = block(x, p, f"decoder.blocks.{i}", heads)
    name = f"decoder.blocks.{layer}"
    return attention(layer_norm(x, p, f"{name}.norm1"), p, f"{name}.attn", heads)[1]
