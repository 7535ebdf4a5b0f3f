"""A linear layer added to the stream of tokens in Triton, held to float64."""

import pytest
import torch
from checks import assert_matches
from linear_cases import (
    NOTHING,
    PRODUCT,
    assert_same,
    count_products,
    force,
    leaves_of,
    on,
    with_gradients,
)
from test_linear_residual import make_inputs
from triton_cases import DEVICE, dtypes, on_device

from segmenter_fast.ops import _triton, linear_residual_triton
from segmenter_fast.ops.linear_residual import linear_residual, linear_residual_reference

pytestmark = on_device

LINEAR = torch.ops.segmenter_fast.linear_residual_triton
NAMES = ("v", "weight", "bias", "x")
# batch, tokens, channels, width
SHAPES = [(1, 1, 1, 1), (3, 25, 40, 33), (2, 35, 100, 130)]

each_choice = pytest.mark.parametrize("choice", [PRODUCT, NOTHING], ids=["fused", "apart"])


def by_name(**inputs):
    return LINEAR(*inputs.values())


def held_to_reference(shape, dtype, spikes=False, scale=True):
    """The oracle, but for the factors, to which no gradient flows."""
    make = make_inputs(*shape, spikes=spikes, scale=scale)
    factors = make(dtype)["scale"]

    def kernels(**inputs):
        return by_name(**on(DEVICE, inputs | {"scale": factors})).cpu()

    def reference(**inputs):
        return linear_residual_reference(**inputs, scale=factors)

    def inputs(of):
        return {name: t for name, t in make(of).items() if name != "scale"}

    assert_matches(kernels, reference, inputs, dtype)


@each_choice
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [False, True])
def test_matches_reference(shape, scale, choice, monkeypatch):
    force(monkeypatch, linear_residual_triton, choice)
    made = count_products(monkeypatch, linear_residual_triton)
    held_to_reference(shape, torch.float32, True, scale)
    assert made == [False] * choice.product


@dtypes
@pytest.mark.parametrize("candidate", range(2))
def test_every_dtype_and_configuration(dtype, candidate, monkeypatch):
    force(monkeypatch, linear_residual_triton, PRODUCT)
    with _triton.use_candidate(candidate):
        held_to_reference((2, 35, 72, 66), dtype, True)


def test_what_is_fused_by_default(monkeypatch):
    made = count_products(monkeypatch, linear_residual_triton)
    held_to_reference((1, 2, 16, 16), torch.bfloat16)
    held_to_reference((1, 2, 16, 16), torch.float32)
    assert made == [False], "16 bits only: cuBLAS multiplies float32"


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_keeps_the_stream(stream):
    inputs = make_inputs(2, 9, 24, 20)(torch.float32)
    expected = with_gradients(linear_residual_reference, inputs, NAMES)
    inputs["x"] = inputs["x"].to(stream)
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = with_gradients(linear_residual, inputs, NAMES, backend="triton")
    assert ours[0].dtype == stream
    assert [g.dtype for g in ours[1:]] == [*[torch.float32] * 3, stream]
    assert_same([t.float().cpu() for t in ours], expected, rtol=0.05, atol=0.1)


def test_runs_agree_to_the_bit(monkeypatch):
    force(monkeypatch, linear_residual_triton, PRODUCT)
    runs = [with_gradients(by_name, make_inputs(2, 40, 40, 33)(torch.float32), NAMES) for _ in "12"]
    assert_same(*runs, rtol=0, atol=0)


# ------------------------------------------------------------------------------------- machinery
@each_choice
def test_gradcheck(choice, monkeypatch):
    force(monkeypatch, linear_residual_triton, choice)
    own = leaves_of(make_inputs(2, 2, 3, 2)(torch.float64), NAMES)
    scale = own.pop("scale").double()
    assert torch.autograd.gradcheck(lambda *x: LINEAR(*x, scale), [*own.values()])


def test_refuses_a_second_derivative():
    own = leaves_of(make_inputs(1, 2, 3, 2)(torch.float32), NAMES)
    gradient = torch.autograd.grad(by_name(**own).square().sum(), own["v"], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        gradient.square().sum().backward()


def test_opcheck():
    own = leaves_of(make_inputs(2, 3, 8, 5)(torch.float32), NAMES)
    torch.library.opcheck(LINEAR.default, tuple(own.values()))
    torch.library.opcheck(LINEAR.default, (*[own[name] for name in NAMES], None))
    v, weight, _, x = (own[name].detach() for name in NAMES)
    torch.library.opcheck(
        torch.ops.segmenter_fast.linear_residual_triton_backward.default,
        (torch.ones_like(x), v, weight, own["scale"]),
    )


def test_compile_fullgraph():
    inputs = make_inputs(2, 3, 8, 5)(torch.float32)
    compiled = torch.compile(linear_residual, fullgraph=True, backend="aot_eager")
    runs = [
        with_gradients(function, inputs, NAMES, backend="triton")
        for function in (linear_residual, compiled)
    ]
    assert_same(*runs)


@each_choice
def test_strided_inputs(choice, monkeypatch):
    force(monkeypatch, linear_residual_triton, choice)
    inputs = make_inputs(2, 9, 24, 20)(torch.float32)
    expected = with_gradients(by_name, inputs, NAMES)

    def elsewhere(**own):
        return by_name(**(own | {n: own[n].mT.contiguous().mT for n in ("v", "weight", "x")}))

    assert_same(with_gradients(elsewhere, inputs, NAMES), expected)


@each_choice
def test_empty(choice, monkeypatch):
    force(monkeypatch, linear_residual_triton, choice)
    for batch, n in ((2, 0), (0, 3)):
        inputs = make_inputs(batch, n, 8, 5)(torch.float32)
        y, *gradients = with_gradients(by_name, inputs, NAMES)
        assert y.shape == (batch, n, 5)
        assert all((gradient == 0).all() for gradient in gradients)


def test_rejects_bad_input():
    inputs = on(DEVICE, make_inputs(1, 2, 4, 3)(torch.float32))
    for change, text in (
        ({"v": inputs["v"].half()}, "one floating-point dtype, got torch.float16, torch.float32"),
        ({"x": inputs["x"].half()}, "x must be torch.float32 as v, .* got torch.float16"),
    ):
        with pytest.raises(TypeError, match=text):
            by_name(**(inputs | change))
