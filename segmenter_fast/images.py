"""Pictures and label maps from files, through Pillow."""

import os
import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm")
MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")

# Damaged files surface as any of these, depending on the format and on where they are cut.
UNREADABLE = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)


def load_image(path: str | os.PathLike) -> Image.Image:
    """Read a picture from a file as upright 8-bit RGB.

    Args:
        path: any format Pillow reads; the first frame of several.

    Returns:
        RGB image, turned as its EXIF orientation says; `to_rgb` says how other modes are converted.

    Raises:
        FileNotFoundError: no such file.  ValueError: not a readable picture.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"image {path} does not exist")
    try:
        with Image.open(path) as image:
            return to_rgb(ImageOps.exif_transpose(image))
    except UNREADABLE as error:
        raise ValueError(f"cannot read image {path}: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a PIL image of any mode to 8-bit RGB.

    Grey values are repeated, palettes looked up, transparency is dropped, and modes "I;16" and "I"
    are taken for 16-bit grey (0 to 65535).

    Raises:
        ValueError: a mode whose values have no agreed range, such as "F".
    """
    if image.mode == "RGB":
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.float32).clip(0, 65535) / 257
        return Image.fromarray((grey + 0.5).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode == "La":
        image = image.convert("LA")
    try:
        if image.mode == "F":
            raise ValueError("floating-point pixels have no agreed range")
        return image.convert("RGB")
    except ValueError as error:
        raise ValueError(
            f"cannot convert an image of mode {image.mode!r} to RGB: {error}. "
            "Convert it to mode 'RGB' or 'L' first."
        ) from error


def load_mask(path: str | os.PathLike) -> np.ndarray:
    """Read a label map from a file.

    Args:
        path: a palette image, whose indices count, or a grey one, whose values do.

    Returns:
        (H, W) uint8.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a readable picture, several channels, or values beyond 255.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"label map {path} does not exist")
    try:
        with Image.open(path) as image:
            mode, mask = image.mode, np.array(image)
    except UNREADABLE as error:
        raise ValueError(f"cannot read label map {path}: {error}") from error
    if mask.ndim != 2 or mask.min() < 0 or mask.max() > 255:
        raise ValueError(
            f"label map {path} must have one channel of class numbers 0 to 255 (mode P or L), "
            f"got mode {mode} with shape {mask.shape}"
        )
    return mask.astype(np.uint8)
