"""Probabilities in Triton, all of them and the largest, forward and backward, held to float64."""

import pytest
import torch
from checks import assert_close, assert_matches
from dense_cases import STRIDED_LAYOUTS, bad_geometry, noise, plain_logits, strided_as
from torch import Tensor
from triton_cases import DEVICE, dtypes, on_device

from segmenter_fast.ops import _triton
from segmenter_fast.ops.upsample_probabilities import upsample_probabilities

pytestmark = on_device

both = pytest.mark.parametrize("top1", [False, True], ids=["all", "top1"])

# (B, K, h, w), size, crop: small, since the interpreter goes through every block.
SHAPES = {
    "patch 8": ((1, 37, 2, 2), (16, 16), None),
    "prime sizes": ((2, 19, 3, 2), (13, 11), (3, 5, 7, 6)),
    "one patch": ((2, 5, 1, 1), (7, 5), None),
    "one row of patches": ((1, 7, 1, 5), (6, 40), (0, 6, 3, 31)),
    "many classes": ((1, 70, 2, 2), (4, 5), None),
    "downscale": ((1, 11, 9, 10), (3, 4), (1, 1, 2, 3)),
    "same size": ((1, 6, 2, 5), (2, 5), None),
    "one pixel": ((1, 6, 8, 9), (31, 37), (30, 36, 1, 1)),
    "large cells": ((1, 4, 1, 2), (20, 50), None),
}
shapes = pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)


def kernels(logits: Tensor, size, crop=None, top1=False) -> Tensor:
    """With the result on the CPU; backend "triton" has no way to take another's kernels."""
    return upsample_probabilities(logits.to(DEVICE), size, crop, top1, backend="triton").cpu()


def plain(logits: Tensor, size, crop=None, top1=False) -> Tensor:
    """The definition, written apart from the library."""
    p = plain_logits(logits, size, crop).softmax(dim=1)
    return p.amax(dim=1) if top1 else p


# ------------------------------------------------------------------------------------- oracle
@shapes
@both
def test_matches_reference(case, top1):
    shape, size, crop = case
    assert_matches(
        lambda logits: kernels(logits, size, crop, top1),
        lambda logits: plain(logits, size, crop, top1),
        lambda dtype: {"logits": noise(shape, dtype)},
        torch.float32,
        k=6 if top1 else None,  # by way of a logarithm
    )


@dtypes
@both
def test_every_dtype(dtype, top1):
    assert_matches(
        lambda logits: kernels(logits, (7, 9), None, top1),
        lambda logits: plain(logits, (7, 9), None, top1),
        lambda dtype: {"logits": noise((1, 19, 2, 2), dtype)},
        dtype,
    )


@both
def test_is_the_operator_that_runs(top1, monkeypatch):
    """No other backend's code stands in for the kernels."""
    from segmenter_fast.ops import upsample_probabilities as module

    def refuse(*arguments, **options):
        raise AssertionError("not in Triton")

    monkeypatch.setattr(module, "_native", refuse)
    monkeypatch.setattr(module, "upsample_reference", refuse)
    kernels(noise((1, 5, 2, 2)), (5, 6), top1=top1)


