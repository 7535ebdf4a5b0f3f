"""A linear layer added to the stream of tokens: PyTorch's."""

import pytest
import torch
import torch.nn.functional as F
from checks import with_spikes

from segmenter_fast.ops.linear_residual import linear_residual


def make_inputs(batch, n, channels, width, spikes=False, scale=True):
    def make(dtype):
        generator = torch.Generator().manual_seed(0)

        def randn(*shape):
            return torch.randn(shape, generator=generator)

        v = randn(batch, n, channels)
        inputs = {
            "v": with_spikes(v, 4.0) if spikes else v,
            "weight": randn(width, channels) / channels**0.5,
            "bias": randn(width),
            "x": randn(batch, n, width),
        }
        inputs = {name: t.to(dtype) for name, t in inputs.items()}
        # 0 drops an image's branch.
        factors = torch.tensor([1.25, 0.0, 0.5])[:batch] if scale else None
        return {**inputs, "scale": factors}

    return make


def test_adds_a_linear_layer():
    inputs = make_inputs(3, 5, 4, 6)(torch.float64)
    branch = F.linear(inputs["v"], inputs["weight"], inputs["bias"])
    for backend in ("reference", "native"):
        y = linear_residual(**inputs, backend=backend)
        assert torch.equal(y[1], inputs["x"][1]), "a dropped branch leaves no trace"
        torch.testing.assert_close(y[0], inputs["x"][0] + 1.25 * branch[0])
        y = linear_residual(**(inputs | {"scale": None}), backend=backend)
        torch.testing.assert_close(y, inputs["x"] + branch)


def test_rejects_bad_input():
    inputs = make_inputs(2, 5, 4, 6)(torch.float32)
    for name, shape, text in (
        ("v", (2, 4, 4), r"v \(B, N, C\), .* got \(2, 4, 4\), \(6, 4\), \(6,\), \(2, 5, 6\) and"),
        ("weight", (6, 5), r"got \(2, 5, 4\), \(6, 5\)"),
        ("bias", (5,), r"\(6, 4\), \(5,\)"),
        ("x", (2, 5, 7), r"\(2, 5, 7\) and \(2,\)"),
        ("scale", (3,), r"and \(3,\)"),
    ):
        with pytest.raises(ValueError, match=text):
            linear_residual(**(inputs | {name: torch.ones(shape)}))
