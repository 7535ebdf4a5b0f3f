"""`python -m benchmarks.parts`: the parts add up to the whole model, and the table."""

import subprocess
import sys
from pathlib import Path

import pytest

from segmenter_fast.variants import create_config

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # `benchmarks` is no installed package


@pytest.fixture(scope="module")
def parts():
    """The module; what it puts on the path and imports by bare name is taken back."""
    path, before = list(sys.path), set(sys.modules)
    pytest.importorskip("pytest_benchmark")
    from benchmarks import parts

    yield parts
    sys.path[:] = path
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if file.startswith(str(ROOT / "benchmarks")):
            del sys.modules[name]


@pytest.mark.parametrize("variant", ["Seg-T-Mask/16", "Seg-S-Mask/32"])
def test_the_parts_of_the_call_add_up_to_the_model(parts, variant):
    from bench_model import model_work

    config = create_config(variant, 150, 512)
    work = parts.call_work(config, "int8", "bfloat16", batch=2)
    products = sum(work[name][1].flops for name in ("embed", "attention", "linear", "head"))
    assert products == model_work(config, 1, batch=2).flops
    assert work["linear"][0] == "int8" and work["head"][0] == "bfloat16"
    weights = 12 * config.d_model**2 * (config.n_layers + config.decoder_n_layers)
    assert work["linear"][1].bytes == weights  # one byte each


def test_the_table(parts):
    work = {"linear": ("int8", parts.Work(2e9, 1e6)), "labels": ("float32", parts.Work(0, 4e6))}
    rates = {"int8": 1e12, "float32": 1e11}
    seconds = [{"linear": 3e-3, "wait": 1e-3}, {"linear": 5e-3}, {"linear": 4e-3, "wait": 2e-3}]
    lines = parts.call_lines(seconds, 8.0, work, rates, bandwidth=1e9)
    assert lines == [("linear", 1, 4.0, 2.0), ("wait", 1, 1.0, None), ("labels", 1, 8.0, 4.0)]
    text = parts.table_of([lines[0], lines[2]], whole=16.0)
    assert text[2] == "| linear | 1 | 4.00 | 25 % | 2.00 | 50 % |"
    assert text[-3] == "| sum of the parts | | 12.0 | 75 % | 6.00 | 50 % |"
    assert text[-2] == "| **whole model** | | **16.0** | | 6.00 | 38 % |"
    unknown = parts.table_of(lines, whole=16.0)
    assert unknown[3] == "| wait | 1 | 1.00 | 6.2 % |  |  |"


@pytest.mark.parametrize("words", [["--help"], ["--precision", "int4"]])
def test_command(words):
    command = [sys.executable, "-m", "benchmarks.parts", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == (2 if "int4" in words else 0), done.stderr
    assert ("got int4" in done.stderr) if "int4" in words else ("--modules" in done.stdout)
