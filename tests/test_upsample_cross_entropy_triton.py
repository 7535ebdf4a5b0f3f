"""Cross-entropy in Triton, forward and backward, called directly and held to float64."""

from functools import partial

import pytest
import torch
from checks import assert_close, assert_matches
from dense_cases import (
    GOOD,
    LABELS,
    STRIDED_LAYOUTS,
    bad_target,
    noise,
    plain_logits,
    random_target,
    strided_as,
)
from torch import Tensor
from triton_cases import DEVICE, DTYPES, dtypes, on_device

from segmenter_fast.ops import _triton
from segmenter_fast.ops.upsample_cross_entropy import upsample_cross_entropy

pytestmark = on_device

LOSS = torch.ops.segmenter_fast.upsample_cross_entropy_triton
BACKWARD = torch.ops.segmenter_fast.upsample_cross_entropy_triton_backward

# (B, K, h, w), size, crop: small, since the interpreter goes through every pixel of every block.
SHAPES = {
    "patch 8": ((1, 37, 2, 2), (16, 16), None),
    "prime sizes": ((2, 19, 3, 2), (13, 11), (3, 5, 7, 6)),
    "one patch": ((2, 5, 1, 1), (7, 5), None),
    "one row of patches": ((1, 7, 1, 5), (6, 40), (0, 6, 3, 31)),
    "two blocks of classes": ((1, 70, 2, 2), (4, 5), None),
    "downscale": ((1, 11, 9, 10), (3, 4), (1, 1, 2, 3)),
    "same size": ((1, 6, 2, 5), (2, 5), None),
    "one pixel": ((1, 6, 8, 9), (31, 37), (30, 36, 1, 1)),
    "cells of 40 pixels": ((1, 4, 1, 2), (2, 80), None),
}
shapes = pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)


def loss_of(
    logits: Tensor,
    target: Tensor,
    size: tuple[int, int] | None = None,
    crop: tuple[int, int, int, int] | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = 255,
    reduction: str = "mean",
) -> Tensor:
    """The registered operator, on the device under test; the loss comes back to the CPU."""
    size = size or tuple(target.shape[1:])
    crop = crop or (0, 0, *size)
    weight = None if weight is None else weight.to(DEVICE)
    options = (size, crop, label_smoothing, ignore_index, reduction)
    return LOSS(logits.to(DEVICE), target.to(DEVICE), weight, *options)[0].cpu()


def plain(
    logits: Tensor,
    target: Tensor,
    size: tuple[int, int] | None = None,
    crop: tuple[int, int, int, int] | None = None,
    weight: Tensor | None = None,
    ignore_index: int = 255,
    **options,
) -> Tensor:
    """The definition, written apart from the library."""
    full = plain_logits(logits, size or tuple(target.shape[1:]), crop)
    weight = None if weight is None else weight.to(full.dtype)
    return torch.nn.functional.cross_entropy(
        full, target.long(), weight, ignore_index=ignore_index, **options
    )


def hold_to_oracle(logits: Tensor, target: Tensor, *geometry, **options) -> None:
    """Loss and gradient within rounding of float64."""
    assert_matches(
        lambda logits: loss_of(logits, target, *geometry, **options),
        lambda logits: plain(logits, target, *geometry, **options),
        lambda dtype: {"logits": logits},
        logits.dtype,
    )


def gradient_of(function, logits: Tensor, upstream: Tensor | None = None) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    loss = function(leaf)
    return loss.detach(), *torch.autograd.grad(loss, leaf, upstream)


def hold_to_torch(logits: Tensor, target: Tensor, **options) -> None:
    """NaN and infinite where PyTorch is, and close elsewhere."""
    ours, theirs = (
        gradient_of(lambda x, f=function: f(x, target, reduction="none", **options).sum(), logits)
        for function in (loss_of, plain)
    )
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, equal_nan=True, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------- oracle
@shapes
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_matches_reference(case, reduction):
    shape, size, crop = case
    target = random_target((shape[0], *(crop[2:] if crop else size)), shape[1])
    target[:, 0, 0] = shape[1] - 1  # never all ignored
    hold_to_oracle(noise(shape), target, size, crop, reduction=reduction)


