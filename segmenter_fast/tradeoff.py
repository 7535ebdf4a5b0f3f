"""Images per second against mIoU: the paper's figure 4, measured on the machine at hand.

Speed needs no training, so every variant is timed with random weights, images to label maps. mIoU
is either measured (of weights that are given, or of the small models that this project trained on
procedural scenes) or published; a row says which, and where it comes from. That of given weights is
measured in each precision on a CPU, the others are of float32.

A machine's speed wanders. Every model is therefore timed in several passes over all models, and its
figure is the median over the passes.
"""

import csv
import gc
import io
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from segmenter_fast.backend import PRECISIONS as NATIVE_PRECISIONS
from segmenter_fast.backend import BackendError, resolve_backend
from segmenter_fast.checkpoint import load_checkpoint
from segmenter_fast.config import SegmenterConfig
from segmenter_fast.data.scenes import Scenes
from segmenter_fast.files import replacing
from segmenter_fast.published import published
from segmenter_fast.variants import create_config, create_model_from_config

SMALL_MODELS = Path(__file__).parent / "data" / "small_models.json"
SIZES, PATCHES = "TSBL", (8, 16, 32)
# Of parameters and images, where layers run one by one.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PARTS = ("patch embedding", "attention", "linear layers", "head", "other")
BATCHES = (1, 2, 4, 8, 16, 32, 64)
# Batches grow while they gain more than this.
GAIN = 1.03
IN_PYTORCH = " in PyTorch"
"""Behind the names of variants that benchmarks/bench_peers.py runs without our kernels."""


def variants() -> list[str]:
    """T, S, B and L, linear and mask, patches of 8, 16 and 32: small ones first."""
    return [
        f"Seg-{size}{decoder}/{patch}"
        for size in SIZES
        for patch in reversed(PATCHES)
        for decoder in ("", "-Mask")
    ]


def is_native(device: torch.device | str, backend: str) -> bool:
    """Whether `SegmenterModel.precision` chooses the precision there, and not the dtype."""
    return resolve_backend(backend, device) == "native"


def precisions(device: torch.device | str, backend: str = "auto") -> tuple[str, ...]:
    """Names of the precisions that can be timed there."""
    return NATIVE_PRECISIONS if is_native(device, backend) else tuple(DTYPES)


class Task(NamedTuple):
    """A model to be timed, and what is known of its mIoU.

    Args:
        name: of the row.
        config: architecture and crop; the images have the size of the crop.
        precision: one of `precisions`.
        miou: in percent, or None.
        kind: "measured" or "published", or "" without an mIoU.
        source: where the mIoU comes from.
        dataset: it is of.
    """

    name: str
    config: SegmenterConfig
    precision: str
    miou: float | None = None
    kind: str = ""
    source: str = ""
    dataset: str = ""


class Speed(NamedTuple):
    """What was measured of a task.

    Args:
        images_per_second: at batch 1, median over the passes.
        best_images_per_second, best_batch: of the batch with the most.
        parts: share of the time by `PARTS`, at batch 1.
        reason: why it was not measured, else "".
    """

    images_per_second: float | None
    best_images_per_second: float | None = None
    best_batch: int | None = None
    parts: dict[str, float] | None = None
    reason: str = ""


def published_tasks(
    names: Iterable[str], precisions: Iterable[str], size: int, num_classes: int
) -> list[Task]:
    """Variants with what is published of them on ADE20K, for images of just that size."""
    tasks = []
    for name, precision in itertools.product(names, precisions):
        row = published(name, size=size)
        known = row is not None and row.miou is not None
        tasks.append(
            Task(
                name,
                create_config(name, num_classes, size),
                precision,
                row.miou if known else None,
                "published" if known else "",
                row.source if known else "",
                "ade20k",
            )
        )
    return tasks


