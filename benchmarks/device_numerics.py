"""Hold every operation's kernels, in each configuration, to float64 on the device at hand.

The oracle is that of the tests (tests/checks.py): an error of at most a few times PyTorch's own in
the same type. Inputs are drawn afresh from a seed, which the results name.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from checks import CPU_FACTOR, GPU_FACTOR, assert_close

from segmenter_fast.backend import BackendError
from segmenter_fast.ops._triton import Kernel, Operation, use_candidate
from segmenter_fast.ops.window_geometry import WindowView

LABELS_THAT_MAY_DIFFER = 5e-4
"""Share of pixels whose two best classes rounding may swap, in random logits."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What came of one operation on one set of inputs.

    Attributes:
        operation, case, dtype: what ran.
        configuration: index into the kernels' configurations.
        part: "forward", "gradient of <input>", or the name of a contestant.
        error, torch_error: largest difference from float64 of ours and of PyTorch in this dtype;
            for labels the share of pixels that differ. None if it did not come so far.
        fault: what is wrong, empty if nothing is.
    """

    operation: str
    case: str
    dtype: str
    configuration: int
    part: str
    error: float | None = None
    torch_error: float | None = None
    fault: str = ""


def configurations(function: Callable[[], Any]) -> int:
    """How many configurations the kernels that `function` launches have at most.

    Where it fails, those it came to; the first configuration's verdict tells of the failure.
    """
    asked: list[Kernel] = []
    choose = Kernel.config

    def note(kernel: Kernel, tensor: Tensor) -> Any:
        asked.append(kernel)
        return choose(kernel, tensor)

    Kernel.config = note
    try:
        with contextlib.suppress(Exception):
            function()
    finally:
        Kernel.config = choose
    sizes = [len(table) for kernel in asked for table in kernel.configs.values()]
    return max(sizes, default=1)


def convert(
    value: Any, device: str | None = None, to: Callable[[Tensor], Tensor] | None = None
) -> Any:
    """Inputs on another device, or with `to` applied to their floating-point tensors."""
    if isinstance(value, Tensor):
        value = value if device is None else value.to(device)
        return to(value) if to is not None and value.is_floating_point() else value
    if isinstance(value, WindowView):
        return dataclasses.replace(value, logits=convert(value.logits, device, to))
    if isinstance(value, Mapping):
        return {name: convert(one, device, to) for name, one in value.items()}
    if isinstance(value, list):
        return [convert(one, device, to) for one in value]
    return value


def with_gradients(
    function: Callable[..., Any], operation: Operation, inputs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The result by part, with the gradients of the inputs that have one."""
    names = operation.gradient_of if operation.backward_work is not None else ()
    leaves = {name: inputs[name].detach().requires_grad_() for name in names}
    result = function(**{**inputs, **leaves})
    parts = {"forward": result.detach()}
    if leaves:
        generator = torch.Generator().manual_seed(1)
        upstream = torch.randn(result.shape, generator=generator).to(result)
        gradients = torch.autograd.grad(result, list(leaves.values()), upstream)
        parts |= {
            f"gradient of {name}": gradient
            for name, gradient in zip(leaves, gradients, strict=True)
        }
    return parts


def describe(case: Mapping[str, Any]) -> str:
    """A case in a few words: "batch 2, n_cls 19, grid (7, 5)"."""
    return ", ".join(f"{name} {value}" for name, value in case.items())


def check(
    operation: Operation,
    case: Mapping[str, Any],
    dtype: torch.dtype,
    device: str,
    seed: int,
    others: bool = False,
) -> Iterator[Verdict]:
    """Run an operation, and say how right each part of the result is.

    Args:
        operation: what to run.
        case: for its `make_inputs`.
        dtype: of the inputs.
        device: "cuda", or "cpu" in the interpreter.
        seed: of the inputs.
        others: run every configuration but the first, instead of that and the contestants.
    """
    about = {
        "operation": operation.name.removesuffix("_triton"),
        "case": describe(case),
        "dtype": str(dtype).removeprefix("torch."),
    }
    torch.manual_seed(seed)
    inputs = convert(operation.make_inputs(dtype, **case), device)
    theirs = with_gradients(operation.reference, operation, inputs)
    exact = with_gradients(operation.reference, operation, convert(inputs, to=Tensor.double))
    candidates = range(1)
    if others:
        found = configurations(lambda: with_gradients(operation.run, operation, inputs))
        candidates = range(1, found)
    else:
        for name, function in operation.contestants.items():
            here = {**about, "configuration": 0}
            try:
                result = function(**inputs)
            except (BackendError, NotImplementedError):  # not compiled, or not for this device
                continue
            except Exception as error:
                yield Verdict(**here, part=name, fault=_first_line(error))
                continue
            right = (theirs["forward"], exact["forward"])
            yield judge(operation.verdict, result, *right, device, here, name)
    for candidate in candidates:
        here = {**about, "configuration": candidate}
        try:
            with use_candidate(candidate):
                ours = with_gradients(operation.run, operation, inputs)
            if device == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            yield Verdict(**here, part="forward", fault=_first_line(error))
            continue
        for part, ref in exact.items():
            yield judge(operation.verdict, ours[part], theirs[part], ref, device, here, part)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def judge(
    verdict: str,
    ours: Tensor,
    theirs: Tensor,
    exact: Tensor,
    device: str,
    here: Mapping[str, Any],
    part: str,
) -> Verdict:
    """Compare one part of a result."""
    if verdict == "close":
        fault = ""
        try:
            factor = GPU_FACTOR if device == "cuda" else CPU_FACTOR
            assert_close(part, ours, theirs, exact, factor)
        except AssertionError as error:
            fault = str(error)
        errors = [(x.double() - exact).abs().max().item() for x in (ours, theirs)]
        return Verdict(**here, part=part, error=errors[0], torch_error=errors[1], fault=fault)
    fault = ""
    if ours.shape != exact.shape:
        fault = f"shape {tuple(ours.shape)} instead of {tuple(exact.shape)}"
        return Verdict(**here, part=part, fault=fault)
    shares = [(x.long() != exact.long()).double().mean().item() for x in (ours, theirs)]
    allowed = 0.0 if verdict == "equal" else 2 * shares[1] + LABELS_THAT_MAY_DIFFER
    if shares[0] > allowed:
        fault = f"{shares[0]:.3%} of the pixels differ from float64, at most {allowed:.3%} may"
    return Verdict(**here, part=part, error=shares[0], torch_error=shares[1], fault=fault)
