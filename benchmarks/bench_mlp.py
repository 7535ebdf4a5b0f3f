"""The feed-forward branch of a block: forward, and with its gradient.

D = 192 as of Seg-T, 768 as of Seg-B. Work and inputs are those of the operation's declaration.
"""

import pytest
import torch
from linear_cases import TOKENS, contest_of

from segmenter_fast.ops import mlp_triton
from segmenter_fast.ops.mlp import mlp, mlp_reference


@pytest.mark.parametrize("width", [192, 768])
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "with gradient"])
def test_mlp(contest, with_compile, width, gradient):
    torch.manual_seed(0)
    inputs = mlp_triton._make_inputs(torch.float32, batch=1, n=TOKENS, width=width)
    title = f"feed-forward branch, N = {TOKENS}, D = {width}"
    work = mlp_triton._work(inputs)
    own = (mlp_reference, mlp, inputs)
    contest_of(contest, title, *own, gradient, with_compile, work)
