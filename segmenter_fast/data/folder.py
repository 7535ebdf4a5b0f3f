"""Pairs of images and label maps in folders."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from segmenter_fast.images import IMAGE_SUFFIXES, MASK_SUFFIXES, load_image, load_mask


def _by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    return {p.stem: p for p in sorted(folder.iterdir()) if p.suffix.lower() in suffixes}


class FolderDataset(torch.utils.data.Dataset):
    """Images and label maps that share a file stem.

    Args:
        images: folder of pictures.
        masks: folder of single-channel label maps; values are class numbers or `ignore_index`.
        class_names: K names; the number of classes is their number.
        palette: K (r, g, b) colours for pictures of the result.
        ignore_index: label without a class.

    Raises:
        FileNotFoundError: a folder is missing or holds nothing.
        ValueError: images without masks or masks without images, named; and, when a sample is read,
            sizes that differ or a label outside the classes, with file name and value.
    """

    def __init__(self, images, masks, class_names, palette=None, ignore_index: int = 255):
        self.class_names = tuple(class_names)
        self.num_classes = len(self.class_names)
        self.palette = palette
        self.ignore_index = ignore_index
        pictures = _by_stem(Path(images), IMAGE_SUFFIXES)
        maps = _by_stem(Path(masks), MASK_SUFFIXES)
        if not pictures:
            raise FileNotFoundError(f"no images ({', '.join(IMAGE_SUFFIXES)}) in {images}")
        unpaired = sorted(pictures.keys() ^ maps.keys())
        if unpaired:
            raise ValueError(
                f"{len(unpaired)} file stems are in only one of {images} and {masks}, "
                f"such as {', '.join(unpaired[:5])}"
            )
        self.files = [(pictures[stem], maps[stem]) for stem in pictures]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """(3, H, W) uint8 image and (H, W) uint8 labels."""
        picture, label_map = self.files[index]
        image = np.array(load_image(picture))
        mask = load_mask(label_map)
        if image.shape[:2] != mask.shape:
            raise ValueError(
                f"{picture} is {image.shape[1]} x {image.shape[0]} pixels and {label_map} "
                f"{mask.shape[1]} x {mask.shape[0]}"
            )
        outside = (mask >= self.num_classes) & (mask != self.ignore_index)
        if outside.any():
            raise ValueError(
                f"{label_map} holds label {int(mask[outside][0])} at {int(outside.sum())} pixels; "
                f"expected 0 to {self.num_classes - 1} or ignore_index {self.ignore_index}"
            )
        return torch.from_numpy(image).permute(2, 0, 1).contiguous(), torch.from_numpy(mask)


class InMemory(torch.utils.data.Dataset):
    """A small dataset decoded once and kept: augmentation then costs more than reading.

    Attributes such as `class_names` are those of the dataset it holds.
    """

    def __init__(self, dataset):
        self.dataset = dataset
        self.samples = [dataset[i] for i in range(len(dataset))]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.samples[index]

    def __getattr__(self, name: str):
        if name in ("dataset", "samples"):  # not set yet: a copy or an unpickling is under way
            raise AttributeError(name)
        return getattr(self.dataset, name)


def spread(dataset, limit: int | None):
    """At most `limit` samples, evenly over the dataset; None is all of it."""
    if limit is None or limit >= len(dataset):
        return dataset
    return torch.utils.data.Subset(dataset, [i * len(dataset) // limit for i in range(limit)])


CAMVID_CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian",
    "bicyclist",
)  # fmt: skip
CAMVID_PALETTE = (
    (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0),
    (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
)  # fmt: skip


class CamVid(FolderDataset):
    """CamVid with 11 classes: root/images/<split>/*.jpg|png and root/annotations/<split>/*.png.

    Source: Brostow et al. 2009; the 11 classes of Badrinarayanan et al. 2017 (SegNet).
    """

    def __init__(self, root, split: str = "train"):
        root = Path(root)
        super().__init__(
            root / "images" / split, root / "annotations" / split, CAMVID_CLASSES, CAMVID_PALETTE
        )
