"""Images per second of the other architectures: 512 x 512, K = 150, batch 1, random weights.

Each is eager PyTorch in float32 and, with --with-compile, compiled; DeepLabv3+, which is all
convolutions, is also laid out with the channels last. Segmenters in PyTorch's own operators are
among them. This project's kernel reads the labels off all logits, so that only the architectures
differ. Beside each stands Seg-T-Mask/16, met by the same load of the machine: in plain PyTorch with
its fused attention, a yardstick that compares architectures within one engine, and as this project
runs it. A ratio is against the architecture.
"""

import copy
import functools

import pytest
import torch
from bench_model import SIZE, images
from harness import Prepared, not_run
from peers.deeplab import DeepLabV3Plus
from peers.engines import PatchLogits, plain
from peers.hugging_face import SEGFORMER, SWIN, SegFormer, UPerNetSwin
from peers.setr import SETRPUP, VIT

from segmenter_fast import create_model
from segmenter_fast.ops.upsample_argmax import upsample_argmax
from segmenter_fast.tradeoff import IN_PYTORCH

SEGMENTER = ("Seg-T-Mask/16", "Seg-S-Mask/16", "Seg-B-Mask/16")


def in_pytorch(variant: str, n_cls: int) -> PatchLogits:
    """A Segmenter in PyTorch's own operators, to set architectures side by side in one engine."""
    return PatchLogits(plain(create_model(variant, num_classes=n_cls, image_size=SIZE)))


ARCHITECTURES = {
    "DeepLabv3+ ResNet-101, stride 16": functools.partial(DeepLabV3Plus, output_stride=16),
    "DeepLabv3+ ResNet-101, stride 8": functools.partial(DeepLabV3Plus, output_stride=8),
    "SETR-PUP ViT-B": functools.partial(SETRPUP, **VIT["ViT-B"]),
    "SETR-PUP ViT-L": functools.partial(SETRPUP, **VIT["ViT-L"]),
    **{f"UPerNet {v}": functools.partial(UPerNetSwin, variant=v) for v in SWIN},
    **{f"SegFormer {v}": functools.partial(SegFormer, variant=v) for v in SEGFORMER},
    **{f"{v}{IN_PYTORCH}": functools.partial(in_pytorch, v) for v in SEGMENTER},
}
ON_REQUEST = {f"UPerNet Swin-{v}" for v in "SBL"} | {f"SegFormer B{n}" for n in (1, 3, 4)}
"""Only with --all-peers."""
YARDSTICK = "Seg-T-Mask/16, PyTorch"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_images_per_second(request, contest, compiled, name):
    x = images(1)

    @functools.cache
    def model():
        torch.manual_seed(0)
        return ARCHITECTURES[name](150).eval()

    def reading(logits_of):
        return torch.inference_mode()(lambda: upsample_argmax(logits_of(), SIZE))

    eager = Prepared(lambda: reading(functools.partial(model(), x)))
    own = {name: eager, "the same, torch.compile": Prepared(lambda: reading(compiled(model(), x)))}
    if name.startswith("DeepLab"):

        def channels_last():
            layout = {"memory_format": torch.channels_last}
            return reading(functools.partial(copy.deepcopy(model()).to(**layout), x.to(**layout)))

        own["the same, channels last"] = Prepared(channels_last)
    if name in ON_REQUEST and not request.config.getoption("--all-peers"):
        own = dict.fromkeys(own, not_run("needs --all-peers"))
    segmenter = create_model("Seg-T-Mask/16", num_classes=150, image_size=SIZE).eval()

    def check(contestant: str, labels: torch.Tensor) -> None:
        assert labels.shape == (1, *SIZE) and labels.unique().numel() > 1, contestant
        if contestant.startswith("the same"):
            same = float((labels == eager()).double().mean())
            assert same > 0.999, f"{contestant}: {same:.2%} of the labels are eager's"

    contest(
        f"{name}, 512 x 512, batch 1, K = 150",
        own
        | {
            YARDSTICK: reading(functools.partial(PatchLogits(plain(segmenter)), x)),
            "Seg-T-Mask/16, segmenter_fast": torch.inference_mode()(lambda: segmenter.labels(x)),
        },
        check,
        rounds=3,
        peers=len(own),
        images=1,
        yardsticks=[YARDSTICK],
    )
