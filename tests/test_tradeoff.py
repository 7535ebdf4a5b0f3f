"""Images per second against mIoU: what is timed, what is told, and the command."""

import csv
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from segmenter_fast import create_model, tradeoff
from segmenter_fast.cli import app
from segmenter_fast.data import Scenes
from segmenter_fast.evaluate import evaluate
from segmenter_fast.figures import tradeoff_figure
from segmenter_fast.published import PUBLISHED, published
from segmenter_fast.tradeoff import (
    COLUMNS,
    PARTS,
    Speed,
    measure,
    part_of,
    peer_rows,
    published_tasks,
    rows_of,
    small_tasks,
    table,
    variants,
)
from segmenter_fast.variants import VARIANTS


def toy(name="Seg-N-Mask/32", precision="float32", miou=None, size=64):
    [task] = published_tasks([name], [precision], size, 5)
    return task._replace(miou=miou, kind="published" if miou else "", source="somewhere")


def test_variants_are_the_papers():
    assert len(variants()) == 24 and set(variants()) <= set(VARIANTS)


def test_published_figures_are_of_known_models():
    """Those of other architectures are looked at in test_peers.py."""
    assert len({(row.model, row.dataset, row.size) for row in PUBLISHED}) == len(PUBLISHED)
    for row in PUBLISHED:
        assert row.model in VARIANTS or "MMSegmentation" in row.source
        assert 20 < row.miou < 100 and row.source
        assert row.miou_multiscale is None or row.miou < row.miou_multiscale < row.miou + 5
    assert published("Seg-B-Mask/16").miou == 48.5
    assert published("Seg-T/8") is None
    # No mIoU of 640 pixels at a speed of 512.
    assert published("Seg-L-Mask/16").miou == 51.3
    assert published("Seg-L-Mask/16", size=640).miou == 51.8
    [task] = published_tasks(["Seg-L-Mask/16"], ["float32"], 384, 150)
    assert task.miou is None and not task.kind


def test_measure():
    """Batches grow, parts add up, and medians are of what was timed."""
    tasks = [toy(), toy(precision="bfloat16"), toy("Seg-N/16")]
    told = []
    speeds = measure(tasks, passes=2, batches=(1, 2), seconds=60, progress=told.append)
    assert len(speeds) == 3 and len(told) == 6
    for speed in speeds:
        assert 0 < speed.images_per_second <= speed.best_images_per_second * 1.000001
        assert speed.best_batch in (1, 2) and set(speed.parts) == set(PARTS)
        assert sum(speed.parts.values()) == pytest.approx(1) and speed.parts["linear layers"] > 0
        assert speed.parts["attention"] > 0 and speed.parts["head"] > 0


def test_the_best_batch_is_timed_in_every_pass(monkeypatch):
    """A batch of two takes 1.2 times as long as one image, and four no less than two calls."""
    calls = []

    def seconds(model, x, device):
        calls.append(len(x))
        return {1: 1.0, 2: 1.2, 4: 2.4}[len(x)] * (1 + 0.1 * (len(calls) % 3))

    monkeypatch.setattr(tradeoff, "_seconds", seconds)
    [speed] = measure([toy()], passes=3, batches=(1, 2, 4, 8), seconds=60)
    assert speed.best_batch == 2 and 8 not in calls
    assert 1.3 < speed.best_images_per_second / speed.images_per_second < 2
    assert calls.count(2) == 3 + 3 * 2 and calls[-2:] == [2, 2]


def test_what_takes_too_long_says_so(monkeypatch):
    monkeypatch.setattr(tradeoff, "_seconds", lambda *_: 9.0)
    [speed] = measure([toy()], passes=3, batches=(1,), seconds=5)
    assert speed.images_per_second is None and "one image takes 9 s" in speed.reason


