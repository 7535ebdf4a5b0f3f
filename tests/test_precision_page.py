"""`python -m benchmarks.precision`: what it compares, its table, and the command."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from segmenter_fast import BackendError, create_model
from segmenter_fast.data import Scenes
from segmenter_fast.evaluate import evaluate
from segmenter_fast.model import QUANTIZED

sys.path.insert(0, str(Path(__file__).parents[1]))  # `benchmarks` is no installed package
from benchmarks import precision
from benchmarks.precision import SETTINGS, Result, Setting, measure, page, section, table

ROOT = Path(__file__).parents[1]


def test_every_kind_of_layer_has_a_row_of_its_own():
    assert [setting.precision for setting in SETTINGS[:3]] == ["float32", "bfloat16", "int8"]
    assert SETTINGS[2].quantized == QUANTIZED
    assert {kind for setting in SETTINGS[3:] for kind in setting.quantized} == QUANTIZED
    assert all(len(setting.quantized) == 1 and setting.precision == "int8"
               for setting in SETTINGS[3:])  # fmt: skip
    assert len({setting.name for setting in SETTINGS}) == len(SETTINGS)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    small = {"d_model": 64, "n_heads": 2, "n_layers": 1, "decoder_n_layers": 1}
    return create_model("Seg-N-Mask/16", 11, (64, 96), **small).eval()


def test_measure(model, monkeypatch):
    """Numbers are those of `evaluate`, labels are compared with the first row's."""
    data = Scenes(2, size=(64, 96), split="val")
    seen, real = [], evaluate

    def watched(model, *arguments, **options):
        seen.append((model.precision, model.quantized))
        if model.precision == "int8":
            raise BackendError("no such instruction")
        return real(model, *arguments, **options)

    monkeypatch.setattr(precision, "evaluate", watched)
    settings = (SETTINGS[0], SETTINGS[1], Setting("one", "int8", frozenset(("fc1",))))
    results = measure(model, data, settings, progress=False)
    assert seen == [(s.precision, s.quantized) for s in settings]
    model.precision = "float32"
    expected = real(model, data, progress=False)
    assert results[0][1:4] == (expected["miou"], expected["pixel_accuracy"], 1.0)
    assert 0.5 < results[1].agreement <= 1.0
    assert results[2] == Result("one", reason="no such instruction")


def test_agreement_counts_pixels(model, monkeypatch):
    right, wrong = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0, 1], [2, 0]])

    def told(model, dataset, each):
        each(0, right)
        each(1, right if model.precision == "float32" else wrong)
        return {"miou": 0.5, "pixel_accuracy": 0.6}

    monkeypatch.setattr(precision, "evaluate", told)
    first, second = measure(model, None, SETTINGS[:2])
    assert first.agreement == 1.0 and second.agreement == 7 / 8


ROWS = [
    Result("float32", 0.5420, 0.9010, 1.0),
    Result("bfloat16", 0.54189, 0.9012, 0.9987),
    Result("int8", reason="needs VNNI"),
]


def test_table():
    assert table(ROWS)[2:] == [
        "| float32 | 54.20 |  | 90.10 |  | 100.00 |",
        "| bfloat16 | 54.19 | -0.01 | 90.12 | +0.02 | 99.87 |",
        "| int8 | not run: needs VNNI | | | | |",
    ]
    assert {line.count("|") for line in table(ROWS)} == {7}


def test_page():
    text = page([section("`a` on b", "2 images", ROWS), ["## c", ""]], "avx2")
    assert text.startswith("# What bfloat16") and "instructions `avx2`" in text
    assert "## `a` on b\n\n2 images.\n\n| precision |" in text and "## c" in text


def run(*words):
    command = [sys.executable, "-m", "benchmarks.precision", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_help():
    done = run("--help")
    assert done.returncode == 0 and "--camvid" in done.stdout


def test_command(tmp_path, monkeypatch):
    """Without CamVid its section says so, and the page is written."""
    monkeypatch.setattr(precision, "SCENES", {"count": 1, "size": (64, 64), "split": "val"})
    monkeypatch.setattr(precision, "SETTINGS", SETTINGS[:2])
    precision.main(camvid=None, limit=0, threads=None, output=tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "Not run: needs --camvid" in text and "## `scenes` on scenes, split val" in text
    assert "all 1 images" in text and "| bfloat16 |" in text
