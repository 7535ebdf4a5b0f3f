"""The oracles themselves: what they let pass and what they catch."""

import math

import pytest
import torch
from checks import assert_labels, assert_matches
from dense_cases import noise
from torch import Tensor

from segmenter_fast.ops.upsample_argmax import upsample_argmax


def test_oracle_catches_a_dropped_tail():
    """A wrong operation fails, be it wrong in the last row, the last class or one gradient."""

    def reference(x: Tensor, y: Tensor) -> Tensor:
        return x * y

    def last_row_dropped(x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([(x * y)[:-1], torch.zeros_like(x[-1:])])

    def gradient_of_y_dropped(x: Tensor, y: Tensor) -> Tensor:
        return x * y.detach() + 0 * y

    def small_bias(x: Tensor, y: Tensor) -> Tensor:
        return x * y + 1e-5

    def make_inputs(dtype: torch.dtype) -> dict[str, Tensor]:
        return {"x": noise((13, 17), dtype), "y": noise((13, 17), dtype, seed=3)}

    assert_matches(reference, reference, make_inputs, torch.float32)
    for wrong, text in (
        (last_row_dropped, "output 0: maximum error"),
        (gradient_of_y_dropped, "gradient of y: maximum error"),
        (small_bias, "output 0: "),
        (lambda x, y: (x * y).double(), "float64 != torch.float32"),
        (lambda x, y: (x * y).masked_fill(x == x[0, 0], math.nan), "NaN or infinity"),
    ):
        with pytest.raises(AssertionError, match=text):
            assert_matches(wrong, reference, make_inputs, torch.float32)


def test_label_oracle_catches_a_wrong_pixel():
    logits = noise((2, 9, 3, 4))
    labels = upsample_argmax(logits, (29, 31), (1, 2, 25, 28), backend="reference")
    assert_labels(labels, logits, (29, 31), (1, 2, 25, 28))
    labels[1, -1, -1] = (labels[1, -1, -1] + 1) % 9
    with pytest.raises(AssertionError, match=r"1 wrong labels in image 1; first at \(24, 27\)"):
        assert_labels(labels, logits, (29, 31), (1, 2, 25, 28))
    with pytest.raises(AssertionError, match="wrong labels"):
        shifted = upsample_argmax(logits, (29, 31), (1, 3, 25, 28), backend="reference")
        assert_labels(shifted, logits, (29, 31), (1, 2, 25, 28))
