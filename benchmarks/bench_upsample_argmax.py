"""Bilinear upsampling + argmax, K = 150, 32 x 32 patches to 512 x 512 pixels.

Noise is the worst case for the kernel's pruning, since several classes may win inside each cell of
the patch grid; smooth logits, noise of an 8 x 8 grid upsampled bicubically, are like a network's.
The upsampled logits are B x 157 MB in float32, written once and read once; the kernel reads
B x 0.6 MB of patch logits and writes B x 0.26 MB of labels.

PyTorch's upsampling is quicker on class-last tensors and its argmax on class-first ones, so eager
and torch.compile take part in both layouts and the quickest of the four counts.
"""

import pytest
import torch
import torch.nn.functional as F
from checks import assert_labels
from harness import Work
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


def labels_work(batch: int, k: int, grid: tuple[int, int], size: tuple[int, int]) -> Work:
    """The least that a method needs which looks at every class in every cell of the patch grid."""
    (h, w), (height, width) = grid, size
    # Half a pixel of border on each side: h + 1 rows of w + 1 cells (b, c, d = a on the border).
    #
    # A class is out of the running in a cell if its largest corner is below a value that another
    # class has everywhere in it. That takes per class and cell
    #   1 comparison   max(a, b), which the cells above and below it share
    #   1 comparison   max(max(a, b), max(c, d))
    #   1 comparison   with the bound
    # and nothing for the bound itself if the winner is guessed (the neighbour's) and only
    # confirmed. Where one class is left, as in most cells of a network's logits, its pixels cost no
    # arithmetic. What several survivors cost depends on the data and is left out: so on noise no
    # method gets near this floor. (Without pruning it is 7 FLOP for each pixel and class: 3 blends
    # by multiply-add, 1 comparison; 560 times as much here.)
    flops = 3 * batch * k * (h + 1) * (w + 1)
    # float32 patch logits read, uint8 labels written (up to 256 classes).
    bytes_ = 4 * batch * k * h * w + batch * height * width
    return Work(flops, bytes_)


def eager(logits: Tensor) -> Tensor:
    return F.interpolate(logits, size=SIZE, mode="bilinear", align_corners=False).argmax(dim=1)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("kind", ["noise", "smooth"])
def test_labels(contest, compiled, kind, batch):
    class_first = make_logits(kind, batch)
    # What a decoder gives: (B, h w, K) seen as (B, K, h, w).
    class_last = class_first.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    peers = {
        "interpolate + argmax, class first": lambda: eager(class_first),
        "interpolate + argmax, class last": lambda: eager(class_last),
        "torch.compile, class first": compiled(eager, class_first),
        "torch.compile, class last": compiled(eager, class_last),
    }
    ours = {
        "native, class first": lambda: upsample_argmax(class_first, SIZE, backend="native"),
        "native, class last": lambda: upsample_argmax(class_last, SIZE, backend="native"),
    }
    contest(
        f"labels, {kind} logits, B = {batch}, K = {N_CLS}, {GRID} x {GRID} to 512 x 512",
        peers | ours,
        check=lambda name, labels: assert_labels(labels, class_first, SIZE),
        rounds=9 if batch == 1 else 3,
        peers=len(peers),
        gpu=True,
        work=labels_work(batch, N_CLS, (GRID, GRID), SIZE),
    )
