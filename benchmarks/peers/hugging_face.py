"""UPerNet-Swin and SegFormer from transformers, with random weights: nothing is downloaded.

Source: Liu et al., ICCV 2021 (Swin), section 3.3; Xiao et al., ECCV 2018 (UPerNet); Xie et al.,
NeurIPS 2021 (SegFormer), table 6.
"""

import os
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from peers import need

SWIN = {
    "Swin-T": {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]},
    "Swin-S": {"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24]},
    "Swin-B": {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]},
    "Swin-L": {
        "embed_dim": 192,
        "depths": [2, 2, 18, 2],
        "num_heads": [6, 12, 24, 48],
        "window_size": 12,
    },
}

_WIDE = {"hidden_sizes": [64, 128, 320, 512]}
SEGFORMER = {
    "B0": {
        "hidden_sizes": [32, 64, 160, 256],
        "depths": [2, 2, 2, 2],
        "decoder_hidden_size": 256,
    },
    "B1": _WIDE | {"depths": [2, 2, 2, 2], "decoder_hidden_size": 256},
    "B2": _WIDE | {"depths": [3, 4, 6, 3], "decoder_hidden_size": 768},
    "B3": _WIDE | {"depths": [3, 4, 18, 3], "decoder_hidden_size": 768},
    "B4": _WIDE | {"depths": [3, 8, 27, 3], "decoder_hidden_size": 768},
    "B5": _WIDE | {"depths": [3, 6, 40, 3], "decoder_hidden_size": 768},
}


def _transformers() -> ModuleType:
    # Weights come from configs; a look at the hub would only wait for a network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return need("transformers")


class UPerNetSwin(nn.Module):
    """UPerNet on a Swin transformer.

    transformers would upsample the logits to every pixel; they are taken before.

    Args:
        n_cls: number of classes K.
        variant: of SWIN.
        auxiliary: whether to have the head that training adds and inference leaves out.
        **options: of SwinConfig and, beginning with "head_", of UperNetConfig, to change sizes.

    Raises:
        NotRun: transformers is absent; says what to install.
    """

    def __init__(
        self, n_cls: int, variant: str = "Swin-T", auxiliary: bool = False, **options: Any
    ):
        super().__init__()
        transformers = _transformers()
        head = {k.removeprefix("head_"): v for k, v in options.items() if k.startswith("head_")}
        swin = {k: v for k, v in options.items() if not k.startswith("head_")}
        backbone = transformers.SwinConfig(
            **{"window_size": 7} | SWIN[variant] | swin,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        )
        config = transformers.UperNetConfig(
            backbone_config=backbone,
            num_labels=n_cls,
            use_auxiliary_head=auxiliary,
            auxiliary_in_channels=4 * backbone.embed_dim,
            **{"hidden_size": 512} | head,
        )
        self.model = transformers.UperNetForSemanticSegmentation(config)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to logits (B, K, H / 4, W / 4)."""
        return self.model.decode_head(self.model.backbone(images).feature_maps)


class SegFormer(nn.Module):
    """SegFormer: a hierarchical transformer and a decoder of linear layers.

    Args:
        n_cls: number of classes K.
        variant: of SEGFORMER.
        **options: of SegformerConfig, to change sizes.

    Raises:
        NotRun: transformers is absent; says what to install.
    """

    def __init__(self, n_cls: int, variant: str = "B0", **options: Any):
        super().__init__()
        transformers = _transformers()
        config = transformers.SegformerConfig(num_labels=n_cls, **SEGFORMER[variant] | options)
        self.model = transformers.SegformerForSemanticSegmentation(config)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to logits (B, K, H / 4, W / 4)."""
        return self.model(images).logits
