"""The ablation grid: what runs, what its page says, and that one run of it works."""

import copy
import json
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))  # `benchmarks` is no installed package
from benchmarks import ablations, curves
from benchmarks.ablations import Answer, Cell, answers, cells, collect, page, specification, verdict

GRID = yaml.safe_load(ablations.CONFIG.read_text(encoding="utf-8"))


def test_every_row_of_a_question_is_a_run_and_every_run_is_asked_for():
    asked = {row["run"] for question in GRID["questions"].values() for row in question["rows"]}
    assert asked == set(GRID["runs"])
    for run in GRID["runs"]:
        assert specification(GRID, run)["train"]["steps"] == GRID["base"]["train"]["steps"]
    with pytest.raises(ValueError, match="expected data, model, train or init"):
        specification(GRID | {"runs": {"x": {"modle": {}}}}, "x")


def test_cells_come_in_an_order_that_can_be_stopped(tmp_path):
    """All runs of a seed before the next; CamVid's only where it is."""
    without = list(cells(GRID, None, None))
    assert not any(cell.run.startswith("camvid") for cell in without)
    assert [cell.seed for cell in without] == sorted(cell.seed for cell in without)
    every = list(cells(GRID, None, tmp_path))
    assert len(every) == len(GRID["runs"]) * len(GRID["seeds"])
    assert list(cells(GRID, {"base"}, None)) == [Cell("base", seed) for seed in GRID["seeds"]]


def miniature():
    grid = copy.deepcopy(GRID)
    grid["seeds"] = [0]
    grid["base"]["data"] |= {"count": 4, "val_count": 2, "size": [32, 48]}
    grid["base"]["model"] |= {"n_layers": 1, "decoder_n_layers": 1}
    grid["base"]["train"] |= {"steps": 2, "batch_size": 2, "warmup": 1}
    return grid


def test_a_grid_from_training_to_its_page(tmp_path):
    """Two runs in processes of their own; the others are named as not run."""
    pytest.importorskip("matplotlib")
    grid = miniature()
    config, runs = tmp_path / "grid.yaml", tmp_path / "runs"
    config.write_text(yaml.safe_dump(grid))
    runs.mkdir()
    todo = list(cells(grid, {"base", "linear"}, None))
    ablations.train_all(config, grid, todo, runs, None, jobs=2)
    results = collect(grid, runs)
    assert set(results) == {"base", "linear"} and 0 <= results["base"][0]["miou"] <= 1
    state = (runs / "base-0/state.pt").stat().st_mtime_ns
    ablations.train_all(config, grid, todo, runs, None, jobs=2)  # nothing is repeated
    assert (runs / "base-0/state.pt").stat().st_mtime_ns == state
    ablations.write_report(grid, runs, tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    assert f"| linear | {100 * results['linear'][0]['miou']:.1f} | 1 |" in text
    assert "Not run: patch 32, patch 8." in text
    assert (tmp_path / "out/ablations.png").stat().st_size > 10_000


def test_what_starts_from_another_run_waits_for_it(tmp_path):
    grid = miniature() | {"runs": {"base": {}, "second": {"init": "base"}}}
    assert ablations._is_ready(grid, Cell("base", 0), tmp_path)
    assert not ablations._is_ready(grid, Cell("second", 0), tmp_path)
    with pytest.raises(SystemExit, match="second-0 waits for a run"):
        ablations.train_all(tmp_path, grid, [Cell("second", 0)], tmp_path, None, jobs=1)


def answer(label, mious, paper):
    return Answer(label, mious, paper, None)


def test_verdict():
    same = [answer("a", [10, 11, 12], 1.0), answer("b", [20, 21, 22], 2.0)]
    assert verdict(same) == "The order is the paper's."
    other = [answer("a", [30, 31, 32], 1.0), answer("b", [20, 21, 22], 2.0)]
    assert verdict(other) == "The order differs from the paper's: a is above b."
    close = [answer("a", [10, 20, 30], 1.0), answer("b", [11, 21, 31], 2.0)]
    assert verdict(close).endswith("Within the noise of the seeds: a and b.")
    assert verdict(same[:1]) == "The paper has no figures for an order."


def test_page_has_mean_and_spread():
    results = {"base": {0: {"miou": 0.2}, 1: {"miou": 0.3}}}
    [row] = answers(GRID["questions"]["decoder"], results)
    assert row.mean == pytest.approx(25) and row.spread == pytest.approx(50**0.5)
    assert "| mask transformer | 25.0 ± 7.1 | 2 | 48.70 |" in page(GRID, results)


def test_committed_page_is_of_the_committed_results():
    record = json.loads((ablations.OUTPUT / "results.json").read_text(encoding="utf-8"))
    assert record["grid"] == GRID
    text = (ablations.OUTPUT / "README.md").read_text(encoding="utf-8")
    assert page(GRID, record["results"]) == text and "Not run" not in text
    models = json.loads(ablations.SMALL_MODELS.read_text(encoding="utf-8"))
    assert models == ablations.small_models(GRID, record["results"])


def test_curves_compare_kernels_with_seeds():
    grid = yaml.safe_load(curves.CONFIG.read_text(encoding="utf-8")) | {"seeds": [0, 1]}
    assert list(grid["runs"]) == ["reference", "native"]
    values = {("reference", 0): 0.10, ("reference", 1): 0.16, ("native", 0): 0.11,
              ("native", 1): 0.15}  # fmt: skip
    logs = {
        k: [{"step": 2, "loss": 1.0}, {"step": 4, "loss": 1.0, "miou": v}]
        for k, v in values.items()
    }
    # Reference and native means; 1 point between kernels; 6 and 4 between seeds.
    assert curves.summary(grid, logs)[-1] == "| 4 | 13.0 | 13.0 | 1.0 | 5.0 |"