def small_tasks(precisions: Iterable[str]) -> list[Task]:
    """The small models that this project trained on procedural scenes, with their mIoU.

    Source: benchmarks/ablations.yaml and the results of `python -m benchmarks.ablations`.
    """
    tasks = []
    known = json.loads(SMALL_MODELS.read_text(encoding="utf-8"))
    for row, precision in itertools.product(known, precisions):
        changes = dict(row["model"])
        variant = changes.pop("variant")
        config = create_config(variant, len(Scenes.class_names), tuple(row["size"]), **changes)
        name = variant if "d_model" not in changes else f"{variant}, width {config.d_model}"
        spread = "" if row["spread"] is None else f" ± {row['spread']:.1f}"
        source = f"{row['seeds']} seeds{spread}, {row['steps']} steps on {row['scenes']} scenes"
        tasks.append(Task(name, config, precision, row["miou"], "measured", source, "scenes"))
    return tasks


def weights_task(
    source: str, miou: float | None, dataset: str, protocol: str, precision: str
) -> Task:
    """Weights with an mIoU, in percent, that was measured by `evaluate`; None if it could not."""
    config = load_checkpoint(source)[0]
    kind = "" if miou is None else "measured"
    return Task(source, config, precision, miou, kind, protocol, dataset)


@torch.inference_mode(False)  # as `create_model` makes its parameters
def _random_model(task: Task, device: torch.device, backend: str):
    """A model of the architecture; its values are small, and cheap to draw.

    Raises:
        BackendError: no such precision there.
    """
    known = precisions(device, backend)
    if task.precision not in known:
        raise BackendError(f"precision must be one of {', '.join(known)}; got {task.precision!r}")
    with torch.device("meta"):
        model = create_model_from_config(task.config, backend)
    model = model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.02, generator=generator)
            else:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    if is_native(device, backend):
        model.precision = task.precision
    else:
        model.to(DTYPES[task.precision])
    return model.eval()


def _images(task: Task, batch: int, model) -> torch.Tensor:
    """Network input with structure, as pictures have and noise has not."""
    generator = torch.Generator().manual_seed(batch)
    layers = [
        torch.nn.functional.interpolate(
            torch.randn(batch, 3, side, side, generator=generator),
            size=task.config.image_size,
            mode="bicubic",
        )
        for side in (4, 16, 64)
    ]
    return (sum(layers) / 2).to(next(model.parameters()))


def _seconds(model, x: torch.Tensor, device: torch.device) -> float:
    start = time.perf_counter()
    model.labels(x)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@torch.inference_mode()
def measure(
    tasks: Sequence[Task],
    device: torch.device | str = "cpu",
    backend: str = "auto",
    passes: int = 3,
    batches: Sequence[int] = BATCHES,
    seconds: float = 60.0,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Speed]:
    """Time all tasks, images to label maps.

    Args:
        tasks: what to time.
        device, backend: where, and with what.
        passes: over all tasks; figures are medians over them.
        batches: rising, beginning with 1; larger ones are tried while they gain.
        seconds: a call that would take longer is not made; what this leaves out says so.
        progress: told what is being timed.

    Returns:
        One Speed for each task.

    Raises:
        ValueError: `batches` that do not begin with 1, or no pass.
    """
    if not batches or batches[0] != 1 or list(batches) != sorted(set(batches)) or passes < 1:
        raise ValueError(
            f"batches must rise from 1 and passes be at least 1, got {batches} and {passes}"
        )
    device = torch.device(device)
    single: list[list[float]] = [[] for _ in tasks]
    best: list[int] = [1] * len(tasks)
    batched: list[list[float]] = [[] for _ in tasks]
    parts: list[dict[str, float] | None] = [None] * len(tasks)
    reasons = [""] * len(tasks)
    for turn in range(passes):
        for i, task in enumerate(tasks):
            if reasons[i]:
                continue
            progress(f"pass {turn + 1} of {passes}: {task.name}, {task.precision}")
            try:
                model = _random_model(task, device, backend)
                x = _images(task, 1, model)
                first = _seconds(model, x, device)  # warms up, too
                if first > seconds:
                    reasons[i] = f"one image takes {first:.0f} s, more than --seconds"
                    continue
                repeats = max(1, min(10, round(0.5 / first)))
                single[i] += [_seconds(model, x, device) for _ in range(repeats)]
                if turn == 0:
                    parts[i] = _parts(model, x, device)
                    one = statistics.median(single[i])
                    best[i] = _best_batch(task, model, device, batches, seconds, one)
                if best[i] > 1:
                    batched[i] += _of_batch(task, model, device, best[i])
            except (RuntimeError, MemoryError) as error:  # such as one that has no room
                reasons[i] = str(error).splitlines()[0][:120]
            finally:
                model = x = None
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
    results = []
    for i in range(len(tasks)):
        if reasons[i] or not single[i]:
            results.append(Speed(None, reason=reasons[i]))
            continue
        one = 1 / statistics.median(single[i])
        many = best[i] / statistics.median(batched[i]) if batched[i] else one
        results.append(Speed(one, max(one, many), best[i] if many > one else 1, parts[i]))
    return results


