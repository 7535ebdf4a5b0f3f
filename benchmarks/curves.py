"""Does it learn the same? One recipe with the reference and the compiled kernels, on CamVid.

    python -m benchmarks.curves --camvid data/camvid

`curves.yaml` holds model, recipe and seeds. Two runs of one seed see the same pictures and start
from the same weights, but rounding parts them after some steps. So their curves are compared with
what another seed does to a curve. As the ablations' runs, these are resumed and never repeated.
"""

import json
import os
import platform
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml

from benchmarks.ablations import HERE, Cell, cells, train_all
from segmenter_fast.files import replacing
from segmenter_fast.runlog import read_log

CONFIG = HERE / "curves.yaml"
OUTPUT = HERE / "results" / "curves"
KEYS = ("loss", "miou", "pixel_accuracy")


def curve(rows: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the rows that have the key."""
    points = [(row["step"], row[key]) for row in rows if key in row]
    return [step for step, _ in points], [value for _, value in points]


def summary(grid, logs) -> list[str]:
    """The table: at each validation the seeds' mean mIoU of both, and two kinds of difference."""
    lines = [
        "| step | reference | native | same seed, other kernels | other seed, same kernels |",
        "|---|---|---|---|---|",
    ]
    one, two = grid["runs"]
    values = {
        run: torch.tensor([curve(logs[run, seed], "miou")[1] for seed in grid["seeds"]]) * 100
        for run in (one, two)
    }
    steps = curve(logs[one, grid["seeds"][0]], "miou")[0]
    for i, step in enumerate(steps):
        first, second = values[one][:, i], values[two][:, i]
        kernels = (first - second).abs().mean()
        apart = [(v[:, None] - v).abs().sum() for v in (first, second)]
        pairs = len(first) * (len(first) - 1)
        seeds = sum(apart) / (2 * pairs)
        lines.append(
            f"| {step} | {first.mean():.1f} | {second.mean():.1f} | {kernels:.1f} | {seeds:.1f} |"
        )
    return lines


def page(grid, logs) -> str:
    """The Markdown page."""
    base = grid["base"]
    one, two = grid["runs"]
    seed = grid["seeds"][0]
    early = [(a["loss"], b["loss"]) for a, b in zip(logs[one, seed], logs[two, seed], strict=True)]
    first = abs(early[0][0] / early[0][1] - 1)
    return "\n".join(
        [
            "# The same curves with the reference and with the compiled kernels",
            "",
            "Made by `python -m benchmarks.curves`; the recipe is "
            "[curves.yaml](../../curves.yaml). "
            f"{base['model']['variant']} from random weights, CamVid train, "
            f"{base['train']['steps']} steps of {base['train']['batch_size']}; mIoU on CamVid val, "
            "in percent. Runs of one seed see the same pictures and start from the same weights; "
            "the columns on the right are mean absolute differences between two runs.",
            "",
            f"Mean loss of the first {base['train']['log_every']} steps, seed {seed}: "
            f"{early[0][0]:.6f} and {early[0][1]:.6f}, a relative difference of {first:.1e}.",
            "",
            "![curves](curves.png)",
            "",
            *summary(grid, logs),
            "",
        ]
    )


def draw(grid, logs, path: Path) -> None:
    """Loss and mIoU over the steps; a colour for each seed, dashes for the reference."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    for axes, key, title in zip(
        figure.subplots(1, 2), ("loss", "miou"), ("loss", "mIoU on CamVid val"), strict=True
    ):
        for run, style in zip(grid["runs"], ("--", "-"), strict=True):
            for i, seed in enumerate(grid["seeds"]):
                label = f"{run}, seed {seed}"
                axes.plot(*curve(logs[run, seed], key), style, color=f"C{i}", label=label, lw=1.3)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def main(
    camvid: Annotated[Path, typer.Option(help="CamVid's folder.")],
    config: Annotated[Path, typer.Option(help="Model, recipe and seeds.")] = CONFIG,
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/curves"),
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the page.")] = OUTPUT,
    jobs: Annotated[int, typer.Option(min=1, help="Runs side by side.")] = os.cpu_count() or 1,
) -> None:
    """Train with both backends over all seeds and write the page."""
    grid = yaml.safe_load(config.read_text(encoding="utf-8"))
    runs, camvid = runs.resolve(), camvid.resolve()
    runs.mkdir(parents=True, exist_ok=True)
    todo = list(cells(grid, None, camvid))
    train_all(config.resolve(), grid, todo, runs, camvid, jobs)
    logs = {(c.run, c.seed): read_log(runs / str(Cell(c.run, c.seed))) for c in todo}
    output.mkdir(parents=True, exist_ok=True)
    kept = {
        f"{run}-{seed}": {key: curve(rows, key) for key in KEYS}
        for (run, seed), rows in logs.items()
    }
    record = {"system": platform.platform(), "torch": torch.__version__, "grid": grid}
    text = json.dumps(record | {"curves": kept}) + "\n"
    (output / "results.json").write_text(text, encoding="utf-8")
    (output / "README.md").write_text(page(grid, logs), encoding="utf-8")
    draw(grid, logs, output / "curves.png")
    typer.echo(f"written to {output}")


if __name__ == "__main__":
    typer.run(main)
