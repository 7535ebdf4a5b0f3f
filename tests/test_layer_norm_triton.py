"""Layer norm in Triton, forward and backward, held to float64."""

import pytest
import torch
from checks import assert_close, assert_matches
from test_layer_norm import make_inputs
from torch import Tensor
from triton_cases import DEVICE, dtypes, on_device

from segmenter_fast.ops import _triton
from segmenter_fast.ops._layer_norm_triton import MOST_CHANNELS, PARTS, normalise_gradient
from segmenter_fast.ops.layer_norm import layer_norm, layer_norm_reference

pytestmark = on_device

NORM = torch.ops.segmenter_fast.layer_norm_triton
NAMES = ("x", "weight", "bias")


def kernels(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """The registered operator, on the device under test; the result comes back to the CPU."""
    inputs = [t.to(DEVICE) for t in (x, weight, bias)]
    return NORM(*inputs, eps, any(t.requires_grad for t in inputs))[0].cpu()


@pytest.mark.parametrize("shape", [(1, 1), (2, 7, 24), (37, 192), (3, 1000), (1, 70, 1)], ids=str)
@pytest.mark.parametrize("spikes", [False, True])
def test_matches_reference(shape, spikes):
    if shape[-1] == 1:
        inputs = make_inputs(shape)(torch.float32)  # what reaches x is rounding
        torch.testing.assert_close(kernels(**inputs), inputs["bias"].expand(shape))
        return
    assert_matches(kernels, layer_norm_reference, make_inputs(shape, spikes), torch.float32)


@dtypes
@pytest.mark.parametrize("candidate", range(2))
def test_every_dtype_and_configuration(dtype, candidate):
    with _triton.use_candidate(candidate):
        assert_matches(kernels, layer_norm_reference, make_inputs((45, 100), True), dtype)


def test_more_rows_than_programs():
    """Each program of the gradient then walks over several blocks of rows."""
    inputs = make_inputs((PARTS * 4 + 3, 1024), True)
    assert_matches(kernels, layer_norm_reference, inputs, torch.float32)


def test_a_large_mean_does_not_cancel():
    inputs = make_inputs((5, 64), offset=3000.0)(torch.float32)
    exact = layer_norm_reference(**{n: t if n == "eps" else t.double() for n, t in inputs.items()})
    torch.testing.assert_close(kernels(**inputs), exact.float(), rtol=1e-3, atol=1e-3)


def test_what_else_reaches_x_is_added():
    inputs = make_inputs((9, 24))(torch.float32)
    x, weight = inputs["x"].to(DEVICE), inputs["weight"].to(DEVICE)
    upstream, skip = torch.randn(2, 9, 24, device=DEVICE)
    mean, r = x.mean(-1), 1 / (x.var(-1, correction=0) + 1e-5).sqrt()
    alone, *sums = normalise_gradient(upstream, x, mean, r, weight)
    both, *same_sums = normalise_gradient(upstream, x, mean, r, weight, skip)
    torch.testing.assert_close(both, alone + skip)
    assert all(torch.equal(*pair) for pair in zip(sums, same_sums, strict=True))


def test_special_values_as_in_the_reference():
    inputs = make_inputs((4, 20))(torch.float32)
    inputs["x"][0, 3], inputs["x"][2, 19] = float("nan"), float("inf")
    expected = layer_norm_reference(**inputs)
    torch.testing.assert_close(kernels(**inputs), expected, equal_nan=True)


def test_runs_agree_to_the_bit():
    runs = []
    for _ in range(2):
        inputs = make_inputs((300, 40))(torch.float32)
        leaves = [inputs[name].requires_grad_() for name in NAMES]
        y = kernels(*leaves)
        runs.append((y.detach(), *torch.autograd.grad(y.square().sum(), leaves)))
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_autocast_answers_in_float32(dtype):
    """As on a GPU PyTorch's layer norm does."""
    inputs = {n: t if n == "eps" else t.to(DEVICE) for n, t in make_inputs((3, 8))(dtype).items()}
    with torch.autocast(DEVICE, torch.bfloat16):
        y = layer_norm(**inputs, backend="triton")
    assert y.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


# ------------------------------------------------------------------------------------- machinery
def test_gradcheck():
    inputs = make_inputs((2, 3))(torch.float64)
    assert torch.autograd.gradcheck(kernels, [inputs[name].requires_grad_() for name in NAMES])


def test_refuses_a_second_derivative():
    leaves = [make_inputs((2, 8))(torch.float32)[name].requires_grad_() for name in NAMES]
    gradient = torch.autograd.grad(kernels(*leaves).square().sum(), leaves, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        gradient.square().sum().backward()


def test_opcheck():
    inputs = [make_inputs((2, 3, 8))(torch.float32)[name].to(DEVICE) for name in NAMES]
    torch.library.opcheck(NORM.default, (*inputs, 1e-5, False))
    torch.library.opcheck(NORM.default, (*[t.requires_grad_() for t in inputs], 1e-5, True))
    x, weight, bias = (t.detach() for t in inputs)
    y, mean, r = NORM(x, weight, bias, 1e-5, True)
    torch.library.opcheck(
        torch.ops.segmenter_fast.layer_norm_triton_backward.default,
        (torch.ones_like(y), x, mean, r, weight),
    )


def test_compile_fullgraph():
    leaves = [make_inputs((2, 8))(torch.float32)[name].to(DEVICE) for name in NAMES]
    leaves = [t.requires_grad_() for t in leaves]
    results = []
    for function in (layer_norm, torch.compile(layer_norm, fullgraph=True, backend="aot_eager")):
        y = function(*leaves, backend="triton")
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), leaves)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_strided_inputs():
    inputs = make_inputs((2, 9, 24))(torch.float32)
    weight, bias = inputs["weight"], inputs["bias"]
    whole, upstream = inputs["x"], torch.randn(2, 5, 24)
    results = []
    for layout in (Tensor.contiguous, lambda x: x, lambda x: x.mT.contiguous().mT):
        leaf = whole.clone().requires_grad_()
        y = kernels(layout(leaf[:, ::2]), weight, bias)
        for u in (upstream, upstream.mT.contiguous().mT):
            results.append((y.detach(), torch.autograd.grad(y, leaf, u, retain_graph=True)[0]))
    for y, gradient in results[1:]:
        assert torch.equal(y, results[0][0])
        assert_close("gradient", gradient, results[0][1], results[0][1].double())


def test_empty():
    weight, bias = torch.ones(8), torch.zeros(8)
    x = torch.empty(2, 0, 8, requires_grad=True)
    y = kernels(x, weight, bias)
    assert y.shape == x.shape
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_rejects_bad_input():
    ones = torch.ones(4, device=DEVICE)
    with pytest.raises(TypeError, match=r"float32 or float64, got torch.int64"):
        layer_norm(torch.ones(2, 4, dtype=torch.int64, device=DEVICE), ones, ones, backend="triton")
    wide = torch.ones(MOST_CHANNELS + 1, device=DEVICE)
    with pytest.raises(ValueError, match=f"1 to {MOST_CHANNELS} channels"):
        layer_norm(wide[None], wide, wide, backend="triton")
    with pytest.raises(RuntimeError, match="with_gradient=True"):
        NORM(torch.ones(2, 4, device=DEVICE, requires_grad=True), ones, ones, 1e-5, False)
