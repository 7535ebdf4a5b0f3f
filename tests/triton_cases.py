"""Where the tests of Triton kernels run: on a GPU if there is one, else in the interpreter.

On a GPU they carry the mark `gpu`, so that `pytest -m gpu` runs just them; elsewhere the same tests
run interpreted, on CPU tensors.
"""

import pytest
import torch
from dense_cases import SHAPES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

on_device = pytest.mark.gpu if DEVICE == "cuda" else pytest.mark.interpreted

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# The interpreter takes a second per thousand blocks: what differs in kind, not in size.
FEW = ("prime sizes", "one row of patches", "downscale", "one pixel")
few_shapes = pytest.mark.parametrize("case", [SHAPES[name] for name in FEW], ids=FEW)
