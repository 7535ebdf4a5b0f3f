"""Which implementation runs: one small table, asked at every call.

`reference` is plain PyTorch on any device and the definition of the right answer. `native` is the
CPU path: the compiled kernels of `segmenter_fast._C` beside PyTorch's own matrix products, and its
fused attention where ours has no kernel. `triton` is the GPU path, and runs on CPU tensors too
where Triton's interpreter was chosen. `auto` looks at the device of the tensor in hand.
"""

import torch
from torch import Tensor

BACKENDS = ("auto", "reference", "native", "triton")

PRECISIONS = ("float32", "bfloat16", "int8")
"""What inference may calculate in; see `SegmenterModel.precision`."""


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run here."""


def check_backend(backend: str) -> str:
    """Return `backend` if it is a known name, else raise ValueError listing the names."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    return backend


def check_precision(precision: str) -> str:
    """Return `precision` if it is a known name, else raise ValueError listing the names."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
    return precision


def native_module():
    """Import the compiled module, or raise BackendError with the command that builds it."""
    try:
        from segmenter_fast import _C
    except ImportError as error:
        raise BackendError(
            "backend 'native' needs the compiled module segmenter_fast._C, which cannot be "
            f"imported ({error}). Build it with: pip install -e ."
        ) from error
    return _C


def resolve_backend(backend: str, device: torch.device | str) -> str:
    """Map a backend name and a device to the implementation that will run.

    Args:
        backend: "auto", "reference", "native" or "triton".
        device: where the input tensor lives.

    Returns:
        "reference", "native" or "triton". `auto` is native on a CPU, triton on a GPU of CUDA, and
        reference elsewhere.

    Raises:
        ValueError: unknown name.
        BackendError: the named backend cannot take a tensor on this device.
    """
    check_backend(backend)
    kind = torch.device(device).type
    if backend == "auto":
        backend = {"cpu": "native", "cuda": "triton"}.get(kind, "reference")
    if backend == "native" and kind != "cpu":
        raise BackendError(
            f"backend 'native' runs on the CPU; the input is on {kind!r}. "
            "Move it with .cpu(), or use backend='auto'."
        )
    if backend == "triton":
        from segmenter_fast.ops._triton import check_kind

        check_kind(kind)
    return backend


def matrix_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which autocast takes a matrix product of `x`; its own where there is none.

    A registered operator is opaque to autocast, so the function above it converts. float64 stays
    what it is, as with PyTorch's own operators.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype
