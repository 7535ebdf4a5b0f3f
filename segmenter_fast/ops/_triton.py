"""What the Triton kernels share: the one place for Triton's quirks, choices per GPU and launches.

Interpreter. With TRITON_INTERPRET=1 kernels run on CPU tensors, in NumPy. The variable is read when
a kernel is decorated, that is, at import. The interpreter is silently wrong for bfloat16 arithmetic
and for float32 -> bfloat16, which it truncates instead of rounding; subnormal numbers come out
wrong in both directions. Kernels therefore convert as they load (`load_as`), round through
`round_as`, store through `store_as` and multiply through `dot`. It knows no libdevice and no inline
assembly, so no kernel uses either. tests/test_triton.py states these facts, and fails when a
version of Triton changes them.

Configurations. A kernel has a table of `Config`s by architecture, the preferred one first. What was
compiled but never run on such a chip has `verified=False`; an architecture that a table does not
name takes the entry "default", which every chip since sm_80 can hold.

Launches go through `launch`. While a `Recorder` is in force they are written down instead of run:
so the compile report compiles exactly the specialisations that the operations ask for.

ptxas. Versions before 13.1 were seen to miscompile Hopper's asynchronous matrix instructions when
an operand comes from registers (triton#11781, flash-linear-attention#1262), that is, when it is
computed rather than loaded. `check_ptxas` refuses such a compiler for such kernels on sm_90.
"""

import functools
import importlib
import os
import pkgutil
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segmenter_fast.backend import BackendError

INSTALL_HINT = "install it with: pip install triton (Linux), or use backend='reference'"

try:
    import triton
    import triton.language as tl

    IMPORT_ERROR = None
except ImportError as error:  # there are no wheels for macOS and Windows
    IMPORT_ERROR = error

    class _Absent:
        """Stands in for `triton` and `tl`: kernels can be written down, not launched."""

        def __getattr__(self, name: str) -> "_Absent":
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return args[0] if len(args) == 1 and callable(args[0]) else self

    triton = tl = _Absent()

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
"""Kernels run in Triton's interpreter, on CPU tensors."""

ARCHITECTURES = (80, 86, 89, 90, 100)
"""Compute capabilities that have configurations of their own, as in sm_90."""

MINIMUM_PTXAS_FOR_HOPPER = (13, 1)
PTXAS_VARIABLES = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")
"""Where Triton looks for ptxas first; newer ones read the second for sm_90, too."""

_INTERPRETED = tl.constexpr(INTERPRETED)


def require_triton() -> None:
    """Raise BackendError with what to install unless Triton can be imported."""
    if IMPORT_ERROR is not None:
        raise BackendError(
            "backend 'triton' needs the package triton, which cannot be imported "
            f"({IMPORT_ERROR}): {INSTALL_HINT}"
        )


# --------------------------------------------------------------------------- inside kernels
@triton.jit
def load_as(pointer, mask, other, DTYPE: tl.constexpr):
    """`tl.load`, converted at once: arithmetic is never done in 16 bits."""
    value = tl.load(pointer, mask=mask, other=other)
    if _INTERPRETED:
        if pointer.dtype.element_ty == tl.bfloat16:
            # These are the upper 16 bits of a float32.
            bits = value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
            value = bits.to(tl.float32, bitcast=True)
    return value.to(DTYPE)


@triton.jit
def round_as(value, DTYPE: tl.constexpr):
    """`value.to(DTYPE)`, to nearest even in the interpreter too."""
    if _INTERPRETED:
        if DTYPE == tl.bfloat16:
            # The upper 16 bits of the float32, rounded by hand; a NaN must stay one.
            bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
            rounded = bits + 0x7FFF + ((bits >> 16) & 1)
            bits = tl.where(value == value, rounded, bits | 0x400000)
            value = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(DTYPE)


@triton.jit
def store_as(pointer, value, mask):
    """`tl.store`, rounded to the pointer's type."""
    tl.store(pointer, round_as(value, pointer.dtype.element_ty), mask=mask)


