"""Mean intersection over union of a model on a dataset."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from segmenter_fast.distributed import gathered, rank, summed, world_size
from segmenter_fast.inference import predict
from segmenter_fast.metrics import (
    frequency_weighted_iou,
    iou,
    mean_accuracy,
    mean_iou,
    pixel_accuracy,
)
from segmenter_fast.object_size import SIZES, check_areas, object_sizes
from segmenter_fast.ops.confusion import confusion_matrix
from segmenter_fast.ops.upsample import check_labels


class _Samples(Dataset):
    """Some samples of a dataset; with `areas`, labels are numbered on for each size of objects.

    Class k in a small object is k, in a medium one `classes` + k, in a large one 2 `classes` + k,
    and what is ignored is -1, so that one count is of all sizes.
    """

    def __init__(self, dataset, indices: Sequence[int], classes: int, ignore_index: int, areas):
        self.dataset, self.indices = dataset, indices
        self.classes, self.ignore_index, self.areas = classes, ignore_index, areas

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> tuple[int, Tensor, Tensor, Tensor | int]:
        index = self.indices[number]
        image, target = self.dataset[index]
        if self.areas is None:
            return index, image, target, 0
        ignored = target == self.ignore_index
        with _naming(self.dataset, index):
            check_labels(target.masked_fill(ignored, 0), self.classes, self.ignore_index)
        sizes, objects = object_sizes(target, self.ignore_index, self.areas)
        numbered = target + self.classes * sizes.int()
        return index, image, numbered.masked_fill_(ignored, -1), objects


@contextlib.contextmanager
def _naming(dataset, index: int) -> Iterator[None]:
    """Put the name of the sample before what is wrong with it."""
    try:
        yield
    except ValueError as error:
        where = picture_of(dataset, index) or f"image {index}"
        raise ValueError(f"{where}: {error}") from error


def picture_of(dataset, index: int) -> Path | None:
    """The file of a sample's picture, through subsets; None for datasets without files."""
    while isinstance(dataset, Subset):
        dataset, index = dataset.dataset, dataset.indices[index]
    files = getattr(dataset, "files", None)
    return None if files is None else Path(files[index][0])


def check_weights(model: torch.nn.Module) -> None:
    """ValueError that names the parameters which hold NaN or infinity."""
    bad = [name for name, value in model.named_parameters() if not value.isfinite().all()]
    if bad:
        raise ValueError(
            f"{len(bad)} of the model's parameters hold NaN or infinity, such as "
            f"{', '.join(bad[:3])}: the weights are damaged, or their training diverged"
        )


@torch.inference_mode()
def evaluate(
    model,
    dataset,
    progress: bool = True,
    ignore_index: int | None = None,
    shared: bool = False,
    object_areas: Sequence[int] | None = None,
    workers: int = 0,
    each: Callable[[int, Tensor], None] | None = None,
    **protocol,
) -> dict:
    """Predict every image of a dataset and compare with its labels at their own size.

    Args:
        model: a `SegmenterModel`.
        dataset: maps an index to (uint8 image (3, H, W), integer labels (H, W)).
        progress: show a progress bar.
        ignore_index: label without a class; None takes the dataset's own, or 255.
        shared: every process of torch.distributed calls this, does its share of the images, and
            gets the result of all.
        object_areas: two numbers of pixels, such as `object_size.AREAS`, from which objects are
            medium and large: counts by object size, too.
        workers: processes that read images ahead; 0 reads in this one.
        each: called with the index and the labels (H, W), on the CPU, of each image of this
            process.
        **protocol: of `predict`: window_size, window_stride, scales, flip, short_side, long_side,
            antialias, batch_size.

    Returns:
        dict with "miou", "pixel_accuracy", "mean_accuracy", "frequency_weighted_iou", "iou" (a list
        by class, None where a class never occurs), "images", "seconds" of the slowest process with
        reading and counting, "images_per_second", and the "confusion" matrix (rows are the truth)
        as a tensor. Numbers of which nothing was counted are NaN. With `object_areas`, "objects"
        maps each of `object_size.SIZES` to "iou" (None for classes that have no objects of the
        size), its mean "miou", the number of "objects", and "confusion".

    Raises:
        ValueError: NaN or infinity in the weights; and, with the image named, a label out of range
            or what `predict` refuses.

    Source: Strudel et al. 2021, section 4.1 (mean IoU over the whole split).
    """
    if ignore_index is None:
        ignore_index = getattr(dataset, "ignore_index", 255)
    if object_areas is not None:
        object_areas = check_areas(object_areas)
    check_weights(model)
    device, classes = next(model.parameters()).device, model.n_cls
    layers = 1 if object_areas is None else len(SIZES)
    total = torch.zeros(layers, classes, classes, dtype=torch.int64)
    objects = torch.zeros(layers, dtype=torch.int64)

    first, step = (rank(), world_size()) if shared else (0, 1)
    indices = range(first, len(dataset), step)
    part = _Samples(dataset, indices, classes, ignore_index, object_areas)
    # A generator of its own: training that goes on afterwards draws what it would have drawn.
    loader = DataLoader(part, batch_size=None, num_workers=workers, generator=torch.Generator())
    ignored = ignore_index if layers == 1 else -1
    started = time.perf_counter()
    bar = tqdm(loader, desc="evaluate", unit="image", disable=not progress)
    for index, image, target, of_each_size in bar:
        with _naming(dataset, index):
            labels = predict(model, image.to(device), **protocol).cpu()
            counts = confusion_matrix(labels, target, layers * classes, ignored)
        total += counts[:, :classes].view(layers, classes, classes)
        objects += of_each_size
        if each is not None:
            each(index, labels)
        if progress and total.any():
            bar.set_postfix_str(f"mIoU {100 * mean_iou(total.sum(0)):.2f} %", refresh=False)
    seconds = torch.tensor(time.perf_counter() - started, dtype=torch.float64)
    if shared:
        total, objects = summed(total.to(device)).cpu(), summed(objects.to(device)).cpu()
        seconds = gathered(seconds.to(device)).max().cpu()
    whole = total.sum(0)
    result = {
        "miou": mean_iou(whole),
        "pixel_accuracy": pixel_accuracy(whole),
        "mean_accuracy": mean_accuracy(whole),
        "frequency_weighted_iou": frequency_weighted_iou(whole),
        "iou": _by_class(whole),
        "images": len(dataset),
        "seconds": float(seconds),
        "images_per_second": len(dataset) / float(seconds),
        "confusion": whole,
    }
    if object_areas is not None:
        result["objects"] = {
            name: {
                "miou": mean_iou(total[size], in_truth=True),
                "iou": _by_class(total[size], in_truth=True),
                "objects": int(objects[size]),
                "confusion": total[size],
            }
            for size, name in enumerate(SIZES)
        }
    return result


def _by_class(confusion: Tensor, in_truth: bool = False) -> list[float | None]:
    values = iou(confusion)
    if in_truth:
        values = values.where(confusion.sum(1) > 0, torch.nan)
    return [None if value.isnan() else float(value) for value in values]


if __name__ == "__main__":
    import sys

    from segmenter_fast.cli import main

    main(["evaluate", *sys.argv[1:]])
