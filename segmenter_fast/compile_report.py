"""Every Triton kernel in every configuration, compiled ahead of time: what `kernels` shows.

Operations are run on CPU tensors at the shapes of their declarations while a `Recorder` writes
their launches down, once for each architecture, dtype and configuration, forward and backward.
Triton then compiles each launch as it would on such a GPU: it asks its driver which GPU that is,
and a stand-in answers. So argument specialisation is Triton's own. Nothing of this needs a GPU.

A kernel fails when it spills registers, when it multiplies 16-bit matrices without tensor cores
(on sm_90 without the instructions that only Hopper has), when a block of it does not fit, or when
it does not compile.
"""

import importlib
import multiprocessing
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from segmenter_fast.backend import BackendError
from segmenter_fast.cubin import LIMITS, Usage, cuda_cubins, demangle, occupancy, read_cubin
from segmenter_fast.ops import _triton
from segmenter_fast.ops._triton import ARCHITECTURES, Config, Launch, Operation, Recorder

# Rates of an H200. Bytes read plus written, and products of bfloat16 matrices, as measured through
# PyTorch on one; its data sheet promises 4.8 TB/s and 989 TFLOP/s. float32 as on the data sheet.
BANDWIDTH = 4.3e12
MATRIX_RATE = 790e12
FLOAT32_RATE = 67e12


# --------------------------------------------------------------------------- what there is to do
@dataclass(frozen=True)
class Pointer:
    """In place of a tensor among a kernel's arguments: what Triton looks at to compile."""

    dtype: torch.dtype
    aligned: bool

    def data_ptr(self) -> int:
        """An address of the tensor's alignment."""
        return 0 if self.aligned else self.dtype.itemsize


@dataclass(frozen=True)
class Specialisation:
    """All that decides how a kernel is compiled. Can be sent to another process.

    Args:
        module: where the kernel is, and `function`, its name there.
        arch: compute capability.
        options: of the launch, such as num_warps.
        arguments: by name; tensors as `Pointer`.
    """

    module: str
    function: str
    arch: int
    options: tuple[tuple[str, Any], ...]
    arguments: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Job:
    """A launch of an operation, and where it came from."""

    operation: str
    backward: bool
    dtype: torch.dtype
    kernel: str
    matrix: bool
    register_operands: bool
    config: Config
    specialisation: Specialisation


def find_jobs(
    operations: Iterable[Operation],
    archs: Sequence[int] = ARCHITECTURES,
    dtypes: Sequence[torch.dtype] | None = None,
) -> list[Job]:
    """Launches of the operations on every architecture in every dtype and configuration.

    Args:
        operations: from `_triton.operations()`.
        archs: compute capabilities.
        dtypes: to choose, where an operation has a choice; all of them unless given.
    """
    jobs: dict[str, Job] = {}
    for operation in operations:
        for dtype in _chosen_dtypes(operation, dtypes):
            inputs = operation.make_inputs(dtype, **operation.case)
            for arch in archs:
                for backward, launch in _launches(operation, inputs, arch):
                    job = _job(operation, backward, dtype, arch, launch)
                    jobs.setdefault(repr(job), job)
    return list(jobs.values())


def _chosen_dtypes(
    operation: Operation, dtypes: Sequence[torch.dtype] | None
) -> Iterable[torch.dtype]:
    # An operation on labels alone has no dtype that a list of floating-point ones could name.
    named = [dtype for dtype in operation.dtypes if dtypes is None or dtype in dtypes]
    labels = not any(dtype.is_floating_point for dtype in operation.dtypes)
    return operation.dtypes if labels and not named else named


def _launches(
    operation: Operation, inputs: Mapping[str, Any], arch: int
) -> Iterable[tuple[bool, Launch]]:
    """(in the backward pass?, launch) for every configuration."""
    candidate, candidates = 0, 1
    while candidate < candidates:
        with _triton.use_candidate(candidate), Recorder(arch) as recorder:
            forward = _run(operation, inputs, recorder)
        for n, launch in enumerate(recorder.launches):
            candidates = max(candidates, len(launch.kernel.candidates(arch)))
            yield n >= forward, launch
        candidate += 1