def _of_batch(task: Task, model, device: torch.device, batch: int, calls: int = 2) -> list[float]:
    """Seconds of some calls, after one that warms up."""
    x = _images(task, batch, model)
    model.labels(x)
    return [_seconds(model, x, device) for _ in range(calls)]


def _best_batch(
    task: Task, model, device: torch.device, batches: Sequence[int], seconds: float, one: float
) -> int:
    """The batch with the most images per second; larger ones are tried while they gain."""
    best, best_rate = 1, 1 / one
    for batch in batches[1:]:
        if 1.5 * batch / best_rate > seconds:
            break
        rate = batch / statistics.median(_of_batch(task, model, device, batch, calls=3))
        if rate < GAIN * best_rate:
            break
        best, best_rate = batch, rate
    return best


# --- Where the time goes -------------------------------------------------------------------------

_OPERATIONS = (
    ("patch embedding", ("patch_embed", "conv")),
    ("attention", ("attention",)),
    ("head", ("upsample", "argmax", "mask_product", "windows")),
    ("linear layers", ("linear", "addmm", "mm", "mlp", "matmul", "gemm")),
)


def part_of(operation: str) -> str:
    """The part that an operation of PyTorch or of this library belongs to."""
    for part, words in _OPERATIONS:
        if any(word in operation for word in words):
            return part
    return "other"


# The one native call: its name in the profiler, and what it calls its parts.
_CALL = "segmenter_fast::network"
_CALL_PARTS = {
    "embed": "patch embedding",
    "attention": "attention",
    "linear": "linear layers",
    "head": "head",
}


def _parts_of_call(model, x: torch.Tensor, microseconds: float) -> dict[str, float]:
    """Microseconds of the one native call by part; norms and waiting are "other"."""
    from segmenter_fast.native import seconds_of

    times = dict.fromkeys(PARTS, 0.0)
    for name, seconds in seconds_of(model, x).items():
        times[_CALL_PARTS.get(name, "other")] += 1e6 * seconds
    times["other"] += max(0.0, microseconds - sum(times.values()))
    return times


