"""Layer norm and the projection to queries, keys and values: forward, and with its gradient.

D = 192 as of Seg-T, 768 as of Seg-B. Work and inputs are those of the operation's declaration.
"""

import pytest
import torch
from linear_cases import TOKENS, contest_of

from segmenter_fast.ops import layer_norm_linear_triton
from segmenter_fast.ops.layer_norm_linear import layer_norm_linear, layer_norm_linear_reference


@pytest.mark.parametrize("width", [192, 768])
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "with gradient"])
def test_layer_norm_linear(contest, with_compile, width, gradient):
    torch.manual_seed(0)
    inputs = layer_norm_linear_triton._make_inputs(torch.float32, batch=1, n=TOKENS, width=width)
    title = f"norm and qkv, N = {TOKENS}, D = {width}"
    work = layer_norm_linear_triton._work(inputs)
    own = (layer_norm_linear_reference, layer_norm_linear, inputs)
    contest_of(contest, title, *own, gradient, with_compile, work)
