"""Datasets that map an index to (uint8 image (3, H, W), uint8 labels (H, W)), and their loader."""

from segmenter_fast.data.ade20k import ADE20K
from segmenter_fast.data.augment import Augmentation, normalise
from segmenter_fast.data.cityscapes import Cityscapes
from segmenter_fast.data.folder import CamVid, FolderDataset, InMemory
from segmenter_fast.data.loader import images_per_second, make_loader
from segmenter_fast.data.pascal_context import PascalContext
from segmenter_fast.data.scenes import Scenes

__all__ = [
    "ADE20K",
    "Augmentation",
    "CamVid",
    "Cityscapes",
    "FolderDataset",
    "InMemory",
    "PascalContext",
    "Scenes",
    "images_per_second",
    "make_loader",
    "normalise",
]