@dtypes
def test_every_dtype(dtype):
    target = random_target((1, 7, 9), 19)
    hold_to_oracle(noise((1, 19, 2, 2), dtype), target, reduction="none")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_options(reduction, label_smoothing, weighted):
    weight = torch.linspace(0.0, 2.0, 7) if weighted else None
    options = {"label_smoothing": label_smoothing, "reduction": reduction, "weight": weight}
    target = random_target((1, 5, 7), 7)
    target[:, :2, :4] = 3  # stretches of one label beside single pixels
    hold_to_oracle(noise((1, 7, 1, 2)), target, **options)
    hold_to_oracle(noise((1, 7, 1, 2)) * 60, target, **options)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_target_dtypes(dtype):
    target = random_target((1, 5, 7), 7)
    logits = noise((1, 7, 1, 2))
    results = [
        gradient_of(lambda x, t=t: loss_of(x, t), logits) for t in (target, target.to(dtype))
    ]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_one_class_costs_nothing():
    """PyTorch's result is 0 exactly; ours may be a rounding of the terms, which are about 1."""
    loss, gradient = gradient_of(
        lambda x: loss_of(x, torch.zeros(1, 5, 6).long()), noise((1, 1, 2, 2))
    )
    assert loss.abs() < 1e-6
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("n_cls", [129, 600])
def test_many_classes(n_cls):
    target = random_target((1, 1, 3), n_cls, torch.int16)
    target[0, 0, :2] = n_cls - 1
    hold_to_oracle(noise((1, n_cls, 1, 1)), target, label_smoothing=0.1)


