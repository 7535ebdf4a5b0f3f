"""Label maps in the form that the evaluation servers of ADE20K and Cityscapes take."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from segmenter_fast.data.cityscapes import PICTURE, TRAIN_IDS
from segmenter_fast.files import replacing


class Server(NamedTuple):
    """What a server wants to be sent: 8-bit PNG files of the pictures' own sizes.

    Args:
        values: (K,) uint8, what stands in the file for each class number.
        name: of the file, from that of the picture.
    """

    values: np.ndarray
    name: Callable[[Path], str]


SERVERS = {
    # Classes count from 1, and the name is the picture's (CSAILVision/placeschallenge,
    # sceneparsing/README.md).
    "ade20k": Server(np.arange(1, 151, dtype=np.uint8), lambda picture: f"{picture.stem}.png"),
    # Label ids, not train ids, and a name that begins with the picture's city, sequence and frame
    # (cityscapesscripts/evaluation/evalPixelLevelSemanticLabeling.py).
    "cityscapes": Server(
        np.array(sorted(TRAIN_IDS, key=TRAIN_IDS.get), dtype=np.uint8),
        lambda picture: f"{picture.stem.removesuffix(PICTURE)}_labelIds.png",
    ),
}


def write_submission(folder: Path, dataset: str, picture: Path, labels: Tensor) -> Path:
    """Write the file for one picture, replacing one that is there.

    Args:
        folder: where to; the server wants all files in one archive.
        dataset: "ade20k" or "cityscapes".
        picture: the file that was labelled.
        labels: (H, W) integer class numbers.

    Returns:
        The file.

    Raises:
        ValueError: no server is known for this dataset.  OSError: it cannot be written.
    """
    if dataset not in SERVERS:
        raise ValueError(f"submissions are for {' and '.join(SERVERS)}, got {dataset!r}")
    server = SERVERS[dataset]
    path = folder / server.name(Path(picture))
    with replacing(path) as temporary:
        Image.fromarray(server.values[labels.cpu().numpy()]).save(temporary, format="PNG")
    return path
