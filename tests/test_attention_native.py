"""The CPU's attention kernels against the definition, at every SIMD level of this processor.

The registered operators are called by name, or the module itself, so that nothing can stand in for
the kernels.
"""

import copy
import math
import re
from pathlib import Path

import pytest
import torch
from checks import assert_matches, with_spikes
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from segmenter_fast import _C
from segmenter_fast.ops.attention import attention, attention_reference

GUARD = 64
DTYPES = [torch.float32, torch.bfloat16]
WIDTHS = [32, 64, 128]
# B, N, heads: one key, fewer than a vector, a strip of queries and one more, several blocks of keys
# and of queries, none of them whole.
SHAPES = [(2, 1, 1), (1, 5, 3), (1, 64, 1), (2, 65, 1), (1, 129, 2), (1, 197, 3), (1, 400, 1)]


def _has(level: str) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEGMENTER_FAST_SIMD", level)
        try:
            return _C.simd_level() == level
        except RuntimeError:
            return False


LEVELS = [
    pytest.param(level, marks=pytest.mark.skipif(not _has(level), reason="this CPU lacks it"))
    for level in _C.build_info()["simd_levels"]
]
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
all_widths = pytest.mark.parametrize("width", WIDTHS)


def operator(qkv: Tensor) -> Tensor:
    return torch.ops.segmenter_fast.attention(qkv, qkv.requires_grad)[0]


def make_inputs(shape, width, size=1.0, seed=0):
    """Standard normal, with queries and keys times `size`, and spikes at the ends."""
    batch, tokens, heads = shape

    def make(dtype):
        generator = torch.Generator().manual_seed(seed)
        qkv = torch.randn(batch, tokens, 3, heads, width, generator=generator)
        qkv[:, :, :2] *= size
        return {"qkv": with_spikes(qkv, size=1.0).to(dtype)}

    return make


def guarded(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(memory with guard words at both ends, the part between them)."""
    memory = torch.full((count + 2 * GUARD,), -7.0, dtype=dtype)
    return memory, memory[GUARD : GUARD + count]


def run(qkv: Tensor, upstream: Tensor, threads: int = 1) -> tuple[Tensor, Tensor]:
    """(values, gradient) from the module's own functions, with guard words around it all."""
    batch, n, _, heads, width = qkv.shape
    count = batch * n * heads * width
    sizes = (count, 2 * batch * n * heads, 3 * count)
    kinds = (qkv.dtype, torch.float32, qkv.dtype)
    memory = [guarded(*pair) for pair in zip(sizes, kinds, strict=True)]
    y, statistics, gradient = (part for _, part in memory)
    packed = (
        qkv.data_ptr(),
        str(qkv.dtype).removeprefix("torch."),
        (batch, n, heads, width),
        qkv.stride()[:4],
        width**-0.5,
    )
    _C.attention(
        *packed, out_ptr=y.data_ptr(), threads=threads, statistics_ptr=statistics.data_ptr()
    )
    _C.attention_gradient(
        *packed,
        out_ptr=y.data_ptr(),
        statistics_ptr=statistics.data_ptr(),
        upstream_ptr=upstream.data_ptr(),
        gradient_ptr=gradient.data_ptr(),
        threads=threads,
    )
    for whole, part in memory:
        ends = torch.cat([whole[:GUARD], whole[-GUARD:]])
        assert len(whole) == len(part) + 2 * GUARD and (ends == -7).all(), "stray write"
    return y.view(batch, n, heads * width), gradient.view(batch, n, 3, heads, width)


def case(shape, width, dtype, size=1.0) -> tuple[Tensor, Tensor]:
    """(qkv, upstream gradient)."""
    qkv = make_inputs(shape, width, size)(dtype)["qkv"]
    upstream = torch.randn(shape[0], shape[1], shape[2] * width).to(dtype)
    return qkv, upstream


def same_bits(a: Tensor, b: Tensor) -> bool:
    kind = torch.int32 if a.dtype == torch.float32 else torch.int16
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


# --------------------------------------------------------------------------- right results
@all_dtypes
@pytest.mark.parametrize("magnitude", [1e14, 1e16, 3e17])
def test_scores_far_below_zero(dtype, magnitude):
    """All of them: the largest is still the one that counts, forward and backward."""
    keys = -magnitude * (1 + 0.02 * torch.arange(40.0))
    qkv = torch.zeros(1, 40, 3, 1, 32)
    qkv[0, :, 0], qkv[0, :, 1] = magnitude, keys[:, None, None]
    qkv[0, :, 2] = torch.randn(40, 1, 32)
    qkv = qkv.to(dtype).requires_grad_()
    y = operator(qkv)
    torch.testing.assert_close(y, qkv[:, :1, 2].flatten(2).expand_as(y), rtol=0, atol=0)
    y.backward(torch.ones_like(y))
    expected = torch.zeros_like(qkv)
    expected[0, 0, 2] = 40
    torch.testing.assert_close(qkv.grad, expected, rtol=1e-2, atol=1e-9)


@all_dtypes
@pytest.mark.parametrize("value", [1e-6, 1e-12, 1e-18, 1e-22])
def test_small_values_behind_low_scores(dtype, value):
    """Scores near the bound below which no maximum is kept must not lose the values."""

    def make(dtype):
        generator = torch.Generator().manual_seed(0)
        qkv = torch.randn(1, 70, 3, 1, 64, generator=generator)
        qkv[:, :, 0] = 2.7 + 0.01 * qkv[:, :, 0]
        qkv[:, :, 1] = -2.7 + 0.01 * qkv[:, :, 1]
        qkv[:, :, 2] *= value
        return {"qkv": qkv.to(dtype)}

    assert_matches(operator, attention_reference, make, dtype, backward=value >= 1e-6)


@all_dtypes
@all_widths
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, width, dtype):
    assert_matches(operator, attention_reference, make_inputs(shape, width), dtype)


