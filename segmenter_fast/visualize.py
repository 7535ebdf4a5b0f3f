"""Pictures of label maps: indexed PNG files, colours, overlays with a legend, panels side by side.

Pillow and numpy only. Pictures are PIL images, (H, W, 3) or (H, W) uint8 arrays or (3, H, W) uint8
tensors; label maps are (H, W) arrays or tensors of any integer type.
"""

import math
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from segmenter_fast.files import replacing

Colour = Sequence[int]

_PAPER = (255, 255, 255)
_INK = (24, 24, 28)
_FAINT_INK = (110, 110, 118)
_PICTURE_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")


# Input ------------------------------------------------------------------------------------------


def _picture(image: Image.Image | np.ndarray | torch.Tensor) -> np.ndarray:
    """Any accepted picture as an (H, W, 3) uint8 array."""
    if isinstance(image, Image.Image):
        if image.mode not in _PICTURE_MODES:
            raise TypeError(
                f"a picture of 8 bits per channel is expected, got PIL mode {image.mode!r}; "
                "scale it to 0 ... 255 first"
            )
        return np.asarray(image.convert("RGB"))
    if not isinstance(image, np.ndarray | torch.Tensor):
        raise TypeError(
            f"a picture must be a PIL image, an array or a tensor, got {type(image).__name__}"
        )
    channels_first = isinstance(image, torch.Tensor)
    array = image.detach().cpu().numpy() if channels_first else image
    if array.dtype != np.uint8:
        raise TypeError(f"a picture must be uint8 (0 ... 255), got {image.dtype}")
    if array.ndim == 2:
        return np.repeat(array[:, :, None], 3, axis=2)
    if array.ndim == 3 and array.shape[0] == 3 and (channels_first or array.shape[2] != 3):
        return np.ascontiguousarray(array.transpose(1, 2, 0))
    if array.ndim == 3 and array.shape[2] == 3:
        return np.ascontiguousarray(array)
    raise ValueError(
        f"a picture must be (H, W, 3), (3, H, W) or (H, W), got shape {tuple(array.shape)}"
    )


def _label_map(labels: np.ndarray | torch.Tensor | Image.Image) -> np.ndarray:
    """Any accepted label map as an (H, W) integer array."""
    if isinstance(labels, torch.Tensor):
        array = labels.detach().cpu().numpy()
    elif isinstance(labels, np.ndarray | Image.Image):
        array = np.asarray(labels)
    else:
        raise TypeError(f"labels must be an array or a tensor, got {type(labels).__name__}")
    if array.dtype.kind not in "iu":
        raise TypeError(f"labels must be integers, got {array.dtype}")
    if array.ndim != 2:
        raise ValueError(f"labels must be (H, W), got shape {tuple(array.shape)}")
    if array.size == 0:
        raise ValueError(f"labels have no pixels: shape {tuple(array.shape)}")
    return array


def _palette(palette: Sequence[Colour]) -> np.ndarray:
    """A palette as a (K, 3) uint8 array."""
    array = np.asarray(palette)
    if array.ndim != 2 or array.shape[1] != 3 or array.shape[0] == 0:
        raise ValueError(f"palette must hold RGB triples, got shape {tuple(array.shape)}")
    if array.dtype.kind not in "iu":
        raise TypeError(f"palette must hold integers 0 ... 255, got {array.dtype}")
    if array.min() < 0 or array.max() > 255:
        raise ValueError(f"palette must hold 0 ... 255, got {array.min()} ... {array.max()}")
    return array.astype(np.uint8)


def _check_labels(array: np.ndarray, count: int, void: int) -> None:
    """Every label is a class in [0, count) or `void`."""
    wrong = (array != void) & ((array < 0) | (array >= count))
    if wrong.any():
        raise ValueError(
            f"labels must be in [0, {count}) or {void} for void, got {int(array[wrong][0])}"
        )


# Colours ----------------------------------------------------------------------------------------


