"""Tokens of an image of 512 x 512 pixels in patches of 16: forward, and with their gradient.

D = 192 as of Seg-T, 768 as of Seg-B.
"""

import pytest
import torch
from harness import Work, not_run
from torch import Tensor

from segmenter_fast.ops.patch_embed import patch_embed

SIDE, PATCH = 512, 16
PATCHES = (SIDE // PATCH) ** 2


def make_inputs(batch: int, width: int) -> list[Tensor]:
    """Images, weight, bias, position embeddings and class token; all but images with gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((width, 3, PATCH, PATCH), (width,), (1, 1 + PATCHES, width), (1, 1, width))
    images = torch.randn((batch, 3, SIDE, SIDE), generator=generator)
    return [
        images,
        *(torch.randn(shape, generator=generator).mul_(0.02).requires_grad_() for shape in shapes),
    ]


def eager(images: Tensor, weight: Tensor, bias: Tensor, pos: Tensor, token: Tensor) -> Tensor:
    """The official code's lines."""
    x = torch.nn.functional.conv2d(images, weight, bias, stride=PATCH).flatten(2).transpose(1, 2)
    return torch.cat((token.expand(len(images), -1, -1), x), dim=1) + pos


@pytest.mark.parametrize("width", [192, 768])
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "with gradient"])
def test_patch_embed(contest, with_compile, width, gradient):
    inputs = make_inputs(1, width)
    upstream = torch.randn(1, 1 + PATCHES, width, generator=torch.Generator().manual_seed(1))

    def run(function):
        if gradient:
            return torch.autograd.grad(function(*inputs), inputs[1:], upstream)
        with torch.no_grad():
            return (function(*inputs),)

    right = run(eager)

    def check(name: str, results: tuple[Tensor, ...]) -> None:
        for ours, theirs in zip(results, right, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3, msg=name)

    compiled = torch.compile(eager, dynamic=False)
    flops = 2 * PATCHES * inputs[1].numel()
    moved = 4 * (sum(x.numel() for x in inputs) + upstream.numel())
    contest(
        f"patch embedding{' and gradient' * gradient}, {SIDE} x {SIDE}, D = {width}",
        {
            "eager": lambda: run(eager),
            "torch.compile": (lambda: run(compiled))
            if with_compile
            else not_run("needs --with-compile"),
            "native": lambda: run(lambda *x: patch_embed(*x, backend="native")),
        },
        check,
        peers=2,
        work=Work(flops=flops * (2 if gradient else 1), bytes=moved * (2 if gradient else 1)),
    )
