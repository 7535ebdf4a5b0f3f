"""Check a downloaded copy of a data set, lay it out, and say where to get what is missing.

Nothing is downloaded here: the owners want a registration, or an agreement to their terms. Archives
that lie in the folder are unpacked where the loaders look.
"""

import json
import tarfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from segmenter_fast.data import ade20k, cityscapes, pascal_context
from segmenter_fast.data.folder import PairedFiles
from segmenter_fast.files import replacing

# What reading a file that was cut off or mistaken for another may raise.
DAMAGED = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    EOFError,
    json.JSONDecodeError,
    UnicodeDecodeError,
    KeyError,
)
SHOWN = 5  # problems of one kind that are told one by one


class Source(NamedTuple):
    """A file to download.

    Args:
        file: its name, which is looked for in the folder.
        where: address, and what has to be done there.
        gives: what it leaves behind once unpacked; any one of these paths is enough.
    """

    file: str
    where: str
    gives: tuple[str, ...]


class Plan(NamedTuple):
    """A data set: its loader, what it is made from, and which folder that belongs in."""

    title: str
    loader: type[PairedFiles]
    sources: tuple[Source, ...]


class Report(NamedTuple):
    """What was found to be right, and what was not; without problems the data set is ready."""

    found: list[str]
    problems: list[str]


PLANS = {
    "ade20k": Plan(
        "ADE20K",
        ade20k.ADE20K,
        (
            Source(
                "ADEChallengeData2016.zip",
                "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip "
                "(terms: http://sceneparsing.csail.mit.edu)",
                (f"{ade20k.FOLDER}/annotations", "annotations"),
            ),
        ),
    ),
    "cityscapes": Plan(
        "Cityscapes",
        cityscapes.Cityscapes,
        tuple(
            Source(
                f"{name}_trainvaltest.zip",
                f"https://www.cityscapes-dataset.com/file-handling/?packageID={package} "
                "(register at https://www.cityscapes-dataset.com first)",
                (f"{name}/val",),
            )
            for name, package in (("gtFine", 1), ("leftImg8bit", 3))
        ),
    ),
    "pascal-context": Plan(
        "Pascal Context",
        pascal_context.PascalContext,
        (
            Source(
                "VOCtrainval_03-May-2010.tar",
                "http://host.robots.ox.ac.uk/pascal/VOC/voc2010/VOCtrainval_03-May-2010.tar",
                tuple(f"{f}/{pascal_context.PICTURES}" for f in pascal_context.FOLDERS),
            ),
            Source(
                "trainval_merged.json",
                "https://codalabuser.blob.core.windows.net/public/trainval_merged.json "
                "(project page: https://sites.google.com/view/pasd)",
                tuple(f"{f}/{pascal_context.LISTS}/val.txt" for f in pascal_context.FOLDERS),
            ),
        ),
    ),
}


def prepare(
    name: str, root, sample: int = 32, say: Callable[[str], None] = lambda line: None
) -> Report:
    """Unpack what has been downloaded, then count the files and read a sample of them.

    Args:
        name: "ade20k", "cityscapes" or "pascal-context".
        root: folder of the data, with or without the archives.
        sample: pictures of each split to read, evenly over it; 0 reads none.
        say: told what takes long, before it begins.

    Returns:
        What is right and what is not. Files that are missing come with their address.

    Raises:
        ValueError: an unknown name, or an archive that is damaged.
    """
    if name not in PLANS:
        raise ValueError(f"expected one of {', '.join(PLANS)}, got {name!r}")
    plan, root = PLANS[name], Path(root)
    missing = []
    for source in plan.sources:
        if any((root / path).exists() for path in source.gives):
            continue
        if not (root / source.file).is_file():
            missing.append(source)
            continue
        say(f"unpacking {root / source.file}")
        _unpack(root / source.file, root, source)
    if missing:
        lines = [f"{plan.title} is not complete in {root}. Put into this folder:"]
        lines += [f"  {source.file} from {source.where}" for source in missing]
        lines.append(f"Then run 'segmenter-fast prepare {name} {root}' again: it unpacks them")
        return Report([], ["\n".join(lines)])

    report = Report([], [])
    for split, expected in plan.loader.counts.items():
        _check(plan.loader, root, split, expected, sample, report)
    if report.problems:
        files = " or ".join(source.file for source in plan.sources)
        report.problems.append(
            "where files are missing or damaged, remove their folder and unpack again: with "
            f"{files} in {root}, 'segmenter-fast prepare {name} {root}' does that"
        )
    return report