@cache
def _spread_colours(n: int) -> tuple[tuple[int, int, int], ...]:
    levels = np.linspace(0, 255, 12).round().astype(np.int64)
    lattice = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    # Near-black stands for void; near-white is lost on paper.
    lattice = lattice[(lattice.sum(1) > 110) & (lattice.sum(1) < 720)]
    # Rough visual weights of red, green and blue.
    space = lattice * np.sqrt([3.0, 4.0, 2.0])
    chosen = [int(np.argmin(np.abs(lattice - [230, 25, 70]).sum(1)))]
    distance = np.full(len(lattice), np.inf)
    while len(chosen) < min(n, len(lattice)):
        distance = np.minimum(distance, ((space - space[chosen[-1]]) ** 2).sum(1))
        chosen.append(int(distance.argmax()))
    colours = [tuple(int(v) for v in lattice[i]) for i in chosen]
    seen = set(colours)
    # An odd step visits every one of the 2^24 colours once.
    value = 0
    while len(colours) < n:
        value = (value + 10368889) % 2**24
        colour = (value >> 16, value >> 8 & 255, value & 255)
        if colour not in seen:
            seen.add(colour)
            colours.append(colour)
    return tuple(colours)


def default_palette(n: int) -> list[list[int]]:
    """Colours for `n` classes, each as far as possible from those before it.

    Args:
        n: number of classes, 1 to 65536.

    Returns:
        n distinct [r, g, b], 0 to 255; always the same, and a longer palette begins with a shorter.

    Raises:
        ValueError: n outside of its range.
    """
    if not 1 <= n <= 65536:
        raise ValueError(f"a palette has 1 to 65536 colours, got n = {n}")
    return [list(colour) for colour in _spread_colours(int(n))]


def colorize(
    labels: np.ndarray | torch.Tensor,
    palette: Sequence[Colour],
    void: int = 255,
    void_color: Colour = (0, 0, 0),
) -> np.ndarray:
    """Paint every pixel in the colour of its class.

    Args:
        labels: (H, W) integers in [0, K) or `void`.
        palette: K RGB colours.
        void: label of pixels without a class, where it is not a class itself.
        void_color: RGB of void pixels.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: a label that is neither a class nor void, or a wrong shape.
        TypeError: labels that are not integers.
    """
    array, colours = _label_map(labels), _palette(palette)
    _check_labels(array, len(colours), void)
    table = np.empty((len(colours) + 1, 3), dtype=np.uint8)
    table[:-1], table[-1] = colours, void_color
    return table[np.where((array >= 0) & (array < len(colours)), array, len(colours))]


# Files ------------------------------------------------------------------------------------------


def save_image(path: str | os.PathLike, image: Image.Image) -> None:
    """Write a picture so that `path` never holds half of one.

    Args:
        path: file to write; its suffix says the format. An existing file is replaced.
        image: PIL image.

    Raises:
        ValueError: a suffix that Pillow cannot write.  OSError: the folder cannot be written to.
    """
    path = Path(path)
    Image.init()
    kind = Image.EXTENSION.get(path.suffix.lower())
    if kind is None or kind not in Image.SAVE:
        raise ValueError(f"no picture format is known for {path.name!r}; name it like 'name.png'")
    with replacing(path) as temporary, open(temporary, "wb") as file:
        image.save(file, format=kind)


