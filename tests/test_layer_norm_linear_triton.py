"""A linear layer of normed tokens in Triton, forward and backward, held to float64."""

import pytest
import torch
from checks import assert_matches
from linear_cases import (
    CHOICES,
    EVERYTHING,
    assert_same,
    count_products,
    force,
    leaves_of,
    on,
    with_gradients,
)
from test_layer_norm_linear import make_inputs
from triton_cases import DEVICE, dtypes, on_device

from segmenter_fast.ops import _triton, layer_norm_linear_triton
from segmenter_fast.ops._layer_norm_triton import MOST_CHANNELS
from segmenter_fast.ops.layer_norm_linear import layer_norm_linear, layer_norm_linear_reference

pytestmark = on_device

LINEAR = torch.ops.segmenter_fast.layer_norm_linear_triton
NAMES = ("x", "gamma", "beta", "weight", "bias")
# batch, tokens, channels, outputs: in blocks of 32 to 128, less than one and a little more
SHAPES = [(1, 1, 2, 1), (2, 35, 40, 33), (1, 70, 100, 130)]

each_choice = pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)


def kernels(**inputs):
    """The registered operator, on the device under test; the result comes back to the CPU."""
    return LINEAR(*on(DEVICE, inputs).values()).cpu()


@each_choice
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, choice, monkeypatch):
    force(monkeypatch, layer_norm_linear_triton, choice)
    made = count_products(monkeypatch, layer_norm_linear_triton)
    inputs = make_inputs(*shape, spikes=True)
    assert_matches(kernels, layer_norm_linear_reference, inputs, torch.float32)
    assert made == [choice.norm] * choice.product


@dtypes
@pytest.mark.parametrize("candidate", range(2))
def test_every_dtype_and_configuration(dtype, candidate, monkeypatch):
    force(monkeypatch, layer_norm_linear_triton, EVERYTHING)
    with _triton.use_candidate(candidate):
        assert_matches(
            kernels, layer_norm_linear_reference, make_inputs(1, 70, 72, 66, True), dtype
        )


@pytest.mark.parametrize(("width", "fused"), [(384, [True]), (400, [])])
def test_what_is_fused_by_default(width, fused, monkeypatch):
    made = count_products(monkeypatch, layer_norm_linear_triton)
    inputs = make_inputs(1, 2, width, 16)
    assert_matches(kernels, layer_norm_linear_reference, inputs, torch.bfloat16)
    assert made == fused
    kernels(**inputs(torch.float32))
    assert made == fused, "cuBLAS multiplies float32"


def test_a_large_mean_does_not_cancel(monkeypatch):
    force(monkeypatch, layer_norm_linear_triton, EVERYTHING)
    inputs = make_inputs(1, 5, 100, 7, offset=3000.0)(torch.float32)
    exact = {name: x if name == "eps" else x.double() for name, x in inputs.items()}
    expected = layer_norm_linear_reference(**exact).float()
    torch.testing.assert_close(kernels(**inputs), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(stream, monkeypatch):
    """A stream in float32 goes straight into the norm; parameters keep their own gradients."""
    inputs = make_inputs(1, 9, 24, 20)(torch.float32)
    inputs["x"] = inputs["x"].to(stream)
    expected = with_gradients(
        layer_norm_linear_reference, on("cpu", inputs | {"x": inputs["x"].float()}), NAMES
    )
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = with_gradients(layer_norm_linear, inputs, NAMES, backend="triton")
    assert ours[0].dtype == torch.bfloat16
    assert [g.dtype for g in ours[1:]] == [stream, *[torch.float32] * 4]
    assert_same([t.float().cpu() for t in ours], expected, rtol=0.05, atol=0.1)


def test_runs_agree_to_the_bit(monkeypatch):
    force(monkeypatch, layer_norm_linear_triton, EVERYTHING)
    inputs = make_inputs(1, 70, 40, 33)(torch.float32)
    runs = [with_gradients(by_name, inputs, NAMES) for _ in range(2)]
    assert_same(*runs, rtol=0, atol=0)


def by_name(**inputs):
    return LINEAR(*inputs.values())


# ------------------------------------------------------------------------------------- machinery
@each_choice
def test_gradcheck(choice, monkeypatch):
    force(monkeypatch, layer_norm_linear_triton, choice)
    own = leaves_of(make_inputs(1, 2, 3, 2)(torch.float64), NAMES)
    # A product with a norm weighs blocks of channels in float32.
    assert torch.autograd.gradcheck(lambda *x: LINEAR(*x, 1e-5), [own[n] for n in NAMES], atol=1e-4)


def test_refuses_a_second_derivative():
    own = leaves_of(make_inputs(1, 2, 3, 2)(torch.float32), NAMES)
    y = LINEAR(*own.values())
    gradient = torch.autograd.grad(y.square().sum(), own["x"], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        gradient.square().sum().backward()


def test_opcheck():
    own = leaves_of(make_inputs(1, 3, 8, 5)(torch.float32), NAMES)
    torch.library.opcheck(LINEAR.default, tuple(own.values()))
    x, gamma, beta, weight, _ = (own[name].detach() for name in NAMES)
    torch.library.opcheck(
        torch.ops.segmenter_fast.layer_norm_linear_triton_backward.default,
        (torch.ones(1, 3, 5, device=DEVICE), x, gamma, beta, weight, 1e-5),
    )


def test_compile_fullgraph():
    inputs = make_inputs(1, 3, 8, 5)(torch.float32)
    compiled = torch.compile(layer_norm_linear, fullgraph=True, backend="aot_eager")
    runs = [
        with_gradients(function, inputs, NAMES, backend="triton")
        for function in (layer_norm_linear, compiled)
    ]
    assert_same(*runs)


@each_choice
def test_strided_inputs(choice, monkeypatch):
    force(monkeypatch, layer_norm_linear_triton, choice)
    inputs = make_inputs(2, 9, 24, 20)(torch.float32)
    inputs["x"] = inputs["x"][:, ::2].contiguous()
    expected = with_gradients(by_name, inputs, NAMES)

    def elsewhere(**own):
        strided = {n: own[n].mT.contiguous().mT for n in ("x", "weight")}
        return LINEAR(*(own | strided).values())

    assert_same(with_gradients(elsewhere, inputs, NAMES), expected)


@each_choice
def test_empty(choice, monkeypatch):
    force(monkeypatch, layer_norm_linear_triton, choice)
    inputs = make_inputs(2, 0, 8, 5)(torch.float32)
    y, *gradients = with_gradients(by_name, inputs, NAMES)
    assert y.shape == (2, 0, 5)
    assert all((gradient == 0).all() for gradient in gradients)


def test_rejects_bad_input():
    inputs = on(DEVICE, make_inputs(1, 2, 4, 3)(torch.float32))
    for change, text in (
        ({"x": inputs["x"].double()}, "for torch.float64 tokens .* got torch.float32"),
        ({"x": inputs["x"].long()}, "for torch.int64 tokens"),
        ({"bias": inputs["bias"].half()}, "torch.float32, torch.float32, torch.float16"),
    ):
        with pytest.raises(TypeError, match=text):
            by_name(**(inputs | change))
    wide = make_inputs(1, 1, MOST_CHANNELS + 1, 1)(torch.float32)
    with pytest.raises(ValueError, match=f"1 to {MOST_CHANNELS} channels"):
        kernels(**wide)
