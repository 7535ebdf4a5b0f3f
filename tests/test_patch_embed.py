"""Patch embedding: image to tokens, with padding, normalisation and position embeddings."""

import pytest
import torch
import torch.nn.functional as F
from checks import assert_matches, with_spikes

from segmenter_fast.ops.patch_embed import patch_embed

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.1)


def definition(images, weight, bias, pos_embed, tokens, mean=None, std=None, sizes=None):
    """Patch by patch: cut out, normalise, multiply."""
    batch, channels, height, width = images.shape
    d, patch = weight.shape[0], weight.shape[2]
    x = images.to(weight.dtype) / (255 if images.dtype == torch.uint8 else 1)
    x = x - torch.tensor(mean or [0.0] * channels, dtype=torch.float64).to(x)[:, None, None]
    x = x / torch.tensor(std or [1.0] * channels, dtype=torch.float64).to(x)[:, None, None]
    rows = []
    for b in range(batch):
        h, w = (height, width) if sizes is None else sizes[b].tolist()
        whole = F.pad(x[b, :, :h, :w], (0, 2 * patch + width - w, 0, 2 * patch + height - h))
        cut = [
            whole[:, i : i + patch, j : j + patch].reshape(-1)
            for i in range(0, height, patch)
            for j in range(0, width, patch)
        ]
        rows.append(torch.cat((tokens[0], torch.stack(cut) @ weight.reshape(d, -1).mT + bias)))
    return torch.stack(rows) + pos_embed


