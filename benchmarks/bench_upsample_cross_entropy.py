"""Bilinear upsampling + cross-entropy, forward and backward, 512 x 512 pixels, two images.

Targets have stretches of one label, as annotated pictures have, and a tenth of their pixels is
ignored; one case draws every pixel's label by itself, which gives the kernel the most to do. Noise
logits or smooth ones, noise of an 8 x 8 grid upsampled bicubically, cost the kernel the same unless
neighbours are sure of different classes: in "sure" they are, and most cells go pixel by pixel.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from checks import assert_close
from harness import Work
from torch import Tensor

from segmenter_fast.ops.upsample_cross_entropy import upsample_cross_entropy

BATCH, SIZE = 2, (512, 512)


def work(n_cls: int, grid: int, backward: bool) -> Work:
    """What one call cannot do without.

    Per pixel and class, with the logits of a row of a cell in geometric progression: forward a
    multiplication and an addition; backward a fused multiply-add (2 FLOP) for the left end of the
    row and one for the right. Per class, row and cell, of 512 / grid pixels, two exponentials of
    about 11 FLOP.
    Read once: float32 logits and int64 labels. Written once: the gradient of the logits.
    """
    pixels = BATCH * SIZE[0] * SIZE[1]
    flop = pixels * n_cls * ((6 if backward else 2) + 22 * grid / SIZE[1])
    patches = BATCH * n_cls * grid * grid * 4
    return Work(flop, patches * (2 if backward else 1) + pixels * 8)


def make_logits(kind: str, n_cls: int, grid: int) -> Tensor:
    """(B, K, grid, grid) class-first logits."""
    generator = torch.Generator().manual_seed(0)
    if kind == "smooth":
        coarse = torch.randn(BATCH, n_cls, 8, 8, generator=generator)
        return F.interpolate(coarse, size=(grid, grid), mode="bicubic", align_corners=False)
    scale = 30.0 if kind == "sure" else 1.0
    return scale * torch.randn(BATCH, n_cls, grid, grid, generator=generator)


def make_target(kind: str, n_cls: int) -> Tensor:
    """(B, 512, 512) int64, the upper tenth ignored."""
    generator = torch.Generator().manual_seed(1)
    if kind == "random":
        target = torch.randint(0, n_cls, (BATCH, *SIZE), generator=generator)
    else:
        regions = torch.randn(BATCH, n_cls, 9, 9, generator=generator)
        target = F.interpolate(regions, size=SIZE, mode="bilinear").argmax(dim=1)
    target[:, : SIZE[0] // 10] = 255
    return target


def eager(logits: Tensor, target: Tensor) -> Tensor:
    full = F.interpolate(logits, size=SIZE, mode="bilinear", align_corners=False)
    return F.cross_entropy(full, target, ignore_index=255)


def native(logits: Tensor, target: Tensor) -> Tensor:
    return upsample_cross_entropy(logits, target, backend="native")


def gradient_of(loss: Callable[[], Tensor], leaf: Tensor) -> Callable:
    """A contestant that returns (loss, its gradient)."""

    def call() -> tuple[Tensor, Tensor]:
        value = loss()
        return value.detach(), *torch.autograd.grad(value, leaf)

    return call


def exact_result(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient in float64, one image after the other to save memory."""
    valid = (target != 255).sum()
    total, gradients = torch.zeros((), dtype=torch.float64), []
    for image, labels in zip(logits.double().split(1), target.split(1), strict=True):
        leaf = image.requires_grad_()
        full = F.interpolate(leaf, size=SIZE, mode="bilinear", align_corners=False)
        loss = F.cross_entropy(full, labels, ignore_index=255, reduction="sum") / valid
        gradients += torch.autograd.grad(loss, leaf)
        total += loss.detach()
    return total, torch.cat(gradients)


# The first and the last also against torch.compile, which takes a minute to compile for each.
CASES = [
    (150, 32, "noise", "regions"),
    (150, 32, "smooth", "regions"),
    (150, 32, "noise", "random"),
    (150, 32, "sure", "regions"),
    (150, 64, "noise", "regions"),
    (19, 32, "noise", "regions"),
]


@pytest.mark.parametrize(("n_cls", "grid", "logits", "labels"), CASES)
@pytest.mark.parametrize("backward", [True, False], ids=["forward and backward", "forward"])
def test_cross_entropy(contest, compiled, n_cls, grid, logits, labels, backward):
    if not backward and (n_cls, grid, logits, labels) != CASES[0]:
        pytest.skip("forward alone is timed once")
    name = f"{n_cls} classes, {grid} x {grid}, {logits} logits, {labels} labels"
    class_first = make_logits(logits, n_cls, grid)
    # What a decoder gives: (B, h w, K) seen as (B, K, h, w).
    class_last = class_first.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    target = make_target(labels, n_cls)
    exact = exact_result(class_first, target)

    def contestant(function: Callable, logits: Tensor) -> Callable:
        if backward:
            leaf = logits.detach().requires_grad_()
            return gradient_of(lambda: function(leaf, target), leaf)
        return lambda: (function(logits, target),)

    contestants = {
        "interpolate + cross_entropy, class first": contestant(eager, class_first),
        "interpolate + cross_entropy, class last": contestant(eager, class_last),
    }
    if (n_cls, grid, logits, labels) in (CASES[0], CASES[-1]):
        for layout, x in (("class first", class_first), ("class last", class_last)):
            leaf = x.detach().requires_grad_(backward)
            call = compiled(eager, leaf, target)
            contestants[f"torch.compile, {layout}"] = (
                gradient_of(call, leaf) if backward else lambda call=call: (call(),)
            )
    peers = len(contestants)
    contestants["native, class first"] = contestant(native, class_first)
    contestants["native, class last"] = contestant(native, class_last)
    first_result = contestants["interpolate + cross_entropy, class first"]()

    def check(_: str, results: tuple[Tensor, ...]) -> None:
        for what, ours, theirs, ref in zip(
            ("loss", "gradient"), results, first_result, exact, strict=False
        ):
            # PyTorch sums in another order in each layout: its error is more than one sample says.
            assert_close(what, ours, theirs, ref, k=10)

    contest(
        f"{'forward and backward' if backward else 'forward'}, {name}",
        contestants,
        check=check,
        rounds=5,
        peers=peers,
        gpu=True,
        work=work(n_cls, grid, backward),
    )
