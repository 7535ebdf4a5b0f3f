"""The page of expected times: it is the committed one, and its sums are those of the models."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import expected
from records import RESULTS


def gflop(parts, *names):
    return sum(p.calls * p.flop for p in parts if p.name in names) / 1e9


def test_flop_of_the_base_model():
    """Counted by hand: 1,025 tokens, 12 blocks of 12 D^2 products and 4 N D of attention."""
    parts = expected.parts_of("Seg-B-Mask/16", 1)
    n, d = 1025, 768
    linear = 12 * 2 * n * 12 * d * d / 1e9
    names = ("layer_norm_linear", "linear_residual", "mlp")
    assert gflop(parts, *names) == pytest.approx(linear)
    assert gflop(parts, "attention") == pytest.approx(12 * 4 * n * n * d / 1e9)
    assert gflop(parts, "patch_embed") == pytest.approx(2 * 1024 * 768 * d / 1e9)


@pytest.mark.parametrize("model", expected.MODELS)
def test_nothing_is_expected_below_its_floor(model):
    one, many = (expected.parts_of(model, batch) for batch in expected.BATCHES)
    assert all(0 < part.floor < part.expected for part in one + many)
    per_image = [sum(p.expected for p in parts) for parts in (one, many)]
    assert per_image[1] / expected.BATCHES[1] < per_image[0], "a batch saves time"


def test_the_committed_page_is_what_the_command_writes():
    text = (RESULTS / "expected.md").read_text()
    assert text == expected.page(), "run: python -m benchmarks.expected"