def make_inputs(batch, height, width, patch=4, d=8, extra=1, channels=3, spikes=False):
    n = -(-height // patch) * -(-width // patch)

    def make(dtype):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            x = torch.randn(*shape, generator=generator)
            return (with_spikes(x) if spikes else x).to(dtype)

        return {
            "images": draw(batch, channels, height, width),
            "weight": draw(d, channels, patch, patch), "bias": draw(d),
            "pos_embed": draw(1, extra + n, d), "tokens": draw(1, extra, d),
        }  # fmt: skip

    return make


def pictures(batch, height, width):
    generator = torch.Generator().manual_seed(1)
    shape = (batch, 3, height, width)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


OPTIONS = {
    "none": {},
    "mean alone": {"mean": MEAN},
    "std alone": {"std": STD},
    "sizes": {"sizes": torch.tensor([[9, 5], [1, 11]])},
    "all": {"mean": MEAN, "std": STD, "sizes": torch.tensor([[8, 11], [9, 1]], dtype=torch.int32)},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@pytest.mark.parametrize("dtype", [torch.float32])
@pytest.mark.parametrize("extra", [0, 1, 2])
@pytest.mark.parametrize("size", [(8, 12), (9, 11), (1, 1)])
@pytest.mark.parametrize("spikes", [False, True])
def test_matches_reference(size, extra, dtype, spikes):
    assert_matches(
        patch_embed, definition, make_inputs(2, *size, extra=extra, spikes=spikes), dtype
    )


@each_option
def test_options(options):
    def make(dtype):
        return make_inputs(2, 9, 11)(dtype) | options

    assert_matches(patch_embed, definition, make, torch.float32)


@each_option
def test_pictures(options):
    def make(dtype):
        return make_inputs(2, 9, 11)(dtype) | {"images": pictures(2, 9, 11)} | options

    inputs = make(torch.float32)
    assert patch_embed(**inputs).dtype == torch.float32
    floats = inputs | {"images": inputs["images"] / 255}
    torch.testing.assert_close(patch_embed(**inputs), patch_embed(**floats))
    torch.testing.assert_close(patch_embed(**inputs), definition(**inputs))


def test_padding_is_zero_after_normalisation():
    """As in the official code, which normalises first: black pixels would be others."""
    inputs = make_inputs(1, 6, 7)(torch.float64)
    inputs["images"] = (inputs["images"] - 0.3) / 0.2
    expected = F.conv2d(
        F.pad(inputs["images"], (0, 1, 0, 2)), inputs["weight"], inputs["bias"], stride=4
    )
    raw = inputs | {"images": inputs["images"] * 0.2 + 0.3, "mean": [0.3] * 3, "std": [0.2] * 3}
    z = patch_embed(**raw) - inputs["pos_embed"]
    torch.testing.assert_close(z[:, 1:], expected.flatten(2).mT)


def test_images_of_several_sizes_in_one_batch():
    """Whatever is beyond an image's size, even NaN, it has the tokens of the image alone."""
    sizes = torch.tensor([[9, 5], [3, 11]])
    inputs = make_inputs(2, 9, 11)(torch.float64)
    alone = []
    for b, (h, w) in enumerate(sizes.tolist()):
        padded = torch.zeros(1, 3, 12, 12).double()
        padded[:, :, :h, :w] = inputs["images"][b : b + 1, :, :h, :w]
        alone.append(patch_embed(**inputs | {"images": padded}))
        inputs["images"][b, :, h:] = float("nan")
        inputs["images"][b, :, :, w:] = float("nan")
    torch.testing.assert_close(patch_embed(**inputs, sizes=sizes), torch.cat(alone))


@each_option
def test_gradcheck(options):
    inputs = [x.requires_grad_() for x in make_inputs(2, 3, 5, 2, 2)(torch.float64).values()]
    sizes = torch.tensor([[3, 2], [1, 5]]) if "sizes" in options else None
    assert torch.autograd.gradcheck(
        lambda *x: patch_embed(*x, options.get("mean"), options.get("std"), sizes), inputs
    )


def test_autocast():
    """The product in 16 bits as of a convolution, the tokens in float32 as of what follows it."""
    inputs = make_inputs(2, 9, 11)(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        low = patch_embed(**inputs)
    assert low.dtype == torch.float32
    error = (low - patch_embed(**inputs)).abs().max()
    assert 0 < error < 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_pictures_are_normalised_in_float32(dtype):
    inputs = make_inputs(1, 4, 4)(dtype) | {"images": pictures(1, 4, 4), "mean": MEAN, "std": STD}
    z = patch_embed(**inputs)
    assert z.dtype == dtype
    wide = {n: x.float() if n in ("weight", "bias", "pos_embed", "tokens") else x
            for n, x in inputs.items()}  # fmt: skip
    eps = torch.finfo(dtype).eps
    assert (z - patch_embed(**wide)).abs().max() < 4 * eps * patch_embed(**wide).abs().max()


def test_compile_fullgraph():
    inputs = make_inputs(2, 7, 6)(torch.float32) | {"mean": MEAN, "std": STD}
    compiled = torch.compile(patch_embed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs), patch_embed(**inputs))


def test_strided_inputs():
    inputs = make_inputs(2, 9, 11)(torch.float32)
    expected = patch_embed(**inputs)
    wide = torch.randn(2, 3, 20, 30)
    wide[:, :, 3:12, 1:23:2] = inputs["images"]
    for images in (
        inputs["images"].contiguous(memory_format=torch.channels_last),
        wide[:, :, 3:12, 1:23:2],
    ):
        torch.testing.assert_close(patch_embed(**inputs | {"images": images}), expected)


def test_empty():
    inputs = make_inputs(2, 9, 11)(torch.float32)
    inputs["images"] = inputs["images"][:0]
    assert patch_embed(**inputs).shape == (0, 1 + 9, 8)


BAD = {
    "rank": ({"images": torch.ones(3, 8, 8)}, ValueError, r"\(B, C, H, W\).*got \(3, 8, 8\)"),
    "pixels": ({"images": torch.ones(2, 3, 0, 8)}, ValueError, r"with pixels, got \(2, 3, 0, 8\)"),
    "channels": ({"weight": torch.ones(8, 4, 4, 4)}, ValueError, r"C = 3, got \(8, 4, 4, 4\)"),
    "patch": ({"weight": torch.ones(8, 3, 4, 2)}, ValueError, r"weight must be \(D, C, P, P\)"),
    "bias": ({"bias": torch.ones(7)}, ValueError, r"bias must be \(8,\).*got \(7,\)"),
    "tokens": ({"tokens": torch.ones(1, 8)}, ValueError, r"\(1, E, 8\), got \(1, 8\)"),
    "grid": (
        {"pos_embed": torch.ones(1, 6, 8)},
        ValueError,
        r"\(1, 5, 8\) for 1 extra tokens and 2 x 2 patches, got \(1, 6, 8\)",
    ),
    "dtypes": ({"images": torch.ones(2, 3, 8, 8).half()}, TypeError, "uint8 or torch.float32"),
    "bytes": ({"images": torch.ones(2, 3, 8, 8).char()}, TypeError, "got torch.int8"),
    "whole": ({"tokens": torch.ones(1, 1, 8).int()}, TypeError, "tokens must be floating point"),
    "mean": ({"mean": (1.0, 2.0)}, ValueError, r"mean must hold 3 numbers, got \(1.0, 2.0\)"),
    "zero": ({"std": (1.0, 0.0, 1.0)}, ValueError, "std must not hold 0"),
    "sizes": ({"sizes": torch.ones(2).int()}, ValueError, r"sizes must be \(2, 2\), got \(2,\)"),
    "lengths": ({"sizes": torch.ones(2, 2)}, TypeError, "int32 or int64, got torch.float32"),
}


@pytest.mark.parametrize(("change", "error", "text"), BAD.values(), ids=BAD)
def test_rejects_bad_input(change, error, text):
    with pytest.raises(error, match=text):
        patch_embed(**make_inputs(2, 8, 8)(torch.float32) | change)