def test_what_fails_does_not_stop_the_others(monkeypatch):
    real = tradeoff._random_model

    def fail(task, device, backend):
        if "Mask" in task.name:
            raise RuntimeError("no room for 3 GiB\nat some place")
        return real(task, device, backend)

    monkeypatch.setattr(tradeoff, "_random_model", fail)
    first, second = measure([toy(), toy("Seg-N/32")], passes=1, batches=(1,))
    assert first.reason == "no room for 3 GiB" and second.images_per_second > 0


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_random_models_are_finite_in_every_precision(backend):
    names = {name for name, _ in create_model("Seg-N-Mask/16", 5, 64).named_parameters()}
    known = tradeoff.precisions("cpu", backend)
    assert ("int8" in known) == (backend == "auto") and ("float16" in known) != ("int8" in known)
    for precision in known:
        task = toy("Seg-N-Mask/16", precision)
        model = tradeoff._random_model(task, torch.device("cpu"), backend)
        native = backend == "auto"
        dtype = torch.float32 if native else tradeoff.DTYPES[precision]
        assert all(p.isfinite().all() and p.dtype == dtype for p in model.parameters())
        assert model.precision == (precision if native else "float32")
        assert {name for name, _ in model.named_parameters()} == names


def test_a_precision_that_is_not_there_says_so():
    for precision, backend in (("int8", "reference"), ("float16", "auto")):
        [speed] = measure([toy(precision=precision)], backend=backend, passes=1, batches=(1,))
        assert f"got '{precision}'" in speed.reason


def test_parts_of_the_one_native_call(monkeypatch):
    """What it counts itself; the rest of its time is of no part."""
    from segmenter_fast import native

    counted = {"embed": 1e-6, "attention": 4e-6, "linear": 3e-6, "norm": 1e-6, "head": 2e-6}
    monkeypatch.setattr(native, "seconds_of", lambda model, x: counted)
    times = tradeoff._parts_of_call(None, None, microseconds=15.0)
    assert times == pytest.approx(
        {"patch embedding": 1, "attention": 4, "linear layers": 3, "head": 2, "other": 5}
    )
    assert set(times) == set(PARTS)


