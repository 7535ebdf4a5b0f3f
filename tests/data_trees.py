"""Miniature copies of data sets in their true layouts and formats; the pictures are noise."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

# Cityscapes' label ids in the order of the train ids (cityscapesscripts/helpers/labels.py).
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
SIZE = (20, 30)


def picture(path: Path, size=SIZE, seed=0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)


def label_map(path: Path, labels) -> None:
    """One-channel PNG of the labels given, each on some pixels of (20, 30)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = np.resize(np.asarray(labels, dtype=np.uint8), SIZE)
    Image.fromarray(labels).save(path)


def write_ade20k(root: Path, train=3, val=2) -> Path:
    """ADEChallengeData2016 as its archive has it, every label in every map."""
    folder = root / "ADEChallengeData2016"
    for split, short, count in (("training", "train", train), ("validation", "val", val)):
        for number in range(1, count + 1):
            stem = f"ADE_{short}_{number:08d}"
            picture(folder / "images" / split / f"{stem}.jpg", seed=number)
            label_map(folder / "annotations" / split / f"{stem}.png", range(151))
    for name in ("objectInfo150.txt", "sceneCategories.txt"):
        (folder / name).write_text("")
    return folder


def write_cityscapes(root: Path, train=2, val=1, test=1, train_ids=False) -> Path:
    """leftImg8bit and gtFine, with all the files that stand beside the label ids."""
    cities = {"train": ("aachen", "zurich"), "val": ("lindau",), "test": ("berlin",)}
    for split, count in (("train", train), ("val", val), ("test", test)):
        for number in range(count):
            city = cities[split][number % len(cities[split])]
            # The same number in two cities: a file is known by its city, too.
            name = f"{city}_{number // 2:06d}_000019"
            picture(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", seed=number)
            stem = root / "gtFine" / split / city / f"{name}_gtFine"
            # Labels of the test split are withheld: 0 to 3 alone are in its files.
            ids = range(4) if split == "test" else range(34)
            if train_ids:
                label_map(stem.with_name(f"{stem.name}_labelTrainIds.png"), [*range(19), 255])
            else:
                label_map(stem.with_name(f"{stem.name}_labelIds.png"), ids)
            picture(stem.with_name(f"{stem.name}_color.png"))
            instances = np.full(SIZE, 26001, np.uint16)
            Image.fromarray(instances).save(stem.with_name(f"{stem.name}_instanceIds.png"))
            stem.with_name(f"{stem.name}_polygons.json").write_text("{}")
    return root


def write_voc2010(root: Path, names: list[str]) -> Path:
    """Pascal VOC 2010 as its archive has it, without anything of Pascal Context."""
    folder = root / "VOCdevkit" / "VOC2010"
    for seed, name in enumerate(names):
        picture(folder / "JPEGImages" / f"{name}.jpg", seed=seed)
    for name in ("Annotations", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return folder


def write_pascal_context(root: Path) -> Path:
    """VOC2010 with three pictures in train, two in val, and one that is in neither."""
    names = [f"2008_{number:06d}" for number in range(6)]
    folder = write_voc2010(root, names)
    lists = folder / "ImageSets" / "SegmentationContext"
    lists.mkdir(parents=True)
    for split, listed in (("train", names[:3]), ("val", names[3:5])):
        (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in listed))
        for name in listed:
            label_map(folder / "SegmentationClassContext" / f"{name}.png", range(60))
    return folder


def run_length_code(mask: np.ndarray) -> dict:
    """A mask as COCO's compressed run lengths, the inverse of `decode_mask`."""
    column = mask.T.ravel().astype(np.int8)
    edges = np.flatnonzero(np.diff(column)) + 1
    runs = np.diff([0, *edges, column.size]).tolist()
    if column[0]:
        runs.insert(0, 0)
    text = io.StringIO()
    for i, run in enumerate(runs):
        rest = run - runs[i - 2] if i > 2 else run
        while True:
            digit, rest = rest & 31, rest >> 5
            more = rest != (-1 if digit & 16 else 0)
            text.write(chr(48 + digit + 32 * more))
            if not more:
                break
    return {"size": list(mask.shape), "counts": text.getvalue()}


def write_context_annotations(path: Path, labels: dict[str, tuple[str, np.ndarray]]) -> None:
    """trainval_merged.json of label maps (in its categories) by picture, with their phase."""
    images, annotations = [], []
    for name, (phase, categories) in labels.items():
        number = int(name.replace("_", ""))
        height, width = categories.shape
        images.append(
            {
                "image_id": number,
                "file_name": f"{name}.jpg",
                "phase": phase,
                "height": height,
                "width": width,
            }
        )
        for category in np.unique(categories[categories > 0]).tolist():
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": number,
                    "category_id": category,
                    "segmentation": run_length_code(categories == category),
                }
            )
    path.write_text(json.dumps({"images": images, "annos_segmentation": annotations}))
