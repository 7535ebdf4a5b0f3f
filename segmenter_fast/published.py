"""Published accuracy of Segmenter and its peers, each figure with its source.

Speeds that others publish are not here: hardware, batch and protocol differ from table to table.
"""

from typing import NamedTuple

OFFICIAL = "official README"
PAPER = "Strudel et al. 2021"


class Published(NamedTuple):
    """A published mIoU in percent.

    Args:
        model: variant, or the name of another architecture.
        dataset: it was measured on (validation split).
        miou: at one scale; None where only several were published.
        miou_multiscale: with several scales and flips.
        source: who published it.
    """

    model: str
    dataset: str
    miou: float | None
    miou_multiscale: float | None
    source: str


PUBLISHED = (
    Published("Seg-T-Mask/16", "ade20k", 38.1, 38.8, OFFICIAL),
    Published("Seg-S-Mask/16", "ade20k", 45.3, 46.9, OFFICIAL),
    Published("Seg-B-Mask/16", "ade20k", 48.5, 50.0, OFFICIAL),
    Published("Seg-L-Mask/16", "ade20k", 51.8, 53.6, OFFICIAL),
    Published("Seg-B/8", "ade20k", 49.5, 50.5, OFFICIAL),
    Published("Seg-B-DeiT/16", "ade20k", 47.1, 48.1, OFFICIAL),
    Published("Seg-B-DeiT-Mask/16", "ade20k", 48.7, 50.1, OFFICIAL),
    Published("Seg-S/16", "ade20k", 45.37, None, PAPER),
    Published("Seg-B/32", "ade20k", 43.07, None, PAPER),
    Published("Seg-B/16", "ade20k", 48.06, None, PAPER),
    Published("Seg-L/16", "ade20k", 50.71, None, PAPER),
    Published("Seg-L-Mask/16", "pascal_context", 58.1, 59.0, OFFICIAL),
    Published("Seg-L-Mask/16", "cityscapes", 79.1, 81.3, OFFICIAL),
)


def published(model: str, dataset: str = "ade20k") -> Published | None:
    """What is published of a model on a data set; None if nothing is known here."""
    found = (row for row in PUBLISHED if (row.model, row.dataset) == (model, dataset))
    return next(found, None)
