"""Published accuracy of Segmenter and its peers, each figure with its source.

Recipes differ from source to source, MMSegmentation's own Segmenters too: points of two sources are
for orientation, and no ranking of architectures.

Speeds that others publish are not here: hardware, batch and protocol differ from table to table.
"""

from typing import NamedTuple

OFFICIAL = "official README"
PAPER = "Strudel et al. 2021"
MMSEG = "MMSegmentation"
"""Its own trainings at 512 x 512 for 160,000 iterations; tables in configs/*/README.md there."""


class Published(NamedTuple):
    """A published mIoU in percent.

    Args:
        model: variant, or the name of another architecture.
        dataset: it was measured on (validation split).
        miou: at one scale; None where only several were published.
        miou_multiscale: with several scales and flips.
        source: who published it.
        size: side of the crops and windows in pixels.
    """

    model: str
    dataset: str
    miou: float | None
    miou_multiscale: float | None
    source: str
    size: int = 512


PUBLISHED = (
    Published("Seg-T-Mask/16", "ade20k", 38.1, 38.8, OFFICIAL),
    Published("Seg-S-Mask/16", "ade20k", 45.3, 46.9, OFFICIAL),
    Published("Seg-B-Mask/16", "ade20k", 48.5, 50.0, OFFICIAL),
    Published("Seg-L-Mask/16", "ade20k", 51.8, 53.6, OFFICIAL, 640),
    Published("Seg-B/8", "ade20k", 49.5, 50.5, OFFICIAL),
    Published("Seg-B-DeiT/16", "ade20k", 47.1, 48.1, OFFICIAL),
    Published("Seg-B-DeiT-Mask/16", "ade20k", 48.7, 50.1, OFFICIAL),
    Published("Seg-S/16", "ade20k", 45.37, None, PAPER),
    Published("Seg-B/32", "ade20k", 43.07, None, PAPER),
    Published("Seg-B/16", "ade20k", 48.06, None, PAPER),
    Published("Seg-L/16", "ade20k", 50.71, None, PAPER),
    Published("Seg-L-Mask/16", "ade20k", 51.30, None, PAPER),
    # Other architectures, by the names that benchmarks/bench_peers.py has for them.
    Published("DeepLabv3+ ResNet-101, stride 8", "ade20k", 45.47, 46.35, MMSEG),
    Published("SETR-PUP ViT-L", "ade20k", 48.24, 49.99, MMSEG),
    Published("UPerNet Swin-T", "ade20k", 44.41, None, MMSEG),
    Published("UPerNet Swin-S", "ade20k", 47.72, None, MMSEG),
    Published("UPerNet Swin-B", "ade20k", 50.31, None, f"{MMSEG}, pretrained on ImageNet-22k"),
    Published("SegFormer B0", "ade20k", 37.41, 38.34, MMSEG),
    Published("SegFormer B1", "ade20k", 40.97, 42.54, MMSEG),
    Published("SegFormer B2", "ade20k", 45.58, 47.03, MMSEG),
    Published("SegFormer B3", "ade20k", 47.82, 48.81, MMSEG),
    Published("SegFormer B4", "ade20k", 48.46, 49.76, MMSEG),
    Published("SegFormer B5", "ade20k", 49.13, 50.22, MMSEG),
    Published("Seg-L-Mask/16", "pascal_context", 58.1, 59.0, OFFICIAL, 480),
    Published("Seg-L-Mask/16", "cityscapes", 79.1, 81.3, OFFICIAL, 768),
)


def published(model: str, dataset: str = "ade20k", size: int = 512) -> Published | None:
    """What is published of a model on a data set at a size; None if nothing is known here."""
    found = (
        row for row in PUBLISHED if (row.model, row.dataset, row.size) == (model, dataset, size)
    )
    return next(found, None)
