"""Mean intersection over union of a model on a dataset."""

import torch
from torch.utils.data import Subset
from tqdm import tqdm

from segmenter_fast.distributed import rank, summed, world_size
from segmenter_fast.inference import predict
from segmenter_fast.metrics import iou, mean_iou, pixel_accuracy
from segmenter_fast.ops.confusion import confusion_matrix


@torch.inference_mode()
def evaluate(
    model,
    dataset,
    progress: bool = True,
    ignore_index: int | None = None,
    shared: bool = False,
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
        **protocol: of `predict`: window_size, window_stride, scales, flip, short_side.

    Returns:
        dict with "miou", "pixel_accuracy", "iou" (a list by class, None where a class never
        occurs), "images", and the "confusion" matrix (rows are the truth) as a tensor.

    Source: Strudel et al. 2021, section 4.1 (mean IoU over the whole split).
    """
    if ignore_index is None:
        ignore_index = getattr(dataset, "ignore_index", 255)
    total = torch.zeros(model.n_cls, model.n_cls, dtype=torch.int64)
    device = next(model.parameters()).device
    first, step = (rank(), world_size()) if shared else (0, 1)
    part = Subset(dataset, range(first, len(dataset), step))
    for index in tqdm(range(len(part)), desc="evaluate", unit="image", disable=not progress):
        image, target = part[index]
        labels = predict(model, image.to(device), **protocol)
        total += confusion_matrix(labels.cpu(), target, model.n_cls, ignore_index)
    if shared:
        total = summed(total.to(device)).cpu()
    by_class = iou(total)
    return {
        "miou": mean_iou(total),
        "pixel_accuracy": pixel_accuracy(total),
        "iou": [None if value.isnan() else float(value) for value in by_class],
        "images": len(dataset),
        "confusion": total,
    }
