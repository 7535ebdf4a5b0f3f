"""Self-attention at N = 1025 tokens (512 x 512 in patches of 16) with heads of 64 channels.

Three heads as in Seg-T, twelve as in Seg-B: forward, and with its gradient.
"""

import pytest
import torch
from harness import Work, not_run
from torch import Tensor

from segmenter_fast.ops.attention import attention, attention_reference

TOKENS, CHANNELS = 1025, 64


@pytest.mark.parametrize("heads", [3, 12])
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "with gradient"])
def test_attention(contest, with_compile, heads, gradient):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, TOKENS, 3, heads, CHANNELS, generator=generator, requires_grad=True)
    upstream = torch.randn(1, TOKENS, heads * CHANNELS, generator=generator)

    def run(function):
        if gradient:
            return torch.autograd.grad(function(qkv), qkv, upstream)
        with torch.no_grad():
            return (function(qkv),)

    right = run(attention_reference)

    def check(name: str, results: tuple[Tensor, ...]) -> None:
        torch.testing.assert_close(results[0], right[0], rtol=1e-3, atol=1e-4, msg=name)

    compiled = torch.compile(attention_reference, dynamic=False)
    # Two products; five more for the gradient. q, k, v read and y written; backward, y and its
    # gradient read, too.
    product = 2 * heads * TOKENS**2 * CHANNELS
    contest(
        f"attention{' and gradient' * gradient}, {heads} heads, N = {TOKENS}",
        {
            "eager": lambda: run(attention_reference),
            "torch.compile": (lambda: run(compiled))
            if with_compile
            else not_run("needs --with-compile"),
            "native": lambda: run(lambda x: attention(x, backend="native")),
        },
        check,
        work=Work(
            flops=product * (7 if gradient else 2),
            bytes=qkv.nbytes * 4 / 3 * (3 if gradient else 1),
        ),
    )