def _run(operation: Operation, inputs: Mapping[str, Any], recorder: Recorder) -> int:
    """Run forward and, if there is one, backward; returns the number of forward launches."""
    if operation.backward_work is None:
        operation.run(**inputs)
        return len(recorder.launches)
    leaves = {
        name: value.detach().requires_grad_()
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    outputs = operation.run(**{**inputs, **leaves})
    forward = len(recorder.launches)
    every = [outputs] if isinstance(outputs, Tensor) else outputs
    roots = [output for output in every if output.requires_grad]
    torch.autograd.backward(roots, [torch.empty_like(root) for root in roots])
    return forward


def _job(
    operation: Operation, backward: bool, dtype: torch.dtype, arch: int, launch: Launch
) -> Job:
    function = launch.kernel.function
    arguments = tuple(
        (name, Pointer(value.dtype, value.data_ptr() % 16 == 0))
        if isinstance(value, Tensor)
        else (name, value)
        for name, value in launch.arguments.items()
    )
    return Job(
        operation=operation.name.removesuffix("_triton"),
        backward=backward,
        dtype=dtype,
        kernel=launch.kernel.name,
        matrix=launch.kernel.matrix,
        register_operands=launch.kernel.register_operands,
        config=launch.config,
        specialisation=Specialisation(
            module=function.__module__,
            function=function.__name__,
            arch=arch,
            options=tuple(launch.config.options().items()),
            arguments=arguments,
        ),
    )


# --------------------------------------------------------------------------- compiling
class _StandIn:
    """A driver of Triton's that knows nothing but which GPU the current device is."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


def compile_one(specialisation: Specialisation) -> Usage:
    """Compile and look at the binary. Changes Triton's driver, so runs in a process of its own."""
    from triton.runtime.driver import driver

    driver.set_active(_StandIn(specialisation.arch))
    function = getattr(importlib.import_module(specialisation.module), specialisation.function)
    compiled = function.warmup(
        grid=(1,), **dict(specialisation.arguments), **dict(specialisation.options)
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        (usage,) = read_cubin(path, specialisation.arch).values()
    return usage.with_dynamic(compiled.metadata.shared)


def _try_compile(specialisation: Specialisation) -> Usage | str:
    """`compile_one`, or in one line why not."""
    try:
        return compile_one(specialisation)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[-1] if lines else ''}"


def compile_all(
    specialisations: Sequence[Specialisation],
    processes: int,
    done: Callable[[], None] = lambda: None,
) -> list[Usage | str]:
    """Usage of each, or a line that says why it does not compile.

    Args:
        specialisations: what to compile.
        processes: how many at the same time.
        done: called after each.
    """
    context = multiprocessing.get_context("spawn")
    results: dict[int, Usage | str] = {}

    def compile_some(indices: Iterable[int], processes: int) -> None:
        with ProcessPoolExecutor(processes, context, torch.set_num_threads, (1,)) as pool:
            futures = {pool.submit(_try_compile, specialisations[i]): i for i in indices}
            for future in as_completed(futures):
                results[futures[future]] = future.result()
                done()

    try:
        compile_some(range(len(specialisations)), processes)
    except BrokenProcessPool:
        # The compiler crashed, and took with it what else was under way: now one by one.
        for i in range(len(specialisations)):
            if i not in results:
                try:
                    compile_some([i], 1)
                except BrokenProcessPool:
                    results[i] = "the compiler crashed"
                    done()
    return [results[i] for i in range(len(specialisations))]


# --------------------------------------------------------------------------- rows
@dataclass(frozen=True)
class Row:
    """One line of the report: a kernel's figures on one architecture in one configuration.

    Args:
        operation: what launches it, or the source file of CUDA C++.
        kernel: its name.
        arch: compute capability.
        dtypes: of the operation, those that have the same figures.
        configuration: blocks and launch options.
        usage: the figures, or why there are none.
        matrix: multiplies matrices.
    """

    operation: str
    kernel: str
    arch: int
    dtypes: tuple[str, ...]
    configuration: str
    usage: Usage | str
    matrix: bool = False

    def problems(self) -> list[str]:
        """What must not be, in words."""
        if isinstance(self.usage, str):
            return [f"does not compile: {self.usage}"]
        found = []
        if self.usage.spilled:
            found.append(f"spills registers ({self.usage.spilled} bytes)")
        if self.matrix and set(self.dtypes) & {"float16", "bfloat16"}:
            names = [name for name, _ in self.usage.tensor_core]
            if self.arch == 90 and not any("GMMA" in name for name in names):
                found.append(f"multiplies 16-bit matrices without HGMMA ({_names(names)})")
            elif not names:
                found.append("multiplies 16-bit matrices without tensor cores")
        limit = LIMITS[self.arch].shared_per_block
        if self.usage.shared > limit:
            found.append(f"needs {self.usage.shared} bytes of shared memory; there are {limit}")
        elif not occupancy(self.usage, self.arch):
            found.append("one block needs more registers than there are")
        return found

    def cells(self) -> tuple[str, ...]:
        """What stands in the table, below `HEADINGS`."""
        first = (self.kernel, f"sm_{self.arch}", ", ".join(self.dtypes), self.configuration)
        if isinstance(self.usage, str):
            return (*first, *("-",) * (len(HEADINGS) - len(first)))
        return (
            *first,
            str(self.usage.registers),
            str(self.usage.spilled),
            str(self.usage.shared),
            ", ".join(f"{count} {name}" for name, count in self.usage.tensor_core) or "-",
            str(self.usage.tma or "-"),
            str(self.usage.instructions),
            f"{occupancy(self.usage, self.arch):.0%}",
        )


HEADINGS = (
    *("kernel", "GPU", "dtype", "configuration", "registers", "spilled", "shared"),
    *("tensor cores", "TMA", "instructions", "occupancy"),
)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(names: Sequence[str]) -> str:
    return "has " + ", ".join(names) if names else "has none at all"


def _configuration(config: Config) -> str:
    options = [f"{name} {size}" for name, size in config.blocks.items()]
    options += [f"{config.num_warps} warps", f"{config.num_stages} stages"]
    if config.maxnreg is not None:
        options.append(f"at most {config.maxnreg} registers")
    return ", ".join(options)


def make_rows(jobs: Sequence[Job], usages: Sequence[Usage | str]) -> list[Row]:
    """Rows in the order of the jobs; dtypes with the same figures share one."""
    merged: dict[tuple, list[str]] = {}
    for job, usage in zip(jobs, usages, strict=True):
        key = (
            job.operation,
            job.kernel + (" (backward)" if job.backward else ""),
            job.specialisation.arch,
            _configuration(job.config),
            usage,
            job.matrix,
        )
        dtypes = merged.setdefault(key, [])
        if _name(job.dtype) not in dtypes:
            dtypes.append(_name(job.dtype))
    rows = [
        Row(operation, kernel, arch, tuple(dtypes), configuration, usage, matrix)
        for (operation, kernel, arch, configuration, usage, matrix), dtypes in merged.items()
    ]
    # Kernels in the order of their launches; a stable sort keeps it within an operation.
    order = list(dict.fromkeys((row.operation, row.kernel) for row in rows))
    return sorted(rows, key=lambda row: (order.index((row.operation, row.kernel)), row.arch))


# --------------------------------------------------------------------------- floors
@dataclass(frozen=True)
class Floor:
    """What an operation cannot do without at its case, and how long that takes on an H200."""

    operation: str
    dtype: str
    flop: float
    bytes: float
    matrix: bool

    @property
    def seconds(self) -> float:
        """No less than this, by arithmetic and by memory."""
        return max(self.flop / self.rate, self.bytes / BANDWIDTH)

    @property
    def rate(self) -> float:
        """FLOP/s: of tensor cores if they can be used."""
        return MATRIX_RATE if self.matrix and self.dtype != "float32" else FLOAT32_RATE

    def cells(self) -> tuple[str, ...]:
        """What stands in the table, below `FLOOR_HEADINGS`."""
        bound = "arithmetic" if self.flop / self.rate > self.bytes / BANDWIDTH else "memory"
        return (
            *(self.operation, self.dtype, f"{self.flop / 1e9:.2f}", f"{self.bytes / 1e6:.2f}"),
            *(f"{1e6 * self.seconds:.1f}", bound),
        )


FLOOR_HEADINGS = ("operation", "dtype", "GFLOP", "MB", "floor in us", "bound by")


def find_floors(
    operations: Iterable[Operation], dtypes: Sequence[torch.dtype] | None = None
) -> list[Floor]:
    """Floors of the operations at their case, forward and backward."""
    floors = []
    for operation in operations:
        name = operation.name.removesuffix("_triton")
        for dtype in _chosen_dtypes(operation, dtypes):
            inputs = operation.make_inputs(dtype, **operation.case)
            passes = [(name, operation.work), (f"{name} (backward)", operation.backward_work)]
            for title, work in passes:
                if work is not None:
                    floors.append(Floor(title, _name(dtype), *work(inputs), operation.matrix))
    return floors


# --------------------------------------------------------------------------- CUDA C++
def find_cuda_rows(archs: Sequence[int], names: Sequence[str] = ()) -> list[Row]:
    """Rows of the kernels in CUDA C++: of the compiled module, or compiled by the nvcc at hand.

    Args:
        archs: compute capabilities.
        names: parts of the source files' names; all of them unless given.

    Raises:
        BackendError: there is neither, or nvcc fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubins = cuda_cubins(archs, Path(folder))
        rows = []
        for arch in archs:
            for path in cubins.get(arch, ()):
                for mangled, usage in read_cubin(path, arch).items():
                    source, kernel = demangle(mangled)
                    if any(name in source for name in names or ("",)):
                        rows.append(Row(source, kernel, arch, (), "", usage))
    return sorted(rows, key=lambda row: (row.operation, row.kernel, row.arch))


# --------------------------------------------------------------------------- the report
CUDA_HEADINGS = ("source", "kernel", "GPU", "registers", "spilled", "shared", "occupancy")

READING = """\
Every Triton kernel in every configuration, compiled ahead of time for the shapes that its operation
declares. Nothing here was measured: it was read from the binaries. *Registers* are a thread's;
*spilled* are the bytes of its instructions that move registers to memory and back; *shared* are
bytes of shared memory of a block. *Tensor cores* counts instructions that multiply matrices, *TMA*
those that the tensor memory accelerator copies by, *instructions* all of them. *Occupancy* is the
share of a multiprocessor's warps that registers, shared memory and threads let be in flight. In
CUDA C++ shared memory that is asked for at launch is not in the figures. Dtypes with the same
figures share a row."""

FLOOR_NOTE = (
    "What no method can do without at the declared shapes: operations that the result needs, "
    "inputs read once, outputs written once. The floor is the longer of FLOP / rate and "
    f"bytes / bandwidth: {BANDWIDTH / 1e12:g} TB/s (measured; data sheet 4.8), "
    f"{MATRIX_RATE / 1e12:g} TFLOP/s for products of 16-bit matrices (measured; data sheet 989), "
    f"{FLOAT32_RATE / 1e12:g} TFLOP/s for everything else (float32 on the data sheet)."
)


@dataclass(frozen=True)
class Report:
    """All figures.

    Args:
        rows: of the kernels in Triton.
        cuda: of those in CUDA C++.
        floors: of the operations.
        verified: configurations, of `configurations`, that ran on such a GPU with the right result.
        configurations: how many there are, each architecture's counted.
        versions: of what compiled, in words.
        notes: what is not in the report, and why.
    """

    rows: list[Row]
    cuda: list[Row]
    floors: list[Floor]
    verified: int
    configurations: int
    versions: str
    notes: list[str]

    @property
    def problems(self) -> list[str]:
        """One line for each thing that must not be; empty if all is well."""
        return [
            f"{row.operation}: {', '.join(filter(None, row.cells()[:4]))}: {problem}"
            for row in self.rows + self.cuda
            for problem in row.problems()
        ]

    def facts(self) -> list[str]:
        """What else there is to know, a paragraph each."""
        return [
            f"Compiled with {self.versions}.",
            f"{self.verified} of {self.configurations} configurations (each counted once for every "
            "kind of GPU) are marked as verified: run on such a GPU with the right result.",
            *self.notes,
        ]


class Section(NamedTuple):
    """A table of the report."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def make_report(
    names: Sequence[str] = (),
    archs: Sequence[int] = ARCHITECTURES,
    dtypes: Sequence[torch.dtype] | None = None,
    processes: int = 1,
    with_cuda: bool = True,
    operations: Sequence[Operation] | None = None,
    progress: Callable[[int], Callable[[], None]] = lambda total: lambda: None,
) -> Report:
    """Compile and collect.

    Args:
        names: parts of the operations' names; all of them unless given.
        archs: compute capabilities.
        dtypes: to choose, where an operation has a choice; all of them unless given.
        processes: how many compile at the same time.
        with_cuda: look at CUDA C++, too.
        operations: to look at instead of those of `_triton.operations()`.
        progress: called with the number of kernels to compile; what it returns, after each.

    Raises:
        BackendError: Triton or a tool is absent, kernels are interpreted in this process, or
            Triton's ptxas is known to miscompile one of them.
        ValueError: no operation has such a name.
    """
    _triton.require_triton()
    if _triton.INTERPRETED:
        raise BackendError("with TRITON_INTERPRET in the environment nothing can be compiled")
    known = _triton.operations() if operations is None else operations
    chosen = [o for o in known if any(name in o.name for name in names or ("",))]
    if not chosen:
        raise ValueError(
            f"no operation is called {' or '.join(map(repr, names))}; there are "
            + ", ".join(o.name.removesuffix("_triton") for o in known)
        )
    jobs = find_jobs(chosen, archs, dtypes)
    if not jobs:
        raise ValueError(
            f"{', '.join(o.name.removesuffix('_triton') for o in chosen)}: not declared for "
            + " or ".join(map(_name, dtypes or ()))
        )
    if 90 in archs and any(job.register_operands for job in jobs):
        _triton.check_ptxas(90)
    distinct = {repr(job.specialisation): job.specialisation for job in jobs}
    results = compile_all(list(distinct.values()), processes, progress(len(distinct)))
    usages = dict(zip(distinct, results, strict=True))
    configurations = {
        (job.kernel, job.specialisation.arch, _configuration(job.config), job.config.verified)
        for job in jobs
    }
    cuda, notes = [], []
    if with_cuda:
        try:
            cuda = find_cuda_rows(archs, names)
        except BackendError as error:
            notes.append(str(error))
    return Report(
        rows=make_rows(jobs, [usages[repr(job.specialisation)] for job in jobs]),
        cuda=cuda,
        floors=find_floors(chosen, dtypes),
        verified=sum(verified for *_, verified in configurations),
        configurations=len(configurations),
        versions=_versions(archs),
        notes=notes,
    )


