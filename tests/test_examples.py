"""The examples run as a user runs them, and do what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from segmenter_fast import SegmenterModel

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, *words):
    """What an example prints, on one thread and without a GPU."""
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}
    environment |= {"PYTHONPATH": str(EXAMPLES.parent), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(text):
    found = [float(value) for value in re.findall(r"loss (\S+)", text)]
    assert found and all(value == value for value in found)
    return found


def test_plain_loop(tmp_path):
    assert len((EXAMPLES / "plain_loop.py").read_text().splitlines()) <= 40
    found = losses(run("plain_loop.py", "--steps", 14, "--batch-size", 4, "--output", tmp_path))
    assert len(found) == 14 and sum(found[-4:]) < 0.95 * sum(found[:4])
    assert SegmenterModel.from_pretrained(tmp_path).config.class_names[0] == "sky"


def test_plain_loop_in_bfloat16(tmp_path):
    found = losses(
        run("plain_loop.py", "--steps", 2, "--batch-size", 2, "--amp", "--output", tmp_path)
    )
    assert len(found) == 2


def test_accelerate_loop(tmp_path):
    pytest.importorskip("accelerate", reason="pip install 'segmenter_fast[examples]'")
    words = ("--steps", 8, "--batch-size", 2, "--accumulate", 2, "--cpu", "--output", tmp_path)
    found = losses(run("accelerate_loop.py", *words))
    assert len(found) == 8 and sum(found[-3:]) < sum(found[:3])
    assert SegmenterModel.from_pretrained(tmp_path).n_cls == 11


def test_hugging_face_segformer():
    """It compares both ways itself; here, that the memory is really saved."""
    pytest.importorskip("transformers", reason="pip install 'segmenter_fast[examples]'")
    words = ("--size", 256, "--classes", 150, "--batch-size", 2, "--rounds", 1)
    text = run("hugging_face_segformer.py", *words)
    assert "same loss" in text and "labels agree on" in text
    if Path("/proc/self/clear_refs").exists():
        usual, ours = (float(v.replace(",", "")) for v in re.findall(r"([\d,]+) MiB", text))
        # The full-size logits and their gradient, which ours never makes, are 75 MiB each.
        assert usual - ours > 60