@pytest.mark.parametrize(
    ("operation", "part"),
    [
        ("aten::addmm", "linear layers"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("segmenter_fast::attention_triton", "attention"),
        ("segmenter_fast::upsample_argmax", "head"),
        ("segmenter_fast::mask_product_triton", "head"),
        ("aten::mkldnn_convolution", "patch embedding"),
        ("aten::native_layer_norm", "other"),
        ("aten::gelu", "other"),
    ],
)
def test_parts(operation, part):
    assert part_of(operation) == part


def test_small_models_have_an_mIoU_that_was_measured():
    tasks = small_tasks(["float32"])
    assert len({task.name for task in tasks}) == len(tasks) >= 5
    for task in tasks:
        assert 10 < task.miou < 80 and task.kind == "measured" and "seeds" in task.source
        assert task.config.n_cls == len(Scenes.class_names)


ROWS = [
    (toy("Seg-T-Mask/16", miou=38.1), Speed(12.345, 20.0, 4, dict.fromkeys(PARTS, 0.2))),
    (toy("Seg-B-Mask/16", miou=48.5), Speed(1.2, 1.3, 2, dict.fromkeys(PARTS, 0.2))),
    (toy("Seg-L-Mask/8"), Speed(None, reason="one image takes 99 s, more than --seconds")),
]


def test_table_and_columns():
    rows = rows_of(*zip(*ROWS, strict=True))
    assert all(tuple(row) == COLUMNS for row in rows)
    lines = table(rows)
    assert lines[2].startswith("| Seg-T-Mask/16 | float32 | 12.3 | 20.0 at 4 | 20 % |")
    assert lines[2].endswith("| 38.1 | ade20k, published (somewhere) |")
    assert "not run: one image takes 99 s" in lines[4]
    assert {line.count("|") for line in lines} == {lines[0].count("|")}


def test_figure(tmp_path):
    pytest.importorskip("matplotlib")
    rows = rows_of(*zip(*ROWS, strict=True))
    for name in ("a.png", "a.svg"):
        tradeoff_figure(tmp_path / name, rows, "a machine")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > 500
    assert "Seg-B-Mask/16" in (tmp_path / "a.svg").read_text()
    with pytest.raises(ValueError, match="nothing to draw"):
        tradeoff_figure(tmp_path / "b.png", rows[2:], "a machine")


def test_figure_names_a_model_once_and_other_architectures_too(tmp_path):
    pytest.importorskip("matplotlib")
    tasks = [toy("Seg-T-Mask/16", precision, 38.1) for precision in ("float32", "int8")]
    rows = rows_of(tasks, [ROWS[0][1], ROWS[1][1]])
    tradeoff_figure(tmp_path / "ours.svg", rows, "a machine")
    assert (tmp_path / "ours.svg").read_text().count("<!-- Seg-T-Mask/16 -->") == 1
    assert "others in PyTorch" not in (tmp_path / "ours.svg").read_text()
    rows += peer_rows(peers_file(tmp_path), "a processor", 2)
    tradeoff_figure(tmp_path / "all.svg", rows, "a machine")
    drawn = (tmp_path / "all.svg").read_text()
    assert "<!-- SegFormer B0 -->" in drawn and "<!-- others in PyTorch, float32 -->" in drawn
    assert "My network" not in drawn  # nobody has published its mIoU


def peers_file(folder: Path, gpu: str | None = None, threads: int = 2) -> Path:
    """What bench_peers.py writes, as far as it is read."""

    def row(contestant, ms, peer=True):
        return {"contestant": contestant, "ms": ms, "peer": peer, "images": 1}

    ours = row("Seg-T-Mask/16, segmenter_fast", 1.0, peer=False)
    cases = {
        "a": [row("SegFormer B0", 20.0), row("the same, torch.compile", 10.0), ours],
        "b": [row("My network", 4.0), row("the same, torch.compile", None), ours],
        "d": [row("Seg-T-Mask/16 in PyTorch", 5.0), ours],
        "c": [row("SegFormer B1", None), row("the same, torch.compile", None), ours],
    }
    machine = {"cpu": "a processor", "threads": threads, "gpu": gpu}
    path = folder / "peers.json"
    path.write_text(json.dumps({"machine": machine, "cases": cases}))
    return path


def test_peers_are_rows_at_their_best(tmp_path):
    first, second, plain = peer_rows(peers_file(tmp_path), "a processor", 2)
    assert tuple(first) == COLUMNS
    assert (first["model"], first["images_per_second"]) == ("SegFormer B0", 100.0)
    assert (first["miou"], first["kind"]) == (published("SegFormer B0").miou, "published")
    assert (second["images_per_second"], second["miou"], second["source"]) == (250.0, None, "")
    assert (plain["model"], plain["miou"]) == ("Seg-T-Mask/16 in PyTorch", 38.1)
    assert "| SegFormer B0 | float32 | 100 |  |" in table([first, second])[2]
    assert len(peer_rows(peers_file(tmp_path, gpu="a GPU"), "a GPU", None)) == 3


def test_peers_of_another_machine_or_none(tmp_path):
    for device, threads in (("another", 2), ("a processor", 4), ("a processor", None)):
        with pytest.raises(ValueError, match="on a processor with 2 threads, and this is"):
            peer_rows(peers_file(tmp_path), device, threads)
    bad = tmp_path / "bad.json"
    for text in ("{", "[]", '{"machine": {}}', '{"machine": {"gpu": 1}, "cases": {"a": [{}]}}'):
        bad.write_text(text)
        with pytest.raises(ValueError, match=r"bad\.json is not what `pytest"):
            peer_rows(bad, "a processor", 2)
    with pytest.raises(ValueError, match=r"none\.json cannot be read"):
        peer_rows(tmp_path / "none.json", "a processor", 2)


def run(*words, status=0):
    result = CliRunner().invoke(app, ["tradeoff", *map(str, words)])
    assert result.exit_code == status, f"{result.output}\n{result.exception!r}"
    return result.output


QUICK = ("--size", 64, "--passes", 1, "--batches", "1", "--precision", "float32")


def test_command(tmp_path):
    pytest.importorskip("matplotlib")
    text = run("-o", tmp_path / "out", "--variants", "Seg-T-Mask/32,Seg-T-Mask/16", *QUICK)
    assert "Seg-T-Mask/16" in text and "Seg-N-Mask/8" in text
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"README.md", "tradeoff.csv", "tradeoff.json", "tradeoff.png", "tradeoff.svg"}
    with open(tmp_path / "out/tradeoff.csv") as file:
        rows = list(csv.DictReader(file))
    stored = json.loads((tmp_path / "out/tradeoff.json").read_text())
    assert len(rows) == len(stored["rows"]) == 2 + len(small_tasks(["float32"]))
    for row in stored["rows"]:
        assert row["images_per_second"] > 0 and math.isfinite(row["images_per_second"])
    # Nothing is published for images of 64 pixels.
    assert {row["kind"] for row in stored["rows"]} == {"", "measured"}
    assert stored["machine"]["torch"] == torch.__version__
    assert (
        "![images per second against mIoU](tradeoff.png)"
        in (tmp_path / "out/README.md").read_text()
    )


