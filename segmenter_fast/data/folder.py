"""Pairs of images and label maps in folders, and what the stored label values mean."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from segmenter_fast.images import IMAGE_SUFFIXES, MASK_SUFFIXES, load_image, load_mask

CLASSES = Path(__file__).parent / "classes"


def read_classes(name: str) -> tuple[tuple[str, ...], tuple[tuple[int, int, int], ...]]:
    """Names and colours of the classes of "ade20k", "cityscapes" or "pascal_context"."""
    rows = json.loads((CLASSES / f"{name}.json").read_text(encoding="utf-8"))
    return tuple(name for name, _ in rows), tuple(tuple(colour) for _, colour in rows)


class LabelTable(NamedTuple):
    """What the values stored in a label map mean.

    Args:
        classes: (256,) uint8, the class number or `ignore_index` that a value stands for.
        known: (256,) bool; any other value is an error of the file.
        expected: the known values in words, for that error.
    """

    classes: np.ndarray
    known: np.ndarray
    expected: str


def label_table(meaning: Mapping[int, int], expected: str) -> LabelTable:
    """The table of `meaning`, from a stored value to a class number or `ignore_index`.

    Raises:
        ValueError: a value outside of 0 to 255, which no label map of one byte holds.
    """
    outside = [v for pair in meaning.items() for v in pair if not 0 <= int(v) <= 255]
    if outside:
        raise ValueError(f"labels are bytes, 0 to 255, got {outside[0]}")
    values, numbers = list(meaning), list(meaning.values())
    classes, known = np.zeros(256, np.uint8), np.zeros(256, bool)
    classes[values], known[values] = numbers, True
    return LabelTable(classes, known, expected)


def files_in(folder: Path, suffixes: tuple[str, ...], ending: str = "") -> dict[str, Path]:
    """Files of a folder by their stem, less `ending`, which the stem must have.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: two files share a stem.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in suffixes and path.stem.endswith(ending):
            other = found.setdefault(path.stem.removesuffix(ending), path)
            if other != path:
                raise ValueError(
                    f"{other} and {path.name} share a stem, and files are paired by stems: "
                    "rename or remove one of them"
                )
    return found


def paired(
    pictures: Mapping[str, Path], maps: Mapping[str, Path] | None, images, masks=None
) -> list[tuple[Path, Path | None]]:
    """Pair the files of `images` and `masks` by their keys, or with None without any `maps`.

    Raises:
        FileNotFoundError: no pictures.
        ValueError: pictures without a label map, or label maps without a picture.
    """
    if not pictures:
        raise FileNotFoundError(f"no images ({', '.join(IMAGE_SUFFIXES)}) in {images}")
    if maps is None:
        return [(pictures[key], None) for key in sorted(pictures)]
    for what, other, have, where, theirs, elsewhere in (
        ("images", "label map", pictures, images, maps, masks),
        ("label maps", "image", maps, masks, pictures, images),
    ):
        alone = sorted(have.keys() - theirs.keys())
        if alone:
            names = ", ".join(have[key].name for key in alone[:5])
            raise ValueError(
                f"{len(alone)} of {len(have)} {what} in {where} have no {other} in {elsewhere}, "
                f"such as {names}"
            )
    return [(pictures[key], maps[key]) for key in sorted(pictures)]


