"""Layer norm over channels: PyTorch's."""

import pytest
import torch
from checks import with_spikes

from segmenter_fast.ops.layer_norm import layer_norm


def make_inputs(shape, spikes=False, offset=0.0):
    def make(dtype):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(shape, generator=generator) + offset
        width = shape[-1]
        return {
            "x": (with_spikes(x) if spikes else x).to(dtype),
            "weight": (torch.rand(width, generator=generator) + 0.5).to(dtype),
            "bias": torch.randn(width, generator=generator).to(dtype),
            "eps": 1e-5,
        }

    return make


def test_rows_have_no_mean_and_deviation_1():
    inputs = make_inputs((3, 5, 64))(torch.float64)
    inputs["weight"], inputs["bias"] = torch.ones_like(inputs["bias"]), inputs["bias"] * 0
    for backend in ("reference", "native"):
        y = layer_norm(**inputs, backend=backend)
        assert y.mean(-1).abs().max() < 1e-12
        assert (y.var(-1, correction=0) - 1).abs().max() < 1e-4


def test_rejects_bad_input():
    x, three = torch.randn(2, 4), torch.ones(3)
    with pytest.raises(ValueError, match=r"weight and bias \(4,\), got \(3,\) and \(3,\)"):
        layer_norm(x, three, three)
