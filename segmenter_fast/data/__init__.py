"""Datasets that map an index to (uint8 image (3, H, W), uint8 labels (H, W))."""

from segmenter_fast.data.folder import CamVid, FolderDataset, InMemory
from segmenter_fast.data.scenes import Scenes

__all__ = ["CamVid", "FolderDataset", "InMemory", "Scenes"]