def save_label_png(
    path: str | os.PathLike,
    labels: np.ndarray | torch.Tensor,
    palette: Sequence[Colour],
    void: int = 255,
    void_color: Colour = (0, 0, 0),
) -> None:
    """Write a label map as a PNG whose pixel values are the class numbers.

    Up to 256 classes the file is indexed (mode P): viewers show the palette's colours, and readers
    get the classes back with `np.asarray(Image.open(path))`. With more classes in the palette a PNG
    can hold no colours, and the file is 16-bit greyscale with the same values.

    Args:
        path: file to write, ending in .png. An existing file is replaced at once, never in parts.
        labels: (H, W) integers in [0, K) or `void`.
        palette: K RGB colours, K <= 65536.
        void: label of pixels without a class, stored as it is.
        void_color: RGB of void in an indexed file, where void is not a class itself.

    Raises:
        ValueError: a label that is neither a class nor void, a path that is not a PNG, too many
            classes.  TypeError: labels that are not integers.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"a label map is written as .png, got {path.name!r}")
    array, colours = _label_map(labels), _palette(palette)
    if len(colours) > 65536:
        raise ValueError(f"a PNG label map holds at most 65536 classes, got {len(colours)}")
    _check_labels(array, len(colours), void)
    if len(colours) > 256:
        if not 0 <= void <= 65535:
            raise ValueError(f"void must be in [0, 65535] for a 16-bit file, got {void}")
        save_image(path, Image.fromarray(array.astype(np.uint16)))
        return
    if not 0 <= void <= 255:
        raise ValueError(f"void must be in [0, 255] for an indexed file, got {void}")
    entries = np.zeros((256, 3), dtype=np.uint8)
    if void >= len(colours):
        entries[void] = void_color
    entries[: len(colours)] = colours
    image = Image.fromarray(array.astype(np.uint8))
    # On an 8-bit greyscale picture this only relabels the mode to P; the values stay.
    image.putpalette(entries.tobytes())
    save_image(path, image)


# Drawing ----------------------------------------------------------------------------------------


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)


def _text_width(font, text: str) -> int:
    return math.ceil(font.getlength(text))


def _contours(labels: np.ndarray, width: int) -> np.ndarray:
    """(H, W) bool: pixels within `width` of another class to the right or below."""
    edge = np.zeros(labels.shape, dtype=bool)
    for shift in range(1, width + 1):
        edge[:, :-shift] |= labels[:, :-shift] != labels[:, shift:]
        edge[:-shift] |= labels[:-shift] != labels[shift:]
    return edge


def _legend(
    entries: list[tuple[Colour, str, str]], size: tuple[int, int], below: bool, font_size: int
) -> Image.Image:
    """Swatch, name and share of each entry, in columns that fit below or beside `size` (W, H)."""
    font = _font(font_size)
    line, pad = round(1.6 * font_size), round(0.6 * font_size)
    swatch = round(1.0 * font_size)
    name_width = max(_text_width(font, name) for _, name, _ in entries)
    share_width = max(_text_width(font, share) for _, _, share in entries)
    column = swatch + name_width + share_width + 4 * pad
    if below:
        columns = max(1, min(len(entries), (size[0] - pad) // column))
        rows = math.ceil(len(entries) / columns)
    else:
        # A low picture is extended downwards rather than followed by dozens of columns.
        rows = max((size[1] - 2 * pad) // line, 12, math.ceil(len(entries) / 4))
        rows = min(rows, len(entries))
        columns = math.ceil(len(entries) / rows)
    legend = Image.new("RGB", (columns * column + pad, rows * line + 2 * pad), _PAPER)
    draw = ImageDraw.Draw(legend)
    for i, (colour, name, share) in enumerate(entries):
        left, top = pad + i // rows * column, pad + i % rows * line
        middle = top + line // 2
        box = (left, middle - swatch // 2, left + swatch, middle - swatch // 2 + swatch)
        draw.rectangle(box, fill=tuple(int(v) for v in colour), outline=_FAINT_INK)
        draw.text((left + swatch + pad, middle), name, fill=_INK, font=font, anchor="lm")
        end = left + swatch + 2 * pad + name_width + share_width
        draw.text((end, middle), share, fill=_FAINT_INK, font=font, anchor="rm")
    return legend


def overlay(
    image: Image.Image | np.ndarray | torch.Tensor,
    labels: np.ndarray | torch.Tensor,
    palette: Sequence[Colour],
    alpha: float = 0.5,
    class_names: Sequence[str] | None = None,
    legend: bool = True,
    min_share: float = 0.001,
    contours: bool = True,
    void: int = 255,
) -> Image.Image:
    """Lay the colours of a label map over its picture and name the classes beside it.

    Args:
        image: picture of H x W pixels.
        labels: (H, W) integers in [0, K) or `void`; void pixels show the bare picture.
        palette: K RGB colours.
        alpha: share of the colours in [0, 1]; 0 is the picture.
        class_names: K names; None shows the class numbers.
        legend: whether to name the classes that are present, largest first. The legend stands below
            a wide picture and to the right of any other; the picture itself is never covered.
        min_share: classes on less than this share of the pixels are left out of the legend.
        contours: whether to draw thin dark lines between classes.
        void: label of pixels without a class, where it is not a class itself.

    Returns:
        PIL image, RGB, H x W plus the legend.

    Raises:
        ValueError: sizes that differ, a label that is neither a class nor void, alpha outside
            [0, 1], not K names.  TypeError: a picture that is not uint8, labels not of integers.
    """
    picture, array, colours = _picture(image), _label_map(labels), _palette(palette)
    if picture.shape[:2] != array.shape:
        raise ValueError(
            f"image is {picture.shape[0]} x {picture.shape[1]} but labels are "
            f"{array.shape[0]} x {array.shape[1]}"
        )
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    if class_names is not None and len(class_names) != len(colours):
        raise ValueError(f"{len(colours)} colours but {len(class_names)} class names")
    painted = colorize(array, colours, void)
    # Fixed point, so that a large picture is never held in floating point: 256 is one.
    share = round(alpha * 256)
    blended = picture.astype(np.uint16)
    blended *= 256 - share
    blended += painted.astype(np.uint16) * np.uint16(share)
    blended >>= 8
    blended = blended.astype(np.uint8)
    bare = (array == void) & (array >= len(colours))
    blended[bare] = picture[bare]
    height, width = array.shape
    if contours and alpha > 0:
        edge = _contours(array, max(1, round(min(height, width) / 700)))
        blended[edge] //= 2
    result = Image.fromarray(blended)
    if not legend:
        return result

    numbers = np.where(bare, len(colours), array)
    counts = np.bincount(numbers.ravel(), minlength=len(colours) + 1)
    entries = []
    for k in np.argsort(-counts, kind="stable"):
        if counts[k] == 0 or counts[k] < min_share * array.size:
            continue
        if k == len(colours):
            colour, name = _PAPER, "void"
        else:
            colour, name = colours[k], class_names[k] if class_names is not None else f"class {k}"
        entries.append((colour, name, f"{100 * counts[k] / array.size:.1f} %"))
    if not entries:
        return result
    font_size = min(max(round(min(height, width) / 26), 11), 72)
    key = None
    if width >= 1.2 * height and width >= 30 * font_size:
        key = _legend(entries, (width, height), True, font_size)
    if key is not None and key.height <= height:
        page = Image.new("RGB", (max(width, key.width), height + key.height), _PAPER)
        page.paste(key, (0, height))
    else:
        key = _legend(entries, (width, height), False, font_size)
        page = Image.new("RGB", (width + key.width, max(height, key.height)), _PAPER)
        page.paste(key, (width, 0))
    page.paste(result, (0, 0))
    return page


def side_by_side(
    panels: Sequence[tuple[str, Image.Image | np.ndarray | torch.Tensor]],
    legend: Sequence[tuple[Colour, str, str]] = (),
) -> Image.Image:
    """Put pictures in one row, each under its title, and one legend below them all.

    Args:
        panels: (title, picture) pairs; the pictures keep their sizes.
        legend: (RGB colour, name, note) entries, such as a class and its IoU.

    Returns:
        PIL image, RGB.

    Raises:
        ValueError: no panels.  TypeError: a picture that is not uint8.
    """
    if not panels:
        raise ValueError("side_by_side needs at least one (title, image) panel")
    pictures = [(str(title), Image.fromarray(_picture(image))) for title, image in panels]
    tallest = max(picture.height for _, picture in pictures)
    font_size = min(max(round(tallest / 22), 12), 72)
    font = _font(font_size)
    gap, header = round(0.6 * font_size), round(1.9 * font_size)
    cells = [max(picture.width, _text_width(font, title)) for title, picture in pictures]
    width, height = sum(cells) + gap * (len(cells) + 1), tallest + header + gap
    key = _legend(list(legend), (width, height), True, font_size) if legend else None
    if key is not None:
        page = Image.new("RGB", (max(width, key.width), height + key.height), _PAPER)
        page.paste(key, (0, height))
    else:
        page = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(page)
    left = gap
    for (title, picture), cell in zip(pictures, cells, strict=True):
        draw.text((left, header // 2), title, fill=_INK, font=font, anchor="lm")
        page.paste(picture, (left, header))
        left += cell + gap
    return page
