"""Self-attention at N = 1025 tokens (512 x 512 in patches of 16) with heads of 64 channels.

Three heads as in Seg-T, twelve as in Seg-B: forward, and with its gradient, in float32 and in
bfloat16. The last is the kernel of this project, which `attention` takes on a CPU.
"""

import pytest
import torch
import torch.nn.functional as F
from checks import assert_close
from harness import Work
from torch import Tensor

from segmenter_fast.ops.attention import attention, attention_reference

TOKENS, CHANNELS = 1025, 64


def fused(qkv: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("heads", [3, 12])
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "with gradient"])
def test_attention(contest, compiled, heads, gradient, dtype):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, TOKENS, 3, heads, CHANNELS, generator=generator).to(dtype)
    qkv.requires_grad_()
    upstream = torch.randn(1, TOKENS, heads * CHANNELS, generator=generator).to(dtype)

    def of(function, x=qkv):
        if gradient:
            return torch.autograd.grad(function(), x, upstream.to(x.dtype))
        with torch.no_grad():
            return (function(),)

    double = qkv.detach().double().requires_grad_()
    (right,) = of(lambda: attention_reference(double), double)
    (eager,) = of(lambda: attention_reference(qkv))

    def check(name: str, results: tuple[Tensor, ...]) -> None:
        assert_close(name, results[0], eager, right)

    graph = compiled(attention_reference, qkv)
    # Two products; five more for the gradient. q, k, v read and y written; backward, y and its
    # gradient read, too.
    product = 2 * heads * TOKENS**2 * CHANNELS
    title = f"attention{' and gradient' * gradient}, {heads} heads, N = {TOKENS}"
    contest(
        title + ", bfloat16" * (dtype == torch.bfloat16),
        {
            "eager": lambda: of(lambda: attention_reference(qkv)),
            "fused": lambda: of(lambda: fused(qkv)),
            "torch.compile": lambda: of(graph),
            "native": lambda: of(lambda: attention(qkv, backend="native")),
        },
        check,
        peers=3,
        work=Work(
            flops=product * (7 if gradient else 2),
            bytes=qkv.nbytes * 4 / 3 * (3 if gradient else 1),
            dtype=str(dtype).removeprefix("torch."),
        ),
        gpu=True,
    )