def _parts(model, x: torch.Tensor, device: torch.device) -> dict[str, float]:
    """Shares of the time by part, from PyTorch's profiler and what the native call counts."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(ProfilerActivity.CUDA)
    with profile(activities=kinds) as profiler:
        model.labels(x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    times = dict.fromkeys(PARTS, 0.0)
    for event in profiler.key_averages():
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        if event.key == _CALL and device.type == "cpu":
            for part, microseconds in _parts_of_call(model, x, own).items():
                times[part] += microseconds
        else:
            times[part_of(event.key)] += own
    total = sum(times.values()) or 1.0
    return {part: value / total for part, value in times.items()}


# --- What comes of it ----------------------------------------------------------------------------

COLUMNS = (
    "model", "patch", "decoder", "precision", "size", "images_per_second", "best_images_per_second",
    "best_batch", *PARTS, "miou", "dataset", "kind", "source", "reason",
)  # fmt: skip


def rows_of(tasks: Sequence[Task], speeds: Sequence[Speed]) -> list[dict[str, Any]]:
    """Plain rows with the columns of `COLUMNS`."""
    rows = []
    for task, speed in zip(tasks, speeds, strict=True):
        config = task.config
        rows.append(
            {
                "model": task.name,
                "patch": config.patch_size,
                "decoder": "mask" if config.decoder == "mask_transformer" else "linear",
                "precision": task.precision,
                "size": f"{config.image_size[0]} x {config.image_size[1]}",
                "images_per_second": speed.images_per_second,
                "best_images_per_second": speed.best_images_per_second,
                "best_batch": speed.best_batch,
                **{part: (speed.parts or {}).get(part) for part in PARTS},
                "miou": task.miou,
                "dataset": task.dataset if task.miou is not None else "",
                "kind": task.kind,
                "source": task.source,
                "reason": speed.reason,
            }
        )
    return rows


def peer_rows(path: Path, device: str, threads: int | None) -> list[dict[str, Any]]:
    """Rows of other architectures, as `benchmarks/bench_peers.py` timed them, eager or compiled.

    Args:
        path: peers.json, which `pytest benchmarks/bench_peers.py --benchmark-only --save-results`
            writes.
        device, threads: where the others were timed: the name of a processor and so many threads,
            or the name of a GPU and None.

    Returns:
        Rows with the columns of `COLUMNS`, one for each architecture that ran.

    Raises:
        ValueError: no such file, or one of another machine.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        machine, cases = stored["machine"], stored["cases"]
        theirs = (machine["gpu"], None) if machine["gpu"] else (machine["cpu"], machine["threads"])
        best: dict[str, dict[str, Any]] = {}
        for case in cases.values():
            ran = [row for row in case if row["peer"] and row["ms"] and row["images"]]
            if ran:
                best[case[0]["contestant"]] = min(ran, key=lambda row: row["ms"])
        speeds = {name: 1e3 * row["images"] / row["ms"] for name, row in best.items()}
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except (json.JSONDecodeError, AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not what `pytest benchmarks/bench_peers.py --benchmark-only "
            f"--save-results` writes: {error!r}"
        ) from error
    if theirs != (device, threads):
        raise ValueError(
            f"{path} was measured on {_machine_name(*theirs)}, and this is "
            f"{_machine_name(device, threads)}: speeds of two machines cannot be compared"
        )
    rows = []
    for name, speed in speeds.items():
        known = published(name.removesuffix(IN_PYTORCH))
        row = dict.fromkeys(COLUMNS, "") | dict.fromkeys(PARTS)
        rows.append(
            row
            | {
                "model": name,
                "precision": "float32",
                "size": "512 x 512",
                "images_per_second": speed,
                "miou": known and known.miou,
                "dataset": known.dataset if known else "",
                "kind": "published" if known else "",
                "source": known.source if known else "",
            }
        )
    return rows


def _machine_name(device: str, threads: int | None) -> str:
    return device if threads is None else f"{device} with {threads} threads"


def _rate(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return ""
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:,.{digits}f}"


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown lines."""
    head = ["model", "precision", "images/s", "best batch", *PARTS, "mIoU", "of"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        if row["reason"]:
            cells = [f"not run: {row['reason']}", "", *[""] * len(PARTS)]
        else:
            best = row["best_images_per_second"]
            cells = [_rate(row["images_per_second"])]
            cells += [f"{_rate(best)} at {row['best_batch']}" if best else ""]
            cells += ["" if row[p] is None else f"{100 * row[p]:.0f} %" for p in PARTS]
        miou = "" if row["miou"] is None else f"{row['miou']:.1f}"
        source = f"{row['dataset']}, {row['kind']} ({row['source']})" if miou else ""
        cells = [row["model"], row["precision"], *cells, miou, source]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def write_tables(
    output: Path, rows: Sequence[dict[str, Any]], machine: dict[str, Any], heading: str
) -> None:
    """README.md, tradeoff.csv and tradeoff.json."""
    output.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    contents = {
        "tradeoff.csv": text.getvalue(),
        "tradeoff.json": json.dumps({"machine": machine, "rows": list(rows)}, indent=1) + "\n",
        "README.md": "\n".join([heading, "", *table(rows), ""]),
    }
    for name, content in contents.items():
        with replacing(output / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