@triton.jit
def dot(a, b, acc):
    """`acc` + a @ b, accumulated in acc's type; 16-bit a and b go to the tensor cores as they are.

    float32 is multiplied as such, not as TF32. The interpreter multiplies bfloat16 wrongly, so
    there the operands are converted first.
    """
    if _INTERPRETED:
        return acc + tl.dot(a.to(acc.dtype), b.to(acc.dtype), input_precision="ieee").to(acc.dtype)
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)


def accumulator(dtype: torch.dtype) -> Any:
    """Triton type in which sums over this type are kept: float64 for itself, else float32."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least n; blocks must have such sizes."""
    return 1 << max(n - 1, 0).bit_length()


# --------------------------------------------------------------------------- configurations
@dataclass(frozen=True)
class Config:
    """Block sizes and launch options of one kernel on one architecture.

    Args:
        blocks: constexpr arguments of the kernel, by name.
        num_warps: warps of one program.
        num_stages: loads in flight ahead of the loop body.
        maxnreg: registers per thread that ptxas may use; None leaves it free.
        verified: ran on such a GPU with the right result.
    """

    blocks: Mapping[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    maxnreg: int | None = None
    verified: bool = False

    def __getitem__(self, name: str) -> int:
        """Size of a block."""
        return self.blocks[name]

    def options(self) -> dict[str, Any]:
        """Launch options. Fused multiply-adds are asked for: newer Tritons leave them out."""
        options = {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }
        return options if self.maxnreg is None else {**options, "maxnreg": self.maxnreg}


class Kernel:
    """A jitted function with its configurations.

    Args:
        function: what `triton.jit` made.
        configs: by compute capability (90 for sm_90) and "default", the preferred one first.
        matrix: has matrix products, which must run on tensor cores for 16-bit inputs.
        register_operands: some of their operands are computed in the kernel, not loaded.
        descriptors: makes tensor descriptors on the device, which need memory from the host.
    """

    def __init__(
        self,
        function: Any,
        configs: Mapping[int | str, Sequence[Config]],
        matrix: bool = False,
        register_operands: bool = False,
        descriptors: bool = False,
    ):
        self.function, self.configs = function, configs
        self.matrix, self.register_operands = matrix, register_operands
        self.descriptors = descriptors
        self.name = getattr(function, "__name__", "kernel").strip("_").removesuffix("_kernel")

    def candidates(self, arch: int) -> Sequence[Config]:
        """All configurations for this architecture."""
        return self.configs.get(arch, self.configs["default"])

    def config(self, tensor: Tensor) -> Config:
        """The configuration to launch with for tensors on this one's device."""
        candidates = self.candidates(_architecture(tensor))
        return candidates[min(_candidate, len(candidates) - 1)]


# Plain globals, not context variables: autograd runs a GPU's backward in threads of its own, which
# would not see those.
_recorder: "Recorder | None" = None
_candidate = 0


class use_candidate:
    """Context in which every kernel takes its n-th configuration, or its last if it has fewer."""

    def __init__(self, n: int):
        self.n = n

    def __enter__(self) -> None:
        global _candidate
        self.before, _candidate = _candidate, self.n

    def __exit__(self, *error: object) -> None:
        global _candidate
        _candidate = self.before


@functools.cache
def _capability(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def _architecture(tensor: Tensor) -> int:
    if _recorder is not None:
        return _recorder.arch
    return _capability(tensor.device.index) if tensor.is_cuda else 0


# --------------------------------------------------------------------------- launches
@dataclass(frozen=True)
class Launch:
    """One launch that was asked for: everything that decides how its kernel is compiled."""

    kernel: Kernel
    config: Config
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]


class Recorder:
    """Context in which launches are written down in `launches` instead of run.

    Operations then take CPU tensors, whose results stay unwritten.

    Args:
        arch: compute capability to choose configurations for, 90 for sm_90.
    """

    def __init__(self, arch: int):
        self.arch = arch
        self.launches: list[Launch] = []

    def __enter__(self) -> "Recorder":
        global _recorder
        if _recorder is not None:
            raise RuntimeError("launches are being recorded already")
        _recorder = self
        return self

    def __exit__(self, *error: object) -> None:
        global _recorder
        _recorder = None


def check_kind(kind: str) -> None:
    """Raise BackendError unless kernels can run on this kind of device: "cuda", or interpreted."""
    if _recorder is not None:
        return
    require_triton()
    if kind != "cuda" and not (INTERPRETED and kind == "cpu"):
        raise BackendError(
            f"backend 'triton' runs on a GPU; the input is on {kind!r}. Move it with .cuda(), or "
            "use backend='auto'. (With TRITON_INTERPRET=1 in the environment kernels run on CPU "
            "tensors, slowly, for tests.)"
        )


def check_device(tensor: Tensor) -> None:
    """`check_kind` of a tensor's device."""
    check_kind(tensor.device.type)


def launch(kernel: Kernel, grid: tuple[int, ...], config: Config, *args: Any, **constexprs: Any):
    """Run `kernel` on a grid of programs, or write the launch down if a `Recorder` is in force.

    Args:
        kernel: what to run.
        grid: numbers of programs; none are started if one of them is 0.
        config: from `kernel.config(tensor)`; its blocks are passed on by name.
        *args: the kernel's arguments that are not constexpr; the first is a tensor.
        **constexprs: constexpr arguments that the configuration does not hold.

    Raises:
        BackendError: Triton is absent, or its ptxas is known to compile this kernel wrongly.
    """
    if 0 in grid:
        return
    constexprs = {**config.blocks, **constexprs}
    if _recorder is not None:
        names = kernel.function.arg_names
        arguments = dict(zip(names, args, strict=False)) | constexprs
        _recorder.launches.append(Launch(kernel, config, grid, arguments))
        return
    first = args[0]
    check_device(first)
    if not first.is_cuda:
        kernel.function[grid](*args, **constexprs, **config.options())
        return
    if kernel.register_operands:
        check_ptxas(_capability(first.device.index))
    # Triton launches on the current device, whatever device the tensors are on.
    with torch.cuda.device(first.device):
        if kernel.descriptors:
            # Kept in a context variable, which autograd's threads do not inherit.
            triton.set_allocator(_allocate)
        kernel.function[grid](*args, **constexprs, **config.options())


def matmul(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`a @ b + bias` of (M, K), (K, N) and (N,) by PyTorch, that is, on a GPU by cuBLAS.

    While launches are recorded the result stays unwritten, as theirs do.
    """
    if _recorder is not None:
        return a.new_empty(a.shape[0], b.shape[1])
    return a @ b if bias is None else torch.addmm(bias, a, b)


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


# --------------------------------------------------------------------------- declarations
@dataclass(frozen=True)
class Operation:
    """What the compile report and the device benchmark need to know of an operation.

    Args:
        name: of the registered operator, without "segmenter_fast::".
        make_inputs: (dtype, **case) -> keyword arguments of `run`, CPU tensors with fresh values.
        run: the operation in Triton.
        reference: the same in plain PyTorch.
        case: shape and options at which it is timed and compiled, as for ADE20K.
        checks: more cases at which it is only checked, with odd sizes.
        toy: the smallest case that reaches every kernel, for the interpreter.
        work: (inputs) -> (FLOP, bytes) that no method can do without, forward alone.
        backward_work: the same for the gradient; None if there is none.
        verdict: "close" for floating-point results, "equal" for exact ones, "labels" for classes
            that must be best but for rounding.
        matrix: counts matrix products, whose FLOP the tensor cores do.
        dtypes: to check and to compile for.
        gradient_of: inputs that have a gradient, if there is `backward_work`.
        contestants: other ways to the result than `reference`, by name, called as `run` is: timed
            beside it on a GPU. One that raises has no figures, but the reason.
    """

    name: str
    make_inputs: Callable[..., dict[str, Any]]
    run: Callable[..., Tensor | tuple[Tensor, ...]]
    reference: Callable[..., Tensor | tuple[Tensor, ...]]
    case: Mapping[str, Any]
    checks: Sequence[Mapping[str, Any]]
    toy: Mapping[str, Any]
    work: Callable[[Mapping[str, Any]], tuple[float, float]]
    backward_work: Callable[[Mapping[str, Any]], tuple[float, float]] | None = None
    verdict: str = "close"
    matrix: bool = False
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    gradient_of: Sequence[str] = ("logits",)
    contestants: Mapping[str, Callable[..., Any]] = field(default_factory=dict)


def operations() -> tuple[Operation, ...]:
    """Everything declared as `OPERATION` or in `OPERATIONS` by the modules ops/*_triton.py."""
    from segmenter_fast import ops

    found: list[Operation] = []
    for name in sorted(info.name for info in pkgutil.iter_modules(ops.__path__)):
        if name.endswith("_triton"):
            module = importlib.import_module(f"{ops.__name__}.{name}")
            found += getattr(module, "OPERATIONS", ())
            found += [module.OPERATION] if hasattr(module, "OPERATION") else []
    return tuple(found)


# --------------------------------------------------------------------------- the compiler
@functools.cache
def ptxas_version(program: str) -> tuple[int, int]:
    """(major, minor) of a ptxas; (0, 0) if it cannot be run."""
    try:
        text = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
    except OSError:
        return (0, 0)
    found = re.search(r"release (\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def find_tool(name: str) -> str:
    """Path of `cuobjdump` or `nvdisasm`: Triton's own, else the one on PATH.

    Raises:
        BackendError: neither is there.
    """
    require_triton()
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    found = str(bundled) if bundled.is_file() else shutil.which(name)
    if found is None:
        raise BackendError(
            f"{name} was found neither in Triton's wheel nor on PATH; install a CUDA toolkit"
        )
    return found


def ptxas_of_triton(arch: int) -> str:
    """The ptxas that Triton will run for this architecture."""
    from triton.backends.nvidia import compiler

    for arguments in ((arch,), ()):
        try:
            found = compiler.get_ptxas(*arguments)
        except TypeError:
            continue
        # A tool with a version, a path, or a pair beginning with the path.
        found = found[0] if isinstance(found, tuple) else getattr(found, "path", found)
        return str(found)
    return find_tool("ptxas")


@functools.cache
def check_ptxas(arch: int) -> None:
    """Refuse a ptxas that miscompiles matrix products of registers on this architecture.

    If Triton's own is too old and none of PTXAS_VARIABLES is set, a good one is looked for beside
    it and on PATH, and Triton is told to use it.

    Raises:
        BackendError: no good one; says which version was found and what to install.
    """
    if arch != 90:
        return
    chosen = ptxas_of_triton(arch)
    if ptxas_version(chosen) >= MINIMUM_PTXAS_FOR_HOPPER:
        return
    if not any(variable in os.environ for variable in PTXAS_VARIABLES):
        beside = str(Path(chosen).with_name("ptxas-blackwell"))
        for other in filter(None, (beside, shutil.which("ptxas"))):
            if ptxas_version(other) >= MINIMUM_PTXAS_FOR_HOPPER:
                os.environ.update(dict.fromkeys(PTXAS_VARIABLES, other))
                return
    wanted, found = (
        ".".join(map(str, version)) for version in (MINIMUM_PTXAS_FOR_HOPPER, ptxas_version(chosen))
    )
    raise BackendError(
        f"ptxas {found} ({chosen}) is known to miscompile matrix products for sm_90; {wanted} or "
        f"newer is needed. Install triton >= 3.9, or a CUDA toolkit >= {wanted} and set "
        f"{' and '.join(PTXAS_VARIABLES)} to its ptxas"
    )
