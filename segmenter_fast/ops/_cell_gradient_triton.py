"""From the four corners of every cell to the gradient of patch logits, in Triton.

A patch is a corner of up to four cells, and of the border's besides. Kernels that go through pixels
cell by cell write what each cell has to say about its corners; here every patch adds up what it was
told, always in the same order. So no atomic additions are needed, and results never vary.
"""

from torch import Tensor

from segmenter_fast.ops._triton import (
    Config,
    Kernel,
    accumulator,
    launch,
    load_as,
    store_as,
    tl,
    triton,
)
from segmenter_fast.ops._upsampling_triton import Axis


@triton.jit
def _gather_kernel(
    corners_ptr,  # (B, cells_y, cells_x, 4, K), corner 2 * lower + right
    gradient_ptr,  # (B, K, h, w)
    stride_b,
    stride_k,
    stride_h,
    stride_w,
    K,
    h,
    w,
    first_y,
    cells_y,
    first_x,
    cells_x,
    DTYPE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid = tl.program_id(0)
    j = pid % w
    i = pid // w % h
    image = (pid // w // h).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    # Patch i is the upper corner of cell i, the lower one of cell i - 1, both of the last cell, the
    # upper one of cell -1 if it is the first and, with weight 0, the lower one if it is the second.
    # Of four rows of two corners by four columns of two, those are kept whose corner it is.
    n = tl.arange(0, 64)
    y, low = i - 2 + n // 16, n // 8 % 2
    x, right = j - 2 + n // 2 % 4, n % 2
    at_y = (tl.minimum(tl.maximum(y, 0) + low, h - 1) == i) & (y >= first_y)
    at_x = (tl.minimum(tl.maximum(x, 0) + right, w - 1) == j) & (x >= first_x)
    ours = at_y & at_x & (y < first_y + cells_y) & (x < first_x + cells_x)
    cell = (image * cells_y + y - first_y) * cells_x + x - first_x
    part = corners_ptr + ((cell * 4 + 2 * low + right) * K)[:, None] + k[None, :]
    total = tl.sum(load_as(part, ours[:, None] & (k < K)[None, :], 0.0, DTYPE), 0)
    out = gradient_ptr + image * stride_b + i.to(tl.int64) * stride_h + j.to(tl.int64) * stride_w
    store_as(out + k.to(tl.int64) * stride_k, total, k < K)


_GATHER = Kernel(_gather_kernel, {"default": (Config({"BLOCK_K": 32}),)})


def gather_corners(corners: Tensor, rows: Axis, columns: Axis, gradient: Tensor) -> None:
    """Write the gradient of patch logits.

    Args:
        corners: (B, cells_y, cells_x, 4, K) contiguous, for each cell of the two axes what it adds
            to its upper left, upper right, lower left and lower right patch.
        rows, columns: the cells.
        gradient: (B, K, h, w) floating point, any strides, overwritten.
    """
    batch, n_cls, h, w = gradient.shape
    config = _GATHER.config(gradient)
    launch(
        _GATHER,
        (batch * h * w, -(-n_cls // config["BLOCK_K"])),
        config,
        *(corners, gradient, *gradient.stride(), n_cls, h, w),
        *(rows.first, rows.cells, columns.first, columns.cells),
        DTYPE=accumulator(corners.dtype),
    )


def empty_corners(like: Tensor, batch: int, rows: Axis, columns: Axis, n_cls: int) -> Tensor:
    """Unwritten `corners` for `gather_corners`, of the dtype and on the device of `like`."""
    return like.new_empty((batch, rows.cells, columns.cells, 4, n_cls))
