"""The oracles every operation is held to: how large an error may be, and which labels are right.

Floating-point results: with `ref` the reference in float64, err_torch the error of the same
reference in the dtype under test and eps that of the result's dtype,

    err <= k err_torch + 2 eps max|ref|        in the maximum norm, and
    err <= k err_torch + 2 eps |ref|           in the Frobenius norm.

Labels: the chosen class's exact logit is within rounding of the largest.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

GPU_FACTOR = 2.0
CPU_FACTOR = 3.0
"""Also Triton's interpreter, which runs on the CPU."""


# --------------------------------------------------------------------------- floating-point results
def assert_close(
    name: str, fast: Tensor, torch_result: Tensor, ref: Tensor, k: float = CPU_FACTOR
) -> None:
    """Hold one tensor to the bounds above.

    Args:
        name: what to call it in a failure.
        fast: result under test.
        torch_result: the reference's result on the same inputs in the dtype under test.
        ref: the reference's result in float64.
        k: how many times PyTorch's own error is allowed.

    Raises:
        AssertionError: shape, dtype, position of non-finite values or size of the error differs.
    """
    assert fast.shape == ref.shape, f"{name}: shape {tuple(fast.shape)} != {tuple(ref.shape)}"
    assert fast.dtype == torch_result.dtype, f"{name}: {fast.dtype} != {torch_result.dtype}"
    if fast.numel() == 0:
        return
    eps = torch.finfo(fast.dtype).eps
    fast, torch_result, ref = fast.double(), torch_result.double(), ref.double()
    finite = torch.isfinite(ref)
    same = torch.equal(
        torch.nan_to_num(fast, 0, 1, -1)[~finite], torch.nan_to_num(ref, 0, 1, -1)[~finite]
    ) and torch.equal(fast.isnan(), ref.isnan())
    assert same, f"{name}: NaN or infinity where the reference has none, or the reverse"
    fast, torch_result, ref = fast[finite], torch_result[finite], ref[finite]
    if ref.numel() == 0:
        return
    for norm, order in (("maximum", float("inf")), ("Frobenius", 2.0)):
        error, torch_error, size = (
            torch.linalg.vector_norm(x, order).item() for x in (fast - ref, torch_result - ref, ref)
        )
        bound = k * torch_error + 2 * eps * size
        assert error <= bound, (
            f"{name}: {norm} error {error:.3e} exceeds {bound:.3e} "
            f"(PyTorch's own {torch_error:.3e}, |ref| {size:.3e})"
        )


def assert_matches(
    op: Callable[..., Tensor | tuple[Tensor, ...]],
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    make_inputs: Callable[[torch.dtype], Mapping[str, Any]],
    dtype: torch.dtype,
    k: float | None = None,
    backward: bool = True,
) -> None:
    """Hold `op` to `reference`: outputs, and the gradient of every floating-point input.

    Both are called with the keyword arguments that `make_inputs(dtype)` returns. The same numbers
    go through `op` in `dtype`, through `reference` in `dtype` and through `reference` in float64,
    with one random upstream gradient.

    Args:
        op: the fast operation.
        reference: its definition in plain PyTorch.
        make_inputs: keyword arguments, floating-point tensors in the dtype asked for.
        dtype: under test.
        k: how many times PyTorch's own error is allowed; None is 2 on a GPU and 3 on a CPU.
        backward: also compare gradients.

    Raises:
        AssertionError: with the name of the output or gradient that differs.
    """
    inputs = dict(make_inputs(dtype))

    def run(function: Callable, to: torch.dtype) -> tuple[list[Tensor], dict[str, Tensor]]:
        own = dict(inputs)
        leaves = {}
        for name, value in inputs.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                own[name] = value.detach().to(to).requires_grad_(backward)
                leaves[name] = own[name]
        result = function(**own)
        outputs = [result] if isinstance(result, Tensor) else list(result)
        if not backward:
            return [output.detach() for output in outputs], {}
        generator = torch.Generator().manual_seed(0)
        upstream = [torch.randn(x.shape, generator=generator).to(dtype).to(x) for x in outputs]
        gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
        return [x.detach() for x in outputs], dict(zip(leaves, gradients, strict=True))

    fast, fast_gradients = run(op, dtype)
    plain, plain_gradients = run(reference, dtype)
    exact, exact_gradients = run(reference, torch.float64)
    if k is None:
        k = GPU_FACTOR if fast[0].is_cuda else CPU_FACTOR
    assert len(fast) == len(exact), f"{len(fast)} outputs, expected {len(exact)}"
    for i, (ours, theirs, ref) in enumerate(zip(fast, plain, exact, strict=True)):
        assert_close(f"output {i}", ours, theirs, ref, k)
    for name, ref in exact_gradients.items():
        assert_close(f"gradient of {name}", fast_gradients[name], plain_gradients[name], ref, k)


