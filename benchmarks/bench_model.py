"""Whole images to label maps: 512 x 512, K = 150, batch 1, random weights (speed needs no other).

The official algorithm in eager PyTorch is `reference.labels`: attention weights written out, logits
upsampled to B x 150 x 512 x 512 floats, softmax, argmax. Its best form is taken: the mask tensor is
made contiguous first, without which PyTorch's softmax is several times slower. Between it and ours
stands the same with PyTorch's fused attention, eager and compiled, so that the gains can be told
apart. All three are PyTorch alone, and so peers: the ratio is against the quickest.
"""

import pytest
import torch
from checks import assert_labels
from harness import Work

from segmenter_fast import create_model, reference
from segmenter_fast.config import MLP_RATIO, SegmenterConfig


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


def model_work(config: SegmenterConfig, parameters: int, batch: int) -> Work:
    """The matrix products of a Segmenter with a mask transformer, and what passes through memory.

    The rest (normalisation, softmax, GELU, upsampling) is a few per cent of them and left out.
    """
    height, width = config.image_size
    n = (height // config.patch_size) * (width // config.patch_size)  # patches
    d, k = config.d_model, config.n_cls

    def blocks(layers: int, tokens: int) -> int:
        # An (m, p) by (p, q) product is 2 m p q FLOP. Per layer and token: queries, keys and values
        # (d by 3d), projection (d by d), MLP (d by 4d and back); attention twice tokens^2 d.
        linear = 2 * tokens * d * d * (3 + 1 + 2 * MLP_RATIO)
        return layers * (linear + 2 * 2 * tokens**2 * d)

    flops = (
        2 * n * 3 * config.patch_size**2 * d  # patch embedding
        + blocks(config.n_layers, n + 1)  # with the class token
        + 2 * n * d * d  # into the decoder
        + blocks(config.decoder_n_layers, n + k)  # with a token per class
        + 2 * (n + k) * d * d  # projections of patches and classes
        + 2 * n * k * d  # mask product
    )
    # float32 parameters and images read, uint8 labels written.
    return Work(batch * flops, 4 * parameters + batch * (4 * 3 + 1) * height * width)


@pytest.mark.parametrize("variant", ["Seg-T-Mask/16", "Seg-B-Mask/16"])
def test_labels(contest, compiled, variant):
    torch.manual_seed(0)
    model = create_model(variant, num_classes=150, image_size=512).eval()
    state, config, x = model.state_dict(), model.config, images(1)

    @torch.inference_mode()
    def official():
        return reference.labels(x, state, config)

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

    contest(
        f"{variant}, 512 x 512, batch 1, K = 150",
        {
            "official algorithm, eager": official,
            "full-size softmax, fused attention": torch.inference_mode()(fused_attention),
            "the same, torch.compile": torch.inference_mode()(compiled(fused_attention)),
            "segmenter_fast": ours,
        },
        check,
        rounds=9 if "T" in variant else 5,
        peers=3,
        work=model_work(model.config, sum(p.numel() for p in model.parameters()), batch=1),
    )