def _versions(archs: Sequence[int]) -> str:
    compilers: dict[str, list[str]] = {}
    for arch in archs:
        version = _triton.ptxas_version(_triton.ptxas_of_triton(arch))
        compilers.setdefault(".".join(map(str, version)), []).append(f"sm_{arch}")
    ptxas = ", ".join(f"{version} ({', '.join(names)})" for version, names in compilers.items())
    return f"Triton {_triton.triton.__version__}, PyTorch {torch.__version__}, ptxas {ptxas}"


def sections(report: Report) -> list[Section]:
    """The report in tables."""
    made = []
    for operation in dict.fromkeys(row.operation for row in report.rows):
        rows = [row.cells() for row in report.rows if row.operation == operation]
        made.append(Section(operation, HEADINGS, rows))
    if report.cuda:
        keep = [HEADINGS.index(name) for name in CUDA_HEADINGS[1:]]
        rows = [(row.operation, *(row.cells()[i] for i in keep)) for row in report.cuda]
        made.append(Section("CUDA C++", CUDA_HEADINGS, rows))
    floors = [floor.cells() for floor in report.floors]
    made.append(Section("Floors on an H200", FLOOR_HEADINGS, floors, FLOOR_NOTE))
    return made


def to_markdown(report: Report) -> str:
    """The report as a page."""
    lines = ["# Compile report", "", "Written by `segmenter-fast kernels --output FILE`.", ""]
    lines += [*READING.splitlines(), ""]
    for fact in report.facts():
        lines += [fact, ""]
    lines += ["## Problems", ""]
    lines += [f"- {problem}" for problem in report.problems] or ["None."]
    for title, headings, rows, note in sections(report):
        lines += ["", f"## {title}", ""]
        lines += [note, ""] if note else []
        lines += [_line(headings), _line([_alignment(name) for name in headings])]
        lines += [_line(row) for row in rows]
    return "\n".join(lines) + "\n"


WORDS = {"kernel", "GPU", "dtype", "configuration", "source", "operation", "bound by"}
"""Headings of columns that hold words; others hold numbers, which stand on the right."""


WIDTH = 160
"""Characters in a line of what is written to a file or a pipe."""


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _alignment(heading: str) -> str:
    return "---" if heading in WORDS else "--:"


def show(report: Report, console: Any) -> None:
    """Print the report's tables and problems.

    Args:
        report: what to print.
        console: a `rich.console.Console`.
    """
    from rich.markup import escape
    from rich.table import Table

    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    for title, headings, rows, note in sections(report):
        table = Table(title=escape(title), title_justify="left", box=None)
        for name in headings:
            table.add_column(name, justify="left" if name in WORDS else "right")
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
        if note:
            console.print(note, markup=False, highlight=False)
        console.print()
    for line in (*report.facts(), *(f"PROBLEM {problem}" for problem in report.problems)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
