"""SETR-PUP: a vision transformer whose patches are upsampled by convolutions, in plain PyTorch.

The transformer is the one that Segmenter has, so SETR's own part is the decoder. Attention is
PyTorch's fused one, as in a best form.

Source: Zheng et al., CVPR 2021 (SETR), sections 3.2 and 3.3; Dosovitskiy et al., ICLR 2021 (ViT),
table 1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VIT = {
    "ViT-B": {"d_model": 768, "n_layers": 12, "n_heads": 12},
    "ViT-L": {"d_model": 1024, "n_layers": 24, "n_heads": 16},
}


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.proj(attended)
        return x + self.mlp(self.norm2(x))


class SETRPUP(nn.Module):
    """Progressive upsampling: four times a 3 x 3 convolution and twice the side.

    There is no class token: nothing in SETR reads it.

    Args:
        n_cls: number of classes K.
        image_size: side in pixels, a multiple of the patch.
        patch_size: in pixels; 16 makes the logits those of every pixel.
        d_model, n_layers, n_heads: of the transformer, see VIT.
        channels: of the decoder.
    """

    def __init__(
        self,
        n_cls: int,
        image_size: int = 512,
        patch_size: int = 16,
        d_model: int = 1024,
        n_layers: int = 24,
        n_heads: int = 16,
        channels: int = 256,
    ):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, d_model, patch_size, patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, (image_size // patch_size) ** 2, d_model))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks = nn.ModuleList(Block(d_model, n_heads) for _ in range(n_layers))
        self.norm = nn.LayerNorm(d_model, eps=1e-6)
        self.decoder = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(d_model if i == 0 else channels, channels, 3, padding=1),
                nn.BatchNorm2d(channels),
                nn.ReLU(inplace=True),
            )
            for i in range(4)
        )
        self.classifier = nn.Conv2d(channels, n_cls, 1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to logits (B, K, H / 2, W / 2); the last doubling is the reader's.

        A 1 x 1 convolution and bilinear upsampling commute, so that the classifier comes first.
        """
        x = self.patch_embed(images)
        grid = x.shape[2:]
        x = x.flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        x = self.norm(x).transpose(1, 2).unflatten(2, grid)
        for i, layer in enumerate(self.decoder):
            x = layer(F.interpolate(x, scale_factor=2, mode="bilinear") if i else x)
        return self.classifier(x)
