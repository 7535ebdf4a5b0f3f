"""Confusion counts at K = 150, 512 x 512: of a label map, and straight from patch logits.

The target is made of blocks of 16 x 16 pixels, a tenth of them ignored; the logits are smooth, as a
network's.
"""

import pytest
import torch
import torch.nn.functional as F
from harness import Work
from torch import Tensor

from segmenter_fast.ops.confusion import confusion_matrix, upsample_confusion
from segmenter_fast.ops.upsample_argmax import upsample_argmax

N_CLS, GRID, SIZE, IGNORE = 150, 32, (512, 512), 255


def make_inputs(batch: int) -> tuple[Tensor, Tensor]:
    """Class-last logits (B, K, 32, 32) and a target (B, 512, 512) uint8."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(batch, N_CLS, 8, 8, generator=generator)
    logits = F.interpolate(coarse, size=(GRID, GRID), mode="bicubic", align_corners=False)
    logits = logits.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    target = torch.randint(0, N_CLS, (batch, GRID, GRID), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.1] = IGNORE
    return logits, target.repeat_interleave(16, 1).repeat_interleave(16, 2).byte()


def eager(labels: Tensor, target: Tensor) -> Tensor:
    """The usual few lines of PyTorch."""
    valid = target != IGNORE
    bins = target[valid].long() * N_CLS + labels[valid].long()
    return torch.bincount(bins, minlength=N_CLS**2).view(N_CLS, N_CLS)


def eager_from_logits(logits: Tensor, target: Tensor) -> Tensor:
    full = F.interpolate(logits, size=SIZE, mode="bilinear", align_corners=False)
    return eager(full.argmax(dim=1), target)


@pytest.mark.parametrize("batch", [1, 4])
def test_label_map(contest, batch):
    logits, target = make_inputs(batch)
    labels = upsample_argmax(logits, SIZE)
    expected = eager(labels, target)

    def check(name: str, counts: Tensor) -> None:
        assert torch.equal(counts, expected), name

    # Two bytes are read per pixel and the counts written; nothing is computed but sums of integers.
    work = Work(flops=0, bytes=2 * target.numel() + 8 * N_CLS**2)
    contest(
        f"confusion of label maps, B = {batch}, K = {N_CLS}, 512 x 512",
        {
            "mask + bincount": lambda: eager(labels, target),
            "native": lambda: confusion_matrix(labels, target, N_CLS, backend="native"),
        },
        check,
        work=work,
    )


@pytest.mark.parametrize("batch", [1, 4])
def test_patch_logits(contest, batch):
    logits, target = make_inputs(batch)
    class_first = logits.contiguous()
    right = eager_from_logits(class_first, target)

    def check(name: str, counts: Tensor) -> None:
        # A label may differ where two classes tie to within rounding.
        assert counts.sum() == right.sum(), name
        assert (counts - right).abs().sum() <= 1e-4 * right.sum(), name

    # Per class and cell the comparisons of bench_upsample_argmax; patch logits and target are read.
    cells = batch * (GRID + 1) ** 2
    work = Work(flops=3 * N_CLS * cells, bytes=4 * logits.numel() + target.numel() + 8 * N_CLS**2)
    contest(
        f"confusion of patch logits, smooth, B = {batch}, K = {N_CLS}, 32 x 32 to 512 x 512",
        {
            "interpolate + argmax + bincount, class first": lambda: eager_from_logits(
                class_first, target
            ),
            "interpolate + argmax + bincount, class last": lambda: eager_from_logits(
                logits, target
            ),
            "native": lambda: upsample_confusion(logits, target, backend="native"),
        },
        check,
        rounds=5,
        peers=2,
        work=work,
    )
