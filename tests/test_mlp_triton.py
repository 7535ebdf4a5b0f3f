"""The feed-forward branch in Triton, forward and backward, held to float64."""

import pytest
import torch
import torch.nn.functional as F
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
from test_mlp import make_inputs
from torch import Tensor
from triton_cases import DEVICE, dtypes, on_device

from segmenter_fast.ops import _triton, mlp_triton
from segmenter_fast.ops._layer_norm_triton import MOST_CHANNELS
from segmenter_fast.ops._linear_triton import GELU, GELU_GRADIENT, linear
from segmenter_fast.ops.mlp import mlp, mlp_reference

pytestmark = on_device

MLP = torch.ops.segmenter_fast.mlp_triton
NAMES = ("x", "gamma", "beta", "w1", "b1", "w2", "b2")
# batch, tokens, channels, hidden channels
SHAPES = [(1, 1, 2, 1), (3, 12, 40, 70), (2, 35, 66, 130)]

each_choice = pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)


def by_name(**inputs):
    return MLP(*inputs.values(), any(t.requires_grad for t in inputs.values() if is_tensor(t)))[0]


def is_tensor(value):
    return isinstance(value, Tensor)


def held_to_reference(shape, dtype, scale=True):
    """The oracle, but for the factors, to which no gradient flows."""
    make = make_inputs(*shape, spikes=True, scale=scale)
    factors = make(dtype)["scale"]

    def kernels(**inputs):
        return by_name(**on(DEVICE, inputs | {"scale": factors})).cpu()

    def reference(**inputs):
        return mlp_reference(**inputs, scale=factors)

    def inputs(of):
        return {name: t for name, t in make(of).items() if name != "scale"}

    assert_matches(kernels, reference, inputs, dtype)


@each_choice
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, choice, monkeypatch):
    force(monkeypatch, mlp_triton, choice)
    made = count_products(monkeypatch, mlp_triton)
    held_to_reference(shape, torch.float32)
    # Forward twice, and once for the gradient.
    assert made == [choice.norm, False, False] * choice.product


def test_without_factors(monkeypatch):
    for choice in CHOICES.values():
        force(monkeypatch, mlp_triton, choice)
        held_to_reference((2, 5, 12, 9), torch.float32, scale=False)


@dtypes
@pytest.mark.parametrize("candidate", range(2))
def test_every_dtype_and_configuration(dtype, candidate, monkeypatch):
    force(monkeypatch, mlp_triton, EVERYTHING)
    with _triton.use_candidate(candidate):
        held_to_reference((1, 70, 36, 66), dtype)


@pytest.mark.parametrize(("width", "norm"), [(384, True), (400, False)])
def test_what_is_fused_by_default(width, norm, monkeypatch):
    made = count_products(monkeypatch, mlp_triton)
    held_to_reference((1, 2, width, 16), torch.bfloat16)
    held_to_reference((1, 2, width, 16), torch.float32)
    assert made == [norm, False, False], "16 bits only: cuBLAS multiplies float32"


def gelu_of(z: Tensor) -> tuple[Tensor, Tensor]:
    """GELU and its derivative by the kernel, from a product with the identity."""
    one = torch.eye(len(z), dtype=z.dtype, device=DEVICE)
    z = z.to(DEVICE)
    h, kept, _ = linear(one, z.mT.contiguous(), after=GELU, keep=True)
    assert torch.equal(kept, z)
    slope, again, _ = linear(one, torch.ones_like(z.mT), after=GELU_GRADIENT, extra=z)
    assert torch.equal(again, h)
    return h.cpu(), slope.cpu()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_gelu_is_exact(dtype):
    z = torch.linspace(-12, 12, 24 * 40).view(24, 40).to(dtype)
    exact = z.double().requires_grad_()
    expected = F.gelu(exact)
    slope = torch.autograd.grad(expected.sum(), exact)[0]
    eps = torch.finfo(dtype).eps
    for ours, theirs in zip(gelu_of(z), (expected.detach(), slope), strict=True):
        assert ((ours - theirs).abs() <= 4 * eps * theirs.abs() + 4 * eps).all()


def test_gelu_in_bfloat16_is_a_polynomial_within_rounding():
    z = torch.linspace(-12, 12, 24 * 40).view(24, 40).bfloat16()
    exact = z.double().requires_grad_()
    expected = F.gelu(exact)
    slope = torch.autograd.grad(expected.sum(), exact)[0]
    half_an_ulp = torch.finfo(z.dtype).eps / 2
    h, derivative = gelu_of(z)
    assert ((h - expected).abs() <= half_an_ulp * expected.abs() + 5e-5).all()
    assert ((derivative - slope).abs() <= half_an_ulp * slope.abs() + 1e-4).all()
    far = z.abs() > 5
    assert torch.equal(h[far], z[far].clamp(min=0)), "nothing is left of large negative numbers"


def test_gelu_of_special_values():
    special = torch.tensor([[float("inf"), -float("inf"), float("nan"), 60000.0, -0.0]])
    for dtype in (torch.float32, torch.bfloat16):
        h, *_ = linear(
            torch.ones(1, 1, dtype=dtype, device=DEVICE),
            special.mT.to(dtype).to(DEVICE).contiguous(),
            after=GELU,
            keep=True,
        )
        h = h.cpu().float()[0]
        assert h[0] == float("inf") and h[2].isnan() and abs(h[3] / 60000 - 1) < 0.01
        assert h[1] == 0 or h[1].isnan()  # PyTorch: NaN, of 0 times infinity
        assert h[4] == 0


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_keeps_the_stream(stream):
    inputs = make_inputs(2, 9, 24, 40)(torch.float32)
    inputs["x"] = inputs["x"].to(stream)
    expected = with_gradients(mlp_reference, inputs | {"x": inputs["x"].float()}, NAMES)
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = with_gradients(mlp, inputs, NAMES, backend="triton")
    assert ours[0].dtype == stream
    assert [g.dtype for g in ours[1:]] == [stream, *[torch.float32] * 6]
    assert_same([t.float().cpu() for t in ours], expected, rtol=0.05, atol=0.2)


