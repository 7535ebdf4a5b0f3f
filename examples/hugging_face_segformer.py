"""segmenter_fast's dense head in another model: training and validating Hugging Face's SegFormer.

    pip install "segmenter_fast[examples]"
    python examples/hugging_face_segformer.py --size 512 --classes 150

SegFormer gives logits at a quarter of the resolution. The usual step resizes them to the image
before the loss and before argmax, K floats for each pixel; `upsample_cross_entropy` and
`upsample_argmax` read the same numbers without that tensor. Both ways are compared before they are
measured: loss, gradients and labels; dropout is off for that. The weights are random, made from a
config. Memory is what a step needs at its peak beyond what is held before it.
"""

import argparse
import ctypes
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from segmenter_fast import upsample_argmax, upsample_cross_entropy


def usual_loss(logits: Tensor, target: Tensor) -> Tensor:
    full = F.interpolate(logits, size=target.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(full, target, ignore_index=255)


def usual_labels(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False).argmax(1)


def our_loss(logits: Tensor, target: Tensor) -> Tensor:
    return upsample_cross_entropy(logits, target, ignore_index=255)


def our_labels(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return upsample_argmax(logits, size).long()


def training_step(model, images: Tensor, target: Tensor, loss_of: Callable) -> Tensor:
    """Loss and gradients; an optimiser would step now."""
    model.zero_grad(set_to_none=True)
    loss = loss_of(model(pixel_values=images).logits, target)
    loss.backward()
    return loss.detach()


@torch.no_grad()
def validation_step(model, images: Tensor, labels_of: Callable) -> Tensor:
    return labels_of(model(pixel_values=images).logits, tuple(images.shape[2:]))


def peak_mib(step: Callable[[], Tensor], device: str) -> float | None:
    """Memory of a step beyond what is held before it: the GPU's, or on Linux the process's."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    status = Path("/proc/self/status")

    def kib(field: str) -> int:
        return int(re.search(rf"{field}:\s+(\d+)", status.read_text())[1])

    # A block that the C library has kept from an earlier step would be used again unseen.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls back to the size
    except OSError:
        return None
    before = kib("VmRSS")
    step()
    return max(0, kib("VmHWM") - before) / 2**10


def seconds(function: Callable[[], Tensor], device: str) -> float:
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(model, images: Tensor, target: Tensor) -> None:
    """Both ways give the same loss, gradients and labels."""
    results = []
    for loss_of, labels_of in ((usual_loss, usual_labels), (our_loss, our_labels)):
        loss = training_step(model, images, target, loss_of)
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append((loss, gradients, validation_step(model, images, labels_of)))
    (loss, gradients, labels), (our, our_gradients, our_map) = results
    torch.testing.assert_close(our, loss, rtol=1e-4, atol=1e-5)
    largest = max(float(g.abs().max()) for g in gradients)
    for one, two in zip(gradients, our_gradients, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4 * largest)
    agreement = (labels == our_map).float().mean().item()
    assert agreement > 0.999, f"labels agree on {agreement:.2%} of the pixels"
    print(f"same loss {our.item():.4f}, same gradients, labels agree on {agreement:.3%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=512, help="side of the images in pixels")
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="of timing, both ways in turn")
    args = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = SegformerConfig(num_labels=args.classes)  # the size of MiT-B0
    model = SegformerForSemanticSegmentation(config).to(device).eval()
    images = torch.randn(args.batch_size, 3, args.size, args.size, device=device)
    target = torch.randint(0, args.classes, (args.batch_size, 8, 8), device=device)
    target = target.repeat_interleave(args.size // 8, 1).repeat_interleave(args.size // 8, 2)
    target = F.pad(
        target, (0, args.size - target.shape[2], 0, args.size - target.shape[1]), value=255
    )

    compare(model, images, target)
    ways = {
        "interpolate, then cross_entropy or argmax": (usual_loss, usual_labels),
        "upsample_cross_entropy, upsample_argmax": (our_loss, our_labels),
    }
    steps = {}
    for name, (loss_of, labels_of) in ways.items():
        steps[name, "training"] = partial(training_step, model, images, target, loss_of)
        steps[name, "validation"] = partial(validation_step, model, images, labels_of)
    times = {key: [] for key in steps}
    for _ in range(args.rounds):
        for key, step in steps.items():
            times[key].append(seconds(step, device))
    model.zero_grad(set_to_none=True)
    for (name, kind), step in steps.items():
        peak = peak_mib(step, device)
        model.zero_grad(set_to_none=True)
        memory = "" if peak is None else f", {peak:,.0f} MiB"
        print(f"{name}: {1e3 * median(times[name, kind]):,.0f} ms{memory} for a {kind} step")


if __name__ == "__main__":
    main()
