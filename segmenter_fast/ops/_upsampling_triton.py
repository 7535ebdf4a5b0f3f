"""The geometry of bilinear upsampling for Triton kernels, as csrc/cell.h has it for C++.

Pixel Y of n_out lies at source coordinate y = ((2Y + 1) n_in - n_out) / (2 n_out), in the cell
c = floor(y) between patches c and c + 1, with weight y - c on the latter. Cells go from -1, of the
pixels before the first patch's centre, to n_in - 1, of those after the last one's; there the value
is that of the first and of the last patch. PyTorch reads the second patch as well in cell -1, with
weight 0, which shows where it is NaN or infinite.

Which pixels a cell has is decided in integers, on the host and in kernels alike. So nobody
disagrees about it, and the weight is exact up to a single rounding.
"""

from typing import NamedTuple

import torch

from segmenter_fast.ops._triton import next_power_of_2, tl, triton


@triton.jit
def first_pixel(cell, n_in, n_out):
    """Smallest Y at or beyond `cell`: that with (2Y + 1) n_in >= (2 cell + 1) n_out.

    For cell -1 this is negative or 0; callers clamp it to their range of pixels.
    """
    numerator = (2 * cell + 1) * n_out - n_in
    # Integer division truncates towards 0 in Triton. Where that is not the ceiling, the numerator
    # is positive.
    return tl.where(numerator > 0, (numerator + 2 * n_in - 1) // (2 * n_in), 0)


@triton.jit
def cell_of(pixel, n_in, n_out):
    """floor(y) of each pixel, -1 at least."""
    # Shifted by 1, so that truncation is the floor.
    return ((2 * pixel + 1) * n_in + n_out) // (2 * n_out) - 1


@triton.jit
def weight_of(pixel, cell, n_in, n_out, DTYPE: tl.constexpr):
    """How far pixels lie beyond their cell's first patch, y - cell; 0 in cell -1."""
    distance = tl.where(cell < 0, 0, (2 * pixel + 1) * n_in - (2 * cell + 1) * n_out)
    return distance.to(DTYPE) / (2 * n_out)


@triton.jit
def between(a, b, weight):
    """Interpolate, a (1 - weight) + b weight, as PyTorch does: 0 times infinity is NaN.

    The multiply-add is spelled out, so that what the compiler fuses is the same in every kernel:
    two that read one pixel agree on it to the bit.
    """
    return tl.fma(b, weight, a * (1.0 - weight))


def host_cell_of(pixel: int, n_in: int, n_out: int) -> int:
    """`cell_of` on the host."""
    return ((2 * pixel + 1) * n_in - n_out) // (2 * n_out)


class Axis(NamedTuple):
    """Pixels start to stop of one axis of the output, and the cells that they lie in.

    Attributes:
        n_in: patches.
        n_out: pixels of the full output.
        start, stop: the crop.
        first: cell of pixel `start`.
        cells: how many cells there are from that of `start` to that of `stop - 1`.
        longest: pixels that a cell has at most.
    """

    n_in: int
    n_out: int
    start: int
    stop: int
    first: int
    cells: int
    longest: int

    def cells_in(self, pixels: int) -> int:
        """How many cells a run of this many pixels reaches into at most."""
        return min(self.cells, (pixels - 1) * self.n_in // self.n_out + 2)


def make_axis(n_in: int, n_out: int, start: int, count: int) -> Axis:
    """The cells of `count` pixels from `start`, of `n_out` that are read from `n_in` patches.

    Raises:
        ValueError: coordinates do not fit into 32 bits.
    """
    if (2 * n_out + 1) * (2 * n_in + 1) >= 2**31:
        raise ValueError(
            f"backend 'triton' upsamples {n_in} patches to less than "
            f"{2**30 // (2 * n_in + 1)} pixels, got {n_out}; use smaller crops of a smaller grid"
        )
    first = host_cell_of(start, n_in, n_out)
    last = host_cell_of(start + count - 1, n_in, n_out)
    longest = min(count, -(-n_out // n_in))
    return Axis(n_in, n_out, start, start + count, first, last - first + 1, longest)


def power_of_2_cells(axis: Axis, pixels: int) -> int:
    """A block that holds the cells of any run of so many pixels."""
    return next_power_of_2(axis.cells_in(pixels))


def check_floating(logits: torch.Tensor) -> None:
    """Raise TypeError unless a kernel can read such logits."""
    if logits.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"logits must be float16, bfloat16, float32 or float64, got {logits.dtype}")
