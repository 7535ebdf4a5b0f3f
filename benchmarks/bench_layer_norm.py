"""Layer norm of 1,025 tokens: forward, and with its gradient.

D = 192 as of Seg-T, 768 as of Seg-B. Work and inputs are those of the operation's declaration.
"""

import pytest
import torch
from linear_cases import TOKENS, contest_of

from segmenter_fast.ops import layer_norm_triton
from segmenter_fast.ops.layer_norm import layer_norm, layer_norm_reference


@pytest.mark.parametrize("width", [192, 768])
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "with gradient"])
def test_layer_norm(contest, with_compile, width, gradient):
    torch.manual_seed(0)
    inputs = layer_norm_triton._make_inputs(torch.float32, rows=TOKENS, width=width)
    title = f"layer norm, N = {TOKENS}, D = {width}"
    work = layer_norm_triton._work(inputs)
    own = (layer_norm_reference, layer_norm, inputs)
    contest_of(contest, title, *own, gradient, with_compile, work)
