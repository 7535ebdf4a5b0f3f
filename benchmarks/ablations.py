"""The paper's ablations at a small, fixed budget: `python -m benchmarks.ablations`.

`ablations.yaml` holds the grid: data, model, recipe and seeds of every run, and which runs answer
which question. A run is one process with one thread; `--jobs` of them run side by side. Runs that
have ended are not repeated, and one that was interrupted goes on, so that a grid of hours can be
stopped at any time. Page, figure and results are made of whatever has ended.

    python -m benchmarks.ablations --camvid data/camvid     # all of it
    python -m benchmarks.ablations --only patch-8,patch-32  # these runs
    python -m benchmarks.ablations --report                 # page and figure alone
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
import yaml
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
CONFIG = HERE / "ablations.yaml"
OUTPUT = HERE / "results" / "ablations"
SMALL_MODELS = HERE.parent / "segmenter_fast" / "data" / "small_models.json"
STAGES = ("data", "model", "train")


class Cell(NamedTuple):
    """A run with one seed."""

    run: str
    seed: int

    def __str__(self):
        return f"{self.run}-{self.seed}"


def specification(grid: dict[str, Any], run: str) -> dict[str, Any]:
    """`base` and what the run changes, stage by stage."""
    changes = grid["runs"][run]
    unknown = changes.keys() - {*STAGES, "init"}
    if unknown:
        raise ValueError(f"run {run!r}: expected {', '.join(STAGES)} or init, got {unknown}")
    spec = {stage: grid["base"][stage] | changes.get(stage, {}) for stage in STAGES}
    return spec | {"init": changes.get("init")}


def datasets(data: dict[str, Any], camvid: Path | None):
    """Training and validation set, decoded once."""
    from segmenter_fast.data import CamVid, InMemory, Scenes

    if data["kind"] == "scenes":
        size = tuple(data["size"])
        train, val = (
            Scenes(data[count], size=size, split=split)
            for count, split in (("count", "train"), ("val_count", "val"))
        )
        return InMemory(train), InMemory(val)
    if data["kind"] != "camvid":
        raise ValueError(f"data kind must be scenes or camvid, got {data['kind']!r}")
    return InMemory(CamVid(camvid, "train")), InMemory(CamVid(camvid, "val"))


def train_cell(spec: dict[str, Any], seed: int, folder: Path, init: Path | None, camvid):
    """Train one run, or go on with it, and write result.json when it has ended."""
    import torch

    from segmenter_fast import SegmenterModel, create_model
    from segmenter_fast.train import TrainOptions, train

    torch.set_num_threads(1)
    train_set, val_set = datasets(spec["data"], camvid)
    model = dict(spec["model"])
    image_size = tuple(model.pop("image_size", spec["data"].get("size", ())))
    torch.manual_seed(seed)
    whole = {"window_size": None, "window_stride": None}
    network = create_model(
        model.pop("variant"), train_set.num_classes, image_size, **whole, **model
    )
    if init is not None:
        from segmenter_fast.pretrained import load_pretrained

        load_pretrained(network, init)
    often = {"save_every": 100, "val_every": spec["train"]["steps"], "log_every": 100}
    recipe = often | spec["train"] | {"scale": tuple(spec["train"]["scale"])}
    options = TrainOptions(**recipe, seed=seed)
    started = (folder / "state.pt").exists()
    if not train(network, train_set, val_set, folder, options, resume=started)["finished"]:
        raise SystemExit(1)  # stopped from outside, and saved
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    last = SegmenterModel.from_pretrained(folder / "last")
    result = {
        "miou": rows[-1]["miou"],
        "pixel_accuracy": rows[-1]["pixel_accuracy"],
        "loss": rows[-1]["loss"],
        "minutes": rows[-1]["minutes"],
        "parameters": sum(p.numel() for p in last.parameters()),
    }
    (folder / "result.json").write_text(json.dumps(result) + "\n", encoding="utf-8")


def cells(grid: dict[str, Any], only: set[str] | None, camvid: Path | None) -> Iterator[Cell]:
    """What to train, in order: all runs of a seed before the next one, what others need first."""
    unknown = (only or set()) - grid["runs"].keys()
    if unknown:
        raise typer.BadParameter(
            f"no run {', '.join(unknown)}; there are {', '.join(grid['runs'])}"
        )
    for seed in grid["seeds"]:
        for run in grid["runs"]:
            spec = specification(grid, run)
            if (only is None or run in only) and (camvid or spec["data"]["kind"] != "camvid"):
                yield Cell(run, seed)


def train_all(config: Path, grid, todo: list[Cell], runs: Path, camvid: Path | None, jobs: int):
    """Keep `jobs` processes busy until all cells have their result."""
    waiting = [cell for cell in todo if not (runs / str(cell) / "result.json").exists()]
    working: dict[Cell, subprocess.Popen] = {}
    try:
        with tqdm(total=len(todo), initial=len(todo) - len(waiting), unit="run") as bar:
            while waiting or working:
                for cell in [c for c, process in working.items() if process.poll() is not None]:
                    if working.pop(cell).returncode:
                        log = runs / f"{cell}.log"
                        raise SystemExit(f"{cell} failed:\n{log.read_text()[-2000:]}")
                    bar.update()
                ready = [cell for cell in waiting if _is_ready(grid, cell, runs)]
                if waiting and not ready and not working:
                    raise SystemExit(f"{waiting[0]} waits for a run that is not among these")
                for cell in ready[: jobs - len(working)]:
                    waiting.remove(cell)
                    working[cell] = _start(config, cell, runs, camvid)
                bar.set_postfix_str(", ".join(map(str, working)))
                time.sleep(0.5)
    finally:
        for process in working.values():
            process.terminate()  # which saves, and the next call goes on from there


def _is_ready(grid, cell: Cell, runs: Path) -> bool:
    init = specification(grid, cell.run)["init"]
    return init is None or (runs / str(Cell(init, cell.seed)) / "result.json").exists()


def _start(config: Path, cell: Cell, runs: Path, camvid: Path | None) -> subprocess.Popen:
    words = ["--config", str(config), "--runs", str(runs), "--cell", str(cell)]
    if camvid is not None:
        words += ["--camvid", str(camvid)]
    with open(runs / f"{cell}.log", "w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "benchmarks.ablations", *words],
            cwd=HERE.parent,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


# --- What came out -------------------------------------------------------------------------------


def collect(grid, runs: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Results of the runs that have ended: run, then seed."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for run in grid["runs"]:
        for seed in grid["seeds"]:
            path = runs / str(Cell(run, seed)) / "result.json"
            if path.exists():
                found.setdefault(run, {})[seed] = json.loads(path.read_text(encoding="utf-8"))
    return found


class Answer(NamedTuple):
    """A row of a question's table."""

    label: str
    mious: list[float]
    paper: float | None
    of: str | None

    @property
    def mean(self) -> float:
        return statistics.mean(self.mious)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds."""
        return statistics.stdev(self.mious) if len(self.mious) > 1 else 0.0


def answers(question: dict[str, Any], results) -> list[Answer]:
    """The rows that have results; mIoU in percent."""
    return [
        Answer(
            row["label"],
            [100 * result["miou"] for result in results[row["run"]].values()],
            row.get("paper"),
            row.get("of"),
        )
        for row in question["rows"]
        if row["run"] in results
    ]


def verdict(rows: list[Answer]) -> str:
    """Whether the order of the rows that the paper has is the paper's, and how surely."""
    known = [row for row in rows if row.paper is not None]
    if len(known) < 2:
        return "The paper has no figures for an order."
    pairs = [(a, b) for i, a in enumerate(known) for b in known[i + 1 :] if a.paper != b.paper]
    other = [(a, b) for a, b in pairs if (a.mean < b.mean) != (a.paper < b.paper)]
    # Twice the standard error of the difference of two means.
    close = [
        (a, b)
        for a, b in pairs
        if abs(a.mean - b.mean)
        <= 2 * ((a.spread**2 + b.spread**2) / min(len(a.mious), len(b.mious))) ** 0.5
    ]
    text = "The order is the paper's."
    if other:
        ranked = [sorted(pair, key=lambda row: row.mean) for pair in other]
        text = "The order differs from the paper's: "
        text += "; ".join(f"{high.label} is above {low.label}" for low, high in ranked) + "."
    if close:
        text += " Within the noise of the seeds: "
        text += "; ".join(f"{a.label} and {b.label}" for a, b in close) + "."
    return text


