"""The library shown on one procedural scene: a picture, its accuracy, and where the time goes."""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from segmenter_fast.backend import check_backend, resolve_backend
from segmenter_fast.data.scenes import Scenes
from segmenter_fast.inference import predict
from segmenter_fast.metrics import iou, mean_iou, pixel_accuracy
from segmenter_fast.model import SegmenterModel
from segmenter_fast.ops.confusion import confusion_matrix
from segmenter_fast.ops.upsample_argmax import upsample_argmax
from segmenter_fast.visualize import colorize, save_image, side_by_side

# The dense head of the published ADE20K models: 150 classes, patch 16, crops of 512.
HEAD_CLASSES, HEAD_GRID, HEAD_SIZE = 150, (32, 32), (512, 512)
# Seconds after which no further round of a comparison begins, so that a busy machine ends too.
TIMING_BUDGET = 20.0


def _interleaved(
    contestants: Sequence[Callable[[], Tensor]], repeats: int, tick: Callable[[], None]
) -> tuple[list[float], list[Tensor]]:
    """Median milliseconds of each contestant, taken in turns, and what each one returned.

    Turns share whatever else the machine is doing; one round before them is not counted. On a slow
    machine `repeats` is cut short, after one round at least.
    """
    began = time.perf_counter()
    answers = [run() for run in contestants]
    times: list[list[float]] = [[] for _ in contestants]
    for _ in range(repeats):
        for run, spent in zip(contestants, times, strict=True):
            start = time.perf_counter()
            run()
            spent.append(1000.0 * (time.perf_counter() - start))
        tick()
        if time.perf_counter() - began > TIMING_BUDGET:
            break
    return [statistics.median(spent) for spent in times], answers


def _agreement(a: Tensor, b: Tensor) -> float:
    return float((a.long() == b.long()).double().mean())


def _comparison(times: list[float], answers: list[Tensor]) -> dict[str, float]:
    official, fast = times
    return {
        "official_ms": official,
        "fast_ms": fast,
        "speedup": official / fast,
        "label_agreement": _agreement(*answers),
    }


def _smooth_logits(seed: int) -> Tensor:
    """(1, 150, 32, 32) logits that vary slowly from patch to patch, as a trained network's do."""
    generator = torch.Generator().manual_seed(seed)
    coarse = 3.0 * torch.randn(1, HEAD_CLASSES, 5, 5, generator=generator)
    return F.interpolate(coarse, size=HEAD_GRID, mode="bicubic")


def _official_head(logits: Tensor) -> Tensor:
    """Full-resolution logits, softmax, argmax.

    Source: official segm/model/segmenter.py, Segmenter.forward; segm/model/utils.py, inference.
    """
    return F.interpolate(logits, size=HEAD_SIZE, mode="bilinear").softmax(1).argmax(1)


def _class_table(names: Sequence[str], share: Tensor, by_class: Tensor) -> Table:
    table = Table(title="IoU of each class", title_justify="left")
    table.add_column("class")
    table.add_column("share of pixels", justify="right")
    table.add_column("IoU", justify="right")
    for name, part, value in zip(names, share.tolist(), by_class.tolist(), strict=True):
        # NaN is the one number that differs from itself: the class never occurred.
        shown = "-" if value != value else f"{100 * value:.1f} %"
        table.add_row(name, f"{100 * part:.1f} %", shown)
    return table


def _time_table(rows: Sequence[tuple[str, dict[str, float]]]) -> Table:
    table = Table(title="official algorithm and fast path, medians in turns", title_justify="left")
    table.add_column("what")
    for heading in ("official", "fast", "ratio", "labels equal"):
        table.add_column(heading, justify="right")
    for what, row in rows:
        table.add_row(
            what,
            f"{row['official_ms']:.1f} ms",
            f"{row['fast_ms']:.1f} ms",
            f"{row['speedup']:.1f} x",
            f"{100 * row['label_agreement']:.3f} %",
        )
    return table