@pytest.mark.parametrize("spread", [90, 1e3])
@both
def test_neighbours_sure_of_different_classes(spread, top1):
    logits = noise((1, 5, 2, 2))
    for i in range(4):
        logits[0, i, i // 2, i % 2] += spread
    results = []
    for function, x in ((kernels, logits), (plain, logits), (plain, logits.double())):
        leaf = x.clone().requires_grad_()
        p = function(leaf, (7, 9), top1=top1)
        results.append((p.detach(), *torch.autograd.grad(p.square().sum(), leaf)))
    for own, other, ref in zip(*results, strict=True):
        # u and L are as large as the spread, and rounded apart.
        bound = spread * torch.finfo(torch.float32).eps * ref.abs().max()
        if (own - ref).abs().max() > bound:
            assert_close("probabilities or gradient", own, other, ref)


@pytest.mark.parametrize("candidate", [0, 1])
def test_every_configuration(candidate):
    with _triton.use_candidate(candidate):
        assert_matches(
            lambda logits: kernels(logits, (6, 7)),
            lambda logits: plain(logits, (6, 7)),
            lambda dtype: {"logits": noise((1, 37, 2, 2), dtype)},
            torch.float32,
        )


@pytest.mark.parametrize("values", [["nan"], ["inf"], ["-inf"]], ids=str)
@both
def test_non_finite_logits_as_torch(values, top1):
    logits = noise((2, 7, 1, 4))
    generator = torch.Generator().manual_seed(0)
    for value in values:
        logits[torch.rand(logits.shape, generator=generator) < 0.06] = float(value)
    ours, theirs = (f(logits, (4, 13), top1=top1) for f in (kernels, plain))
    assert theirs.isnan().any() and not theirs.isnan().all()
    torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------- properties
def test_probabilities_sum_to_one():
    p = kernels(noise((1, 37, 2, 2)), (9, 11)).double()
    assert (p.sum(dim=1) - 1).abs().max() < 2e-6
    assert p.min() >= 0


def test_top1_is_the_largest_of_all():
    logits = noise((1, 37, 3, 2))
    top1, p = (kernels(logits, (11, 13), (2, 3, 7, 9), top1) for top1 in (True, False))
    torch.testing.assert_close(top1, p.amax(dim=1), rtol=1e-6, atol=0)
    assert top1.max() <= 1


def test_the_first_class_takes_the_gradient_of_a_tie():
    logits = torch.zeros(1, 4, 1, 1, requires_grad=True)
    (gradient,) = torch.autograd.grad(kernels(logits, (3, 3), top1=True).sum(), logits)
    expected = 9 * torch.tensor([0.25 * 0.75, -0.0625, -0.0625, -0.0625])
    torch.testing.assert_close(gradient.flatten(), expected)


@both
def test_runs_agree_to_the_bit(top1):
    results = []
    for _ in range(2):
        logits = noise((1, 11, 3, 2)).requires_grad_()
        p = kernels(logits, (9, 7), top1=top1)
        results.append((p.detach(), *torch.autograd.grad(p.square().sum(), logits)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@both
def test_agrees_with_native(top1):
    logits = noise((1, 19, 3, 2))
    native = upsample_probabilities(logits, (11, 9), top1=top1, backend="native")
    torch.testing.assert_close(kernels(logits, (11, 9), top1=top1), native, rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------------------- machinery
@both
def test_gradcheck(top1):
    logits = noise((1, 3, 2, 2), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: kernels(x, (6, 5), (1, 0, 4, 5), top1), (logits,), fast_mode=True
    )


def test_refuses_a_second_derivative():
    logits = noise((1, 3, 2, 2)).requires_grad_()
    p = kernels(logits, (4, 5))
    (gradient,) = torch.autograd.grad(p.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        gradient.square().sum().backward()


def test_opcheck():
    ops = torch.ops.segmenter_fast
    where = ([13, 17], [1, 2, 5, 7])
    logits = strided_as("class last", noise((1, 5, 2, 3))).to(DEVICE)
    torch.library.opcheck(
        ops.upsample_probabilities_triton.default, (logits.clone().requires_grad_(), *where)
    )
    p, lse = ops.upsample_probabilities_triton(logits, *where)
    torch.library.opcheck(
        ops.upsample_probabilities_triton_backward.default,
        (torch.ones_like(p), lse, logits, *where),
    )


@both
def test_compile_fullgraph(top1):
    def function(logits: Tensor) -> Tensor:
        return upsample_probabilities(logits * 2, (5, 7), top1=top1, backend="triton").square()

    results = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        logits = noise((1, 5, 2, 2)).to(DEVICE).requires_grad_()
        p = call(logits)
        results.append((p.detach(), *torch.autograd.grad(p.sum(), logits)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("layout", STRIDED_LAYOUTS)
def test_strided_inputs(layout):
    """Logits of any strides, and upstream gradients too."""
    strided = strided_as(layout, noise((2, 11, 2, 2)))
    assert not strided.is_contiguous()
    upstream = noise((2, 11, 4, 5), seed=3)
    results = []
    for logits, gradient in ((strided, strided_as("class last", upstream)), (strided, upstream)):
        leaf = (logits if not results else logits.contiguous()).detach().requires_grad_()
        p = kernels(leaf, (4, 5))
        results.append((p.detach(), *torch.autograd.grad(p, leaf, gradient)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@both
def test_empty(top1):
    logits = torch.empty(0, 5, 3, 4, requires_grad=True)
    result = kernels(logits, (8, 9), top1=top1)
    assert result.shape == ((0, 8, 9) if top1 else (0, 5, 8, 9))
    result.sum().backward()
    assert logits.grad.shape == logits.shape


@both
def test_autocast_computes_in_float32(top1):
    logits = noise((1, 5, 2, 2), torch.bfloat16)
    with torch.autocast(DEVICE, torch.bfloat16):
        result = kernels(logits, (5, 7), top1=top1)
    assert result.dtype == torch.float32
    assert torch.equal(result, kernels(logits.float(), (5, 7), top1=top1))


@bad_geometry
@both
def test_rejects_bad_input(logits, size, crop, error, text, top1):
    with pytest.raises(error, match=text):
        upsample_probabilities(logits, size, crop, top1=top1, backend="triton")


def test_operator_rejects_bad_input():
    with pytest.raises(ValueError, match="upsamples 3000 patches"):
        kernels(torch.zeros(1, 1, 1, 3000), (1, 500_000), (0, 0, 1, 4))
