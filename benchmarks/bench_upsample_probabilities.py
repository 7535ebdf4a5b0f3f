"""Bilinear upsampling + softmax, K = 150, 32 x 32 patches to 512 x 512 pixels.

All probabilities of one image are 157 MB in float32: what they cost above all is writing them,
so a plain fill of a new tensor of that size runs beside them, a yardstick. `interpolate` writes
that much and `softmax` reads and writes it again, several times over. The largest probability alone
needs none of it: 0.6 MB of patch logits are read and 1 MB is written.
"""

import pytest
import torch
import torch.nn.functional as F
from checks import assert_close
from harness import Work
from torch import Tensor

from segmenter_fast.ops.upsample_probabilities import upsample_probabilities

N_CLS, GRID, SIZE = 150, 32, (512, 512)
FILL = "a fill of that size"


def work(batch: int, top1: bool) -> Work:
    """What one call needs at least by the kernel's method.

    Per class and pixel an addition to the sum and a product to the next power, and for top1 a
    comparison. All probabilities: the progression once more, and a product with 1 / sum. The two
    exponentials per class and 8 rows, about 13 operations each, and the blends, 4, add
    (2 * 13 + 4) / 8. Memory: the patch logits are read, the result is written.
    """
    pixels = batch * SIZE[0] * SIZE[1]
    operations = 3 + 30 / 8 if top1 else (2 + 30 / 8) + (2 + 30 / 8)
    written = pixels if top1 else pixels * N_CLS
    bytes_ = 4.0 * (batch * N_CLS * GRID * GRID + written)
    return Work(operations * pixels * N_CLS, bytes_)


def make_logits(batch: int) -> Tensor:
    """(B, K, 32, 32) class-first logits."""
    return 3 * torch.randn(batch, N_CLS, GRID, GRID, generator=torch.Generator().manual_seed(0))


def eager(logits: Tensor, top1: bool) -> Tensor:
    p = F.interpolate(logits, size=SIZE, mode="bilinear", align_corners=False).softmax(dim=1)
    return p.amax(dim=1) if top1 else p


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("top1", [True, False], ids=["top1", "all"])
def test_probabilities(contest, compiled, top1, batch):
    class_first = make_logits(batch)
    # What a decoder gives: (B, h w, K) seen as (B, K, h, w).
    class_last = class_first.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    contestants = {
        "interpolate + softmax, class first": lambda: eager(class_first, top1),
        "interpolate + softmax, class last": lambda: eager(class_last, top1),
    }
    if batch == 1:
        contestants["torch.compile, class first"] = compiled(eager, class_first, top1)
        contestants["torch.compile, class last"] = compiled(eager, class_last, top1)
    peers = len(contestants)
    if not top1:
        contestants[FILL] = lambda: torch.full((batch, N_CLS, *SIZE), 0.5)
    for name, logits in (("class first", class_first), ("class last", class_last)):
        contestants[f"native, {name}"] = lambda logits=logits: upsample_probabilities(
            logits, SIZE, top1=top1, backend="native"
        )
    exact = eager(class_first.double(), top1)
    plain = eager(class_first, top1)

    def check(name: str, result: Tensor) -> None:
        if name != FILL:
            assert_close(name, result, plain, exact)

    contest(
        f"{'top1' if top1 else 'all'}, B = {batch}, K = {N_CLS}, {GRID} x {GRID} to 512 x 512",
        contestants,
        check=check,
        rounds=9 if batch == 1 else 3,
        peers=peers,
        work=work(batch, top1),
        yardsticks=[] if top1 else [FILL],
    )


@pytest.mark.parametrize("top1", [True, False], ids=["top1", "all"])
def test_probabilities_with_gradient(contest, top1):
    logits = make_logits(1).requires_grad_()
    upstream = torch.randn((1, *SIZE) if top1 else (1, N_CLS, *SIZE))

    def gradient(p: Tensor) -> Tensor:
        return torch.autograd.grad(p, logits, upstream)[0]

    double = logits.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(eager(double, top1), double, upstream.double())
    plain = gradient(eager(logits, top1))
    name = "top1" if top1 else "all"
    contest(
        f"{name} and its gradient, B = 1, K = {N_CLS}, {GRID} x {GRID} to 512 x 512",
        {
            "interpolate + softmax": lambda: gradient(eager(logits, top1)),
            "native": lambda: gradient(
                upsample_probabilities(logits, SIZE, top1=top1, backend="native")
            ),
        },
        check=lambda name, result: assert_close(name, result, plain, exact),
        rounds=3,
    )