@torch.inference_mode()
def run_demo(
    weights: str | os.PathLike = "scenes",
    size: tuple[int, int] = (384, 512),
    seed: int = 29,
    output: str | os.PathLike = "segmenter_fast_demo.png",
    repeats: int = 7,
    backend: str = "auto",
    console: Console | None = None,
    scenes: int = 24,
) -> dict:
    """Predict scenes that were never trained on, on the CPU, and show how well and how fast.

    Writes input | truth | prediction of the first scene as one picture, prints the mean IoU over
    all scenes with a table by class, and times the official algorithm (full-resolution logits,
    softmax, argmax) beside the fast path: from picture to label map with these weights, and the
    dense head alone at the size of the published ADE20K models. Bundled weights need no download.

    Args:
        weights: what `SegmenterModel.from_pretrained` takes; trained on `Scenes`.
        size: (H, W) of the scenes in pixels.
        seed: of the scenes, from their split "val".
        output: picture to write; an existing one is replaced.
        repeats: timed rounds; fewer on a machine that needs longer than about 20 s for them.
        backend: of the fast path.
        console: where to print; None is standard output.
        scenes: number of scenes that the mean IoU is taken over.

    Returns:
        dict with "weights", "backend" (the one that ran), "size", "scenes", "miou", "miou_scene",
        "pixel_accuracy", "iou" (class name to value, None where the class never occurs), "image"
        and "head" (each a dict of "official_ms", "fast_ms", "speedup", "label_agreement"),
        "seconds" and "output" (the picture's path).

    Raises:
        ValueError: weights of other classes, a count below 1, an output that is no picture file.
        BackendError: a backend that cannot run here.
    """
    started = time.perf_counter()
    console = console if console is not None else Console()
    output = Path(output)
    for name, value in (("repeats", repeats), ("scenes", scenes)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
    if output.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"output must end in .png, .jpg or .webp, got {output.name!r}")
    if not output.parent.is_dir():
        raise ValueError(f"output's folder {str(output.parent)!r} does not exist: create it first")
    check_backend(backend)
    dataset = Scenes(scenes, size, seed, split="val")
    model = SegmenterModel.from_pretrained(weights, backend=backend).eval()
    if model.n_cls != dataset.num_classes:
        raise ValueError(
            f"weights {str(weights)!r} know {model.n_cls} classes, but the demo's scenes have "
            f"{dataset.num_classes}; take weights trained on segmenter_fast.data.Scenes"
        )
    used = resolve_backend(backend, "cpu")
    names = list(dataset.class_names)

    def labels_by(chosen: str, image: Tensor) -> Tensor:
        model.backend = chosen
        return predict(model, image)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("predicting scenes", total=scenes + 2 * repeats)

        def tick() -> None:
            progress.advance(task)

        total = torch.zeros(model.n_cls, model.n_cls, dtype=torch.int64)
        for index in range(scenes):
            image, target = dataset[index]
            labels = labels_by(backend, image)
            confusion = confusion_matrix(labels, target, model.n_cls, dataset.ignore_index)
            total += confusion
            if index == 0:
                first = (image, target, labels, confusion)
            tick()

        image, target, labels, confusion = first
        progress.update(task, description="timing picture to labels")
        whole = _comparison(
            *_interleaved(
                (lambda: labels_by("reference", image), lambda: labels_by(backend, image)),
                repeats,
                tick,
            )
        )
        progress.update(task, description="timing the dense head")
        logits = _smooth_logits(seed)
        head = _comparison(
            *_interleaved(
                (
                    lambda: _official_head(logits),
                    lambda: upsample_argmax(logits, HEAD_SIZE, backend=backend),
                ),
                repeats,
                tick,
            )
        )

    by_class, by_class_here = iou(total), iou(confusion)
    present = [k for k in range(model.n_cls) if int(confusion[k].sum() + confusion[:, k].sum())]
    miou, miou_scene = mean_iou(total), mean_iou(confusion)
    page = side_by_side(
        [
            ("input", image),
            ("truth", colorize(target, dataset.palette)),
            (f"prediction, mIoU {100 * miou_scene:.1f} %", colorize(labels, dataset.palette)),
        ],
        legend=[
            (dataset.palette[k], names[k], f"IoU {100 * float(by_class_here[k]):.0f} %")
            for k in present
        ],
    )
    save_image(output, page)

    height, width = dataset.size
    console.print(
        f"{scenes} scenes of {height} x {width}, never trained on: mIoU {100 * miou:.1f} %, "
        f"pixel accuracy {100 * pixel_accuracy(total):.1f} %\n"
        f"the scene on the picture: mIoU {100 * miou_scene:.1f} %"
    )
    console.print(_class_table(names, total.sum(1) / total.sum(), by_class))
    console.print(
        _time_table((("picture to labels", whole), (f"dense head, K = {HEAD_CLASSES}", head)))
    )
    console.print(
        "official: logits of every pixel, softmax, argmax\n"
        f"dense head: {HEAD_GRID[0]} x {HEAD_GRID[1]} patches to {HEAD_SIZE[0]} x {HEAD_SIZE[1]} "
        "pixels, smooth synthetic logits"
    )
    console.print(f"fast path: backend {used}, {torch.get_num_threads()} threads on the CPU")
    console.print(f"picture: {output}", soft_wrap=True)
    return {
        "weights": str(weights),
        "backend": used,
        "size": dataset.size,
        "scenes": scenes,
        "miou": miou,
        "miou_scene": miou_scene,
        "pixel_accuracy": pixel_accuracy(total),
        "iou": {
            name: None if value != value else value
            for name, value in zip(names, by_class.tolist(), strict=True)
        },
        "image": whole,
        "head": head,
        "seconds": time.perf_counter() - started,
        "output": str(output),
    }
