"""What the benchmarks of a block's linear layers have in common."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from harness import Work, not_run
from torch import Tensor

TOKENS = 1025
"""512 x 512 pixels in patches of 16 x 16, and the class token."""


def contest_of(
    contest: Callable,
    title: str,
    reference: Callable[..., Tensor],
    ours: Callable[..., Tensor],
    inputs: Mapping[str, Any],
    gradient: bool,
    with_compile: bool,
    work: tuple[float, float],
) -> None:
    """Time `ours` beside the definition, eager and compiled.

    Args:
        contest, with_compile: pytest's fixtures.
        title: of the case.
        reference, ours: called with the inputs.
        inputs: floating-point tensors get a gradient.
        gradient: also time the gradient of all of them.
        work: FLOP and bytes of the forward pass; the gradient has twice as many more.
    """
    inputs = {n: t.requires_grad_() if isinstance(t, Tensor) else t for n, t in inputs.items()}
    leaves = [t for t in inputs.values() if isinstance(t, Tensor)]
    with torch.no_grad():
        upstream = torch.randn_like(reference(**inputs))

    def run(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        if gradient:
            return torch.autograd.grad(function(**inputs), leaves, upstream)
        with torch.no_grad():
            return (function(**inputs),)

    right = run(reference)

    def check(name: str, results: tuple[Tensor, ...]) -> None:
        for result, expected in zip(results, right, strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3, msg=name)

    compiled = torch.compile(reference, dynamic=False)
    factor = 3 if gradient else 1
    contest(
        f"{title}{' and gradient' * gradient}",
        {
            "eager": lambda: run(reference),
            "torch.compile": (lambda: run(compiled))
            if with_compile
            else not_run("needs --with-compile"),
            "native": lambda: run(lambda **x: ours(**x, backend="native")),
        },
        check,
        peers=2,
        work=Work(flops=factor * work[0], bytes=factor * work[1]),
    )
