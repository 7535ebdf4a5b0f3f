"""What bfloat16 and int8 cost in accuracy: mIoU of the bundled weights in every precision.

    python -m benchmarks.precision --camvid data/camvid
    python -m benchmarks.precision --limit 10 -o precision.md    # ten images of each data set

`scenes` on procedural scenes, those of its model card, and with --camvid `street` on CamVid val,
both by the protocol of the weights. int8 is measured as it comes, with the linear layers of all
kinds quantised, and with one kind alone: which of them costs what. Beside mIoU and pixel accuracy
stands the share of all pixels whose label is that of float32, which sees differences that an mIoU
averages away.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor
from torch.utils.data import Subset

from segmenter_fast import BackendError, SegmenterModel
from segmenter_fast.data import CamVid, Scenes
from segmenter_fast.data.folder import spread
from segmenter_fast.evaluate import evaluate
from segmenter_fast.files import replacing
from segmenter_fast.model import QUANTIZED
from segmenter_fast.protocols import protocol

OUTPUT = Path(__file__).resolve().parent / "results" / "precision.md"
# As in the model card of `scenes`.
SCENES = {"count": 100, "size": (384, 512), "seed": 29, "split": "val"}


class Setting(NamedTuple):
    """A row: what inference calculates in.

    Args:
        name: of the row.
        precision: of the model.
        quantized: kinds of layers that int8 takes in int8.
    """

    name: str
    precision: str
    quantized: frozenset[str] = QUANTIZED


SETTINGS = (
    Setting("float32", "float32"),
    Setting("bfloat16", "bfloat16"),
    Setting("int8", "int8"),
    *(
        Setting(f"int8 in {kind} alone", "int8", frozenset((kind,)))
        for kind in ("qkv", "proj", "fc1", "fc2")
    ),
)


class Result(NamedTuple):
    """What came of a setting; numbers are shares, and None with a reason where it did not run."""

    name: str
    miou: float | None = None
    pixel_accuracy: float | None = None
    agreement: float | None = None
    reason: str = ""


def measure(
    model: SegmenterModel, dataset: Any, settings: Iterable[Setting], **options: Any
) -> list[Result]:
    """Evaluate a model in every setting.

    Args:
        model: in evaluation mode.
        dataset: maps an index to (uint8 image (3, H, W), integer labels (H, W)).
        settings: the first is what labels are compared with.
        **options: of `evaluate`.

    Returns:
        One Result for each setting. One that this processor cannot run has the reason.
    """
    first: dict[int, Tensor] = {}
    results = []
    for setting in settings:
        same = pixels = 0

        def each(index: int, labels: Tensor) -> None:
            nonlocal same, pixels
            same += int((labels == first.setdefault(index, labels)).sum())
            pixels += labels.numel()

        model.precision, model.quantized = setting.precision, setting.quantized
        try:
            result = evaluate(model, dataset, each=each, **options)
        except BackendError as reason:
            results.append(Result(setting.name, reason=str(reason)))
            continue
        results.append(
            Result(setting.name, result["miou"], result["pixel_accuracy"], same / pixels)
        )
    return results


def table(results: Sequence[Result]) -> list[str]:
    """Markdown lines; differences are against the first result."""
    lines = [
        "| precision | mIoU | difference | pixel accuracy | difference | labels as in float32 |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    reference = results[0]
    for name, miou, accuracy, agreement, reason in results:
        if reason:
            lines.append(f"| {name} | not run: {reason} | | | | |")
            continue
        apart = ["", ""]
        if name != reference.name and not reference.reason:
            pairs = ((miou, reference.miou), (accuracy, reference.pixel_accuracy))
            apart = [f"{100 * (ours - theirs):+.2f}" for ours, theirs in pairs]
        lines.append(
            f"| {name} | {100 * miou:.2f} | {apart[0]} | {100 * accuracy:.2f} | {apart[1]} | "
            f"{100 * agreement:.2f} |"
        )
    return lines


def section(title: str, protocol: str, results: Sequence[Result]) -> list[str]:
    """A heading, what was measured, and the table."""
    return [f"## {title}", "", f"{protocol}.", "", *table(results), ""]


def page(sections: Iterable[Sequence[str]], level: str) -> str:
    """The Markdown page; `level` is the instructions that the kernels used."""
    lines = [
        "# What bfloat16 and int8 cost in accuracy",
        "",
        "Made by `python -m benchmarks.precision`; PyTorch "
        f"{torch.__version__.split('+')[0]}, instructions `{level}`. All in percent, differences "
        "in points against float32. int8 is that of the linear layers in the blocks: queries, keys "
        "and values (qkv), the projection after attention (proj), and the two layers of the MLP "
        "(fc1, fc2); what is not int8 is then bfloat16, where the processor has it.",
        "",
    ]
    for part in sections:
        lines += part
    return "\n".join(lines)


def measured(weights: str, dataset: Any, name: str, limit: int) -> list[str]:
    """The section of some weights on a data set, of which `limit` images are taken; 0 is all."""
    model = SegmenterModel.from_pretrained(weights)
    part = spread(dataset, limit or None)
    how = protocol(model.config, "weights")
    results = measure(model, part, SETTINGS, **how.options())
    images = f"{len(part)} images" if isinstance(part, Subset) else f"all {len(part)} images"
    return section(f"`{weights}` on {name}", f"{images}; {how}", results)


def main(
    camvid: Annotated[
        Path | None, typer.Option(metavar="ROOT", help="CamVid's folder, for `street`.")
    ] = None,
    limit: Annotated[
        int, typer.Option(min=0, help="Images of each data set at most; 0 is all.")
    ] = 0,
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Markdown file.")] = OUTPUT,
) -> None:
    """Measure mIoU, pixel accuracy and label agreement in every precision, and write the page."""
    from segmenter_fast.backend import native_module

    if threads is not None:
        torch.set_num_threads(threads)
    sections = []
    if camvid is None:
        sections.append(["## `street` on CamVid val", "", "Not run: needs --camvid.", ""])
    else:
        sections.append(measured("street", CamVid(camvid, "val"), "CamVid val", limit))
    sections.append(measured("scenes", Scenes(**SCENES), "scenes, split val", limit))
    text = page(sections, native_module().simd_level())
    with replacing(output) as temporary:
        temporary.write_text(text, encoding="utf-8")
    typer.echo(text)
    typer.echo(f"written to {output}", err=True)


if __name__ == "__main__":
    typer.run(main)