def page(grid, results) -> str:
    """The Markdown page."""
    base = grid["base"]
    lines = [
        "# Ablations at a small budget",
        "",
        "Made by `python -m benchmarks.ablations`; the grid is "
        "[ablations.yaml](../../ablations.yaml). The paper's figures are of ADE20K, larger models "
        "and pretrained weights: what is compared is the order of the rows. Where it differs, the "
        "budget is the first suspect: larger models, decoders with more layers and more images "
        "need more steps than these before they pay.",
        "",
        f"Unless a row says otherwise: {base['model']['variant']} from random weights, "
        f"{base['data']['count']} procedural scenes of {base['data']['size'][0]} x "
        f"{base['data']['size'][1]} pixels, {base['train']['steps']} steps of "
        f"{base['train']['batch_size']}, {base['train']['optimizer']}; validated on "
        f"{base['data']['val_count']} other scenes at the end. mIoU in percent, mean and standard "
        "deviation over the seeds.",
        "",
        "![mIoU of all runs](ablations.png)",
    ]
    for name, question in grid["questions"].items():
        rows = answers(question, results)
        lines += ["", f"## {name.capitalize()}", "", f"Paper: {question['paper_says']}.", ""]
        lines += ["| | mIoU | seeds | paper, ADE20K |", "|---|---|---|---|"]
        for row in rows:
            spread = f" ± {row.spread:.1f}" if len(row.mious) > 1 else ""
            paper = "" if row.paper is None else f"{row.paper:.2f}"
            paper += f" ({row.of})" if row.of else ""
            lines.append(f"| {row.label} | {row.mean:.1f}{spread} | {len(row.mious)} | {paper} |")
        missing = [r["label"] for r in question["rows"] if r["run"] not in results]
        if missing:
            lines += ["", f"Not run: {', '.join(missing)}."]
        lines += ["", verdict(rows)]
    return "\n".join(lines) + "\n"


