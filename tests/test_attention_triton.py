"""Attention in Triton, forward and backward, held to float64."""

import math

import pytest
import torch
from checks import assert_matches, with_spikes
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from triton_cases import DEVICE, dtypes, on_device

from segmenter_fast.ops import _triton
from segmenter_fast.ops._attention_triton import COLUMNS_LEFT, FORWARD
from segmenter_fast.ops.attention import attention, attention_reference, attention_weights
from segmenter_fast.ops.attention_triton import MOST_CHANNELS

pytestmark = on_device

ATTENTION = torch.ops.segmenter_fast.attention_triton

# batch, tokens, heads, channels: less than a block, a little more than one, and none whole
SHAPES = {
    "one token": (1, 1, 1, 64),
    "two images, odd channels": (2, 7, 3, 8),
    "a block of rows and one more": (1, 33, 2, 64),
    "a tail of rows and of columns": (1, 67, 1, 48),
    "narrow heads": (1, 50, 2, 32),
    "wide heads": (1, 33, 1, 128),
    "the widest head": (1, 5, 1, MOST_CHANNELS),
}


def make_inputs(shape, spikes=False):
    batch, tokens, heads, width = shape

    def make(dtype):
        generator = torch.Generator().manual_seed(0)
        qkv = torch.randn(batch, tokens, 3, heads, width, generator=generator)
        return {"qkv": (with_spikes(qkv, size=2.0) if spikes else qkv).to(dtype)}

    return make


def kernels(qkv: Tensor, dropout_p: float = 0.0, seed: int = 0) -> Tensor:
    """The registered operator, on the device under test; the result comes back to the CPU."""
    seeds = torch.tensor([seed], device=DEVICE)
    return ATTENTION(qkv.to(DEVICE), seeds, dropout_p, qkv.requires_grad)[0].cpu()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("spikes", [False, True])
def test_matches_reference(shape, spikes):
    # Few numbers of long sums: PyTorch's own error is small by chance with some BLAS libraries.
    k = 5 if shape[-1] == MOST_CHANNELS else None
    assert_matches(kernels, attention_reference, make_inputs(shape, spikes), torch.float32, k)


@dtypes
def test_every_dtype(dtype):
    assert_matches(kernels, attention_reference, make_inputs((1, 150, 1, 64), True), dtype)


@pytest.mark.parametrize("candidate", range(2))
@dtypes
def test_every_configuration(candidate, dtype):
    with _triton.use_candidate(candidate):
        assert_matches(kernels, attention_reference, make_inputs((1, 81, 1, 64), True), dtype)


def test_sizes_of_vit():
    """1,025 tokens, as of 512 x 512 pixels in patches of 16 x 16; forward."""
    inputs = make_inputs((1, 1025, 1, 64), True)
    assert_matches(kernels, attention_reference, inputs, torch.bfloat16, backward=False)


def test_float64_is_as_exact_as_its_input():
    qkv = make_inputs((1, 9, 2, 8))(torch.float64)["qkv"]
    torch.testing.assert_close(kernels(qkv), attention_reference(qkv), rtol=1e-9, atol=1e-12)


def test_one_token_more_costs_little(monkeypatch):
    """The multiplications that the interpreter is asked for, beside those that are needed."""
    if DEVICE != "cpu":
        pytest.skip("only the interpreter can be asked what it multiplies")
    from triton.runtime.interpreter import InterpreterBuilder

    done = []
    multiply = InterpreterBuilder.create_dot

    def counting(self, a, b, *others):
        done.append(math.prod(a.data.shape) * b.data.shape[1])
        return multiply(self, a, b, *others)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counting)
    for n in (1025, 1174):
        qkv = torch.randn(1, n, 3, 1, 16).bfloat16().requires_grad_()
        y = kernels(qkv)
        needed = 2 * n * n * 16
        assert needed <= sum(done) < 1.05 * needed, f"forward, {n} tokens"
        done.clear()
        y.sum().backward()
        # Three products for the queries, and four for keys and values.
        assert 3.5 * needed <= sum(done) < 1.05 * 3.5 * needed, f"backward, {n} tokens"
        done.clear()


