"""Pictures in, label maps out: sliding windows, scales and flips by the official protocol.

A picture is normalised. For each scale, and for its mirror image if asked, it is resized (to a
shorter side if the config says so), enlarged until a window fits, and cut into windows, whose patch
logits are kept. `ops/windows.py` does the rest: windows averaged, resized to the output,
mirrored back, softmax, views averaged, argmax.
"""

import contextlib
import math
import numbers
import os
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from segmenter_fast.images import load_image, to_rgb
from segmenter_fast.ops.upsample import label_dtype
from segmenter_fast.ops.window_geometry import WindowView, window_anchors
from segmenter_fast.ops.windows import (
    PROBABILITIES,
    WindowLogits,
    window_probabilities_reference,
)

MAX_ENLARGED_PIXELS = 1 << 25
MAX_ENLARGEMENT = 16
"""An image that would be enlarged past so many pixels, and to more than so many times its own, is
refused: a strip of 1 x 300 would be cut into thousands of windows."""


def _network_input(model: nn.Module, image) -> tuple[Tensor, bool]:
    """(1, 3, H, W) on the model's device in its dtype, and whether `image` was a picture."""
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise TypeError("model has no parameters, so no device and dtype to put the image on")
    device, dtype = parameter.device, parameter.dtype
    if isinstance(image, (str, os.PathLike)):
        image = load_image(image)
    if isinstance(image, Image.Image):
        image = np.asarray(to_rgb(image))
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise TypeError(
                f"an array must be uint8 (H, W, 3), got {image.dtype}; network input is passed as "
                "a floating-point tensor (3, H, W)"
            )
        if image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"an array must be uint8 (H, W, 3), got shape {image.shape}")
        image = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if not isinstance(image, Tensor):
        raise TypeError(
            "image must be a path, a PIL image, a uint8 array (H, W, 3), a uint8 tensor (3, H, W) "
            f"or a floating-point tensor (3, H, W); got {type(image).__name__}"
        )
    if image.ndim == 4 and image.shape[0] == 1:
        image = image[0]
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(
            f"an image tensor must be one image (3, H, W), got {tuple(image.shape)}; "
            "batches go through model.labels"
        )
    if 0 in image.shape:
        raise ValueError(f"image has no pixels: {tuple(image.shape)}")

    if image.is_floating_point():
        bad = int(image.numel() - torch.isfinite(image).sum())
        if bad:
            raise ValueError(f"image has {bad} values that are NaN or infinite")
        return image.detach().to(device, dtype)[None], False
    if image.dtype != torch.uint8:
        raise TypeError(
            f"an image tensor must be uint8, or floating point and normalised; got {image.dtype}"
        )
    config = getattr(model, "config", None)
    if config is None:
        raise ValueError(
            "model.config is None, so how to normalise a picture is not known; pass a normalised "
            "floating-point tensor (3, H, W), or build the model with a SegmenterConfig"
        )
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    mean, std = (
        torch.tensor(v, dtype=exact, device=device)[:, None, None]
        for v in (config.mean, config.std)
    )
    pixels = image.to(device).to(exact).div_(255)
    return pixels.sub_(mean).div_(std).to(dtype)[None], True


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(image.shape[2:]) == size:
        return image
    return F.interpolate(image, size=size, mode="bilinear", align_corners=False)


def _check_enlarged(size: tuple[int, int], target: tuple[int, int], why: str) -> None:
    """ValueError if an image of `size` would be enlarged out of all proportion."""
    pixels = math.prod(target)
    if pixels > MAX_ENLARGED_PIXELS and pixels > MAX_ENLARGEMENT * math.prod(size):
        raise ValueError(
            f"an image of {size[0]} x {size[1]} would have to be enlarged to {target[0]} x "
            f"{target[1]} {why}"
        )


def rescaled_size(
    size: tuple[int, int], short_side: float, long_side: float | None = None
) -> tuple[int, int]:
    """(H, W) scaled by one factor, the largest for which neither side is above its bound.

    Source: mmcv, rescale_size, which official evaluation resizes with.
    """
    factor = short_side / min(size)
    if long_side is not None:
        factor = min(long_side / max(size), factor)
    return max(1, int(size[0] * factor + 0.5)), max(1, int(size[1] * factor + 0.5))


