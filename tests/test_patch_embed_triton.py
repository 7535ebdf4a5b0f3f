"""The patch embedding in Triton, forward and backward, held to float64."""

import pytest
import torch
from checks import assert_close, assert_matches
from test_patch_embed import MEAN, OPTIONS, STD, definition, each_option, make_inputs, pictures
from torch import Tensor
from triton_cases import DEVICE, DTYPES, dtypes, on_device

from segmenter_fast.ops import _triton
from segmenter_fast.ops.patch_embed import patch_embed, patch_embed_reference

pytestmark = on_device

TOKENS = torch.ops.segmenter_fast.patch_embed_triton

# batch, height, width, patch, width of a token, extra tokens: less than a block and a little more
SHAPES = {
    "one of each": (1, 1, 1, 1, 1, 0, 1),
    "whole patches": (2, 8, 12, 4, 8, 1),
    "no whole patch": (2, 3, 2, 4, 8, 2),
    "two blocks of tokens": (3, 17, 34, 4, 24, 1),
    "two blocks of width": (1, 9, 7, 4, 67, 2),
    "two blocks of columns": (1, 15, 13, 7, 9, 0, 1),
}


def kernels(
    images: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos_embed: Tensor,
    tokens: Tensor,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    sizes: Tensor | None = None,
) -> Tensor:
    """The registered operator, on the device under test; the tokens come back to the CPU."""
    inputs = [x.to(DEVICE) for x in (images, weight, bias, pos_embed, tokens)]
    return TOKENS(*inputs, mean, std, None if sizes is None else sizes.to(DEVICE)).cpu()


def leaves_of(inputs: dict) -> dict:
    """Floating-point inputs that ask for a gradient."""
    return {
        name: x.detach().clone().requires_grad_()
        for name, x in inputs.items()
        if isinstance(x, Tensor) and x.is_floating_point()
    }


def results(function, inputs: dict, upstream: Tensor | None = None) -> list[Tensor]:
    """Tokens, then the gradient of every floating-point input."""
    leaves = leaves_of(inputs)
    z = function(**inputs | leaves)
    if upstream is None:
        upstream = torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
    return [z.detach(), *torch.autograd.grad(z, [*leaves.values()], upstream.to(z))]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("spikes", [False, True])
def test_matches_reference(shape, spikes):
    assert_matches(kernels, definition, make_inputs(*shape, spikes=spikes), torch.float32)


@dtypes
def test_every_dtype(dtype):
    make = make_inputs(2, 17, 34, 5, 72, 1, spikes=True)
    assert_matches(kernels, patch_embed_reference, make, dtype)


@each_option
@dtypes
def test_options(options, dtype):
    def make(dtype):
        return make_inputs(2, 9, 11, spikes=True)(dtype) | options

    assert_matches(kernels, patch_embed_reference, make, dtype)


