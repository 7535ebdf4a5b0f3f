"""The L2-normalised mask product with its layer norm over the classes."""

import pytest
import torch
from checks import assert_matches, with_spikes

from segmenter_fast.ops.mask_product import mask_product


def definition(patches, classes, weight, bias):
    """Cosines one by one, then mean, variance, scale and shift."""
    cosine = torch.nn.functional.cosine_similarity(
        patches[:, :, None], classes[:, None], dim=-1, eps=0.0
    )
    mean = cosine.mean(-1, keepdim=True)
    variance = cosine.var(-1, keepdim=True, unbiased=False)
    return (cosine - mean) / (variance + 1e-5).sqrt() * weight + bias


def make_inputs(batch, patches, n_cls, width, spikes=False):
    def make(dtype):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            x = torch.randn(*shape, generator=generator)
            return (with_spikes(x) if spikes else x).to(dtype)

        return {
            "patches": draw(batch, patches, width), "classes": draw(batch, n_cls, width),
            "weight": draw(n_cls), "bias": draw(n_cls),
        }  # fmt: skip

    return make


@pytest.mark.parametrize("dtype", [torch.float32])
@pytest.mark.parametrize("shape", [(1, 1, 2, 8), (2, 37, 5, 16), (1, 64, 150, 64)])
@pytest.mark.parametrize("spikes", [False, True])
def test_matches_reference(shape, dtype, spikes):
    assert_matches(mask_product, definition, make_inputs(*shape, spikes), dtype)


def test_gradcheck():
    inputs = [x.requires_grad_() for x in make_inputs(1, 3, 4, 5)(torch.float64).values()]
    assert torch.autograd.gradcheck(mask_product, inputs)


def test_compile_fullgraph():
    inputs = make_inputs(2, 7, 3, 8)(torch.float32)
    compiled = torch.compile(mask_product, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs), mask_product(**inputs))


def test_strided_inputs():
    """The decoder passes two slices of one tensor."""
    x, weight, bias = torch.randn(2, 12, 8), torch.rand(4), torch.rand(4)
    expected = mask_product(x[:, :-4].contiguous(), x[:, -4:].contiguous(), weight, bias)
    torch.testing.assert_close(mask_product(x[:, :-4], x[:, -4:], weight, bias), expected)


def test_empty():
    x = torch.empty(0, 5, 8)
    assert mask_product(x, x[:, :3], torch.ones(3), torch.zeros(3)).shape == (0, 5, 3)


def test_rejects_bad_input():
    ones = torch.ones(3)
    with pytest.raises(ValueError, match=r"got \(2, 5, 8\) and \(2, 3, 9\)"):
        mask_product(torch.randn(2, 5, 8), torch.randn(2, 3, 9), ones, ones)
    with pytest.raises(ValueError, match=r"expected patches \(B, N, D\)"):
        mask_product(torch.randn(5, 8), torch.randn(3, 8), ones, ones)


def test_length_of_the_vectors_does_not_matter():
    inputs = make_inputs(2, 9, 4, 16)(torch.float64)
    expected = mask_product(**inputs)
    inputs["patches"] = inputs["patches"] * torch.rand(2, 9, 1) * 100
    inputs["classes"] = inputs["classes"] * torch.rand(2, 4, 1)
    torch.testing.assert_close(mask_product(**inputs), expected)


def test_classes_have_zero_mean_and_unit_variance():
    inputs = make_inputs(2, 9, 40, 16)(torch.float64)
    inputs |= {"weight": torch.ones(40).double(), "bias": torch.zeros(40).double()}
    y = mask_product(**inputs)
    assert y.mean(-1).abs().max() < 1e-12
    assert (y.var(-1, unbiased=False) - 1).abs().max() < 1e-3
