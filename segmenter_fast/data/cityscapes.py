"""Cityscapes with fine annotations: 19 classes of European streets."""

from pathlib import Path
from typing import ClassVar

from segmenter_fast.data.folder import (
    LabelTable,
    PairedFiles,
    files_in,
    label_table,
    paired,
    read_classes,
)

# Of the 34 labels in the files these are evaluated, under the numbers ("train ids") on the right.
TRAIN_IDS = {
    7: 0,  # road
    8: 1,  # sidewalk
    11: 2,  # building
    12: 3,  # wall
    13: 4,  # fence
    17: 5,  # pole
    19: 6,  # traffic light
    20: 7,  # traffic sign
    21: 8,  # vegetation
    22: 9,  # terrain
    23: 10,  # sky
    24: 11,  # person
    25: 12,  # rider
    26: 13,  # car
    27: 14,  # truck
    28: 15,  # bus
    31: 16,  # train
    32: 17,  # motorcycle
    33: 18,  # bicycle
}
PICTURE, LABEL_IDS, LABEL_TRAIN_IDS = "_leftImg8bit", "_gtFine_labelIds", "_gtFine_labelTrainIds"


class Cityscapes(PairedFiles):
    """ROOT/leftImg8bit/SPLIT/CITY/*_leftImg8bit.png and ROOT/gtFine/SPLIT/CITY/*_labelIds.png.

    Label ids become train ids, and 255 where a label is not evaluated. Files *_labelTrainIds.png,
    which cityscapesScripts makes, are read where there are no *_labelIds.png.

    Args:
        root: the folder that holds leftImg8bit/ and gtFine/.
        split: "train" (2,975 pictures), "val" (500) or "test" (1,525, whose labels are withheld:
            gtFine/test is not read, and every pixel is 255).

    Raises:
        FileNotFoundError, ValueError: as `PairedFiles` and `FolderDataset`.

    Source: Cordts et al. 2016; cityscapesscripts/helpers/labels.py.
    """

    counts: ClassVar[dict[str, int]] = {"train": 2_975, "val": 500, "test": 1_525}
    # Official segm/data/config/cityscapes.py.
    base_size = (2048, 1024)

    def __init__(self, root, split: str = "train"):
        root = Path(root)
        if split not in self.counts:
            raise ValueError(f'split must be "train", "val" or "test", got {split!r}')
        for name in ("leftImg8bit",) if split == "test" else ("leftImg8bit", "gtFine"):
            if not (root / name / split).is_dir():
                raise FileNotFoundError(
                    f"no Cityscapes {split} in {root}: expected {name}/{split}. "
                    f"'segmenter-fast prepare cityscapes {root}' says where to get it"
                )
        names, palette = read_classes("cityscapes")
        meaning = {label: TRAIN_IDS.get(label, 255) for label in range(34)}
        self._label_ids = label_table(meaning | {255: 255}, "label ids 0 to 33")
        self._train_ids = label_table(
            {**{k: k for k in range(19)}, 255: 255}, "train ids 0 to 18 or 255"
        )
        images, masks = root / "leftImg8bit" / split, root / "gtFine" / split
        pictures = _of_cities(images, PICTURE)
        maps = None
        if split != "test":
            maps = _of_cities(masks, LABEL_TRAIN_IDS) | _of_cities(masks, LABEL_IDS)
        super().__init__(paired(pictures, maps, images, masks), names, palette)

    def table_of(self, label_map: Path) -> LabelTable:
        """Label ids or train ids, as the name of the file says."""
        return self._train_ids if label_map.stem.endswith(LABEL_TRAIN_IDS) else self._label_ids


def _of_cities(folder: Path, ending: str) -> dict[str, Path]:
    """Files CITY/*ENDING.png by the city and what stands before the ending."""
    return {
        f"{city.name}/{stem}": path
        for city in sorted(folder.iterdir())
        if city.is_dir()
        for stem, path in files_in(city, (".png",), ending).items()
    }
