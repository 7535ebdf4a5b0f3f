"""Bilinear upsampling + argmax, K = 150, 32 x 32 patches to 512 x 512 pixels.

Noise is the worst case for the kernel's pruning, since several classes may win inside each cell of
the patch grid; smooth logits, noise of an 8 x 8 grid upsampled bicubically, are like a network's.
The upsampled logits are B x 157 MB in float32, written once and read once; the kernel reads
B x 0.6 MB of patch logits and writes B x 0.26 MB of labels.
"""

import pytest
import torch
import torch.nn.functional as F
from checks import assert_labels
from torch import Tensor

from segmenter_fast.ops.upsample_argmax import upsample_argmax

N_CLS, GRID, SIZE = 150, 32, (512, 512)


def make_logits(kind: str, batch: int) -> Tensor:
    """(B, K, 32, 32) class-first logits."""
    generator = torch.Generator().manual_seed(0)
    if kind == "noise":
        return torch.randn(batch, N_CLS, GRID, GRID, generator=generator)
    coarse = torch.randn(batch, N_CLS, 8, 8, generator=generator)
    return F.interpolate(coarse, size=(GRID, GRID), mode="bicubic", align_corners=False)


def eager(logits: Tensor) -> Tensor:
    return F.interpolate(logits, size=SIZE, mode="bilinear", align_corners=False).argmax(dim=1)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("kind", ["noise", "smooth"])
def test_labels(contest, with_compile, kind, batch):
    class_first = make_logits(kind, batch)
    # What a decoder gives: (B, h w, K) seen as (B, K, h, w).
    class_last = class_first.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    contestants = {
        "interpolate + argmax, class first": lambda: eager(class_first),
        "interpolate + argmax, class last": lambda: eager(class_last),
    }
    if with_compile:
        compiled = torch.compile(eager)
        contestants["torch.compile, class first"] = lambda: compiled(class_first)
    peers = len(contestants)
    contestants["native, class first"] = lambda: upsample_argmax(
        class_first, SIZE, backend="native"
    )
    contestants["native, class last"] = lambda: upsample_argmax(class_last, SIZE, backend="native")
    contest(
        f"labels, {kind} logits, B = {batch}, K = {N_CLS}, {GRID} x {GRID} to 512 x 512",
        contestants,
        check=lambda name, labels: assert_labels(labels, class_first, SIZE),
        rounds=9 if batch == 1 else 3,
        peers=peers,
    )
