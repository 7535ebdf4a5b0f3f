"""An attention's last linear layer, added to the stream of tokens: forward, and with its gradient.

D = 192 as of Seg-T, 768 as of Seg-B. Work and inputs are those of the operation's declaration.
"""

import pytest
import torch
from linear_cases import TOKENS, contest_of

from segmenter_fast.ops import linear_residual_triton
from segmenter_fast.ops.linear_residual import linear_residual, linear_residual_reference


@pytest.mark.parametrize("width", [192, 768])
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "with gradient"])
def test_linear_residual(contest, with_compile, width, gradient):
    torch.manual_seed(0)
    inputs = linear_residual_triton._make_inputs(torch.float32, batch=1, n=TOKENS, width=width)
    inputs["scale"] = None
    title = f"projection and residual, N = {TOKENS}, D = {width}"
    work = linear_residual_triton._work(inputs)
    own = (linear_residual_reference, linear_residual, inputs)
    contest_of(contest, title, *own, gradient, with_compile, work)
