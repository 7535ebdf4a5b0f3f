"""Self-attention over a packed projection: fused against written out.

Widths of 32 and 64 go to the native kernel, 8 and 16 to PyTorch's fused attention.
"""

import pytest
import torch
from checks import assert_matches, with_spikes

from segmenter_fast import BackendError
from segmenter_fast.ops.attention import attention, attention_reference, attention_weights

SHAPES = [(1, 1, 1, 64), (2, 7, 3, 8), (1, 197, 2, 64), (2, 65, 1, 32)]  # B, N, heads, d


def make_inputs(shape, spikes=False):
    batch, tokens, heads, width = shape

    def make(dtype):
        generator = torch.Generator().manual_seed(0)
        qkv = torch.randn(batch, tokens, 3, heads, width, generator=generator)
        return {"qkv": (with_spikes(qkv, size=1.0) if spikes else qkv).to(dtype)}

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spikes", [False, True])
def test_matches_reference(shape, dtype, spikes):
    assert_matches(attention, attention_reference, make_inputs(shape, spikes), dtype)


def test_gradcheck():
    qkv = torch.randn(1, 3, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(attention, (qkv,))


def test_opcheck():
    """Of the native kernel, which tests/test_attention_native.py has more to say about."""
    qkv = torch.randn(2, 7, 3, 3, 32)
    op = torch.ops.segmenter_fast.attention.default
    torch.library.opcheck(op, (qkv, False))
    torch.library.opcheck(op, (qkv.requires_grad_(), True))


def test_compile_fullgraph():
    qkv = make_inputs((2, 7, 3, 8))(torch.float32)["qkv"]
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(qkv), attention(qkv))


def test_strided_inputs():
    whole = torch.randn(2, 9, 3, 2, 16)
    torch.testing.assert_close(attention(whole[:, ::2]), attention(whole[:, ::2].contiguous()))


def test_empty():
    assert attention(torch.empty(0, 5, 3, 2, 8)).shape == (0, 5, 16)


def test_rejects_bad_input():
    with pytest.raises(ValueError, match=r"\(B, N, 3, heads, d\), got \(2, 5, 16\)"):
        attention(torch.randn(2, 5, 16))
    with pytest.raises(ValueError, match=r"got \(2, 5, 2, 4, 8\)"):
        attention_weights(torch.randn(2, 5, 2, 4, 8))
    with pytest.raises(BackendError, match="runs on a GPU"):
        attention(torch.randn(1, 2, 3, 1, 8), backend="triton")


def test_rows_are_convex_combinations():
    """Rows of the weights sum to one, so values that are all alike come through unchanged."""
    qkv = torch.randn(2, 11, 3, 2, 8)
    assert (attention_weights(qkv).sum(-1) - 1).abs().max() < 1e-6
    qkv[:, :, 2] = 3.0
    for backend in ("reference", "native"):
        torch.testing.assert_close(attention(qkv, backend=backend), torch.full((2, 11, 16), 3.0))


def test_permuting_keys_changes_nothing():
    qkv = torch.randn(1, 13, 3, 2, 8, dtype=torch.float64)
    order = torch.randperm(13)
    both = qkv.clone()
    both[:, :, 1:] = qkv[:, order, 1:]
    torch.testing.assert_close(attention(both), attention(qkv))
