"""Probabilities of upsampled patch logits: the compiled kernel against interpolate and softmax.

Registered operators are called by name, or the module itself, so that nothing can stand in for the
kernel.
"""

import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checks import assert_close, assert_matches
from dense_cases import (
    GOOD,
    HALF,
    STRIDED_LAYOUTS,
    bad_geometry,
    noise,
    plain_logits,
    shapes,
    strided_as,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from segmenter_fast import _C
from segmenter_fast.backend import BackendError
from segmenter_fast.ops import upsample_probabilities as module
from segmenter_fast.ops.upsample_probabilities import (
    upsample_probabilities,
    upsample_probabilities_reference,
)

GUARD = 64
SIMD_LEVELS = _C.build_info()["simd_levels"]
# PyTorch's kernels for plain x86-64 compute the source index with two roundings instead of one.
FUSED = platform.machine() not in {"x86_64", "AMD64"} or (
    torch.backends.cpu.get_cpu_capability() in {"AVX2", "AVX512"}
)

both = pytest.mark.parametrize("top1", [False, True], ids=["all", "top1"])


def operator(logits: Tensor, size, crop=None, top1=False) -> Tensor:
    ops = torch.ops.segmenter_fast
    op = ops.upsample_top1 if top1 else ops.upsample_probabilities
    return op(logits, size, crop or (0, 0, *size))


def plain(logits: Tensor, size, crop=None, top1=False) -> Tensor:
    """The definition, written apart from the library."""
    p = plain_logits(logits, size, crop).softmax(dim=1)
    return p.amax(dim=1) if top1 else p


def native(logits: Tensor, size, crop=None, top1=False, threads=1) -> Tensor:
    """The module's own function on memory with guards around it, to catch stray writes."""
    batch, n_cls = logits.shape[:2]
    crop = crop or (0, 0, *size)
    shape = (batch, *crop[2:]) if top1 else (batch, n_cls, *crop[2:])
    n = math.prod(shape)
    memory = torch.full((n + 2 * GUARD,), -7.0, dtype=logits.dtype)
    out = memory[GUARD : GUARD + n]
    where = (logits.shape, logits.stride(), size, crop, threads)
    upsampling = _C.Upsampling(logits.data_ptr(), str(logits.dtype).split(".")[1], *where)
    _C.upsample_probabilities(upsampling, out.data_ptr(), top1)
    assert (memory[:GUARD] == -7).all() and (memory[GUARD + n :] == -7).all(), "stray write"
    return out.view(shape)


def assert_accurate(result: Tensor, logits: Tensor, size, crop=None, top1=False) -> None:
    """Hold every single probability to the definition in float64, relative to itself.

    A logit's error is a probability's relative error: a handful of roundings of logits of size R,
    and the source coordinate's rounding, up to max(h, w), times the step between neighbours.
    """
    exact = plain(logits.double(), size, crop, top1)
    info = torch.finfo(result.dtype)
    finite = logits.double()
    largest = finite.abs().max().item()
    steps = [
        finite.diff(dim=dim).abs().max().item() * finite.shape[dim]
        for dim in (2, 3)
        if finite.shape[dim] > 1
    ]
    relative = info.eps * (32 + 8 * (largest + sum(steps)))
    error = (result.double() - exact).abs()
    bound = relative * exact + 2 * info.tiny
    assert result.shape == exact.shape
    assert bool((error <= bound).all()), f"{(error / bound).max().item():.1f} times the bound"


# ------------------------------------------------------------------------------------- reference
@shapes
@both
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_matches_reference(case, dtype, top1):
    shape, size, crop = case
    assert_matches(
        lambda logits: operator(logits, size, crop, top1),
        lambda logits: plain(logits, size, crop, top1),
        lambda dtype: {"logits": noise(shape, dtype)},
        dtype,
    )


@shapes
@both
def test_matches_reference_in_float64(case, top1):
    shape, size, crop = case
    logits = noise(shape, torch.float64).requires_grad_()
    result, expected = (f(logits, size, crop, top1) for f in (operator, plain))
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-15)
    upstream = noise(expected.shape, torch.float64, seed=4)
    (ours,), (theirs,) = (torch.autograd.grad(x, logits, upstream) for x in (result, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@shapes
@both
def test_backends(case, top1):
    shape, size, crop = case
    logits = noise(shape)
    by_default = upsample_probabilities(logits, size, crop, top1=top1)
    by_name = upsample_probabilities(logits, size, crop, top1=top1, backend="native")
    assert torch.equal(by_default, operator(logits, size, crop, top1))
    assert torch.equal(by_name, by_default)
    reference = upsample_probabilities(logits, size, crop, top1=top1, backend="reference")
    assert torch.equal(reference, plain(logits, size, crop, top1))
    whole = crop or (0, 0, *size)
    assert torch.equal(reference, upsample_probabilities_reference(logits, size, whole, top1))


# Several tiles of columns; more than one run of rows per cell; clamped edges; an output so large
# that it is written past the caches, in rows that begin at any address.
@both
@pytest.mark.parametrize(
    ("shape", "size", "crop"),
    [
        ((1, 3000, 2, 9), (7, 150), None),
        ((2, 1100, 3, 30), (11, 333), (1, 2, 9, 330)),
        ((1, 4, 2, 3), (150, 49), None),
        ((1, 150, 5, 4), (211, 173), (10, 1, 201, 171)),
        ((1, 65535, 2, 2), (3, 5), None),
    ],
    ids=["tiles", "tiles of a crop", "tall cells", "large", "65535 classes"],
)
def test_sizes_that_take_other_paths(shape, size, crop, top1):
    logits = noise(shape)
    assert_accurate(native(logits, size, crop, top1, threads=2), logits, size, crop, top1)


# ------------------------------------------------------------------------------------- machinery
def test_gradcheck():
    logits = noise((2, 3, 2, 3), torch.float64).requires_grad_()
    crop = (1, 0, 4, 5)
    assert torch.autograd.gradcheck(lambda x: operator(x, (6, 5), crop), (logits,))
    assert torch.autograd.gradcheck(lambda x: operator(x, (6, 5), crop, top1=True), (logits,))
    assert torch.autograd.gradgradcheck(lambda x: operator(x, (6, 5), crop), (logits,))


def test_top1_has_no_second_derivative():
    logits = noise((1, 3, 2, 3)).requires_grad_()
    top1 = operator(logits, (6, 5), top1=True)
    (gradient,) = torch.autograd.grad(top1.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="upsample_top1_backward"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    logits = noise((2, 5, 3, 4), dtype)
    where = ([13, 17], [1, 2, 5, 7])
    ops = torch.ops.segmenter_fast
    for op in (ops.upsample_probabilities.default, ops.upsample_top1.default):
        torch.library.opcheck(op, (logits.clone().requires_grad_(), *where))
    torch.library.opcheck(ops.upsample_top1_backward.default, (noise((2, 5, 7)), logits, *where))
    gradient = noise((2, 5, 5, 7)).requires_grad_()
    torch.library.opcheck(ops.upsample_adjoint.default, (gradient, *where, [2, 5, 3, 4]))


def test_compile_fullgraph():
    def function(logits: Tensor) -> tuple[Tensor, Tensor]:
        return (
            upsample_probabilities(logits, (13, 17), (1, 2, 11, 12)),
            upsample_probabilities(logits, (13, 17), top1=True),
        )

    def results(run, logits):
        p, top1 = run(logits)
        (p.square().sum() + top1.sum()).backward()
        return p, top1, logits.grad

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    logits = noise((2, 5, 3, 4))
    for ours, theirs in zip(
        results(compiled, logits.clone().requires_grad_()),
        results(function, logits.clone().requires_grad_()),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@both
def test_export(top1):
    class Head(torch.nn.Module):
        def forward(self, logits: Tensor) -> Tensor:
            return upsample_probabilities(logits, (13, 17), top1=top1)

    logits = noise((2, 5, 3, 4))
    exported = torch.export.export(Head(), (logits,)).module()
    assert torch.equal(exported(logits), operator(logits, (13, 17), top1=top1))


@both
def test_autocast_computes_in_float32(top1):
    logits = noise((1, 5, 3, 4), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        result = operator(logits, (13, 17), top1=top1)
    assert result.dtype == torch.float32
    assert torch.equal(result, operator(logits.float(), (13, 17), top1=top1))


@both
@pytest.mark.parametrize("layout", STRIDED_LAYOUTS)
def test_strided_inputs(layout, top1):
    strided = strided_as(layout, noise((2, 11, 5, 6)))
    assert not strided.is_contiguous()
    dense = strided.contiguous()
    assert torch.equal(native(strided, (31, 37), top1=top1), native(dense, (31, 37), top1=top1))
    gradients = []
    for leaf in (strided.detach().requires_grad_(), dense.requires_grad_()):
        p = operator(leaf, (31, 37), top1=top1)
        gradients += torch.autograd.grad(p.square().sum(), leaf)
    assert torch.equal(*gradients)


@both
def test_empty(top1):
    logits = torch.empty(0, 5, 3, 4, requires_grad=True)
    result = operator(logits, (8, 9), top1=top1)
    assert result.shape == ((0, 8, 9) if top1 else (0, 5, 8, 9))
    result.sum().backward()
    assert logits.grad.shape == logits.shape
    assert native(torch.zeros(1, 5, 3, 4), (8, 9), (2, 3, 0, 4), top1).numel() == 0


@bad_geometry
@both
def test_rejects_bad_input(logits, size, crop, error, text, top1):
    with pytest.raises(error, match=text):
        upsample_probabilities(logits, size, crop, top1=top1)


def test_rejects_a_null_pointer():
    where = (GOOD.shape, GOOD.stride(), (8, 8), (0, 0, 8, 8), 1)
    upsampling = _C.Upsampling(GOOD.data_ptr(), "float32", *where)
    with pytest.raises(ValueError, match="expected a pointer to probabilities, got null"):
        _C.upsample_probabilities(upsampling, 0, True)


def test_refuses_a_backend_without_kernels():
    with pytest.raises(BackendError, match="triton"):
        upsample_probabilities(GOOD, (8, 8), backend="triton")


# ------------------------------------------------------------------------------------- properties
def test_probabilities_sum_to_one():
    p = native(noise((2, 150, 3, 4)), (37, 41)).double()
    assert (p.sum(dim=1) - 1).abs().max() < 1e-6
    assert p.min() >= 0
    assert (native(noise((1, 1, 3, 4)), (37, 41)) == 1).all(), "one class is certain"


def test_top1_is_the_largest_of_all():
    logits = noise((2, 37, 5, 4))
    top1, p = (native(logits, (61, 43), (2, 3, 57, 39), top1) for top1 in (True, False))
    torch.testing.assert_close(top1, p.amax(dim=1), rtol=1e-6, atol=0)


@both
def test_a_shift_common_to_the_classes_of_a_patch_changes_nothing(top1):
    # Whole numbers, so that the shift itself rounds nothing.
    logits = (8 * noise((1, 9, 3, 4))).round() / 8
    shift = torch.randint(-1000, 1000, (1, 1, 3, 4), generator=torch.Generator().manual_seed(2))
    shifted = native(logits + shift, (29, 31), top1=top1)
    assert torch.equal(shifted, native(logits, (29, 31), top1=top1))


@both
def test_a_crop_is_a_part_of_the_whole(top1):
    logits = noise((2, 11, 6, 8))
    whole = native(logits, (90, 130), top1=top1)
    for top, left, height, width in [(0, 0, 90, 130), (3, 5, 40, 41), (89, 129, 1, 1)]:
        part = native(logits, (90, 130), (top, left, height, width), top1)
        expected = whole[..., top : top + height, left : left + width]
        torch.testing.assert_close(part, expected, rtol=5e-6, atol=1e-12)


@both
@pytest.mark.parametrize("shape", [(3, 50, 7, 9), (1, 5, 1, 1), (5, 9, 4, 3)], ids=str)
def test_threads_do_not_change_a_bit(shape, top1):
    logits = noise(shape)
    logits[0, 0, 0, 0] = -1e4  # one patch on the textbook path
    alone = native(logits, (111, 93), top1=top1)
    for threads in (2, 3, 7):
        for _ in range(3):
            assert torch.equal(native(logits, (111, 93), top1=top1, threads=threads), alone)


def test_the_operator_uses_pytorchs_number_of_threads():
    logits, before = noise((2, 50, 7, 9)), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            leaf = logits.clone().requires_grad_()
            p, top1 = operator(leaf, (40, 50)), operator(leaf, (40, 50), top1=True)
            results.append((p.detach(), top1.detach()))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@both
@pytest.mark.parametrize("level", SIMD_LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_simd_level(level, dtype, top1, monkeypatch):
    monkeypatch.setenv("SEGMENTER_FAST_SIMD", level)
    try:
        assert _C.simd_level() == level
    except RuntimeError as error:
        pytest.skip(str(error))
    wide = noise((1, 23, 8, 9), dtype)
    wide[0, :, 2:4, 5] *= 100
    for logits, size in [
        (noise((1, 150, 8, 9), dtype), (128, 99)),
        (noise((2, 23, 9, 9), dtype), (7, 4)),
        (wide, (50, 140)),
    ]:
        assert_accurate(native(logits, size, top1=top1), logits, size, top1=top1)
    # Past the caches, in rows of any alignment.
    logits = noise((1, 300, 3, 3), dtype)
    assert_accurate(native(logits, (131, 109), top1=top1), logits, (131, 109), top1=top1)
    broken = noise((1, 23, 8, 9), dtype)
    broken[0, 5, 2, 3], broken[0, 8, 5, 5], broken[0, 2, 7, 8] = math.nan, math.inf, -math.inf
    result, expected = native(broken, (64, 72), top1=top1), plain(broken, (64, 72), top1=top1)
    torch.testing.assert_close(result, expected, equal_nan=True, rtol=1e-5, atol=1e-12)
    assert torch.equal(result == 0, expected == 0)


# ------------------------------------------------------------------------ logits that are far apart
@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [20.0, 69.0, 70.0, 200.0, 623.0, 625.0, 3000.0])
def test_certain_patches(scale, dtype, top1):
    """Neighbours certain of different classes; at 69.3 and 624 nats the textbook path begins."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 7, (1, 5, 6), generator=generator)
    logits = torch.nn.functional.one_hot(labels, 7).movedim(3, 1).to(dtype) * scale
    for size in [(50, 66), (5, 6), (4, 13)]:
        assert_accurate(native(logits, size, top1=top1), logits, size, top1=top1)


@both
def test_a_masked_class(top1):
    logits = noise((1, 9, 4, 5))
    logits[:, 3] = -1e30
    result = native(logits, (41, 52), top1=top1)
    without = native(logits[:, [0, 1, 2, 4, 5, 6, 7, 8]], (41, 52), top1=top1)
    if not top1:
        assert (result[:, 3] == 0).all()
        result = result[:, [0, 1, 2, 4, 5, 6, 7, 8]]
    torch.testing.assert_close(result, without, rtol=2e-6, atol=1e-12)


@both
def test_logits_close_to_overflow(top1):
    largest = torch.finfo(torch.float32).max
    logits = noise((1, 9, 4, 4)) * (largest / 40)
    logits[:, 4] = largest
    logits[:, 2, 1:3] = -largest
    for size in [(64, 64), (4, 4)]:
        assert torch.equal(native(logits, size, top1=top1), plain(logits, size, top1=top1))


GRIDS = [
    ((4, 4), (64, 64)),
    ((5, 7), (83, 41)),
    ((6, 6), (6, 6)),
    ((6, 5), (6, 50)),
    ((12, 10), (5, 4)),
    ((1, 1), (70, 45)),
    ((7, 1), (1, 1)),
]


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("grid", "size"), GRIDS, ids=str)
@pytest.mark.parametrize(
    "values", [["nan"], ["inf"], ["-inf"], ["nan", "inf", "-inf"]], ids=lambda v: "+".join(v)
)
def test_special_values_are_pytorchs(grid, size, values, dtype, top1):
    if not FUSED and size in ((83, 41), (5, 4)):
        pytest.skip("PyTorch's kernels for this CPU round the source index differently")
    for n_cls, share in [(1, 0.3), (19, 0.002), (19, 0.02), (19, 0.5), (3, 1.0)]:
        generator = torch.Generator().manual_seed(n_cls)
        logits = noise((2, n_cls, *grid), dtype)
        for value in values:
            hit = torch.rand(logits.shape, generator=generator) < share
            logits[hit] = float(value)
        result, expected = (f(logits, size, None, top1) for f in (native, plain))
        torch.testing.assert_close(result, expected, equal_nan=True, rtol=1e-5, atol=1e-12)
        assert torch.equal(result == 0, expected == 0)


# ----------------------------------------------------------------------------- the gradient of top1
def test_gradient_of_top1_by_strips(monkeypatch):
    logits = noise((2, 6, 5, 4), torch.float64).requires_grad_()
    crop = (2, 3, 57, 39)
    upstream = noise((2, 57, 39), torch.float64, seed=7)
    (expected,) = torch.autograd.grad(plain(logits, (61, 43), crop, True), logits, upstream)
    for strip_elements in (1, 6 * 39 * 10, 1 << 30):
        monkeypatch.setattr(module, "STRIP_ELEMENTS", strip_elements)
        top1 = operator(logits, (61, 43), crop, top1=True)
        (gradient,) = torch.autograd.grad(top1, logits, upstream)
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def test_gradient_of_top1_is_shared_by_ties():
    # Whole numbers and weights that are quarters: nothing is rounded before the softmax.
    logits = noise((1, 6, 3, 4), torch.float64).round()
    logits[:, 4] = logits[:, 1] = logits[:, 1] + 8
    logits.requires_grad_()
    gradients = [
        torch.autograd.grad(f(logits, (6, 8), None, True).sum(), logits)[0]
        for f in (operator, plain)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    assert torch.equal(gradients[0][:, 1], gradients[0][:, 4])


@both
def test_gradient_sums_to_zero_over_classes(top1):
    logits = noise((2, 9, 3, 4)).requires_grad_()
    p = operator(logits, (29, 31), top1=top1)
    p.backward(noise(p.shape, seed=5))
    assert logits.grad.sum(dim=1).abs().max() < 2e-6 * logits.grad.abs().max()


MEMORY_SCRIPT = """
import resource, sys, torch
from segmenter_fast.ops.upsample_probabilities import upsample_probabilities
torch.set_num_threads(2)

def peak():  # KiB on Linux, bytes on macOS
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

logits = torch.randn(1, 150, 128, 256)
small = torch.randn(1, 150, 4, 4, requires_grad=True)
upsample_probabilities(small, (16, 16), top1=True).sum().backward()
before = peak()
top1 = upsample_probabilities(logits, (2048, 4096), top1=True)
forward = peak() - before
logits = logits[:, :, :32, :32].clone().requires_grad_()
upsample_probabilities(logits, (512, 768), top1=True).sum().backward()
print(forward, peak() - before)
"""


def test_memory_of_top1_is_bounded():
    """4096 x 2048 in the 32 MiB of the answer and a few more; all logits would be 4.7 GiB.

    The gradient at 768 x 512: all logits would be 225 MiB, several times over.
    """
    pytest.importorskip("resource")
    root = Path(__file__).resolve().parent.parent
    paths = [str(root), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    forward, both_ways = map(float, done.stdout.split())
    assert forward < 32 + 16, f"{forward:.0f} MiB for the forward"
    assert both_ways < 160, f"{both_ways:.0f} MiB with the gradient"


# ------------------------------------------------------------------------------------- fuzz
def fuzz(data: st.DataObject) -> None:
    """One random problem: shape, size, crop, strides, dtype, threads, kind of logits."""

    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    shape = (draw(1, 3), draw(1, 40), draw(1, 9), draw(1, 9))
    size = (draw(1, 60), draw(1, 60))
    top, left = draw(0, size[0] - 1), draw(0, size[1] - 1)
    crop = (top, left, draw(1, size[0] - top), draw(1, size[1] - left))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    generator = torch.Generator().manual_seed(draw(0, 10**6))
    logits = torch.randn(shape, dtype=dtype, generator=generator)
    kind = data.draw(st.sampled_from(["noise", "trained", "flat", "offset", "wide", "some wide"]))
    if kind == "trained":
        logits = 8 * logits
    elif kind == "flat":
        logits = logits.round()
    elif kind == "offset":
        logits = logits + 500 * torch.randn(1, dtype=dtype, generator=generator)
    elif kind == "wide":
        logits = 300 * logits
    elif kind == "some wide":
        hit = torch.rand(shape, generator=generator) < 0.02
        logits = torch.where(hit, 300 * logits, logits)
    layout = data.draw(st.sampled_from(["dense", *STRIDED_LAYOUTS]))
    shown = logits if layout == "dense" else strided_as(layout, logits)
    for top1 in (False, True):
        result = native(shown, size, crop, top1, threads=draw(1, 3))
        assert_accurate(result, shown, size, crop, top1)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_problem(data):
    fuzz(data)


@pytest.mark.nightly
@settings(max_examples=3000, deadline=None, database=None)
@given(data=st.data())
def test_many_problems(data):
    fuzz(data)


# ------------------------------------------------------------------------------------- the oracle
def test_oracle_catches_one_wrong_probability():
    logits, size = noise((1, 9, 3, 4)), (29, 31)
    p = native(logits, size)
    assert_accurate(p, logits, size)
    p[0, -1, -1, -1] *= 1 + 1e-4
    with pytest.raises(AssertionError, match="times the bound"):
        assert_accurate(p, logits, size)
    with pytest.raises(AssertionError, match="maximum error"):
        plain_p = plain(logits, size)
        assert_close("p", plain_p * 1.00001, plain_p, plain(logits.double(), size))