@each_option
@dtypes
def test_pictures(options, dtype):
    def make(dtype):
        return make_inputs(2, 9, 11, spikes=True)(dtype) | {"images": pictures(2, 9, 11)} | options

    assert_matches(kernels, patch_embed_reference, make, dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("options", [{}, OPTIONS["all"]], ids=["none", "all"])
def test_weight_in_16_bits_and_the_rest_in_float32(dtype, options):
    """As under autocast: pixels are rounded on the way, all else is in float32."""
    inputs = make_inputs(2, 9, 11)(torch.float32) | options
    inputs["weight"] = inputs["weight"].to(dtype)
    exact = {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }
    if not options:
        # The products of rounded pixels are exact in float32, but for sums.
        exact["images"] = inputs["images"].to(dtype).double()
    ours, theirs = (
        results(function, x) for function, x in ((kernels, inputs), (definition, exact))
    )
    assert [x.dtype for x in ours] == [
        torch.float32, *(x.dtype for x in leaves_of(inputs).values())
    ]  # fmt: skip
    tolerance = 1e-5 if not options else 4 * torch.finfo(dtype).eps
    for one, other in zip(ours, theirs, strict=True):
        # Upstream gradients are rounded, too.
        allowed = tolerance if one is ours[0] else 4 * torch.finfo(dtype).eps
        assert (one.double() - other).abs().max() < allowed * other.abs().max()


def test_float64_is_as_exact_as_its_input():
    inputs = make_inputs(1, 9, 11)(torch.float64)
    inputs |= {"images": 1 + inputs["images"] * 1e-9, "mean": (1.0,) * 3, "std": (1e-9,) * 3}
    torch.testing.assert_close(kernels(**inputs), definition(**inputs), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("images", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_is_closer_than_torch(images, parameters):
    """Whatever comes in, the product is taken in 16 bits and its sum is not rounded before use."""
    inputs = {n: x.to(DEVICE) for n, x in make_inputs(1, 17, 20, 4, 16)(parameters).items()}
    own = pictures(1, 17, 20) if images == torch.uint8 else inputs["images"].to(images)
    inputs["images"] = own.to(DEVICE)
    exact = definition(**{n: x.double() if x.is_floating_point() else x for n, x in inputs.items()})
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = patch_embed(**inputs, backend="triton")
        theirs = patch_embed(**inputs, backend="reference")
    assert ours.dtype == theirs.dtype == parameters
    assert (ours - exact).abs().max() <= (theirs - exact).abs().max()


def test_autocast_leaves_float64_alone():
    inputs = {name: x.to(DEVICE) for name, x in make_inputs(1, 4, 4)(torch.float64).items()}
    with torch.autocast(DEVICE, torch.bfloat16):
        assert patch_embed(**inputs, backend="triton").dtype == torch.float64


def test_a_pixel_reaches_its_own_patch_alone():
    inputs = make_inputs(2, 9, 11)(torch.float32)
    expected = kernels(**inputs)
    inputs["images"][1, 2, 8, 10] += 1.0
    changed = (kernels(**inputs) != expected).any(-1)
    assert changed.nonzero().tolist() == [[1, 9]]


def test_special_values_as_in_the_reference():
    inputs = make_inputs(2, 9, 11)(torch.float32) | {"mean": MEAN}
    for index, value in (((0, 1, 3, 3), float("nan")), ((1, 2, 8, 10), float("inf"))):
        special = inputs | {"images": inputs["images"].clone()}
        special["images"][index] = value
        expected = patch_embed_reference(**special)
        assert not expected.isfinite().all()
        torch.testing.assert_close(
            kernels(**special), expected, equal_nan=True, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_what_is_beyond_an_image_is_not_looked_at(dtype):
    """Even NaN there leaves tokens and gradients alone, and gets no gradient."""
    inputs = make_inputs(2, 9, 11)(dtype) | {"sizes": torch.tensor([[9, 5], [3, 11]])}
    expected = results(kernels, inputs)
    inputs["images"][0, :, :, 5:] = float("nan")
    inputs["images"][1, :, 3:] = float("nan")
    for one, other in zip(results(kernels, inputs), expected, strict=True):
        assert torch.equal(one, other)
    of_images = expected[1]
    assert (of_images[0, :, :, 5:] == 0).all() and (of_images[1, :, 3:] == 0).all()
    assert (of_images[0, :, :, :5] != 0).all()


def test_runs_agree_to_the_bit():
    inputs = make_inputs(3, 17, 34, 4, 24)(torch.float32) | {"mean": MEAN, "std": STD}
    for one, other in zip(results(kernels, inputs), results(kernels, inputs), strict=True):
        assert torch.equal(one, other)


def test_agrees_with_native():
    inputs = make_inputs(2, 21, 19)(torch.float32)
    native = patch_embed(**inputs, backend="native")
    torch.testing.assert_close(kernels(**inputs), native, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------- machinery
@pytest.mark.parametrize("options", [None, (MEAN[:2], STD[:2], torch.tensor([[3, 2]]))])
def test_gradcheck(options):
    inputs = make_inputs(1, 3, 3, 2, 2, channels=2)(torch.float64)
    leaves = [x.requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(lambda *x: kernels(*x, *options or ()), leaves)


@pytest.mark.parametrize("name", ["images", "weight", "bias", "pos_embed", "tokens"])
def test_one_gradient_alone(name):
    inputs = make_inputs(2, 9, 11)(torch.float32)
    alone = inputs | {name: inputs[name].clone().requires_grad_()}
    z = kernels(**alone)
    upstream = torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad(z, alone[name], upstream)
    expected = results(kernels, inputs)[1 + list(inputs).index(name)]
    assert torch.equal(gradient, expected)


def test_refuses_a_second_derivative():
    inputs = [x.requires_grad_() for x in make_inputs(1, 4, 4)(torch.float32).values()]
    gradients = torch.autograd.grad(kernels(*inputs).square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        gradients[0].square().sum().backward()


@pytest.mark.parametrize("of", ["images", "pictures"])
def test_opcheck(of):
    inputs = make_inputs(2, 5, 6)(torch.float32)
    options = (None, None, None)
    if of == "pictures":
        inputs["images"] = pictures(2, 5, 6)
        options = (MEAN, STD, torch.tensor([[5, 4], [3, 6]], device=DEVICE))
    inputs = [x.to(DEVICE) for x in inputs.values()]
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    torch.library.opcheck(TOKENS.default, (*leaves, *options))
    upstream = torch.ones_like(TOKENS(*inputs, *options))
    torch.library.opcheck(
        torch.ops.segmenter_fast.patch_embed_triton_backward.default,
        (upstream, *inputs[:2], *options, of == "images", True),
    )


def test_compile_fullgraph():
    found = []
    compiled = torch.compile(patch_embed, fullgraph=True, backend="aot_eager")
    inputs = {name: x.to(DEVICE) for name, x in make_inputs(2, 7, 6)(torch.float32).items()}
    inputs |= {"mean": MEAN, "std": STD, "sizes": torch.tensor([[7, 4], [3, 6]], device=DEVICE)}
    for function in (patch_embed, compiled):
        found.append(results(lambda f=function, **x: f(**x, backend="triton"), inputs))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


LAYOUTS = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "a part of channels last": lambda x: torch.cat((x, x), 3).contiguous(
        memory_format=torch.channels_last
    )[..., : x.shape[3]],
    "columns first": lambda x: x.mT.contiguous().mT,
    "every other pixel": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "batch last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strided_inputs(layout):
    """Images, weights and upstream gradients in other strides give the same numbers."""
    inputs = make_inputs(2, 9, 11, spikes=True)(torch.float32) | OPTIONS["all"]
    upstream = torch.randn(2, 10, 8)
    expected = results(kernels, inputs, upstream)

    def strided(**inputs):
        images, weight = layout(inputs["images"]), layout(inputs["weight"])
        assert not images.is_contiguous()
        return kernels(**inputs | {"images": images, "weight": weight})

    for gradient in (upstream, upstream.mT.contiguous().mT):
        for i, x in enumerate(results(strided, inputs, gradient)):
            assert_close(f"result {i}", x, expected[i], expected[i].double())


@pytest.mark.parametrize("strides", [(1 << 30, 16, 4, 1), (36, 12, 3, 1 << 30)])
def test_offsets_beyond_32_bits(strides):
    """Pictures, or columns, a GiB apart; memory that is not touched is not there."""
    images = pictures(3, 4, 4)
    memory = torch.empty((3 << 30) + 108, dtype=torch.uint8)
    apart = memory.as_strided(images.shape, strides).copy_(images)
    inputs = make_inputs(3, 4, 4)(torch.float32)
    found = [results(kernels, inputs | {"images": x}) for x in (apart, images)]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("options", [{}, OPTIONS["all"]], ids=["none", "all"])
def test_empty(options):
    inputs = make_inputs(2, 9, 11)(torch.float32) | options
    inputs["images"] = inputs["images"][:0]
    if options:
        inputs["sizes"] = inputs["sizes"][:0]
    z, *gradients = results(kernels, inputs)
    assert z.shape == (0, 10, 8)
    assert all((x == 0).all() for x in gradients)


@pytest.mark.parametrize("candidate", range(2))
def test_every_configuration(candidate):
    with _triton.use_candidate(candidate):
        make = make_inputs(3, 17, 34, 5, 72, spikes=True)
        assert_matches(kernels, definition, make, torch.float32)
        assert_matches(kernels, patch_embed_reference, make, torch.float16)


def test_launches_are_recorded():
    """What the compile report relies on; pixels that are converted have a kernel of their own."""
    recorded = []
    for change in ({}, OPTIONS["sizes"], OPTIONS["all"], {"images": pictures(2, 9, 11)}):
        inputs = make_inputs(2, 9, 11)(torch.bfloat16) | change
        with _triton.Recorder(90) as recorder:
            leaves = leaves_of(inputs)
            kernels(**inputs | leaves).sum().backward()
        names = [launch.kernel.name for launch in recorder.launches]
        assert names == ["embed", "weight_gradient", "image_gradient"][: 2 + ("images" in leaves)]
        recorded.append(recorder.launches[0].kernel.register_operands)
    assert recorded == [False, True, True, True]


def test_rejects_bad_input():
    good = make_inputs(1, 4, 4)(torch.float32)
    with pytest.raises(TypeError, match=r"got torch.int32 and torch.float32"):
        kernels(**good | {"images": good["images"].int()})
    with pytest.raises(TypeError, match=r"got torch.float32 and torch.int64"):
        kernels(**good | {"weight": good["weight"].long()})
    halves = good | {"images": good["images"].half()}
    with pytest.raises(TypeError, match=r"images must be uint8 or torch\.float32"):
        patch_embed(**halves, backend="triton")
    with pytest.raises(ValueError, match=r"tokens must be \(1, E, 8\)"):
        patch_embed(**good | {"tokens": torch.ones(2, 1, 8)}, backend="triton")