def test_what_is_kept():
    """z for the gradient, and nothing without one."""
    inputs = on(DEVICE, make_inputs(1, 7, 16, 24)(torch.bfloat16))
    y, z = MLP(*inputs.values(), False)
    assert z.numel() == 0
    y_kept, z = MLP(*inputs.values(), True)
    assert torch.equal(y, y_kept)
    assert z.shape == (7, 24) and z.dtype == torch.bfloat16


def test_runs_agree_to_the_bit(monkeypatch):
    force(monkeypatch, mlp_triton, EVERYTHING)
    inputs = make_inputs(1, 70, 40, 33)(torch.float32)
    runs = [with_gradients(by_name, inputs, NAMES) for _ in range(2)]
    assert_same(*runs, rtol=0, atol=0)


# ------------------------------------------------------------------------------------- machinery
@each_choice
def test_gradcheck(choice, monkeypatch):
    force(monkeypatch, mlp_triton, choice)
    own = leaves_of(make_inputs(2, 1, 3, 2)(torch.float64), NAMES)
    scale = own["scale"].double()
    # A product with a norm weighs blocks of channels in float32.
    assert torch.autograd.gradcheck(
        lambda *x: MLP(*x, 1e-5, scale, True)[0], [own[name] for name in NAMES], atol=1e-4
    )


def test_refuses_a_second_derivative():
    own = leaves_of(make_inputs(1, 2, 3, 2)(torch.float32), NAMES)
    gradient = torch.autograd.grad(by_name(**own).square().sum(), own["x"], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        gradient.square().sum().backward()


def test_opcheck():
    own = leaves_of(make_inputs(2, 3, 8, 5)(torch.float32), NAMES)
    torch.library.opcheck(MLP.default, (*own.values(), True))
    plain = {name: t.detach() if is_tensor(t) else t for name, t in own.items()}
    torch.library.opcheck(MLP.default, (*plain.values(), False))
    y, z = MLP(*plain.values(), True)
    names = ("gamma", "beta", "w1", "w2", "eps", "scale")
    torch.library.opcheck(
        torch.ops.segmenter_fast.mlp_triton_backward.default,
        (torch.ones_like(y), plain["x"], z, *[plain[name] for name in names]),
    )


def test_compile_fullgraph():
    inputs = make_inputs(2, 3, 8, 5)(torch.float32)
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    runs = [with_gradients(f, inputs, NAMES, backend="triton") for f in (mlp, compiled)]
    assert_same(*runs)


@each_choice
def test_strided_inputs(choice, monkeypatch):
    force(monkeypatch, mlp_triton, choice)
    inputs = make_inputs(2, 9, 24, 20)(torch.float32)
    expected = with_gradients(by_name, inputs, NAMES)

    def elsewhere(**own):
        return by_name(**(own | {n: own[n].mT.contiguous().mT for n in ("x", "w1", "w2")}))

    assert_same(with_gradients(elsewhere, inputs, NAMES), expected)


@each_choice
def test_empty(choice, monkeypatch):
    force(monkeypatch, mlp_triton, choice)
    for batch, n in ((2, 0), (0, 3)):
        inputs = make_inputs(batch, n, 8, 5)(torch.float32)
        y, *gradients = with_gradients(by_name, inputs, NAMES)
        assert y.shape == (batch, n, 8)
        assert all((gradient == 0).all() for gradient in gradients)


def test_launches_are_recorded():
    """Everything fused at 192 channels in 16 bits; the gradient writes the norm out again."""
    with _triton.Recorder(90) as recorder:
        own = make_inputs(1, 130, 192, 768)(torch.bfloat16)
        own = {n: t.requires_grad_() if n in NAMES else t for n, t in own.items()}
        by_name(**own).sum().backward()
    names = [launch.kernel.name for launch in recorder.launches]
    assert names == ["linear", "linear", "linear", "layer_norm", "layer_norm_gradient"]
    config = recorder.launches[0].config
    blocks = -(-130 // config["BLOCK_M"]) * -(-768 // config["BLOCK_N"])
    assert recorder.launches[0].grid == (blocks,)


def test_rejects_bad_input():
    inputs = on(DEVICE, make_inputs(1, 2, 4, 3)(torch.float32))
    for change, text in (
        ({"w2": inputs["w2"].half()}, "one floating-point dtype, got torch.float32, torch.float32"),
        ({"x": inputs["x"].half()}, "x must be torch.float32 as w1, .* got torch.float16"),
    ):
        with pytest.raises(TypeError, match=text):
            by_name(**(inputs | change))
    wide = on(DEVICE, make_inputs(1, 1, MOST_CHANNELS + 1, 1)(torch.float32))
    with pytest.raises(ValueError, match=f"1 to {MOST_CHANNELS} channels"):
        by_name(**wide)
    with pytest.raises(RuntimeError, match="with_gradient=True"):
        MLP(*leaves_of(inputs, NAMES).values(), False)
