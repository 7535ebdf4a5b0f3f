"""One table of the published models, and how a config becomes a module."""

import difflib
from pathlib import Path
from typing import NamedTuple

import torch

from segmenter_fast.config import MLP_RATIO, NORMALIZATION, SegmenterConfig
from segmenter_fast.decoder import DecoderLinear, MaskTransformer
from segmenter_fast.encoder import VisionTransformer
from segmenter_fast.model import SegmenterModel

IMAGENET_CLASSES = 1000  # the classification head that official checkpoints carry along


class Backbone(NamedTuple):
    """Depth, width and heads of an encoder (Strudel et al. 2021, table 1)."""

    n_layers: int
    d_model: int
    n_heads: int
    timm_name: str | None  # the patch size goes into {}


_VIT = {
    # Not in the paper: small enough to train and try on a laptop.
    "N": Backbone(6, 128, 2, None),
    "T": Backbone(12, 192, 3, "vit_tiny_patch{}_384"),
    "S": Backbone(12, 384, 6, "vit_small_patch{}_384"),
    "B": Backbone(12, 768, 12, "vit_base_patch{}_384"),
    "L": Backbone(24, 1024, 16, "vit_large_patch{}_384"),
}
_DEIT = {
    "T-DeiT": Backbone(12, 192, 3, "deit_tiny_distilled_patch{}_224"),
    "S-DeiT": Backbone(12, 384, 6, "deit_small_distilled_patch{}_224"),
    "B-DeiT": Backbone(12, 768, 12, "deit_base_distilled_patch{}_384"),
}
PATCH_SIZES = (8, 16, 32)


class Variant(NamedTuple):
    """A row of the table: which encoder, which patch, which decoder."""

    backbone: Backbone
    patch_size: int
    decoder: str
    distilled: bool


def _table() -> dict[str, Variant]:
    table = {}
    for distilled, family in ((False, _VIT), (True, _DEIT)):
        for size, backbone in family.items():
            # DeiT was published with patches of 16 pixels alone.
            for patch in (16,) if distilled else PATCH_SIZES:
                table[f"Seg-{size}/{patch}"] = Variant(backbone, patch, "linear", distilled)
                table[f"Seg-{size}-Mask/{patch}"] = Variant(
                    backbone, patch, "mask_transformer", distilled
                )
    return table


VARIANTS = _table()


def list_variants() -> list[str]:
    """Names that `create_model` takes."""
    return list(VARIANTS)


def create_config(
    variant: str, num_classes: int = 150, image_size: int | tuple[int, int] = 512, **changes
) -> SegmenterConfig:
    """The config of a published variant; `changes` are any other `SegmenterConfig` fields."""
    if variant not in VARIANTS:
        close = difflib.get_close_matches(variant, VARIANTS, n=3, cutoff=0.4)
        raise ValueError(
            f"unknown variant {variant!r}; did you mean {' or '.join(close) or 'one of these'}? "
            f"Known: {', '.join(VARIANTS)}"
        )
    backbone, patch_size, decoder, distilled = VARIANTS[variant]
    mean, std = NORMALIZATION["deit" if distilled else "vit"]
    side = image_size if isinstance(image_size, int) else min(image_size)
    fields = {
        "variant": variant,
        "backbone": backbone.timm_name and backbone.timm_name.format(patch_size),
        "n_cls": num_classes,
        "image_size": image_size,
        "patch_size": patch_size,
        "d_model": backbone.d_model,
        "n_layers": backbone.n_layers,
        "n_heads": backbone.n_heads,
        "distilled": distilled,
        "decoder": decoder,
        "mean": mean,
        "std": std,
        "window_size": side,
        "window_stride": side,
    }
    return SegmenterConfig(**(fields | changes))


@torch.inference_mode(False)  # parameters made in it count no changes and can never be trained
def create_model_from_config(config: SegmenterConfig, backend: str = "auto") -> SegmenterModel:
    """A freshly initialised model, in training mode.

    Source: official segm/model/factory.py, create_segmenter.
    """
    encoder = VisionTransformer(
        image_size=config.image_size,
        patch_size=config.patch_size,
        n_layers=config.n_layers,
        d_model=config.d_model,
        d_ff=MLP_RATIO * config.d_model,
        n_heads=config.n_heads,
        n_cls=IMAGENET_CLASSES,
        dropout=config.dropout,
        drop_path_rate=config.drop_path_rate,
        distilled=config.distilled,
        norm_eps=config.norm_eps,
    )
    if config.decoder == "linear":
        decoder = DecoderLinear(config.n_cls, config.patch_size, config.d_model)
    else:
        decoder = MaskTransformer(
            n_cls=config.n_cls,
            patch_size=config.patch_size,
            d_encoder=config.d_model,
            n_layers=config.decoder_n_layers,
            n_heads=config.decoder_n_heads,
            d_model=config.d_model,
            d_ff=MLP_RATIO * config.d_model,
            drop_path_rate=config.decoder_drop_path_rate,
            dropout=config.decoder_dropout,
        )
    return SegmenterModel(encoder, decoder, config.n_cls, config=config, backend=backend)


@torch.inference_mode(False)
def create_model(
    variant: str,
    num_classes: int = 150,
    image_size: int | tuple[int, int] = 512,
    backend: str = "auto",
    pretrained: str | Path | None = None,
    **changes,
) -> SegmenterModel:
    """A model by its name in the paper, freshly initialised or started from other weights.

    Args:
        variant: such as "Seg-B-Mask/16"; `list_variants()` has all.
        num_classes: K.
        image_size: pixels of the training crop, one int or (H, W), multiples of the patch size.
        backend: "auto", "reference", "native" or "triton".
        pretrained: weights to start from, see `load_pretrained`; the normalisation is theirs where
            they tell it.
        **changes: other `SegmenterConfig` fields, such as `class_names` or `drop_path_rate=0.0`.

    Returns:
        A `SegmenterModel` with the official initialisation of what is not in `pretrained`, in
        training mode.

    Raises:
        ValueError: unknown variant or an impossible field.
        FileNotFoundError, CheckpointError: see `load_pretrained`.
    """
    if pretrained is None:
        config = create_config(variant, num_classes, image_size, **changes)
        return create_model_from_config(config, backend)
    from segmenter_fast.foreign import read_weights
    from segmenter_fast.pretrained import fill

    weights = read_weights(pretrained)
    if weights.mean:
        changes = {"mean": weights.mean, "std": weights.std} | changes
    config = create_config(variant, num_classes, image_size, **changes)
    model = create_model_from_config(config, backend)
    fill(model, weights)
    return model