class PairedFiles(torch.utils.data.Dataset):
    """Pictures and label maps in files: what every data set on a disk has in common.

    Args:
        files: (picture, label map) of each sample; None for the label map of one without labels,
            all of whose pixels are `ignore_index`.
        class_names: K names; the number of classes is their number.
        palette: K (r, g, b) colours for pictures of the result.
        ignore_index: label without a class.
        table: what stored labels mean; None takes class numbers and `ignore_index` as they are.

    Raises:
        ValueError: no class names, or more than one byte can number; and, when a sample is read, a
            file that is not a picture, sizes that differ, or a label that means nothing, with file
            name and value.
    """

    base_size: tuple[int, int] | None = None
    """(long, short) side in pixels that training resizes to before its random factor."""
    counts: ClassVar[dict[str, int]] = {}
    """How many samples each split has, where that is known."""

    def __init__(self, files, class_names, palette=None, ignore_index: int = 255, table=None):
        self.files = list(files)
        self.class_names = tuple(class_names)
        self.num_classes = len(self.class_names)
        self.palette = palette
        self.ignore_index = ignore_index
        if not 0 < self.num_classes <= 256:
            raise ValueError(f"1 to 256 class names are expected, got {self.num_classes}")
        self.table = table or label_table(
            {**{k: k for k in range(self.num_classes)}, ignore_index: ignore_index},
            f"0 to {self.num_classes - 1} or ignore_index {ignore_index}",
        )

    @property
    def labelled(self) -> bool:
        """Whether there is anything to compare a prediction with."""
        return any(label_map is not None for _, label_map in self.files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """(3, H, W) uint8 image and (H, W) uint8 labels."""
        picture, label_map = self.files[index]
        image = np.array(load_image(picture))
        pixels = torch.from_numpy(image).permute(2, 0, 1).contiguous()
        if label_map is None:
            return pixels, torch.full(image.shape[:2], self.ignore_index, dtype=torch.uint8)
        mask = load_mask(label_map)
        if image.shape[:2] != mask.shape:
            raise ValueError(
                f"{picture} is {image.shape[1]} x {image.shape[0]} pixels and {label_map} "
                f"{mask.shape[1]} x {mask.shape[0]}"
            )
        table = self.table_of(label_map)
        if not table.known.take(mask).all():
            wrong = mask[~table.known[mask]]
            raise ValueError(
                f"{label_map} holds label {int(wrong[0])} at "
                f"{int((wrong == wrong[0]).sum())} pixels; expected {table.expected}"
            )
        return pixels, torch.from_numpy(table.classes.take(mask))

    def table_of(self, label_map: Path) -> LabelTable:
        """What the values in this file mean."""
        return self.table


class FolderDataset(PairedFiles):
    """Anybody's images and label maps, in two folders, paired by the stems of their names.

    Args:
        images: folder of pictures.
        masks: folder of single-channel label maps; values are class numbers or `ignore_index`. None
            for pictures without labels.
        class_names: K names; the number of classes is their number.
        palette: K (r, g, b) colours for pictures of the result.
        ignore_index: label without a class.
        mask_suffix: what the stem of a label map has beyond its picture's, such as "_mask".
        label_map: class number or `ignore_index` of each stored value, where the files count in
            another way, such as {0: 255, 128: 0, 255: 1}. Other values are errors.

    Raises:
        FileNotFoundError: a folder is missing or holds nothing.
        ValueError: images without masks, masks without images or two of one stem, named; a class
            outside of the names; and, when a sample is read, a file that is not a picture, sizes
            that differ, or a label outside the classes, with file name and value.
    """

    def __init__(
        self,
        images,
        masks,
        class_names,
        palette=None,
        ignore_index: int = 255,
        mask_suffix: str = "",
        label_map: Mapping[int, int] | None = None,
    ):
        pictures = files_in(Path(images), IMAGE_SUFFIXES)
        maps = None if masks is None else files_in(Path(masks), MASK_SUFFIXES, mask_suffix)
        class_names, table = tuple(class_names), None
        if label_map is not None:
            unknown = set(label_map.values()) - {*range(len(class_names)), ignore_index}
            if unknown:
                raise ValueError(
                    f"label_map leads to {min(unknown)}, but there are {len(class_names)} classes "
                    f"and ignore_index {ignore_index}"
                )
            table = label_table(label_map, ", ".join(map(str, sorted(label_map))))
        files = paired(pictures, maps, images, masks)
        super().__init__(files, class_names, palette, ignore_index, table)


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
