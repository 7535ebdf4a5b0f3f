"""ADE20K, the scene parsing challenge of 2016: 150 classes of everyday scenes."""

from pathlib import Path
from typing import ClassVar

from segmenter_fast.data.folder import PairedFiles, files_in, label_table, paired, read_classes

FOLDER = "ADEChallengeData2016"
FOLDERS = {"train": "training", "val": "validation"}
TEST = "release_test/testing"


class ADE20K(PairedFiles):
    """ROOT/images/{training,validation}/*.jpg and ROOT/annotations/{training,validation}/*.png.

    In the files 0 is "other objects" and the classes count from 1: 0 is ignored, the rest less one.

    Args:
        root: the folder ADEChallengeData2016, or the one that it lies in.
        split: "train" (20,210 pictures), "val" (2,000) or "test": the pictures of the archive
            release_test, in ROOT or beside it, whose labels are withheld.

    Raises:
        FileNotFoundError, ValueError: as `PairedFiles` and `FolderDataset`.

    Source: Zhou et al. 2017; labels as in official segm/data/ade20k.py (reduce_zero_label).
    """

    counts: ClassVar[dict[str, int]] = {"train": 20_210, "val": 2_000}
    # Official segm/data/config/ade20k.py: img_scale=(512 * max_ratio, 512), max_ratio 4.
    base_size = (2048, 512)

    def __init__(self, root, split: str = "train"):
        root = Path(root)
        if split == "test":
            images, masks, maps = find_test(root), None, None
        elif split in FOLDERS:
            root = find_root(root)
            images, masks = (root / name / FOLDERS[split] for name in ("images", "annotations"))
            maps = files_in(masks, (".png",))
        else:
            raise ValueError(f'split must be "train", "val" or "test", got {split!r}')
        names, palette = read_classes("ade20k")
        table = label_table(
            {0: 255, 255: 255, **{label: label - 1 for label in range(1, 151)}}, "0 to 150"
        )
        files = paired(files_in(images, (".jpg",)), maps, images, masks)
        super().__init__(files, names, palette, table=table)


def find_root(root: Path) -> Path:
    """The folder that holds images/ and annotations/.

    Raises:
        FileNotFoundError: neither `root` nor its ADEChallengeData2016 does.
    """
    for folder in (root, root / FOLDER):
        if (folder / "images").is_dir() and (folder / "annotations").is_dir():
            return folder
    raise FileNotFoundError(
        f"no ADE20K in {root}: expected {FOLDER}/images and {FOLDER}/annotations. "
        f"'segmenter-fast prepare ade20k {root}' says where to get it"
    )


def find_test(root: Path) -> Path:
    """The folder of the test pictures.

    Raises:
        FileNotFoundError: there is none.
    """
    for folder in (root / TEST, root.parent / TEST):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no test pictures of ADE20K: expected {root / TEST}")
