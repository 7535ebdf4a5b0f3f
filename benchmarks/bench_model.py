"""Whole images to label maps: 512 x 512, K = 150, batch 1, random weights (speed needs no other).

The official algorithm in eager PyTorch is `reference.labels`: attention weights written out, logits
upsampled to B x 150 x 512 x 512 floats, softmax, argmax. Its best form is taken: the mask tensor is
made contiguous first, without which PyTorch's softmax is several times slower. The other peers have
fused attention and no softmax, which changes no label: PyTorch eager and compiled, and the engines
of `peers.engines`. Those in bfloat16 are a case of their own, so that like stands beside like.

Engines run in this process, with as many threads as PyTorch and never at the same time.
"""

import functools

import pytest
import torch
from checks import assert_labels
from harness import Prepared, Work
from peers.engines import Labels, OnnxRuntime, OpenVino, export_onnx, plain

from segmenter_fast import create_model, reference
from segmenter_fast.config import MLP_RATIO, SegmenterConfig
from segmenter_fast.ops.upsample_argmax import upsample_argmax

SIZE = (512, 512)
AGREEMENT = 0.9
"""Share of the labels in float32 that bfloat16 must keep: random weights leave narrow margins."""


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


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """`exported(variant, model, images)`: path of its ONNX file, written once."""
    folder, written = tmp_path_factory.mktemp("onnx"), {}

    def export(variant: str, *arguments):
        if variant not in written:
            path = folder / f"{len(written)}.onnx"
            written[variant] = export_onnx(*arguments, path)
        return written[variant]

    return export


def label_maps(engine, x: torch.Tensor):
    """A contestant of an engine that ends at patch resolution: our kernel reads the labels."""

    def labels() -> torch.Tensor:
        return upsample_argmax(engine(x), SIZE)

    labels.fresh = lambda: upsample_argmax(engine.fresh(x), SIZE)
    return labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ["Seg-T-Mask/16", "Seg-B-Mask/16"])
def test_labels(contest, compiled, exported, variant, dtype):
    torch.manual_seed(0)
    model = create_model(variant, num_classes=150, image_size=SIZE).eval()
    state, config, x = model.state_dict(), model.config, images(1)
    graph = Labels(plain(model)).to(dtype)
    half = dtype == torch.bfloat16
    precision = "bf16" if half else "f32"

    @torch.inference_mode()
    def official():
        return reference.labels(x, state, config)

    @torch.inference_mode()
    def float32():
        return model.labels(x)

    @torch.inference_mode()
    def autocast():
        with torch.autocast("cpu", torch.bfloat16):
            return model.labels(x)

    def engine(kind, *arguments):
        return Prepared(lambda: label_maps(kind(exported(variant, model, x), *arguments), x))

    peers = {
        "PyTorch, fused attention": functools.partial(graph, x.to(dtype)),
        "the same, torch.compile": compiled(graph, x.to(dtype)),
        "the same, max-autotune": compiled(graph, x.to(dtype), mode="max-autotune"),
    }
    peers = {name: torch.inference_mode()(peer) for name, peer in peers.items()}
    if half:
        # ONNX Runtime's CPU kernels have no bfloat16.
        ours = {"segmenter_fast, float32": float32, "segmenter_fast, autocast": autocast}
    else:
        peers = {"official algorithm, eager": official} | peers
        peers["ONNX Runtime"] = engine(OnnxRuntime)
        ours = {"segmenter_fast": float32}
    peers["OpenVINO"] = engine(OpenVino, precision)

    with torch.inference_mode():
        patch_logits = reference.patch_logits(x, state, config)
        expected = reference.labels(x, state, config)
    # A label is right if its logit is within what encoders may differ by of the largest: for two in
    # float32 that is some 1e-5 of it, for one in bfloat16 a few times 2^-8.
    slack = (0.1 if half else 1e-4) * float(patch_logits.abs().max())

    def agreement(name: str, labels: torch.Tensor) -> float:
        return float((labels.long() == expected).double().mean())

    def check(name: str, labels: torch.Tensor) -> None:
        assert_labels(labels, patch_logits, SIZE, slack=slack)
        same = agreement(name, labels)
        assert same >= AGREEMENT, f"{name}: {same:.1%} of the labels are those in float32"

    contest(
        f"{variant}, 512 x 512, batch 1, K = 150" + half * ", bfloat16",
        peers | ours,
        check,
        rounds=7 if "T" in variant else 3,
        peers=len(peers),
        work=model_work(config, sum(p.numel() for p in model.parameters()), batch=1),
        agreement=agreement,
        images=1,
    )