def _scaled(
    image: Tensor, scale: float, short_side: int | None, long_side: int | None, antialias: bool
) -> Tensor:
    """(1, 3, H, W) resized for one scale, from its own pixels."""
    height, width = size = tuple(image.shape[2:])
    if short_side is None:
        scaled = (int(height * scale + 0.5), int(width * scale + 0.5))
    else:
        # Bounds of scales are whole pixels in mmsegmentation, whose MultiScaleFlipAug is official.
        short = int(short_side * scale)
        long = None if long_side is None else int(long_side * scale)
        scaled = rescaled_size(size, short, long) if 0 not in (short, long) else (0, 0)
    if 0 in scaled:
        raise ValueError(f"scale {scale} leaves no pixels of an image of {height} x {width}")
    if short_side is None:
        _check_enlarged(size, scaled, f"at scale {scale:g}; use a smaller scale")
    else:
        at = "" if scale == 1 else f" at scale {scale:g}"
        why = f"for a shorter side of {short_side}{at}; use a smaller short_side or "
        _check_enlarged(size, scaled, why + 'short_side="original"')
    if short_side is None or not antialias or scaled == size:
        return _resize(image, scaled)
    # A photograph is often shrunk tenfold here, and every pixel should count. Training crops are
    # shrunk in the same way. PyTorch has this for 32 and 64 bits only.
    exact = image if image.dtype == torch.float64 else image.float()
    return F.interpolate(exact, size=scaled, mode="bilinear", antialias=True).to(image)


def network_input(
    model: nn.Module, image, short_side: int | str | None = None
) -> tuple[Tensor, tuple[int, int]]:
    """What `predict` mirrors and cuts into windows at scale 1: normalised, shorter side resized.

    Args:
        model: a `SegmenterModel`.
        image, short_side: see `predict`.

    Returns:
        (1, 3, h, w) on the model's device in its dtype, and (H, W) of the image as it was given.

    Raises:
        ValueError, TypeError, FileNotFoundError: see `predict`.
    """
    [pixels], size = _network_inputs(model, image, (1.0,), short_side)
    return pixels, size


def _network_inputs(
    model: nn.Module,
    image,
    scales: Sequence[float],
    short_side: int | str | None = None,
    long_side: int | None = None,
    antialias: bool = True,
) -> tuple[list[Tensor], tuple[int, int]]:
    """`network_input` at each scale, with the other options of `predict`."""
    if short_side not in (None, "original"):
        _positive("short_side", short_side, ("original",))
    if long_side is not None:
        _positive("long_side", long_side)
    pixels, picture = _network_input(model, image)
    if short_side is None and picture:
        short_side = model.config.short_side
    if short_side == "original":
        short_side = None
    if short_side is None and long_side is not None:
        raise ValueError(f"long_side {long_side} needs short_side, too, which is not set")
    images = [_scaled(pixels, scale, short_side, long_side, antialias) for scale in scales]
    return images, tuple(pixels.shape[2:])


def _enlarge(image: Tensor, window: int) -> Tensor:
    """Bring the shorter side up to `window`, the longer in proportion, truncated to int."""
    height, width = image.shape[2:]
    if min(height, width) >= window:
        return image
    if height < width:
        size = (window, int(width / height * window))
    else:
        size = (int(height / width * window), window)
    why = f'before a window of {window} fits; use a smaller window_size or window_size="whole"'
    _check_enlarged((height, width), size, why)
    return _resize(image, size)


# ------------------------------------------------------------------------------------------ options
def _positive(name: str, value, words: Sequence[str] = ()) -> None:
    """TypeError or ValueError unless `value` is an int above zero."""
    choices = "".join(f' or "{word}"' for word in words)
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        kind = ValueError if isinstance(value, str) else TypeError
        raise kind(f"{name} must be a positive int{choices}, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be a positive int{choices}, got {value}")