@pytest.mark.parametrize("spread", [60, 90, 110, 120, 700, 1e4, 1e30])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("size", [(8, 9), (2, 3)], ids=str)
def test_neighbours_sure_of_different_classes(spread, reduction, size):
    logits = noise((1, 5, 2, 2))
    for i in range(4):
        logits[0, i, i // 2, i % 2] += spread
    target = random_target((1, *size), 5)
    upstream = torch.ones(target.shape) if reduction == "none" else None
    ours, theirs, exact = (
        gradient_of(lambda x, f=f: f(x, target, reduction=reduction), x, upstream)
        for f, x in ((loss_of, logits), (plain, logits), (plain, logits.double()))
    )
    for own, other, ref in zip(ours, theirs, exact, strict=True):
        # u and L are as large as the spread, and rounded apart.
        bound = spread * torch.finfo(torch.float32).eps * ref.abs().max()
        if spread > 1e4 or (own - ref).abs().max() > bound:
            assert_close("loss or gradient", own, other, ref)


@pytest.mark.parametrize("low", [-60, -84, -112, -1e4, -1e37])
def test_classes_of_no_importance(low):
    logits = noise((1, 21, 2, 2))
    logits[:, 3:9] += low  # everywhere
    logits[0, 12, 1, 1] += low  # in one patch
    hold_to_oracle(logits, random_target((1, 6, 7), 21), reduction="none")


@pytest.mark.parametrize("candidate", [0, 1])
def test_every_configuration(candidate):
    with _triton.use_candidate(candidate):
        hold_to_oracle(noise((1, 37, 2, 2)), random_target((1, 5, 7), 37))


# ------------------------------------------------------------------------------------- not finite
@pytest.mark.parametrize("values", [["nan"], ["inf"], ["-inf"], ["nan", "inf", "-inf"]], ids=str)
@pytest.mark.parametrize("size", [(4, 12), (3, 5)], ids=str)
def test_non_finite_logits_as_torch(values, size):
    logits = noise((2, 7, 1, 4))
    generator = torch.Generator().manual_seed(0)
    for value in values:
        logits[torch.rand(logits.shape, generator=generator) < 0.06] = float(value)
    target = random_target((2, *size), 7)
    hold_to_torch(logits, target)
    if size == (4, 12):
        hold_to_torch(logits, target, label_smoothing=0.1, weight=torch.linspace(1, 2, 7))


def test_non_finite_upstream_and_weights_as_torch():
    """But for the gradients that PyTorch has infinite: sums of corners make them NaN."""
    logits, target = noise((1, 5, 2, 3)), random_target((1, 8, 12), 5)
    for value in (float("nan"), float("inf")):
        upstream = torch.ones(1, 8, 12)
        upstream[0, 7, 9] = value
        (_, ours), (_, theirs) = (
            gradient_of(lambda x, f=function: f(x, target, reduction="none"), logits, upstream)
            for function in (loss_of, plain)
        )
        theirs = theirs.where(theirs.isfinite(), torch.nan)
        torch.testing.assert_close(ours, theirs, equal_nan=True)
        weight = torch.ones(5)
        weight[2] = value
        ours, theirs = (
            function(logits, target, weight=weight, reduction="none")
            for function in (loss_of, plain)
        )
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_all_ignored(label_smoothing):
    target = torch.full((1, 4, 5), 255, dtype=torch.uint8)
    for reduction, expected in (("mean", float("nan")), ("sum", 0.0), ("none", 0.0)):
        options = {"reduction": reduction, "label_smoothing": label_smoothing}
        loss, gradient = gradient_of(
            lambda x, options=options: loss_of(x, target, **options).sum(), noise((1, 5, 1, 2))
        )
        torch.testing.assert_close(loss, torch.full_like(loss, expected), equal_nan=True)
        assert (gradient == 0).all()


def test_weights_that_sum_to_zero():
    target = torch.zeros(1, 3, 4, dtype=torch.uint8)
    weight = torch.tensor([0.0, 1.0, 1.0])
    assert loss_of(noise((1, 3, 2, 2)), target, weight=weight).isnan()
    assert loss_of(noise((1, 3, 2, 2)), target, weight=weight, reduction="sum") == 0


def test_empty():
    logits = torch.empty(0, 5, 3, 4, device=DEVICE, requires_grad=True)
    target = torch.empty(0, 8, 9, dtype=torch.int64, device=DEVICE)
    for reduction, shape in (("mean", ()), ("sum", ()), ("none", (0, 8, 9))):
        loss = upsample_cross_entropy(logits, target, reduction=reduction, backend="triton")
        assert loss.shape == shape
        assert torch.autograd.grad(loss.sum(), logits)[0].shape == logits.shape


# ------------------------------------------------------------------------------------- labels
@pytest.mark.parametrize("ignore_index", [0, 6, -100, 7])
def test_ignore_index_may_be_a_class(ignore_index):
    target = random_target((1, 5, 7), 7) % 7
    hold_to_oracle(noise((1, 7, 1, 2)), target, ignore_index=ignore_index)


@pytest.mark.parametrize("label", [7, -1, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("scale", [1, 100])  # both ways through a cell
def test_wrong_labels_are_nan_and_index_nothing(label, scale):
    target = torch.zeros(1, 9, 12, dtype=torch.int64)
    logits = noise((1, 7, 3, 4)) * scale
    target[0, 3, 3] = label
    losses, gradient = gradient_of(
        lambda x: loss_of(x, target, reduction="none"), logits, torch.ones(1, 9, 12)
    )
    assert losses.isnan().nonzero().tolist() == [[0, 3, 3]]
    touched = torch.zeros(1, 7, 3, 4, dtype=torch.bool)
    touched[:, :, :2, :2] = True
    assert torch.equal(gradient.isnan(), touched)
    assert loss_of(logits, target).isnan()


def test_labels_are_checked_when_asked():
    logits, target = GOOD.to(DEVICE), (LABELS + 3).to(DEVICE)
    assert upsample_cross_entropy(logits, target, backend="triton").isnan()
    with pytest.raises(ValueError, match=r"64 pixels .*outside \[0, 3\).*ignore_index=255: 3"):
        upsample_cross_entropy(logits, target, check=True, backend="triton")


# ------------------------------------------------------------------------------------- properties
def test_a_constant_shift_changes_nothing():
    logits, target = noise((1, 11, 2, 2)), random_target((1, 5, 7), 11)
    options = {"label_smoothing": 0.2, "weight": torch.linspace(1, 2, 11)}
    one, other = (
        gradient_of(lambda x: loss_of(x, target, **options), logits + shift) for shift in (0, 64)
    )
    torch.testing.assert_close(one[0], other[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one[1], other[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1, 100])
def test_gradients_sum_to_zero_over_the_classes(scale):
    logits = noise((1, 37, 2, 2), torch.float64) * scale
    target = random_target((1, 5, 7), 37)
    _, gradient = gradient_of(
        lambda x: loss_of(x, target, label_smoothing=0.3, reduction="sum"), logits
    )
    assert gradient.sum(dim=1).abs().max() <= 1e-13 * gradient.abs().max() * 37


def test_patches_out_of_reach_have_no_gradient():
    _, gradient = gradient_of(
        lambda x: loss_of(x, torch.zeros(1, 8, 8).byte(), (48, 56), (16, 16, 8, 8)),
        noise((1, 5, 6, 7)),
    )
    reached = torch.zeros(6, 7, dtype=torch.bool)
    reached[1:4, 1:4] = True
    assert torch.equal(gradient[0].abs().sum(dim=0) > 0, reached)


def test_runs_agree_to_the_bit():
    logits, target = noise((1, 19, 3, 2)), random_target((1, 9, 7), 19)
    runs = [gradient_of(lambda x: loss_of(x, target), logits) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


def test_agrees_with_native():
    logits, target = noise((1, 19, 3, 2)), random_target((1, 11, 9), 19)
    options = {"weight": torch.linspace(1, 2, 19), "label_smoothing": 0.1}
    ours, native = (
        gradient_of(lambda x, f=f: f(x, target, **options), logits)
        for f in (loss_of, partial(upsample_cross_entropy, backend="native"))
    )
    torch.testing.assert_close(ours, native, rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------------------- machinery
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("scale", [1, 400])  # 400: pixel by pixel
def test_gradcheck(reduction, scale):
    logits = (noise((1, 3, 2, 2), torch.float64) * scale).requires_grad_()
    target = torch.randint(0, 3, (1, 3, 4), generator=torch.Generator().manual_seed(0))
    target[0, 0, 0] = 255
    weight = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    options = {"weight": weight, "label_smoothing": 0.1}
    assert torch.autograd.gradcheck(
        lambda x: loss_of(x, target, (5, 5), (1, 0, 3, 4), reduction=reduction, **options),
        (logits,),
        fast_mode=True,
    )


def test_refuses_a_second_derivative():
    logits = noise((1, 3, 2, 2)).to(DEVICE).requires_grad_()
    loss = loss_of(logits, random_target((1, 4, 5), 3))
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(reduction):
    logits = strided_as("class last", noise((1, 5, 2, 3))).to(DEVICE).requires_grad_()
    target = random_target((1, 5, 7), 5, torch.uint8).to(DEVICE)
    weight = torch.rand(5, device=DEVICE)
    options = (target, weight, [13, 17], [1, 2, 5, 7], 0.1, 255, reduction)
    torch.library.opcheck(LOSS.default, (logits, *options))
    loss, lse, weights = LOSS(logits.detach(), *options)
    torch.library.opcheck(
        BACKWARD.default, (torch.ones_like(loss), lse, weights, logits.detach(), *options)
    )


def test_compile_fullgraph():
    target = random_target((1, 9, 13), 5).to(DEVICE)

    def function(logits: Tensor) -> Tensor:
        loss = upsample_cross_entropy(logits * 2, target, label_smoothing=0.1, backend="triton")
        return loss * loss

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    ours, theirs = (gradient_of(f, noise((1, 5, 2, 3)).to(DEVICE)) for f in (compiled, function))
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


def test_export():
    class Loss(torch.nn.Module):
        def forward(self, logits: Tensor, target: Tensor) -> Tensor:
            return upsample_cross_entropy(logits, target, backend="triton")

    inputs = (noise((1, 5, 2, 3)).to(DEVICE), random_target((1, 9, 13), 5).to(DEVICE))
    program = torch.export.export(Loss(), inputs)
    assert "segmenter_fast.upsample_cross_entropy_triton" in program.graph_module.code
    assert torch.equal(program.module()(*inputs).cpu(), loss_of(*inputs))


@pytest.mark.parametrize("layout", STRIDED_LAYOUTS)
def test_strided_inputs(layout):
    strided = strided_as(layout, noise((2, 11, 2, 2)))
    assert not strided.is_contiguous()
    target = random_target((2, 4, 5), 11)
    for labels in (target, target.mT.contiguous().mT):
        ours, dense = (
            gradient_of(lambda x, labels=labels: loss_of(x, labels), x)
            for x in (strided, strided.contiguous())
        )
        assert torch.equal(ours[0], dense[0])
        assert torch.equal(ours[1], dense[1])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_autocast_computes_in_float32(dtype):
    logits = noise((1, 7, 2, 3)).to(DEVICE, dtype)
    target = random_target((1, 9, 11), 7).to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = upsample_cross_entropy(logits, target, backend="triton")
    assert loss.dtype == torch.float32
    assert torch.equal(loss.cpu(), loss_of(logits.float(), target))


# ------------------------------------------------------------------------------------- bad input
@bad_target
def test_rejects_bad_target(target, options, error, text):
    if isinstance(target, Tensor) and target.device.type == "cpu":
        target = target.to(DEVICE)
        text = text.replace("logits are on cpu", f"logits are on {DEVICE}")
    with pytest.raises(error, match=text):
        upsample_cross_entropy(GOOD.to(DEVICE), target, **options, check=True, backend="triton")


def test_rejects_bad_input():
    with pytest.raises(TypeError, match=r"float16, bfloat16, float32 or float64, got .*int64"):
        loss_of(GOOD.long(), LABELS)
    with pytest.raises(ValueError, match="upsamples 3000 patches"):
        loss_of(torch.zeros(1, 1, 1, 3000), LABELS[:, :1, :4], (1, 500_000), (0, 0, 1, 4))
    with pytest.raises(ValueError, match=r"\(3,\), got \(4,\)"):
        upsample_cross_entropy(
            GOOD.to(DEVICE), LABELS.to(DEVICE), weight=torch.ones(4), backend="triton"
        )