def test_weights_are_measured(tmp_path):
    torch.manual_seed(0)
    model = create_model("Seg-N-Mask/16", 11, (64, 96), n_layers=1, decoder_n_layers=1)
    model.config = dataclasses.replace(model.config, class_names=Scenes.class_names)
    model.save_pretrained(tmp_path / "mine")
    words = ("--variants", "none", "--no-small", "-w", tmp_path / "mine", "--dataset", "scenes")
    words += ("--scene-size", "64,96", "--limit", 2, *QUICK[:-2], "--device", "cpu")
    run("-o", tmp_path / "out", *words)
    rows = json.loads((tmp_path / "out/tradeoff.json").read_text())["rows"]
    assert [row["precision"] for row in rows] == ["float32", "bfloat16", "int8"]
    for row in rows:
        model.precision = row["precision"]
        if row["reason"]:  # no instructions for int8 here
            assert row["precision"] == "int8" and row["miou"] is None
            continue
        expected = evaluate(model.eval(), Scenes(2, size=(64, 96), split="val"), progress=False)
        assert row["miou"] == pytest.approx(100 * expected["miou"], abs=1e-6)
        assert row["kind"] == "measured" and row["dataset"] == "scenes"
        assert "2 images" in row["source"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--variants", "Seg-X/16"), "Seg-X/16"),
        (("--precision", "int4"), "--precision"),
        (("--precision", "float16", "--device", "cpu"), "of float32, bfloat16, int8"),
        (("--batches", "2,4"), "must rise from 1"),
        (("--variants", "none", "--no-small"), "nothing to measure"),
        (("--weights", "street"), "--dataset"),
        (("-w", "street", "--dataset", "camvid", "--root", ".", "--data-seed", 1), "--data-seed"),
        (("--dataset", "scenes"), "is for measuring the mIoU of --weights"),
        (("--peers", "none.json"), "cannot be read"),
        (("--peers", "none.json", "--size", "64"), "--size 512"),
    ],
)
def test_bad_input(tmp_path, words, message):
    status = 1 if "Seg-X/16" in words else 2
    assert message in run("-o", tmp_path / "out", *words, status=status)
    assert not Path(tmp_path / "out").exists()


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a folder that nobody can write into")
def test_a_folder_that_cannot_be_written(monkeypatch):
    """Before anything is timed."""
    monkeypatch.setattr(tradeoff, "measure", lambda *_: pytest.fail("was timed"))
    assert "cannot write into /proc" in run("-o", "/proc/none", *QUICK, status=1)
