"""Sliding windows to labels: 512 x 683, windows of 512, K = 150, smooth logits as a network's.

The peer is the protocol's own way: every window upsampled, added up at full resolution, divided,
resized, softmax, argmax; it holds several K x H x W tensors of 210 MB. "As in the official code"
its windows are class-last in memory, as the official decoder leaves them, which PyTorch's
interpolation then keeps; its best form has them class-first. The windows' logits are independent of
each other, so that where they overlap many classes compete: with a network's, which agree, pruning
leaves fewer.
"""

import pytest
import torch
import torch.nn.functional as F
from harness import Work
from torch import Tensor

from segmenter_fast.ops.window_geometry import WindowView
from segmenter_fast.ops.windows import WindowLogits, window_probabilities_reference

N_CLS, SIZE, WINDOW, PATCH = 150, (512, 683), 512, 16


def make_views(count: int, class_last: bool = False) -> list[WindowView]:
    """Views at scales 1, 1.25 and 1.5, each also mirrored; the first `count` of them."""
    generator = torch.Generator().manual_seed(0)
    views = []
    for height, width in ((512, 683), (640, 854), (768, 1025)):
        for flip in (False, True):
            rows, columns = (
                len({*range(0, n - WINDOW, WINDOW), n - WINDOW}) for n in (height, width)
            )
            coarse = 3 * torch.randn(rows * columns, N_CLS, 8, 8, generator=generator)
            logits = F.interpolate(coarse, size=(WINDOW // PATCH,) * 2, mode="bicubic")
            if class_last:
                logits = logits.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
            views.append(WindowView(logits, (height, width), (WINDOW, WINDOW), WINDOW, PATCH, flip))
    return views[:count]


def labels_work(views: list[WindowView]) -> Work:
    """What labels need at least, looking at every class of every pixel.

    Per pixel, class and view 2 blends along x (4 FLOP) of rows blended once for all columns, the
    exponential (13), a sum and a share of the mean (3). A single view needs no exponentials, and
    its classes are pruned: per class and block of 16 x 16 pixels the 3 comparisons of
    bench_upsample_argmax. Patch logits are read, labels written.
    """
    pixels = SIZE[0] * SIZE[1]
    if len(views) == 1:
        flops = 3 * N_CLS * pixels / PATCH**2
    else:
        flops = 20 * N_CLS * pixels * len(views)
    return Work(flops, sum(4 * view.logits.numel() for view in views) + pixels)


@pytest.mark.parametrize(("name", "count"), [("one view", 1), ("three scales, mirrored", 6)])
def test_labels(contest, name, count):
    views, official = make_views(count), make_views(count, class_last=True)
    exact = window_probabilities_reference(views, SIZE)
    top = exact.amax(0)

    def check(contestant: str, labels: Tensor) -> None:
        gap = top - exact.gather(0, labels.long()[None])[0]
        assert gap.max() < 1e-5, f"{contestant}: a label's probability is {gap.max():.1e} too low"

    def native(views: list[WindowView]) -> Tensor:
        return WindowLogits(views, SIZE, "native").labels()

    contest(
        f"windows, {name}, 512 x 683, K = {N_CLS}",
        {
            "full-size logits, as in the official code": lambda: window_probabilities_reference(
                official, SIZE
            ).argmax(0),
            "full-size logits, class first": lambda: window_probabilities_reference(
                views, SIZE
            ).argmax(0),
            "tiles in PyTorch": lambda: WindowLogits(views, SIZE, "reference", (64, 256)).labels(),
            "native, class first": lambda: native(views),
            "native, class last": lambda: native(official),
        },
        check,
        rounds=5 if count == 1 else 3,
        peers=2,
        gpu=True,
        work=labels_work(views),
    )