# ------------------------------------------------------------------------------------- properties
def test_values_that_are_all_alike_come_through():
    qkv = torch.randn(2, 19, 3, 2, 16)
    qkv[:, :, 2] = 3.0
    torch.testing.assert_close(kernels(qkv), torch.full((2, 19, 32), 3.0))


def test_permuting_keys_changes_nothing():
    qkv = torch.randn(1, 37, 3, 1, 8, dtype=torch.float64)
    both = qkv.clone()
    both[:, :, 1:] = qkv[:, torch.randperm(37), 1:]
    torch.testing.assert_close(kernels(both), kernels(qkv))


def test_large_scores_do_not_overflow():
    """2^s would, by far; and weights then are 0 and 1."""
    qkv = make_inputs((1, 40, 1, 16))(torch.float32)["qkv"]
    qkv[:, :, :2] *= 100
    leaves = [qkv.clone().requires_grad_() for _ in range(2)]
    ours, theirs = kernels(leaves[0]), attention_reference(leaves[1])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    gradients = [
        torch.autograd.grad(y.sum(), x)[0] for y, x in zip((ours, theirs), leaves, strict=True)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-2)


def test_very_negative_scores_leave_no_trace_in_the_tail():
    """Keys beyond the last must not be told from weights that would overflow."""
    qkv = torch.randn(1, 17, 3, 1, 16)
    qkv[:, :, 0], qkv[:, :, 1] = 60.0, -60.0
    qkv.requires_grad_()
    y = kernels(qkv)
    torch.testing.assert_close(
        y, qkv.detach()[:, :, 2].mean(1, keepdim=True).expand(1, 17, 1, 16)[:, :, 0]
    )
    assert torch.autograd.grad(y.sum(), qkv)[0].isfinite().all()


def test_special_values_as_in_the_reference():
    """An infinite key takes all weight, or none; NaN reaches every query of its head."""
    qkv = make_inputs((1, 20, 2, 8))(torch.float32)["qkv"]
    qkv[0, 3, 1, 0, 0] = float("nan")
    qkv[0, 19, 2, 1, 2] = float("inf")
    torch.testing.assert_close(kernels(qkv), attention_reference(qkv), equal_nan=True)


def test_runs_agree_to_the_bit():
    runs = []
    for _ in range(2):
        qkv = make_inputs((1, 70, 2, 16))(torch.float32)["qkv"].requires_grad_()
        y = kernels(qkv, 0.2, seed=3)
        runs.append((y.detach(), torch.autograd.grad(y.square().sum(), qkv)[0]))
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


def test_agrees_with_native():
    qkv = make_inputs((2, 21, 2, 32))(torch.float32)["qkv"]
    ours = attention(qkv.to(DEVICE), backend="triton").cpu()
    torch.testing.assert_close(ours, attention(qkv, backend="native"))


# ------------------------------------------------------------------------------------- dropout
def dropout_mask(shape: tuple[int, int, int], p: float, seed: int) -> Tensor:
    """(B, H, N, N) of 0 and 1 / (1 - p): equal weights, and one value per key, tell."""
    batch, n, heads = shape
    qkv = torch.zeros(batch, n, 3, heads, max(16, n))
    qkv[:, :, 2, :, :n] = torch.eye(n)[:, None] * n
    return kernels(qkv, p, seed).view(batch, n, heads, -1)[..., :n].transpose(1, 2)


