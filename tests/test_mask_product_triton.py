"""The mask product in Triton, forward and backward, held to float64."""

import pytest
import torch
import torch.nn.functional as F
from checks import assert_close, assert_matches
from test_mask_product import make_inputs
from torch import Tensor
from triton_cases import DEVICE, DTYPES, dtypes, on_device

from segmenter_fast.ops import _triton
from segmenter_fast.ops.mask_product import mask_product, mask_product_reference
from segmenter_fast.ops.mask_product_triton import BLOCK_OF_MANY_CLASSES, MOST_CLASSES

pytestmark = on_device

MASKS = torch.ops.segmenter_fast.mask_product_triton
NAMES = ("patches", "classes", "weight", "bias")

# batch, patches, classes, width: less than a block and a little more of each
SHAPES = {
    "one of each": (1, 1, 1, 1),
    "two blocks of patches": (2, 67, 5, 24),
    "two blocks of width": (1, 9, 19, 70),
    "many classes": (1, 18, 150, 32),
    "a full block of classes": (1, 3, MOST_CLASSES, 16),
    "a class more": (1, 3, MOST_CLASSES + 1, 16),
    "three blocks of classes": (2, 66, 2 * BLOCK_OF_MANY_CLASSES + 3, 24),
}


def kernels(patches: Tensor, classes: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The registered operator, on the device under test; the masks come back to the CPU."""
    inputs = [x.to(DEVICE) for x in (patches, classes, weight, bias)]
    with_gradient = any(x.requires_grad for x in inputs)
    return MASKS(*inputs, 1e-5, with_gradient)[0].cpu()


def definition(patches: Tensor, classes: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    m = F.normalize(patches, dim=-1) @ F.normalize(classes, dim=-1).mT
    return F.layer_norm(m, (classes.shape[1],), weight, bias)


def reference(patches: Tensor, classes: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return mask_product_reference(patches, classes, weight, bias, 1e-5)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("spikes", [False, True])
def test_matches_reference(shape, spikes):
    if shape[2] == 1:
        # A layer norm over one class is its bias, and what reaches its input is rounding.
        inputs = make_inputs(*shape, spikes)(torch.float32)
        torch.testing.assert_close(kernels(**inputs), inputs["bias"].expand(1, 1, 1))
        return
    assert_matches(kernels, definition, make_inputs(*shape, spikes), torch.float32)


@dtypes
def test_every_dtype(dtype):
    assert_matches(kernels, definition, make_inputs(2, 35, 37, 72, True), dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_parameters_in_float32_make_masks_in_float32(dtype):
    """As under autocast, where PyTorch's layer norm computes and answers in float32."""
    inputs = make_inputs(1, 20, 7, 24)(torch.float32)
    vectors = {name: inputs[name].to(dtype) for name in NAMES[:2]}
    masks = kernels(**(inputs | vectors))
    assert masks.dtype == torch.float32
    exact = definition(**{name: x.double() for name, x in (inputs | vectors).items()})
    torch.testing.assert_close(masks, exact.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_cls", [19, MOST_CLASSES + 1])
def test_without_a_gradient_nothing_is_kept(n_cls):
    inputs = [x.to(DEVICE) for x in make_inputs(1, 9, n_cls, 24)(torch.float32).values()]
    masks, *kept = MASKS(*inputs, 1e-5, False)
    assert [x.numel() for x in kept] == [0] * 5
    assert torch.equal(masks, MASKS(*inputs, 1e-5, True)[0])


def test_float64_is_as_exact_as_its_input():
    inputs = make_inputs(1, 9, 5, 24)(torch.float64)
    inputs["classes"] = 1 + inputs["classes"] * 1e-9  # the same direction in float32
    torch.testing.assert_close(kernels(**inputs), definition(**inputs), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("vectors", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_is_closer_than_torch(vectors, parameters):
    """Whatever comes in, the product is taken in 16 bits and the layer norm in float32.

    So CUDA's autocast does it; a CPU's has no layer norm on its list for float32.
    """
    inputs = {name: x.to(DEVICE) for name, x in make_inputs(1, 33, 19, 64)(torch.float32).items()}
    for name in NAMES:
        inputs[name] = inputs[name].to(vectors if name in NAMES[:2] else parameters)
    exact = definition(**{name: x.double() for name, x in inputs.items()})
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = mask_product(**inputs, backend="triton")
        theirs = mask_product(**inputs, backend="reference")
    assert ours.dtype == torch.float32
    assert theirs.dtype == torch.float32 or DEVICE == "cpu"
    assert (ours - exact).abs().max() < (theirs - exact).abs().max()


def test_autocast_leaves_float64_alone():
    inputs = {name: x.to(DEVICE) for name, x in make_inputs(1, 3, 4, 8)(torch.float64).items()}
    with torch.autocast(DEVICE, torch.bfloat16):
        assert mask_product(**inputs, backend="triton").dtype == torch.float64


def test_large_and_small_vectors():
    """Cosines do not depend on lengths, whose squares float16 could not hold."""
    inputs = make_inputs(1, 20, 7, 64)(torch.float16)
    expected = kernels(**inputs)
    inputs["patches"] = inputs["patches"] * 512
    inputs["classes"] = inputs["classes"] / 64
    torch.testing.assert_close(kernels(**inputs), expected, rtol=2e-3, atol=2e-3)


def test_special_values_as_in_the_reference():
    """A vector of zeros has no direction: NaN, for its patch, or for all if it is a class."""
    inputs = make_inputs(2, 18, 5, 24)(torch.float32)
    for name, index, value in (
        ("patches", (0, 3), 0.0),
        ("patches", (1, 17), float("nan")),
        ("patches", (1, 2, 0), float("inf")),
        ("classes", (1, 4), 0.0),
    ):
        special = inputs | {name: inputs[name].clone()}
        special[name][index] = value
        expected = mask_product_reference(**special, eps=1e-5)
        assert expected.isnan().any()
        torch.testing.assert_close(kernels(**special), expected, equal_nan=True)


def test_gradients_of_special_values_as_in_the_reference():
    """NaN for a patch without a direction and for what it reaches: classes and parameters."""
    inputs = make_inputs(2, 18, 5, 24)(torch.float32)
    inputs["patches"][1, 17] = 0.0
    gradients = []
    for function in (kernels, reference):
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        gradients.append(torch.autograd.grad(function(**leaves).sum(), [*leaves.values()]))
    for name, ours, theirs in zip(NAMES, *gradients, strict=True):
        assert theirs.isnan().any() or name == "bias"
        assert torch.equal(ours.isnan(), theirs.isnan()), name


def test_constant_masks():
    """No variance to divide by but eps."""
    inputs = make_inputs(1, 5, 7, 16)(torch.float32)
    inputs["classes"] = inputs["classes"][:, :1].expand(1, 7, 16).contiguous()
    expected = inputs["bias"].expand(1, 5, 7)
    torch.testing.assert_close(kernels(**inputs), expected, rtol=0, atol=1e-3)


def test_runs_agree_to_the_bit():
    runs = []
    for _ in range(2):
        inputs = [x.requires_grad_() for x in make_inputs(2, 40, 9, 24)(torch.float32).values()]
        masks = kernels(*inputs)
        runs.append((masks.detach(), *torch.autograd.grad(masks.square().sum(), inputs)))
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


def test_agrees_with_native():
    inputs = make_inputs(1, 21, 19, 32)(torch.float32)
    torch.testing.assert_close(kernels(**inputs), mask_product(**inputs, backend="native"))


# ------------------------------------------------------------------------------------- machinery
def test_gradcheck():
    inputs = [x.requires_grad_() for x in make_inputs(1, 3, 4, 5)(torch.float64).values()]
    assert torch.autograd.gradcheck(kernels, inputs)


def test_refuses_a_second_derivative():
    inputs = [x.requires_grad_() for x in make_inputs(1, 3, 4, 5)(torch.float32).values()]
    gradients = torch.autograd.grad(kernels(*inputs).square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        gradients[0].square().sum().backward()


def test_opcheck():
    inputs = [x.to(DEVICE) for x in make_inputs(2, 7, 3, 8)(torch.float32).values()]
    torch.library.opcheck(MASKS.default, (*inputs, 1e-5, False))
    torch.library.opcheck(MASKS.default, ([*[x.requires_grad_() for x in inputs], 1e-5, True]))
    inputs = [x.detach() for x in inputs]
    y, *kept = MASKS(*inputs, 1e-5, True)
    torch.library.opcheck(
        torch.ops.segmenter_fast.mask_product_triton_backward.default,
        (torch.ones_like(y), *kept, *inputs[:3]),
    )


def test_compile_fullgraph():
    results = []
    compiled = torch.compile(mask_product, fullgraph=True, backend="aot_eager")
    for function in (mask_product, compiled):
        inputs = make_inputs(2, 7, 3, 8)(torch.float32)
        leaves = {name: x.to(DEVICE).requires_grad_() for name, x in inputs.items()}
        masks = function(**leaves, backend="triton")
        results.append((masks.detach(), *torch.autograd.grad(masks.sum(), [*leaves.values()])))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_strided_inputs():
    """The decoder passes two slices of one tensor; other strides give the same numbers."""
    x = make_inputs(2, 25, 3, 24)(torch.float32)["patches"]
    weight, bias, upstream = torch.rand(4), torch.rand(4), torch.randn(2, 21, 4)
    results = []
    for layout in (Tensor.contiguous, lambda x: x, lambda x: x.mT.contiguous().mT):
        leaf = x.clone().requires_grad_()
        masks = kernels(layout(leaf[:, :-4]), layout(leaf[:, -4:]), weight, bias)
        for gradient in (upstream, upstream.mT.contiguous().mT):
            results.append(
                (masks.detach(), *torch.autograd.grad(masks, leaf, gradient, retain_graph=True))
            )
    for result in results[1:]:
        assert_close("masks", result[0], results[0][0], results[0][0].double())
        assert_close("gradient", result[1], results[0][1], results[0][1].double())


def test_empty():
    for batch, n in ((0, 5), (2, 0)):
        inputs = [x.requires_grad_() for x in make_inputs(2, 5, 3, 8)(torch.float32).values()]
        patches, classes = inputs[0][:batch, :n], inputs[1][:batch]
        masks = kernels(patches, classes, *inputs[2:])
        assert masks.shape == (batch, n, 3)
        assert all((x == 0).all() for x in torch.autograd.grad(masks.sum(), inputs))


@pytest.mark.parametrize("candidate", range(3))
def test_every_configuration(candidate):
    with _triton.use_candidate(candidate):
        assert_matches(kernels, definition, make_inputs(1, 67, 19, 70, True), torch.float32)


def test_launches_are_recorded():
    """What the compile report relies on; of many classes, blocks of them on the second axis."""
    with _triton.Recorder(90) as recorder:
        for n_cls in (19, 300):
            inputs = make_inputs(2, 7, n_cls, 8)(torch.bfloat16)
            leaves = [x.requires_grad_() for x in inputs.values()]
            MASKS(*leaves, 1e-5, True)[0].sum().backward()
    names = [launch.kernel.name for launch in recorder.launches]
    assert names == ["mask", "mask_gradient", "product", "product"] * 2
    assert [recorder.launches[i].grid for i in (0, 4)] == [(2, 1), (2, 3)]


def test_rejects_bad_input():
    good = make_inputs(1, 2, 3, 8)(torch.float32)
    halves = good | {"classes": good["classes"].half()}
    whole = good | {"patches": good["patches"].long()}
    for inputs, error, text in (
        (halves, TypeError, r"float32 or float64, got torch.float32 and torch.float16"),
        (whole, TypeError, r"got torch.int64 and torch.float32"),
    ):
        with pytest.raises(error, match=text):
            kernels(**inputs)
    for change, text in (
        ({"patches": good["patches"][0]}, r"classes \(B, K, D\), got \(2, 8\)"),
        ({"weight": torch.ones(4)}, r"weight and bias \(3,\) for 3 classes, got \(4,\)"),
    ):
        with pytest.raises(ValueError, match=text):
            mask_product(**(good | change), backend="triton")
    with pytest.raises(RuntimeError, match="with_gradient=True"):
        MASKS(*[x.to(DEVICE).requires_grad_() for x in good.values()], 1e-5, False)
