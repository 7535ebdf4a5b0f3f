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
    words = ("--size", 256, "--classes", 150, "--batch-size", 1, "--rounds", 1)
    text = run("hugging_face_segformer.py", *words)
    assert "same loss" in text and "labels agree on" in text
    assert text.count(" ms") == 4
    if "MiB" in text:  # the high-water mark can be read: on Linux, as far as the machine allows
        peaks = re.findall(r"([\d,]+) MiB", text)
        training, validation, our_training, our_validation = (
            float(peak.replace(",", "")) for peak in peaks
        )
        # Full-size logits take 38 MiB, and in training so does their gradient.
        assert training - our_training > 38
        assert validation - our_validation > 19


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_its_docstring_says_how_to_run_it(name):
    text = (EXAMPLES / name).read_text()
    assert f"examples/{name} --" in text.split('"""')[1]
    assert "argparse" in text and f'"{name}"' in Path(__file__).read_text()
