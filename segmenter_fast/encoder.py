"""The ViT / DeiT encoder with the official names (segm/model/vit.py)."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segmenter_fast.blocks import (
    Block,
    LayerNorm,
    attention_map,
    init_weights,
    layer_inputs,
    make_blocks,
)
from segmenter_fast.ops.patch_embed import patch_embed


def resize_pos_embed(
    pos_embed: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], num_extra_tokens: int
) -> Tensor:
    """Resample the grid part of the position embeddings; the extra tokens' stay as they are.

    Args:
        pos_embed: (1, extra + h * w, D).
        old_grid, new_grid: (rows, columns) of patches.
        num_extra_tokens: 1 for ViT (class token), 2 for distilled DeiT.

    Returns:
        (1, extra + rows * columns, D), bilinear with half-pixel centres.

    Source: official segm/model/utils.py, resize_pos_embed.
    """
    extra, grid = pos_embed[:, :num_extra_tokens], pos_embed[:, num_extra_tokens:]
    rows, columns = old_grid
    if grid.shape[1] != rows * columns:
        raise ValueError(
            f"pos_embed holds {grid.shape[1]} grid positions, expected {rows} x {columns}"
        )
    grid = grid.reshape(1, rows, columns, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=new_grid, mode="bilinear")
    grid = grid.permute(0, 2, 3, 1).reshape(1, new_grid[0] * new_grid[1], -1)
    return torch.cat((extra, grid), dim=1)


class PatchEmbedding(nn.Module):
    """Non-overlapping patches, linearly projected: a convolution whose stride is its kernel.

    The encoder reads its parameters, and makes all tokens at once.
    """

    def __init__(self, image_size: tuple[int, int], patch_size: int, embed_dim: int, channels: int):
        super().__init__()
        if image_size[0] % patch_size or image_size[1] % patch_size:
            raise ValueError(
                f"image_size {tuple(image_size)} must be divisible by patch_size {patch_size}"
            )
        self.image_size = tuple(image_size)
        self.patch_size = patch_size
        self.grid_size = (image_size[0] // patch_size, image_size[1] // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(channels, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, im: Tensor) -> Tensor:
        """(B, C, H, W) to (B, N, D), patches in row-major order."""
        return self.proj(im).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """ViT, or distilled DeiT, whose patch tokens are the features.

    Args:
        image_size: (H, W) in pixels of the training crop, multiples of `patch_size`.
        patch_size: side of a patch in pixels.
        n_layers, d_model, d_ff, n_heads: depth, token width, hidden width, heads.
        n_cls: outputs of the classification head that pretrained weights carry.
        dropout, drop_path_rate: regularisation of the blocks.
        distilled: a second extra token and head (DeiT).
        norm_eps: of the layer norms.
        channels: of the input image.

    Source: Strudel et al. 2021, section 3.1; official segm/model/vit.py, VisionTransformer.
    """

    fills_patches = True
    """Takes images of any size: the last patches are filled up with zeros as they are read."""

    normalization: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    """Mean and std of the images that its weights are used to, where that is known."""

    def __init__(
        self,
        image_size: tuple[int, int],
        patch_size: int,
        n_layers: int,
        d_model: int,
        d_ff: int,
        n_heads: int,
        n_cls: int,
        dropout: float = 0.1,
        drop_path_rate: float = 0.0,
        distilled: bool = False,
        channels: int = 3,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        self.patch_embed = PatchEmbedding(image_size, patch_size, d_model, channels)
        self.patch_size = patch_size
        self.n_layers = n_layers
        self.d_model = d_model
        self.d_ff = d_ff
        self.n_heads = n_heads
        self.n_cls = n_cls
        self.distilled = bool(distilled)
        self.dropout = nn.Dropout(dropout)
        self.backend = "auto"

        num_tokens = self.num_extra_tokens + self.patch_embed.num_patches
        self.cls_token = nn.Parameter(torch.zeros(1, 1, d_model))
        if self.distilled:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, d_model))
            self.head_dist = nn.Linear(d_model, n_cls)
        self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, d_model))
        self.blocks = make_blocks(
            n_layers, d_model, n_heads, d_ff, dropout, drop_path_rate, norm_eps
        )
        self.norm = LayerNorm(d_model, norm_eps)
        self.head = nn.Linear(d_model, n_cls)

        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        if self.distilled:
            nn.init.trunc_normal_(self.dist_token, std=0.02)
        self.apply(init_weights)

    @property
    def num_extra_tokens(self) -> int:
        """Tokens before the patches: class, and distillation for DeiT."""
        return 1 + self.distilled

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should leave alone."""
        return {"pos_embed", "cls_token", "dist_token"}

    def _tokens(self, im: Tensor) -> Tensor:
        """Patch and extra tokens with their position embeddings, (B, extra + N, D)."""
        height, width = im.shape[2:]
        grid = (-(-height // self.patch_size), -(-width // self.patch_size))
        tokens = self.cls_token
        if self.distilled:
            tokens = torch.cat((tokens, self.dist_token), dim=1)
        pos_embed = self.pos_embed
        # The official code compares the number of tokens, not the shape of the grid: a 4 x 16 grid
        # takes the embeddings of an 8 x 8 grid unresampled. The released numbers depend on it.
        if self.num_extra_tokens + grid[0] * grid[1] != pos_embed.shape[1]:
            pos_embed = resize_pos_embed(
                pos_embed, self.patch_embed.grid_size, grid, self.num_extra_tokens
            )
        proj = self.patch_embed.proj
        x = patch_embed(im, proj.weight, proj.bias, pos_embed, tokens, backend=self.backend)
        return self.dropout(x)

    def forward(self, im: Tensor, return_features: bool = False) -> Tensor:
        """(B, C, H, W) of any size to (B, extra + N, D), or to class logits (B, n_cls)."""
        x = self._tokens(im)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if return_features:
            return x
        if self.distilled:
            return (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2
        return self.head(x[:, 0])

    def layer_inputs(self, im: Tensor) -> Iterator[tuple[Block, Tensor]]:
        """Each block with the (B, extra + N, D) tokens that enter it."""
        return layer_inputs(self.blocks, self._tokens(im))

    def get_attention_map(self, im: Tensor, layer_id: int) -> Tensor:
        """(B, heads, extra + N, extra + N) attention of one block."""
        return attention_map(self.blocks, self._tokens(im), layer_id)