def test_dropout_is_fair():
    p = 0.3
    mask = dropout_mask((2, 64, 3), p, seed=5)
    dropped = mask == 0
    torch.testing.assert_close(mask[~dropped], torch.full_like(mask[~dropped], 1 / (1 - p)))
    # 24,576 draws: four standard deviations are 0.012; of one query's 64 keys, 0.23.
    assert abs(dropped.double().mean().item() - p) < 0.012
    assert (dropped.double().mean(-1) - p).abs().max() < 0.3
    # Images, heads, queries and keys have masks of their own: halves of independent ones agree.
    agreement = p * p + (1 - p) ** 2
    for one, other in (
        (dropped[0], dropped[1]),
        (dropped[:, 0], dropped[:, 1]),
        (dropped[..., :-1, :], dropped[..., 1:, :]),
        (dropped[..., :-1], dropped[..., 1:]),
        (dropped, dropped.transpose(-1, -2)),
        (dropped, dropout_mask((2, 64, 3), p, seed=6) == 0),
    ):
        assert abs((one == other).double().mean().item() - agreement) < 0.03


def test_dropout_and_its_gradient():
    shape, p = (2, 37, 2, 16), 0.25
    mask = dropout_mask((2, 37, 2), p, seed=9)

    def with_mask(qkv: Tensor) -> Tensor:
        weights = attention_weights(qkv) * mask.to(qkv)
        return (weights @ qkv[:, :, 2].transpose(1, 2)).transpose(1, 2).flatten(2)

    for dtype in (torch.float32, torch.bfloat16):
        # The blocks differ between the two types; the mask does not.
        assert_matches(lambda qkv: kernels(qkv, p, 9), with_mask, make_inputs(shape, True), dtype)


def test_dropout_follows_torch_manual_seed():
    qkv = make_inputs((1, 20, 1, 16))(torch.float32)["qkv"].to(DEVICE).requires_grad_()

    def run(function):
        torch.manual_seed(4)
        y = function(qkv)
        return y.detach(), torch.autograd.grad(y.square().sum(), qkv)[0]

    def plain(x):
        return attention(x, dropout_p=0.5, backend="triton")

    expected = run(plain)
    for one, other in zip(run(plain), expected, strict=True):
        assert torch.equal(one, other)
    # Activation checkpointing runs it twice, and must draw the same mask.
    for one, other in zip(
        run(lambda x: checkpoint(plain, x, use_reentrant=False)), expected, strict=True
    ):
        assert torch.equal(one, other)
    assert not torch.equal(plain(qkv), expected[0])


