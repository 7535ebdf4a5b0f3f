"""Sliding windows to labels: 512 x 683, windows of 512, K = 150, smooth logits as a network's.

The peer is the protocol's own way, in its best form: every window upsampled, added up at full
resolution, divided, resized, softmax, argmax. It holds several K x H x W tensors of 210 MB; ours
holds a tile.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from segmenter_fast.ops.windows import WindowLogits, WindowView, window_probabilities_reference

N_CLS, SIZE, WINDOW, PATCH = 150, (512, 683), 512, 16


def make_views(count: int) -> list[WindowView]:
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
            views.append(WindowView(logits, (height, width), (WINDOW, WINDOW), WINDOW, PATCH, flip))
    return views[:count]


@pytest.mark.parametrize(("name", "count"), [("one view", 1), ("three scales, mirrored", 6)])
def test_labels(contest, name, count):
    views = make_views(count)
    exact = window_probabilities_reference(views, SIZE)
    top = exact.amax(0)

    def check(contestant: str, labels: Tensor) -> None:
        gap = top - exact.gather(0, labels.long()[None])[0]
        assert gap.max() < 1e-5, f"{contestant}: a label's probability is {gap.max():.1e} too low"

    contest(
        f"windows, {name}, 512 x 683, K = {N_CLS}",
        {
            "full-size logits": lambda: window_probabilities_reference(views, SIZE).argmax(0),
            "tap tables": lambda: WindowLogits(views, SIZE).labels(),
        },
        check,
        rounds=7 if count == 1 else 3,
    )
