"""What the tests of linear layers and their surroundings have in common."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from triton_cases import DEVICE

from segmenter_fast.ops import _linear_triton
from segmenter_fast.ops._linear_triton import Choice

EVERYTHING = Choice(norm=True, product=True, reason="a test")
PRODUCT = Choice(norm=False, product=True, reason="a test")
NOTHING = Choice(norm=False, product=False, reason="a test")
CHOICES = {"everything fused": EVERYTHING, "norm apart": PRODUCT, "all apart": NOTHING}


def force(monkeypatch, module: Any, choice: Choice) -> None:
    """Make an operation of this module do as `choice` says, whatever its size and dtype."""
    monkeypatch.setattr(module, "choose", lambda *arguments: choice)


def count_products(monkeypatch, module: Any) -> list[bool]:
    """A list that grows with every product that this module has done by the kernel: with a norm?"""
    made: list[bool] = []

    def linear(x: Tensor, weight: Tensor, bias=None, norm=None, **options: Any) -> Any:
        made.append(norm is not None)
        return _linear_triton.linear(x, weight, bias, norm, **options)

    monkeypatch.setattr(module, "linear", linear)
    return made


def on(device: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs on a device."""
    return {n: t.to(device) if isinstance(t, Tensor) else t for n, t in inputs.items()}


def leaves_of(inputs: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Inputs on the device under test, those named as leaves of the graph."""
    return {
        n: t.detach().requires_grad_() if n in names else t for n, t in on(DEVICE, inputs).items()
    }


def with_gradients(
    function: Callable[..., Tensor], inputs: Mapping[str, Any], names: Sequence[str], **options: Any
) -> list[Tensor]:
    """The result, and the gradients of the inputs named for one fixed upstream gradient."""
    own = leaves_of(inputs, names)
    y = function(**own, **options)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y.detach(), *torch.autograd.grad(y, [own[name] for name in names], upstream)]


def assert_same(one: Sequence[Tensor], other: Sequence[Tensor], **tolerance: float) -> None:
    """Two lists of `with_gradients` agree."""
    for ours, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)
