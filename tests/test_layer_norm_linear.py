"""A linear layer of normed tokens: PyTorch's."""

import pytest
import torch
import torch.nn.functional as F
from checks import with_spikes

from segmenter_fast.ops.layer_norm_linear import layer_norm_linear


def make_inputs(batch, n, width, out, spikes=False, offset=0.0):
    def make(dtype):
        generator = torch.Generator().manual_seed(0)

        def randn(*shape):
            return torch.randn(shape, generator=generator)

        x = randn(batch, n, width) + offset
        inputs = {
            "x": with_spikes(x, 4.0) if spikes else x,
            "gamma": torch.rand(width, generator=generator) + 0.5,
            "beta": randn(width),
            "weight": randn(out, width) / width**0.5,
            "bias": randn(out),
        }
        return {**{name: t.to(dtype) for name, t in inputs.items()}, "eps": 1e-5}

    return make


def test_is_a_norm_and_a_linear_layer():
    inputs = make_inputs(2, 5, 12, 7)(torch.float64)
    norm = (inputs["gamma"], inputs["beta"], 1e-5)
    expected = F.linear(F.layer_norm(inputs["x"], (12,), *norm), inputs["weight"], inputs["bias"])
    for backend in ("reference", "native"):
        torch.testing.assert_close(layer_norm_linear(**inputs, backend=backend), expected)


def test_rejects_bad_input():
    inputs = make_inputs(1, 2, 4, 3)(torch.float32)
    for name, value, text in (
        ("gamma", torch.ones(3), r"gamma and beta \(4,\), .* got \(3,\), \(4,\), \(3, 4\), \(3,\)"),
        ("weight", torch.ones(3, 5), r"weight \(N, 4\)"),
        ("bias", torch.ones(4), r"bias \(N,\)"),
    ):
        with pytest.raises(ValueError, match=text):
            layer_norm_linear(**(inputs | {name: value}))
