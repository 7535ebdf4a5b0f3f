"""Pascal Context: 59 classes and a background on the pictures of Pascal VOC 2010."""

from pathlib import Path
from typing import ClassVar

from segmenter_fast.data.folder import PairedFiles, files_in, paired, read_classes

FOLDERS = ("VOCdevkit/VOC2010", "VOC2010", ".")
PICTURES, MASKS, LISTS = "JPEGImages", "SegmentationClassContext", "ImageSets/SegmentationContext"


class PascalContext(PairedFiles):
    """VOCdevkit/VOC2010 with JPEGImages/*.jpg, SegmentationClassContext/*.png and lists of names.

    In the files 0 is the background, a class like the other 59, and nothing is ignored. The 59 are
    numbered in the order of the alphabet: their numbers are ranks of the categories' numbers, which
    are in that order. The lists of the official code and of MMSegmentation have the same names in
    another order, and so name most classes wrongly.

    Args:
        root: the folder VOC2010, or the one that it or VOCdevkit lies in.
        split: "train" (4,996 pictures) or "val" (5,104), the names in
            ImageSets/SegmentationContext/SPLIT.txt.

    Raises:
        FileNotFoundError, ValueError: as `PairedFiles` and `FolderDataset`.

    Source: Mottaghi et al. 2014; the layout and labels of MMSegmentation
    (tools/convert_datasets/pascal_context.py), which the official code reads.
    """

    counts: ClassVar[dict[str, int]] = {"train": 4_996, "val": 5_104}
    # From official segm/data/config/pascal_context.py. Its trainer puts 8 times the im_size of
    # segm/config.yml in its place (segm/data/base.py), which is (4160, 520).
    base_size = (512, 512)

    def __init__(self, root, split: str = "train"):
        root = find_root(Path(root))
        if split not in self.counts:
            raise ValueError(f'split must be "train" or "val", got {split!r}')
        listed = root / LISTS / f"{split}.txt"
        if not listed.is_file():
            raise FileNotFoundError(f"no such file: {listed}, which names the pictures of {split}")
        names = dict.fromkeys(listed.read_text(encoding="utf-8").split())
        pictures, maps = (
            {name: path for name, path in files.items() if name in names}
            for files in (files_in(root / PICTURES, (".jpg",)), files_in(root / MASKS, (".png",)))
        )
        gone = [name for name in names if name not in pictures and name not in maps]
        if gone:
            raise FileNotFoundError(
                f"{len(gone)} of {len(names)} names in {listed} have neither {PICTURES}/NAME.jpg "
                f"nor {MASKS}/NAME.png, such as {', '.join(gone[:5])}"
            )
        class_names, palette = read_classes("pascal_context")
        files = paired(pictures, maps, root / PICTURES, root / MASKS)
        super().__init__(files, class_names, palette)


def find_root(root: Path) -> Path:
    """The folder VOC2010 with Pascal Context's label maps.

    Raises:
        FileNotFoundError: there are none.
    """
    for folder in FOLDERS:
        if (root / folder / MASKS).is_dir():
            return root / folder
    raise FileNotFoundError(
        f"no Pascal Context in {root}: expected VOCdevkit/VOC2010/{MASKS}. "
        f"'segmenter-fast prepare pascal-context {root}' makes it, or says what it lacks"
    )
