"""The mask product of a Mask Transformer at K = 150, N = 1024: forward, and with its gradient.

D = 192 as of Seg-T, 768 as of Seg-B.
"""

import pytest
import torch
from harness import Work, not_run
from torch import Tensor

from segmenter_fast.ops.mask_product import mask_product

N_CLS, PATCHES = 150, 1024


def make_inputs(batch: int, width: int) -> list[Tensor]:
    """Patches (B, N, D), classes (B, K, D), weight and bias (K,), with gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, PATCHES, width), (batch, N_CLS, width), (N_CLS,), (N_CLS,))
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def eager(patches: Tensor, classes: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The official code's lines."""
    patches = patches / patches.norm(dim=-1, keepdim=True)
    classes = classes / classes.norm(dim=-1, keepdim=True)
    masks = patches @ classes.transpose(1, 2)
    return torch.nn.functional.layer_norm(masks, (N_CLS,), weight, bias)


@pytest.mark.parametrize("width", [192, 768])
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "with gradient"])
def test_mask_product(contest, with_compile, width, gradient):
    inputs = make_inputs(1, width)
    upstream = torch.randn(1, PATCHES, N_CLS, generator=torch.Generator().manual_seed(1))

    def run(function):
        if gradient:
            return torch.autograd.grad(function(*inputs), inputs, upstream)
        with torch.no_grad():
            return (function(*inputs),)

    right = run(eager)

    def check(name: str, results: tuple[Tensor, ...]) -> None:
        for ours, theirs in zip(results, right, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=name)

    compiled = torch.compile(eager, dynamic=False)
    flops = 2 * PATCHES * N_CLS * width
    moved = 4 * (inputs[0].numel() + inputs[1].numel() + PATCHES * N_CLS)
    contest(
        f"mask product{' and gradient' * gradient}, K = {N_CLS}, N = {PATCHES}, D = {width}",
        {
            "eager": lambda: run(eager),
            "torch.compile": (lambda: run(compiled))
            if with_compile
            else not_run("needs --with-compile"),
            "native": lambda: run(lambda *x: mask_product(*x, backend="native")),
        },
        check,
        peers=2,
        work=Work(flops=flops * (3 if gradient else 1), bytes=moved * (2 if gradient else 1)),
    )