def with_spikes(x: Tensor, size: float = 8.0) -> Tensor:
    """`x` with `size` added at the last index of each dimension: a dropped tail shows."""
    x = x.clone()
    for dim in range(x.ndim):
        if x.shape[dim] > 1:
            x.select(dim, -1).add_(size / (dim + 1))
    return x


# --------------------------------------------------------------------------- labels
def interpolation_matrix(output: int, grid: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(output, grid) float64 half-pixel bilinear weights, source index in `dtype` as in PyTorch."""
    pixels = torch.arange(output, dtype=dtype)
    scale = torch.tensor(grid, dtype=dtype) / output
    source = (scale * (pixels + 0.5) - 0.5).clamp(min=0)
    lower = source.long().clamp(max=grid - 1)
    upper = (lower + 1).clamp(max=grid - 1)
    fraction = (source - lower).double()
    matrix = torch.zeros(output, grid, dtype=torch.float64)
    matrix.scatter_add_(1, lower[:, None], 1 - fraction[:, None])
    return matrix.scatter_add_(1, upper[:, None], fraction[:, None])


def _taps(output: int, grid: int) -> Tensor:
    """(output, grid) float64 ones where a pixel reads the grid, be it with weight 0."""
    lower = interpolation_matrix(output, grid).ne(0).int().argmax(dim=1)
    matrix = torch.zeros(output, grid, dtype=torch.float64)
    matrix.scatter_(1, lower[:, None], 1.0)
    return matrix.scatter_(1, (lower + 1).clamp(max=grid - 1)[:, None], 1.0)


def assert_labels(
    labels: Tensor,
    logits: Tensor,
    size: tuple[int, int],
    crop: tuple[int, int, int, int] | None = None,
    slack: float = 0.0,
) -> None:
    """Hold a label map to exact bilinear interpolation, strip by strip in float64.

    A label is right when its exact logit is within rounding of the pixel's largest. Of that
    rounding, 16 eps max|l| is arithmetic (two classes, a handful of operations each), and
    2 eps (h dy + w dx) is the source coordinate, with dy and dx the largest steps between
    neighbouring patches. Where the interpolation reads a NaN, the label is the first class that
    has one.

    Args:
        labels: (B, height, width) under test.
        logits: (B, K, h, w) finite or NaN.
        size: (H, W) the full output.
        crop: (top, left, height, width), the part that `labels` covers; None is all.
        slack: allowed beyond that rounding, for labels whose own logits differ from `logits`.

    Raises:
        AssertionError: with the first pixel that is wrong.
    """
    top, left, height, width = crop or (0, 0, *size)
    batch, n_cls, grid_h, grid_w = logits.shape
    assert tuple(labels.shape) == (batch, height, width), f"labels: shape {tuple(labels.shape)}"
    labels = labels.detach().cpu().long()
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    eps = torch.finfo(dtype).eps
    exact = logits.detach().cpu().double()
    in_range = (labels >= 0) & (labels < n_cls)
    assert bool(in_range.all()), f"labels outside [0, {n_cls}): {labels[~in_range].unique()}"

    rows = interpolation_matrix(size[0], grid_h, dtype)[top : top + height]
    columns = interpolation_matrix(size[1], grid_w, dtype)[left : left + width]
    nan = exact.isnan()
    exact = exact.nan_to_num(nan=0.0)
    step_y = exact.diff(dim=2).abs().max().item() if grid_h > 1 else 0.0
    step_x = exact.diff(dim=3).abs().max().item() if grid_w > 1 else 0.0
    largest = exact.abs().max().item() if batch else 0.0
    tolerance = slack + 16 * eps * largest + 2 * eps * (grid_h * step_y + grid_w * step_x)

    strip = max(1, (1 << 22) // (n_cls * width))
    for image in range(batch):
        for start in range(0, height, strip):
            part = rows[start : start + strip]
            values = torch.einsum("yh,khw,xw->kyx", part, exact[image], columns)
            chosen = labels[image, start : start + strip]
            gap = values.amax(dim=0) - values.gather(0, chosen[None])[0]
            wrong = gap > tolerance
            if nan[image].any():
                reads = torch.einsum(
                    "yh,khw,xw->kyx",
                    _taps(size[0], grid_h)[top + start : top + start + len(part)],
                    nan[image].double(),
                    _taps(size[1], grid_w)[left : left + width],
                ).gt(0)
                first = reads.int().argmax(dim=0)
                wrong = torch.where(reads.any(dim=0), chosen != first, wrong)
            if wrong.any():
                y, x = wrong.nonzero()[0].tolist()
                raise AssertionError(
                    f"{int(wrong.sum())} wrong labels in image {image}; first at "
                    f"({start + y}, {x}): class {int(chosen[y, x])}, whose logit is "
                    f"{gap[y, x]:.3e} below the largest (tolerance {tolerance:.3e})"
                )
