"""The feed-forward branch of a block: PyTorch's."""

import pytest
import torch
import torch.nn.functional as F
from checks import with_spikes

from segmenter_fast.ops.mlp import mlp


def make_inputs(batch, n, width, hidden, spikes=False, scale=True):
    def make(dtype):
        generator = torch.Generator().manual_seed(0)

        def randn(*shape):
            return torch.randn(shape, generator=generator)

        x = randn(batch, n, width)
        inputs = {
            "x": with_spikes(x, 4.0) if spikes else x,
            "gamma": torch.rand(width, generator=generator) + 0.5,
            "beta": randn(width),
            "w1": randn(hidden, width) / width**0.5,
            "b1": randn(hidden),
            "w2": randn(width, hidden) / hidden**0.5,
            "b2": randn(width),
        }
        inputs = {name: t.to(dtype) for name, t in inputs.items()}
        factors = torch.tensor([1.25, 0.0, 0.5])[:batch] if scale else None
        return {**inputs, "eps": 1e-5, "scale": factors}

    return make


def test_is_two_layers_with_gelu_between():
    inputs = make_inputs(3, 5, 4, 6)(torch.float64)
    x = inputs["x"]
    hidden = F.layer_norm(x, (4,), inputs["gamma"], inputs["beta"]) @ inputs["w1"].T + inputs["b1"]
    share = torch.distributions.Normal(0.0, 1.0).cdf(hidden)
    branch = (hidden * share) @ inputs["w2"].T + inputs["b2"]
    for backend in ("reference", "native"):
        y = mlp(**inputs, backend=backend)
        assert torch.equal(y[1], x[1]), "a dropped branch leaves no trace"
        torch.testing.assert_close(y[0], x[0] + 1.25 * branch[0], rtol=1e-6, atol=1e-6)
        y = mlp(**(inputs | {"scale": None}), backend=backend)
        torch.testing.assert_close(y, x + branch, rtol=1e-6, atol=1e-6)


def test_rejects_bad_input():
    inputs = make_inputs(2, 5, 4, 6)(torch.float32)
    for name, shape in (
        ("x", (5, 4)),
        ("gamma", (5,)),
        ("w1", (6, 5)),
        ("b1", (5,)),
        ("w2", (4, 5)),
        ("b2", (6,)),
        ("scale", (3,)),
    ):
        with pytest.raises(ValueError, match=r"expected x \(B, N, D\), .* got") as caught:
            mlp(**(inputs | {name: torch.ones(shape)}))
        assert str(tuple(shape)) in str(caught.value).split("got")[1]