@all_dtypes
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", [(1, 65, 2), (1, 201, 1)], ids=str)
@all_widths
def test_every_simd_level(shape, width, level, dtype, monkeypatch):
    monkeypatch.setenv("SEGMENTER_FAST_SIMD", level)
    for size in (1.0, 6.0):
        assert_matches(operator, attention_reference, make_inputs(shape, width, size), dtype)


@all_dtypes
@all_widths
@pytest.mark.parametrize("size", [4.0, 30.0])
@pytest.mark.parametrize("shape", [(1, 1, 2), (1, 40, 3), (1, 197, 2)], ids=str)
def test_large_scores(shape, width, dtype, size):
    """Scores of which the largest is subtracted, up to softmax being sure of one key."""
    assert_matches(operator, attention_reference, make_inputs(shape, width, size), dtype)


@all_dtypes
def test_both_ways_of_softmax_agree(dtype):
    """One query far longer than all others sends its block the careful way, and its block alone."""
    qkv, upstream = case((1, 400, 1), 64, dtype)
    longer = qkv.clone()
    longer[0, 7, 0] *= 1000
    upstream[0, 7] = 0
    eps = torch.finfo(dtype).eps
    others = torch.arange(400) != 7
    y, gradient = run(qkv, upstream)
    same_y, same_gradient = run(longer, upstream)
    same_bits_in = [
        same_bits(y[0, part], same_y[0, part]) for part in (slice(8, 130), slice(210, 400))
    ]
    assert same_bits_in == [False, True]
    torch.testing.assert_close(y[0, others], same_y[0, others], rtol=8 * eps, atol=4 * eps)
    torch.testing.assert_close(
        gradient[0, others], same_gradient[0, others], rtol=16 * eps, atol=16 * eps
    )


@all_dtypes
def test_huge_values_do_not_overflow(dtype):
    """Sums of unnormalised weights times values would, where finite averages do not."""

    def make(dtype):
        inputs = make_inputs((1, 70, 1), 32, size=2.0)(dtype)
        inputs["qkv"][:, :, 2] *= 1e30
        return inputs

    assert_matches(operator, attention_reference, make, dtype, backward=False)
    # With the upstream gradient of such a loss, which keeps every product finite.
    qkv, upstream = make(dtype)["qkv"], torch.randn(1, 70, 32).to(dtype) * 1e-30
    _, gradient = run(qkv, upstream)
    exact = qkv.double().requires_grad_()
    (ref,) = torch.autograd.grad(attention_reference(exact), exact, upstream.double())
    assert gradient.isfinite().all()
    for part in range(2):
        error = (gradient[:, :, part] - ref[:, :, part]).abs().max()
        bound = 50 if dtype == torch.bfloat16 else 500
        assert error <= bound * torch.finfo(dtype).eps * ref[:, :, part].abs().max()


