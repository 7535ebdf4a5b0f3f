"""What a training run tells: a bar, JSON lines, TensorBoard if installed; and its curves."""

import importlib.util
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from segmenter_fast.files import replacing

LOG = "log.jsonl"


def read_log(run: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a run's log.jsonl, in order.

    A last line without an end is left out: its writer is at it, or was killed.

    Args:
        run: the folder of the run, or the file itself.

    Raises:
        FileNotFoundError: no log there.  ValueError: a line that is not JSON, with its number.
    """
    path = Path(run)
    path = path / LOG if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no log of a run: {path} does not exist")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
    return rows


class RunLog:
    """The log of a run; only the process that talks has one that does anything.

    Args:
        output: folder of log.jsonl and tensorboard/.
        first, steps: where the bar begins and ends.
        logged: rows after this step are dropped: a run that was killed is about to repeat them.
        talks: whether this process writes and shows anything.
    """

    def __init__(self, output: Path, first: int, steps: int, logged: int, talks: bool = True):
        self.path, self.talks = output / LOG, talks
        self.bar = tqdm(
            total=steps, initial=first, desc="train", unit="step", disable=not talks, smoothing=0.1
        )
        self.board = None
        if not talks:
            return
        if self.path.exists():
            kept = [row for row in read_log(self.path) if row["step"] <= logged]
            with replacing(self.path) as temporary:
                temporary.write_text("".join(map(_line, kept)), encoding="utf-8")
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(output / "tensorboard", purge_step=logged + 1)

    def step(self, loss: float | None, lr: float, images_per_second: float, best: float) -> None:
        """Move the bar by a step; the time that is left is tqdm's."""
        shown = {"loss": "-" if loss is None else f"{loss:.3f}", "lr": f"{lr:.2e}"}
        shown |= {"images/s": f"{images_per_second:.1f}"}
        if best >= 0:
            shown["best"] = f"{best:.3f}"
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def row(self, row: dict[str, Any]) -> None:
        """Add a row, and a line above the bar if it has a validation."""
        if not self.talks:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(row))
        if self.board is not None:
            for name, value in row.items():
                if name != "step" and isinstance(value, int | float):
                    self.board.add_scalar(name, value, row["step"])
            self.board.flush()
        if "miou" in row:
            self.bar.write(
                f"step {row['step']:6d}  loss {row['loss']:.4f}  mIoU {100 * row['miou']:.2f}  "
                f"pixel accuracy {100 * row['pixel_accuracy']:.2f}"
            )

    def close(self) -> None:
        """End the bar and TensorBoard's file."""
        self.bar.close()
        if self.board is not None:
            self.board.close()


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


PANELS = (
    ("loss", "loss"),
    ("miou", "mIoU"),
    ("pixel_accuracy", "pixel accuracy"),
    ("lr", "learning rate"),
    ("images_per_second", "images per second"),
)


def plot_runs(runs: Sequence[str | os.PathLike], path: str | os.PathLike) -> None:
    """Draw the curves of runs over their steps, one panel for each quantity that they logged.

    Args:
        runs: folders that `train` has written.
        path: PNG to write.

    Raises:
        FileNotFoundError, ValueError: as `read_log`, and a run that has logged nothing.
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "curves are drawn by matplotlib: pip install 'segmenter_fast[plot]'"
        ) from error
    logs = {str(run): read_log(run) for run in runs}
    for run, rows in logs.items():
        if not rows:
            raise ValueError(f"nothing to plot: {run} has logged nothing yet")
    panels = [panel for panel in PANELS if any(panel[0] in row for row in _all(logs.values()))]
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * lines), layout="constrained")
    places = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, (key, title) in zip(places, panels, strict=False):
        for run, rows in logs.items():
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            if points:
                marker = "o" if len(points) < 30 else None
                axes.plot(*zip(*points, strict=True), label=run, marker=marker, markersize=3)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in places[len(panels) :]:
        axes.remove()
    if len(logs) > 1:
        figure.legend(*_lines(places[: len(panels)]), loc="outside lower center", ncols=2)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _lines(places) -> tuple[list, list]:
    """A line and a name for each run, from whichever panels it is in."""
    found = {}
    for axes in places:
        for line, name in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(name, line)
    return list(found.values()), list(found)


def _all(logs: Iterable[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [row for rows in logs for row in rows]
