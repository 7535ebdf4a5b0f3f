"""The log of a run: rows that are read back, resumed runs, curves."""

import importlib.util
import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from segmenter_fast.cli import app
from segmenter_fast.runlog import RunLog, plot_runs, read_log

ROWS = [
    {"step": 2, "loss": 2.0, "lr": 1e-3, "images_per_second": 9.0},
    {"step": 4, "loss": 1.0, "lr": 5e-4, "images_per_second": 9.5, "miou": 0.2,
     "pixel_accuracy": 0.5},
]  # fmt: skip


def written(folder, rows=ROWS, logged=0):
    folder.mkdir(exist_ok=True)
    log = RunLog(folder, 0, 10, logged)
    for row in rows:
        log.row(row)
    log.close()
    return folder


def test_rows_are_read_back(tmp_path):
    assert read_log(written(tmp_path / "run")) == ROWS
    assert read_log(tmp_path / "run/log.jsonl") == ROWS


def test_a_resumed_run_drops_what_it_is_about_to_repeat(tmp_path):
    written(tmp_path / "run")
    again = {"step": 4, "loss": 1.5}
    written(tmp_path / "run", [again], logged=2)
    assert read_log(tmp_path / "run") == [ROWS[0], again]


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    file = written(tmp_path / "run") / "log.jsonl"
    file.write_text(file.read_text() + '{"step": 6, "lo')
    assert read_log(tmp_path / "run") == ROWS
    written(tmp_path / "run", [], logged=4)
    assert [json.loads(line) for line in file.read_text().splitlines()] == ROWS


def test_silent_processes_write_nothing(tmp_path):
    log = RunLog(tmp_path, 0, 10, 0, talks=False)
    log.row(ROWS[0])
    log.close()
    assert not list(tmp_path.iterdir())


def test_bad_logs_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"log\.jsonl does not exist"):
        read_log(tmp_path)
    (tmp_path / "log.jsonl").write_text('{"step": 2}\nnonsense\n')
    with pytest.raises(ValueError, match=r"log\.jsonl, line 2: not JSON"):
        read_log(tmp_path)


@pytest.mark.skipif(not importlib.util.find_spec("tensorboard"), reason="needs tensorboard")
def test_tensorboard_has_the_curves(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(written(tmp_path / "run") / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(2, 2.0), (4, 1.0)]
    assert [e.step for e in events.Scalars("miou")] == [4]


def test_plot(tmp_path):
    """A panel for each quantity, a curve for each run; the picture shows both."""
    pytest.importorskip("matplotlib")
    runs = [str(written(tmp_path / name)) for name in ("one", "two")]
    result = CliRunner().invoke(app, ["plot", *runs, "-o", str(tmp_path / "curves.png")])
    assert result.exit_code == 0, result.output
    plot_runs(runs[:1], tmp_path / "one.png")
    with Image.open(tmp_path / "curves.png") as both, Image.open(tmp_path / "one.png") as one:
        assert both.size == one.size and both.size[0] > 1.5 * both.size[1]
        assert both.convert("RGB").tobytes() != one.convert("RGB").tobytes()


def test_plot_of_nothing_says_so(tmp_path):
    pytest.importorskip("matplotlib")
    written(tmp_path / "run", [])
    (tmp_path / "run/log.jsonl").touch()
    result = CliRunner().invoke(app, ["plot", str(tmp_path / "run")])
    assert result.exit_code == 1 and "nothing to plot" in result.output
    result = CliRunner().invoke(app, ["plot", str(tmp_path / "none")])
    assert result.exit_code == 1 and "no log of a run" in result.output