def _windows(config, window_size, window_stride) -> tuple[int | None, int | None]:
    """(size, stride) in pixels, or (None, None) for the whole image at once."""
    own = getattr(config, "window_size", None)
    if window_size is None:
        window_size = own
    if window_size is None or window_size == "whole":
        if window_stride is not None:
            raise ValueError(
                f"window_stride {window_stride} needs windows, but the network sees the whole "
                "image at once; give a window_size, too, or leave the stride out"
            )
        return None, None
    _positive("window_size", window_size, ("whole",))
    if window_stride is None and window_size == own:
        window_stride = getattr(config, "window_stride", None)
    if window_stride is None:
        window_stride = window_size
    _positive("window_stride", window_stride)
    if window_stride > window_size:
        raise ValueError(
            f"window_stride {window_stride} is larger than window_size {window_size}: pixels "
            "between windows would have no prediction"
        )
    return int(window_size), int(window_stride)


def _scales(scales) -> list[float]:
    if not isinstance(scales, (Sequence, np.ndarray)) or isinstance(scales, str):
        raise TypeError(f"scales must be a sequence of numbers, got {scales!r}")
    if len(scales) == 0:
        raise ValueError("scales is empty: at least one is needed, such as (1.0,)")
    for scale in scales:
        if not isinstance(scale, numbers.Real) or isinstance(scale, bool):
            raise TypeError(f"scales must be numbers, got {scale!r}")
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scales must be positive and finite, got {scale!r}")
    return [float(scale) for scale in scales]


def _output_size(size, default: tuple[int, int]) -> tuple[int, int]:
    if size is None:
        return default
    if not isinstance(size, (tuple, list, torch.Size)) or len(size) != 2:
        raise ValueError(f"size must be (H, W), got {size!r}")
    for value in size:
        _positive("size", value)
    return int(size[0]), int(size[1])


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch off dropout and stochastic depth, and put every module's mode back afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


# ------------------------------------------------------------------------------------------ windows
def _views(
    model: nn.Module,
    images: Sequence[Tensor],
    window_size: int | None,
    window_stride: int | None,
    flip: bool,
    batch_size: int,
) -> list[WindowView]:
    """Run the model over the windows of each (1, 3, H, W) and, with `flip`, its mirror image."""
    copies = [(image, side) for image in images for side in ((False, True) if flip else (False,))]
    geometry, crops = [], []
    grids: list[list[Tensor]] = [[] for _ in copies]

    def run() -> None:
        logits = model.patch_logits(torch.cat([crop for _, crop in crops])).grid
        for (view, _), grid in zip(crops, logits, strict=True):
            grids[view].append(grid)
        crops.clear()

    for view, (image, mirrored) in enumerate(copies):
        copy = image.flip(-1) if mirrored else image
        if window_size is not None:
            copy = _enlarge(copy, window_size)
        size = tuple(copy.shape[2:])
        window = size if window_size is None else (window_size, window_size)
        stride = max(size) if window_size is None else window_stride
        geometry.append((size, window, stride))
        for top in window_anchors(size[0], window[0], stride):
            for left in window_anchors(size[1], window[1], stride):
                crop = copy[:, :, top : top + window[0], left : left + window[1]]
                if crops and (len(crops) == batch_size or crops[0][1].shape != crop.shape):
                    run()
                crops.append((view, crop))
    run()
    bad = sum(int(grid.numel() - torch.isfinite(grid).sum()) for view in grids for grid in view)
    if bad:
        raise ValueError(
            f"the model's output has {bad} logits that are NaN or infinite: its weights are "
            f"damaged or its arithmetic ({images[0].dtype}) overflows"
        )
    return [
        WindowView(torch.stack(grid), size, window, stride, model.patch_size, mirrored)
        for grid, (size, window, stride), (_, mirrored) in zip(grids, geometry, copies, strict=True)
    ]