def _check(loader, root: Path, split: str, expected: int, sample: int, report: Report) -> None:
    try:
        dataset = loader(root, split)
    except (OSError, ValueError) as error:
        report.problems.append(f"{split}: {error}")
        return
    problems = []
    if len(dataset) != expected:
        problems.append(
            f"{split}: expected {expected:,} pictures with label maps, found {len(dataset):,}"
        )
    count = min(sample, len(dataset))
    unreadable = []
    for i in range(count):
        try:
            dataset[i * len(dataset) // count]
        except (OSError, ValueError) as error:
            unreadable.append(f"{split}: {error}")
    problems += unreadable[:SHOWN]
    if len(unreadable) > SHOWN:
        problems.append(f"{split}: {len(unreadable)} of {count} samples read were bad")
    report.problems.extend(problems)
    if not problems:
        report.found.append(
            f"{split}: {len(dataset):,} pictures with label maps, {count} of them read"
        )


def _unpack(archive: Path, root: Path, source: Source) -> None:
    """Unpack an archive, or make label maps of an annotation file.

    Raises:
        ValueError: it is damaged, or not what its name says.
    """
    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as opened:
                opened.extractall(root)
        elif archive.suffix == ".tar":
            with tarfile.open(archive) as opened:
                opened.extractall(root, filter="data")
        else:
            folder = next(
                root / folder
                for folder in pascal_context.FOLDERS
                if (root / folder / pascal_context.PICTURES).is_dir()
            )
            write_context_labels(archive, folder)
    except DAMAGED as error:
        raise ValueError(
            f"{archive} is damaged ({error}): download it again from {source.where}"
        ) from error
    except StopIteration:  # the pictures' archive was missing, which has been noted
        return
    if not any((root / path).exists() for path in source.gives):
        raise ValueError(
            f"{archive} does not hold {source.gives[0]}: is it the file from {source.where}?"
        )


# --- Pascal Context's annotation file ------------------------------------------------------------

# Class number by category of the annotation file: the background and the 59 most frequent of 459
# categories, in the order of their numbers (MMSegmentation's tools/convert_datasets).
CONTEXT_CATEGORIES = {
    category: number
    for number, category in enumerate(
        (
            0, 2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104,
            105, 113, 115, 144, 158, 159, 162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295,
            296, 308, 324, 326, 347, 349, 354, 355, 360, 366, 368, 397, 415, 416, 420, 424, 427,
            440, 445, 454, 458,
        )
    )
}  # fmt: skip


def write_context_labels(annotations: Path, folder: Path) -> None:
    """Write SegmentationClassContext/*.png and the lists of names from trainval_merged.json.

    Args:
        annotations: JSON with "images" (image_id, file_name, phase, height, width) and
            "annos_segmentation" (image_id, category_id, segmentation), later ones on top.
        folder: VOC2010.

    Raises:
        ValueError: not JSON, a category that is none of the 60, or a mask of another size.
        KeyError: an entry is missing.
    """
    with annotations.open(encoding="utf-8") as file:
        content = json.load(file)
    by_image = defaultdict(list)
    for entry in content["annos_segmentation"]:
        by_image[entry["image_id"]].append(entry)
    masks, lists = folder / pascal_context.MASKS, folder / pascal_context.LISTS
    masks.mkdir(parents=True, exist_ok=True)
    lists.mkdir(parents=True, exist_ok=True)
    names = defaultdict(list)
    for image in tqdm(content["images"], desc="label maps", unit="image"):
        if image["phase"] not in pascal_context.PascalContext.counts:
            continue
        stem = Path(image["file_name"]).stem
        labels = np.zeros((image["height"], image["width"]), np.uint8)
        for entry in by_image[image["image_id"]]:
            category = entry["category_id"]
            if category not in CONTEXT_CATEGORIES:
                raise ValueError(
                    f"{annotations}: category {category} in {stem} is none of the 60 of Pascal "
                    "Context as it is evaluated"
                )
            mask = decode_mask(entry["segmentation"])
            if mask.shape != labels.shape:
                raise ValueError(
                    f"{annotations}: a mask of {stem} is {mask.shape}, its image {labels.shape}"
                )
            labels[mask] = CONTEXT_CATEGORIES[category]
        Image.fromarray(labels).save(masks / f"{stem}.png")
        names[image["phase"]].append(stem)
    # The lists come last, the one that is looked for at the very end: a run that was stopped
    # begins again.
    for phase in ("train", "val"):
        with replacing(lists / f"{phase}.txt") as temporary:
            temporary.write_text("".join(f"{stem}\n" for stem in sorted(names[phase])))


def decode_mask(segmentation: dict) -> np.ndarray:
    """(H, W) bool of a run-length code as COCO writes it.

    Runs of False and True take turns, down the columns. From the fourth on each is stored less the
    one before the last, as digits of 5 bits, lowest first, bit 5 telling that more follow, with the
    sign in the last digit's bit 4.

    Args:
        segmentation: "size" (H, W), and "counts", the code as text.

    Raises:
        ValueError: the runs do not fill the picture.

    Source: cocoapi's common/maskApi.c, rleFrString.
    """
    runs: list[int] = []
    value = shift = 0
    for character in segmentation["counts"]:
        digit = ord(character) - 48
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        if digit & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    height, width = segmentation["size"]
    if shift or any(run < 0 for run in runs) or sum(runs) != height * width:
        raise ValueError(f"a run-length code does not fill {height} x {width} pixels")
    filled = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return filled.reshape(width, height).T