# ------------------------------------------------------------------------------------- machinery
def test_gradcheck():
    qkv = torch.randn(1, 3, 3, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(kernels, (qkv,))
    assert torch.autograd.gradcheck(lambda x: kernels(x, 0.4, 1), (qkv,))


def test_refuses_a_second_derivative():
    qkv = torch.randn(1, 3, 3, 1, 4, requires_grad=True)
    gradient = torch.autograd.grad(kernels(qkv).square().sum(), qkv, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        gradient.square().sum().backward()


def test_opcheck():
    qkv = torch.randn(1, 5, 3, 2, 8, device=DEVICE)
    seed = torch.tensor([1], device=DEVICE)
    torch.library.opcheck(ATTENTION.default, (qkv, seed, 0.0, False))
    torch.library.opcheck(ATTENTION.default, (qkv.clone().requires_grad_(), seed, 0.5, True))
    y, e = ATTENTION(qkv, seed, 0.5, True)
    torch.library.opcheck(
        torch.ops.segmenter_fast.attention_triton_backward.default,
        (torch.ones_like(y), qkv, seed, y, e, 0.5),
    )


def test_compile_fullgraph():
    qkv = make_inputs((2, 7, 2, 8))(torch.float32)["qkv"].to(DEVICE).requires_grad_()
    results = []
    for function in (attention, torch.compile(attention, fullgraph=True, backend="aot_eager")):
        y = function(qkv, backend="triton")
        results.append((y.detach(), torch.autograd.grad(y.square().sum(), qkv)[0]))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_strided_inputs():
    """Whatever the order in memory: the numbers are the same to the bit."""
    qkv = make_inputs((2, 20, 3, 16))(torch.float32)["qkv"]
    upstream = torch.randn(2, 20, 48)
    results = []
    for order in ((0, 1, 2, 3, 4), (2, 0, 3, 1, 4), (4, 3, 2, 1, 0)):
        back = [order.index(i) for i in range(5)]
        leaf = qkv.permute(order).contiguous().permute(back).requires_grad_()
        y = kernels(leaf)
        results += [(y, torch.autograd.grad(y, leaf, upstream)[0])]
    y = kernels(leaf)
    results += [(y, torch.autograd.grad(y, leaf, upstream.mT.contiguous().mT)[0])]
    for y, gradient in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(gradient, results[0][1])


def test_empty():
    for batch, n, heads in ((0, 5, 2), (2, 0, 2), (2, 5, 0)):
        qkv = torch.empty(batch, n, 3, heads, 8, requires_grad=True)
        y = kernels(qkv)
        assert y.shape == (batch, n, heads * 8)
        assert torch.autograd.grad(y.sum(), qkv)[0].shape == qkv.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_autocast(dtype):
    qkv = make_inputs((1, 9, 2, 8))(dtype)["qkv"].to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = attention(qkv, backend="triton")
    assert y.dtype == (torch.float64 if dtype == torch.float64 else torch.bfloat16)


def test_nothing_is_kept_without_a_gradient():
    qkv = make_inputs((1, 20, 1, 16))(torch.float32)["qkv"].to(DEVICE)
    seed = torch.tensor([0], device=DEVICE)
    y, e = ATTENTION(qkv, seed, 0.0, False)
    assert e.numel() == 0
    y_kept, e = ATTENTION(qkv, seed, 0.0, True)
    assert torch.equal(y, y_kept)
    scores = (qkv[:, :, 0, 0] @ qkv[:, :, 1, 0].mT) / 4 * math.log2(math.e)
    torch.testing.assert_close(e[:, 0], torch.log2(torch.exp2(scores).sum(-1)))


def test_launches_are_recorded():
    """A program per block of rows of each head; the second kernel waits for the first's delta."""
    with _triton.Recorder(90) as recorder:
        qkv = torch.randn(2, 130, 3, 3, 64).bfloat16().requires_grad_()
        ATTENTION(qkv, torch.tensor([0]), 0.0, True)[0].sum().backward()
    names = [launch.kernel.name for launch in recorder.launches]
    assert names == ["attention", "attention_of_queries", "attention_of_keys"]
    for launch in recorder.launches:
        assert launch.grid == (2 * 3 * -(-130 // launch.config["ROWS"]),)


def test_tails_are_shorter_than_blocks():
    for (half, _), kernel in FORWARD.items():
        for configs in kernel.configs.values():
            for config in configs:
                assert config["COLUMNS"] % COLUMNS_LEFT.value == 0
                assert config["ROWS_LEFT"] < config["ROWS"] or not half


def test_rejects_bad_input():
    good = torch.randn(1, 4, 3, 2, 8, device=DEVICE)
    for bad, error, text in (
        (good.long(), TypeError, "float32 or float64, got torch.int64"),
        (good[0], ValueError, r"qkv must be \(B, N, 3, heads, d\), got \(4, 3, 2, 8\)"),
        (
            torch.randn(1, 2, 3, 1, MOST_CHANNELS + 1, device=DEVICE),
            ValueError,
            f"up to {MOST_CHANNELS} channels with backend 'triton', got {MOST_CHANNELS + 1}",
        ),
    ):
        with pytest.raises(error, match=text):
            attention(bad, backend="triton")
    with pytest.raises(ValueError, match=r"dropout_p must be in \[0, 1\), got 1.0"):
        attention(good, dropout_p=1.0, backend="triton")
    with pytest.raises(RuntimeError, match="with_gradient=True"):
        ATTENTION(good.requires_grad_(), torch.tensor([0], device=DEVICE), 0.0, False)
