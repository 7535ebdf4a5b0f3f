"""The two decoders with the official names (segm/model/decoder.py): tokens to (B, K, h, w)."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from segmenter_fast.blocks import (
    Block,
    LayerNorm,
    attention_map,
    init_weights,
    layer_inputs,
    make_blocks,
)
from segmenter_fast.ops.mask_product import mask_product


def to_grid(x: Tensor, im_size: tuple[int, int], patch_size: int) -> Tensor:
    """(B, h * w, K) to a (B, K, h, w) view; the memory stays class-last."""
    rows = im_size[0] // patch_size
    return x.unflatten(1, (rows, -1)).permute(0, 3, 1, 2)


class DecoderLinear(nn.Module):
    """One linear layer per patch token: "Seg-B/16".

    Source: Strudel et al. 2021, section 3.2 (Linear); official segm/model/decoder.py.
    """

    def __init__(self, n_cls: int, patch_size: int, d_encoder: int):
        super().__init__()
        self.n_cls = n_cls
        self.patch_size = patch_size
        self.d_encoder = d_encoder
        self.head = nn.Linear(d_encoder, n_cls)
        self.apply(init_weights)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """No parameter is exempt."""
        return set()

    def forward(self, x: Tensor, im_size: tuple[int, int]) -> Tensor:
        """(B, N, D) patch tokens of an image of `im_size` pixels to (B, K, h, w)."""
        return to_grid(self.head(x), im_size, self.patch_size)


class MaskTransformer(nn.Module):
    """K learned class embeddings join the patch tokens; masks are their scalar products.

    `backend` is set by the model.

    Source: Strudel et al. 2021, section 3.2 (Mask Transformer); official segm/model/decoder.py.
    """

    def __init__(
        self,
        n_cls: int,
        patch_size: int,
        d_encoder: int,
        n_layers: int,
        n_heads: int,
        d_model: int,
        d_ff: int,
        drop_path_rate: float,
        dropout: float,
    ):
        super().__init__()
        self.n_cls = n_cls
        self.patch_size = patch_size
        self.d_encoder = d_encoder
        self.n_layers = n_layers
        self.d_model = d_model
        self.d_ff = d_ff
        self.scale = d_model**-0.5
        self.backend = "auto"

        self.blocks = make_blocks(n_layers, d_model, n_heads, d_ff, dropout, drop_path_rate)
        self.cls_emb = nn.Parameter(torch.randn(1, n_cls, d_model))
        self.proj_dec = nn.Linear(d_encoder, d_model)
        self.proj_patch = nn.Parameter(self.scale * torch.randn(d_model, d_model))
        self.proj_classes = nn.Parameter(self.scale * torch.randn(d_model, d_model))
        self.decoder_norm = LayerNorm(d_model)
        self.mask_norm = nn.LayerNorm(n_cls)
        self.apply(init_weights)
        nn.init.trunc_normal_(self.cls_emb, std=0.02)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should leave alone."""
        return {"cls_emb"}

    def _tokens(self, x: Tensor) -> Tensor:
        """Projected patch tokens followed by the class embeddings, (B, N + K, D)."""
        return torch.cat((self.proj_dec(x), self.cls_emb.expand(x.shape[0], -1, -1)), dim=1)

    def embeddings(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, D) patch tokens to the patch and class vectors, (B, N, D) and (B, K, D).

        Masks are the scalar products of these vectors, each divided by its length.
        """
        x = self._tokens(x)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_norm(x)
        return x[:, : -self.n_cls] @ self.proj_patch, x[:, -self.n_cls :] @ self.proj_classes

    def forward(self, x: Tensor, im_size: tuple[int, int]) -> Tensor:
        """(B, N, D) patch tokens of an image of `im_size` pixels to (B, K, h, w)."""
        patches, classes = self.embeddings(x)
        norm = self.mask_norm
        masks = mask_product(patches, classes, norm.weight, norm.bias, norm.eps, self.backend)
        return to_grid(masks, im_size, self.patch_size)

    def layer_inputs(self, x: Tensor) -> Iterator[tuple[Block, Tensor]]:
        """Each block with the (B, N + K, D) tokens that enter it; the class tokens come last."""
        return layer_inputs(self.blocks, self._tokens(x))

    def get_attention_map(self, x: Tensor, layer_id: int) -> Tensor:
        """(B, heads, N + K, N + K) attention of one block; the class tokens come last."""
        return attention_map(self.blocks, self._tokens(x), layer_id)