def draw(grid, results, path: Path) -> None:
    """One panel for each question, a point for each seed and a bar at the mean."""
    from matplotlib.figure import Figure

    from segmenter_fast.files import replacing

    questions = {name: answers(q, results) for name, q in grid["questions"].items()}
    columns = 2
    counts = [max(3, len(rows)) for rows in questions.values()]
    heights = [max(counts[i : i + columns]) for i in range(0, len(counts), columns)]
    figure = Figure(
        figsize=(10, sum(0.9 + 0.33 * height for height in heights)), layout="constrained"
    )
    grid_of_axes = figure.subplots(
        len(heights), columns, squeeze=False, height_ratios=[0.9 + 0.33 * h for h in heights]
    )
    for axes in grid_of_axes.flat[len(questions) :]:
        axes.remove()
    for axes, (name, rows) in zip(grid_of_axes.flat, questions.items(), strict=False):
        labels = [row.label for row in rows]
        axes.barh(labels, [row.mean for row in rows], color="#9ec5e8", height=0.6)
        for i, row in enumerate(rows):
            axes.plot(row.mious, [i] * len(row.mious), "o", color="#1f4e79", markersize=4)
        low = min((m for row in rows for m in row.mious), default=0)
        axes.set(title=name, xlabel="mIoU", xlim=(max(0, 0.8 * low - 2), None))
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def small_models(grid, results) -> list[dict[str, Any]]:
    """What `segmenter_fast.tradeoff` knows of the models of the list `tradeoff`."""
    models = []
    for run in grid["tradeoff"]:
        if run not in results:
            continue
        spec = specification(grid, run)
        mious = [100 * result["miou"] for result in results[run].values()]
        models.append(
            {
                "model": spec["model"],
                "size": spec["data"]["size"],
                "miou": round(statistics.mean(mious), 2),
                "spread": round(statistics.stdev(mious), 2) if len(mious) > 1 else None,
                "seeds": len(mious),
                "steps": spec["train"]["steps"],
                "scenes": spec["data"]["count"],
            }
        )
    return models


def write_report(grid, runs: Path, output: Path) -> None:
    """results.json, README.md and the figure, of the runs that have ended."""
    import torch

    results = collect(grid, runs)
    if not results:
        raise SystemExit(f"no run has ended in {runs}")
    output.mkdir(parents=True, exist_ok=True)
    record = {
        "system": platform.platform(),
        "torch": torch.__version__,
        "grid": grid,
        "results": results,
    }
    (output / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (output / "README.md").write_text(page(grid, results), encoding="utf-8")
    if output.resolve() == OUTPUT:
        text = json.dumps(small_models(grid, results), indent=1) + "\n"
        SMALL_MODELS.write_text(text, encoding="utf-8")
    draw(grid, results, output / "ablations.png")


def main(
    config: Annotated[Path, typer.Option(help="The grid.")] = CONFIG,
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/ablations"),
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the page.")] = OUTPUT,
    camvid: Annotated[
        Path | None, typer.Option(help="CamVid's folder; without it its runs are left out.")
    ] = None,
    only: Annotated[str | None, typer.Option(metavar="RUN,...", help="These runs alone.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs side by side.")] = os.cpu_count() or 1,
    report: Annotated[bool, typer.Option("--report", help="Train nothing.")] = False,
    cell: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Train the grid and write its page."""
    grid = yaml.safe_load(config.read_text(encoding="utf-8"))
    runs = runs.resolve()
    camvid = camvid and camvid.resolve()
    if cell is not None:
        run, seed = cell.rsplit("-", 1)
        spec = specification(grid, run)
        init = spec["init"] and runs / str(Cell(spec["init"], int(seed))) / "last"
        train_cell(spec, int(seed), runs / cell, init, camvid)
        return
    if not report:
        runs.mkdir(parents=True, exist_ok=True)
        chosen = set(only.split(",")) if only else None
        todo = list(cells(grid, chosen, camvid))
        train_all(config.resolve(), grid, todo, runs, camvid, jobs)
    write_report(grid, runs, output)
    typer.echo(f"written to {output}")


if __name__ == "__main__":
    typer.run(main)