def test_many_tokens():
    """Long sums, over a few hundred blocks of keys, of a few rows computed directly."""
    n, width = 65_536, 32
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, n, 3, 1, width, generator=generator).bfloat16()
    y = operator(qkv)
    q, k, v = qkv[0, :, :, 0].float().unbind(1)
    rows = torch.tensor([0, 1, 191, 192, n // 2, n - 1])
    expected = (q[rows] @ k.T * width**-0.5).softmax(-1) @ v
    # Weights are rounded one by one, and their errors average out; the result is rounded once.
    torch.testing.assert_close(y[0, rows].float(), expected, rtol=2**-7, atol=2e-4)


def test_memory_grows_with_the_tokens():
    """N x N weights in float32 would take 1 GiB; forward and backward make do with a tenth."""
    if not Path("/proc/self/clear_refs").exists() or _C.build_info()["sanitizers"]:
        pytest.skip("needs Linux's account of memory, without what sanitizers add")

    def mib(field: str) -> float:
        return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

    qkv = torch.randn(1, 16_384, 3, 1, 32, requires_grad=True)
    Path("/proc/self/clear_refs").write_text("5")
    before = mib("VmRSS")
    (gradient,) = torch.autograd.grad(operator(qkv).square().sum(), qkv)
    assert mib("VmHWM") - before < 100
    assert gradient.isfinite().all()


def test_rows_are_convex_combinations():
    """Values that are all alike come through unchanged, to the last bit but a few."""
    qkv = torch.randn(2, 131, 3, 2, 32)
    qkv[:, :, 2] = 3.0
    torch.testing.assert_close(operator(qkv), torch.full((2, 131, 64), 3.0), rtol=1e-6, atol=0)
    assert torch.equal(operator(qkv.bfloat16()), torch.full((2, 131, 64), 3.0).bfloat16())


def test_gradients_of_softmax_cancel():
    """Adding one vector to all keys changes no probability: the keys' gradients sum to 0."""
    qkv = torch.randn(1, 300, 3, 2, 64, requires_grad=True)
    (gradient,) = torch.autograd.grad(operator(qkv), qkv, torch.randn(1, 300, 128))
    of_keys = gradient[0, :, 1]
    assert of_keys.sum(0).abs().max() <= 1e-5 * of_keys.abs().sum(0).max()


# --------------------------------------------------------------------------- the same results
@all_dtypes
@pytest.mark.parametrize("size", [1.0, 20.0])
@pytest.mark.parametrize("shape", [(1, 400, 1), (2, 197, 3)], ids=str)
def test_threads_change_no_bit(shape, size, dtype):
    inputs = case(shape, 64, dtype, size)
    first = run(*inputs)
    for threads in (1, 2, 3, 7):
        for a, b in zip(first, run(*inputs, threads=threads), strict=True):
            assert same_bits(a, b), f"{threads} threads"


@all_dtypes
def test_images_and_heads_are_independent(dtype):
    qkv, upstream = case((2, 70, 3), 32, dtype)
    y, gradient = run(qkv, upstream)
    one = run(qkv[1:, :, :, 1:2], upstream.unflatten(2, (3, 32))[1:, :, 1].contiguous())
    assert same_bits(y.unflatten(2, (3, 32))[1, :, 1], one[0][0])
    # How keys are divided depends on the number of heads: another order of the same sums.
    torch.testing.assert_close(gradient[1, :, :, 1], one[1][0, :, :, 0])


@all_dtypes
def test_strided_inputs(dtype):
    whole = torch.randn(2, 140, 3, 4, 128).to(dtype)
    layouts = [
        whole[:, ::2],
        whole[:, :70, :, 1:3, 32:64],
        whole.permute(1, 0, 2, 3, 4)[:70],
        whole.permute(0, 1, 3, 2, 4)[:, :70, :3].transpose(2, 3)[:, :, :, :3],
        whole[:, :70, :, :2, ::2],  # channels apart, which the operator copies
        whole[:1, :1].expand(2, 70, 3, 4, 128),
    ]
    for qkv in layouts:
        results = []
        for x in (qkv, qkv.contiguous()):
            leaf = x.detach().requires_grad_()
            y = operator(leaf)
            generator = torch.Generator().manual_seed(0)
            upstream = torch.randn(y.shape, generator=generator).to(dtype)
            results.append((y.detach(), *torch.autograd.grad(y, leaf, upstream)))
        for a, b in zip(*results, strict=True):
            assert a.shape == b.shape and same_bits(a, b), (qkv.shape, qkv.stride())


def test_strided_upstream_gradient():
    qkv = torch.randn(2, 9, 3, 2, 32, requires_grad=True)
    y = operator(qkv)
    upstream = torch.randn(64, 9, 2).permute(2, 1, 0)
    a, b = (
        torch.autograd.grad(y, qkv, u, retain_graph=True)[0] for u in (upstream, upstream.clone())
    )
    assert torch.equal(a, b)
    # That of a sum is expanded from one number.
    (of_sum,) = torch.autograd.grad(y.sum(), qkv, retain_graph=True)
    assert torch.equal(of_sum, torch.autograd.grad(y, qkv, torch.ones(y.shape))[0])


# --------------------------------------------------------------------------- what is no number
@all_dtypes
@pytest.mark.parametrize("part", [0, 1, 2], ids=["query", "key", "value"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_stays_none(part, bad, dtype):
    """NaN wherever the definition has it; infinity may make more of it."""
    qkv, upstream = case((1, 133, 2), 32, dtype)
    qkv[0, 130, part, 0, 5] = bad
    y, gradient = run(qkv, upstream)
    leaf = qkv.double().requires_grad_()
    expected = attention_reference(leaf)
    (expected_gradient,) = torch.autograd.grad(expected, leaf, upstream.double())
    for name, ours, ref in (("y", y, expected), ("gradient", gradient, expected_gradient)):
        missed = ref.isnan() & ours.isfinite()
        assert not missed.any(), f"{name}: {int(missed.sum())} numbers where there is none"
        if math.isnan(bad):
            assert torch.equal(ours.isnan(), ref.isnan()), name
    # The other head knows nothing of it.
    assert y.unflatten(2, (2, 32))[:, :, 1].isfinite().all()
    assert gradient[:, :, :, 1].isfinite().all()


@all_dtypes
def test_upstream_gradients_that_are_no_numbers(dtype):
    qkv, upstream = case((1, 70, 1), 64, dtype)
    upstream[0, 3, 7] = math.nan
    _, gradient = run(qkv, upstream)
    assert gradient[0, 3, 0].isnan().all() and gradient[0, :, 1].isnan().all()
    assert gradient[0, :, 2, 0, 7].isnan().all()
    rest = torch.arange(70) != 3
    assert gradient[0, rest, 0].isfinite().all() and gradient[0, :, 2, 0, 8:].isfinite().all()


def test_NaN_of_any_kind_stays_NaN():
    """Bits that arithmetic on exponents could make a number of."""
    bits = torch.tensor([0x7FC00001, 0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32)
    for nan in bits.view(torch.float32):
        qkv, upstream = case((1, 20, 1), 32, torch.float32)
        qkv[0, 3, 0, 0, 0] = nan
        y, gradient = run(qkv, upstream)
        assert y[0, 3].isnan().all() and gradient[0, 3, 0].isnan().all()
        assert gradient[0, :, 1:].isnan().all()


# --------------------------------------------------------------------------- PyTorch's machinery
@all_dtypes
def test_opcheck(dtype):
    qkv = torch.randn(2, 9, 3, 2, 32).to(dtype)
    forward, backward = (
        torch.ops.segmenter_fast.attention,
        torch.ops.segmenter_fast.attention_backward,
    )
    for x in (qkv, qkv.transpose(0, 1), torch.empty(0, 5, 3, 2, 32, dtype=dtype)):
        torch.library.opcheck(forward.default, (x, False))
        torch.library.opcheck(forward.default, (x.detach().requires_grad_(), True))
    y, statistics = forward(qkv, True)
    torch.library.opcheck(backward.default, (torch.ones_like(y), qkv, y, statistics))


@all_dtypes
def test_compile_fullgraph(dtype):
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    results = []
    for function in (attention, compiled):
        qkv = make_inputs((2, 7, 2), 32)(dtype)["qkv"].requires_grad_()
        y = function(qkv)
        results.append((y.detach(), *torch.autograd.grad(y.float().square().sum(), qkv)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_compile_dynamic_tokens():
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (7, 8, 30):
        qkv = torch.randn(1, n, 3, 2, 32, requires_grad=True)
        torch.testing.assert_close(compiled(qkv), attention(qkv))


def test_export():
    class Module(torch.nn.Module):
        def forward(self, qkv):
            return attention(qkv)

    qkv = torch.randn(1, 9, 3, 2, 32)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(Module(), (qkv,), dynamic_shapes=({1: tokens},))
    assert any("segmenter_fast.attention" in str(node.target) for node in program.graph.nodes)
    longer = torch.randn(1, 21, 3, 2, 32)
    assert torch.equal(program.module()(longer), attention(longer))


def test_autocast():
    qkv = torch.randn(2, 20, 3, 2, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = attention(qkv)
    assert y.dtype == torch.bfloat16
    (gradient,) = torch.autograd.grad(y.float().square().sum(), qkv)
    assert gradient.dtype == torch.float32
    assert torch.equal(y, attention(qkv.bfloat16()))
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(qkv.double()).dtype == torch.float64


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    qkv = torch.randn(2, 20, 3, 2, 64, requires_grad=True)
    results = [
        torch.autograd.grad(y.square().sum(), qkv)[0]
        for y in (attention(qkv), checkpoint(attention, qkv, use_reentrant=False))
    ]
    assert torch.equal(*results)
    if reentrant:
        checkpoint(attention, qkv, use_reentrant=True).square().sum().backward()
        assert torch.equal(qkv.grad, results[0])


def test_copies_of_modules_and_no_grad():
    from segmenter_fast.blocks import Attention

    module = Attention(64, 2, dropout=0.0)
    x = torch.randn(1, 10, 64)
    with torch.inference_mode():
        expected = module(x)
    assert torch.equal(copy.deepcopy(module)(x).detach(), expected)


def test_public_function_takes_the_kernel_where_it_can(monkeypatch):
    """And PyTorch's fused attention elsewhere; never by accident."""
    called = []
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(*arguments, **options):
        called.append(True)
        return real(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)

    def fused(qkv, **options):
        called.clear()
        attention(qkv, **options)
        return bool(called)

    ours, other = torch.randn(1, 4, 3, 2, 64), torch.randn(1, 4, 3, 2, 48)
    for backend in ("auto", "native"):
        assert not fused(ours, backend=backend)
        assert not fused(ours.bfloat16(), backend=backend)
        assert fused(other, backend=backend) and fused(ours.double(), backend=backend)
        assert fused(ours.half(), backend=backend)
        assert fused(ours, dropout_p=0.1, backend=backend)
    assert not fused(other, backend="reference")


# --------------------------------------------------------------------------- edges and mistakes
@all_dtypes
def test_empty(dtype):
    for shape in [(0, 5, 3, 2, 32), (2, 0, 3, 2, 32), (2, 5, 3, 0, 32)]:
        qkv = torch.empty(shape, dtype=dtype, requires_grad=True)
        y = attention(qkv)
        assert y.shape == (shape[0], shape[1], shape[3] * shape[4]) and y.dtype == dtype
        (gradient,) = torch.autograd.grad(y.sum(), qkv)
        assert gradient.shape == shape


def test_second_derivative_is_refused():
    qkv = torch.randn(1, 4, 3, 1, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(attention(qkv).square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated twice.*'reference'"):
        gradient.sum().backward()


def test_rejects_bad_input():
    op = torch.ops.segmenter_fast.attention
    good = torch.randn(1, 4, 3, 2, 64)
    with pytest.raises(TypeError, match=r"float32 or bfloat16, got torch\.float64"):
        op(good.double(), False)
    with pytest.raises(ValueError, match="32, 64 or 128 channels, got 48"):
        op(good[..., :48], False)
    with pytest.raises(ValueError, match=r"\(B, N, 3, heads, d\), got \(1, 4, 3, 128\)"):
        op(good.flatten(3), False)
    with pytest.raises(RuntimeError, match="with_gradient=True"):
        op(good.requires_grad_(), False)
    for function in (_C.attention, _C.attention_gradient):
        extra = {} if function is _C.attention else {"upstream_ptr": 0, "gradient_ptr": 0}
        common = {"strides": (0, 0, 0, 0), "scale": 1.0, "out_ptr": 0, "threads": 1}
        common |= extra | {"statistics_ptr": 0}
        with pytest.raises(ValueError, match='one of "bfloat16", "float32", got "float16"'):
            function(0, "float16", (1, 1, 1, 64), **common)
        with pytest.raises(ValueError, match="32, 64 or 128 channels per head, got 40"):
            function(0, "float32", (1, 1, 1, 40), **common)
        with pytest.raises(ValueError, match="must not be negative"):
            function(0, "float32", (1, -1, 1, 64), **common)
