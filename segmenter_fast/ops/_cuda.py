"""What the operators in CUDA C++ share: the compiled kernels, and the stream that they go to.

The module segmenter_fast._C has them when an nvcc was found as it was built. It links CUDA's
runtime statically, so that it imports anywhere; what a launch lacks, CUDA itself says then.
"""

from types import ModuleType

import torch
from torch import Tensor

from segmenter_fast.backend import BackendError, native_module


def cuda_module() -> ModuleType:
    """The kernels in CUDA C++, or BackendError with the command that builds them."""
    module = getattr(native_module(), "cuda", None)
    if module is None:
        raise BackendError(
            "the compiled module segmenter_fast._C was built without CUDA C++. Build it where "
            "there is a CUDA toolkit: SEGMENTER_FAST_CUDA=1 pip install -e . (nvcc is looked for "
            "in CUDACXX, on PATH and in CUDA_HOME)"
        )
    return module


def queue_of(tensor: Tensor) -> tuple[int, int]:
    """(device index, handle of its current stream): where kernels on this tensor are launched."""
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream
