"""Whole images to label maps: 512 x 512, K = 150, batch 1, random weights (speed needs no other).

The baseline is the official algorithm in eager PyTorch, `reference.labels`: attention weights
written out, logits upsampled to B x 150 x 512 x 512 floats, softmax, argmax. Its best form is
taken: the mask tensor is made contiguous first, without which PyTorch's softmax is several times
slower. Between it and ours stands the same with PyTorch's fused attention, so that the two gains
can be told apart.
"""

import pytest
import torch
from checks import assert_labels

from segmenter_fast import create_model, reference


def images(batch: int) -> torch.Tensor:
    """Network input with structure at several scales, as pictures have and noise has not."""
    generator = torch.Generator().manual_seed(0)
    layers = [
        torch.nn.functional.interpolate(
            torch.randn(batch, 3, side, side, generator=generator), size=(512, 512), mode="bicubic"
        )
        for side in (4, 16, 64)
    ]
    return sum(layers) / 2


@pytest.mark.parametrize("variant", ["Seg-T-Mask/16", "Seg-B-Mask/16"])
def test_labels(contest, with_compile, variant):
    torch.manual_seed(0)
    model = create_model(variant, num_classes=150, image_size=512).eval()
    state, config, x = model.state_dict(), model.config, images(1)

    @torch.inference_mode()
    def official():
        return reference.labels(x, state, config)

    @torch.inference_mode()
    def fused_attention():
        return model(x).softmax(1).argmax(1)

    @torch.inference_mode()
    def ours():
        return model.labels(x)

    with torch.inference_mode():
        patch_logits = reference.patch_logits(x, state, config)

    def check(name: str, labels: torch.Tensor) -> None:
        # Two float32 encoders differ by far more than the rounding of one upsampling, so a label is
        # right if its logit is within the encoders' difference of the largest.
        with torch.inference_mode():
            mine = model.patch_logits(x).grid
        slack = 4 * float((mine - patch_logits).abs().max())
        assert slack < 1e-3 * float(patch_logits.abs().max()), f"{name}: encoders differ by {slack}"
        assert_labels(labels, patch_logits, (512, 512), slack=slack)

    contestants = {
        "official algorithm, eager": official,
        "full-size softmax, fused attention": fused_attention,
    }
    if with_compile:
        contestants["the same, torch.compile"] = torch.compile(fused_attention)
    contestants["segmenter_fast"] = ours
    contest(
        f"{variant}, 512 x 512, batch 1, K = 150",
        contestants,
        check,
        rounds=9 if "T" in variant else 5,
    )
