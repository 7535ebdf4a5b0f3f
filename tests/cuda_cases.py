"""Where the tests of kernels in CUDA C++ run: on a GPU, and without one as far as they get.

Nothing emulates these kernels: where there is no GPU their results are not tested. What can be is:
shapes and types without data, checks of arguments, what is said when a launch fails.
"""

import pytest
import torch

from segmenter_fast import _C

BUILT = _C.build_info()["cuda"] is not None
GPU = torch.cuda.is_available()

if_built = pytest.mark.skipif(not BUILT, reason="built without CUDA C++")
if_no_gpu = pytest.mark.skipif(GPU, reason="needs a machine without a GPU")


def on_gpu(test):
    """Mark a test that launches kernels."""
    ready = pytest.mark.skipif(not (BUILT and GPU), reason="needs a GPU and a build with CUDA C++")
    return pytest.mark.gpu(ready(test))