def predict(
    model: nn.Module,
    image: "str | os.PathLike | Image.Image | np.ndarray | Tensor",
    window_size: int | str | None = None,
    window_stride: int | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    size: tuple[int, int] | None = None,
    return_probabilities: str = "none",
    batch_size: int = 4,
    short_side: int | str | None = None,
    long_side: int | None = None,
    antialias: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Label every pixel of one picture: argmax of the softmax averaged over scales and flips.

    Defaults come from `model.config`. Without windows in the config, or with "whole", the network
    sees the whole image at once, padded to whole patches. The model runs in evaluation mode,
    whatever mode it is in, and without gradients. Full-resolution logits exist for one tile at a
    time, except with backend "reference", which takes the official steps literally and
    materialises them.

    Args:
        model: a `SegmenterModel`.
        image: a path (its EXIF orientation is applied), a PIL image (taken as it lies), a uint8
            array (H, W, 3) or a uint8 tensor (3, H, W): scaled to [0, 1] and normalised as the
            config says. A floating-point tensor (3, H, W) is network input, normalised already.
            Tensors may have a leading batch dimension of 1.
        window_size: side of a window in pixels; "whole" for one window that is the image. An image
            whose shorter side is less is enlarged to it.
        window_stride: pixels between windows, at most `window_size`. None is the config's if the
            window has the config's size, and otherwise `window_size`: windows side by side.
        scales: factors by which the image, or `short_side` and `long_side`, are multiplied, each
            giving one view.
        flip: adds the mirror image of each view.
        size: (H, W) in pixels of the answer; None is the image's own size.
        return_probabilities: "none"; "top1" for the largest probability of each pixel; "all".
        batch_size: windows per forward pass. Memory grows with it, the answer does not change.
        short_side: pixels to which the image's shorter side is resized, the longer in proportion;
            "original" leaves it. None is the config's for a picture and "original" for network
            input.
        long_side: pixels that the longer side has at most, which may leave the shorter one below
            `short_side`; None is no such bound.
        antialias: when resizing to `short_side`, average all the pixels that a new one covers;
            False interpolates between four, as official evaluation does.

    Returns:
        labels: (H, W) on the model's device; uint8, int16 from 257 classes, int32 from 32768.
        With probabilities, (labels, probabilities): (H, W) for "top1", (K, H, W) for "all", in
        float32, or float64 for a float64 model.

    Raises:
        ValueError: shapes or options that make no sense, NaN or infinity in the image or in the
            model's output, an unreadable file.
        TypeError: unsupported types.
        FileNotFoundError: no such file.
        BackendError: the model's backend cannot run on its device.

    Source: Strudel et al. 2021, section 4.1 (inference); official segm/model/utils.py, inference.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "patch_logits"):
        raise TypeError(f"model must be a SegmenterModel, got {type(model).__name__}")
    config = getattr(model, "config", None)
    window_size, window_stride = _windows(config, window_size, window_stride)
    scales = _scales(scales)
    _positive("batch_size", batch_size)
    if return_probabilities not in PROBABILITIES:
        raise ValueError(
            f"return_probabilities must be one of {', '.join(PROBABILITIES)}; "
            f"got {return_probabilities!r}"
        )

    with torch.inference_mode(), evaluation_mode(model):
        images, image_size = _network_inputs(model, image, scales, short_side, long_side, antialias)
        size = _output_size(size, image_size)
        views = _views(model, images, window_size, window_stride, bool(flip), batch_size)
    # Outside inference mode, so that what is returned is an ordinary tensor.
    backend = getattr(model, "backend", "auto")
    if backend == "reference":
        return _read_reference(views, size, return_probabilities)
    logits = WindowLogits(views, size, backend)
    if return_probabilities == "none":
        return logits.labels()
    return logits.labels_and_probabilities(top1=return_probabilities == "top1")


@torch.no_grad()
def _read_reference(views: list[WindowView], size: tuple[int, int], wanted: str):
    probabilities = window_probabilities_reference(views, size)
    labels = probabilities.argmax(0).to(label_dtype(len(probabilities)))
    if wanted == "none":
        return labels
    return labels, probabilities if wanted == "all" else probabilities.amax(0)
