"""Time contestants that have first proved to be right, interleaved, and describe the machine.

    rows = compare({"eager": plain, "native": ours}, check=lambda name, result: ...)

Each round times every contestant once, in an order of its own, so that a change of clock or load
meets all of them and no one always follows the same neighbour; between two is a pause, in which the
threads of the one before come to rest. The first contestants are the peers, the others are ours
unless they are named as yardsticks, and a ratio is the median over the rounds of (quickest peer's
time / contestant's time): against a peer in its best form, and less at the mercy of a busy machine
than a time.

Beside the times stands a floor: the least work of the problem over the rate of this machine's
instructions and that of a copy, measured in the same run (`ceilings`).
"""

import contextlib
import ctypes
import functools
import os
import platform
import random
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from records import PACKAGES, RESULTS, Ceilings, Floor, Record, Row, Work, read, table, write

__all__ = [
    "Ceilings",
    "Floor",
    "NotRun",
    "Prepared",
    "Row",
    "Work",
    "ceilings",
    "compare",
    "compiled",
    "floor_of",
    "gpu_row",
    "instruction_rate",
    "machine",
    "machine_kind",
    "not_run",
    "peak_mib",
    "save",
    "table",
]

MIN_SECONDS = 5e-3
"""A quicker contestant is called several times in a row and its time divided."""
PAUSE = 0.03
"""Seconds between two contestants. OpenMP's threads look for more work for several milliseconds
before they sleep, and would take the next one's processors."""
SETTLING = 0.06
"""Seconds for which a quicker contestant runs untimed after the pause. On virtual machines a kernel
may take a thread that was idle for so idle that it gives it no processor of its own: two threads
then shared one for up to 50 ms, and contestants of 1 to 10 ms took twice their time."""
CHANGED = "+changes"
PEAK_SECONDS = 0.1
"""How long a rate of the processor is measured, each of a few times."""


class NotRun(Exception):
    """Raised by a contestant that cannot take part here; its row says why."""


def compare(
    contestants: Mapping[str, Callable[[], Any]],
    check: Callable[[str, Any], None] | None = None,
    rounds: int = 11,
    peers: int = 1,
    agreement: Callable[[str, Any], float] | None = None,
    images: int | None = None,
    kind: Callable[[str], str] | None = None,
    yardsticks: Collection[str] = (),
) -> list[Row]:
    """Time contestants against each other.

    Args:
        contestants: functions of no argument by name, the peers first. One that raises NotRun when
            it is first called gets a row without figures.
        check: called with (name, result) of every contestant before anything is timed; raises if
            the result is wrong, and then nothing is timed at all.
        rounds: how often each contestant is timed.
        peers: how many of the first contestants are peers; ratios are against the one whose median
            is the lowest.
        agreement: called with (name, result) for the share of labels that are those in float32.
        images: how many a call takes, where it takes whole images.
        kind: called with a contestant's name for what it is one of, such as its precision. All are
            timed in the same rounds, and a ratio is against the quickest peer of the same kind.
        yardsticks: names of contestants behind the peers that are not ours either.

    Returns:
        One row per contestant, in the order given.

    Raises:
        ValueError: fewer contestants than peers, fewer than one peer or round, or a yardstick that
            is a peer or absent.
        Exception: whatever `check` or a contestant raises.
    """
    if not 1 <= peers <= len(contestants) or rounds < 1:
        raise ValueError(
            "need at least one round and between one peer and all contestants, got "
            f"{rounds} rounds, {peers} peers of {len(contestants)} contestants"
        )
    wrong = set(yardsticks) - set(list(contestants)[peers:])
    if wrong:
        raise ValueError(f"need yardsticks among the contestants behind the peers, got {wrong}")
    # What the first call does once (compilation, imports, tables, threads) stays out of the times.
    reasons, devices, agreements = {}, {}, {}
    for name, function in contestants.items():
        try:
            result = function()
        except NotRun as reason:
            reasons[name] = str(reason)
            continue
        if check is not None:
            check(name, result)
        if agreement is not None:
            agreements[name] = agreement(name, result)
        devices[name] = _device_of(result) or "cpu"
        del result

    calls, peaks, quick = {}, {}, {}
    names = [name for name in contestants if name not in reasons]
    for name in names:
        function = contestants[name]
        once = _seconds(function, 1)
        calls[name] = max(1, round(MIN_SECONDS / max(once, 1e-7)))
        quick[name] = once < SETTLING
        fresh = getattr(function, "fresh", function)
        if fresh is not function:
            fresh()  # or the first measured call would find what the calls above have kept
        # What moves in a second is so much that pages of code brought back do not count.
        repeats = 3 if once < 1 else 1
        peaks[name] = peak_mib(fresh, devices[name], repeats)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    shuffle = random.Random(0).shuffle
    order = list(names)
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            time.sleep(PAUSE)
            if quick[name]:
                _settle(contestants[name])
            seconds[name].append(_seconds(contestants[name], calls[name]))

    peer_names = list(contestants)[:peers]
    kind_of = {name: None if kind is None else kind(name) for name in contestants}
    quickest: dict[str | None, list[float]] = {}
    for name in peer_names:
        if name in seconds:
            both = [seconds[name], quickest.get(kind_of[name], seconds[name])]
            quickest[kind_of[name]] = min(both, key=statistics.median)
    rows = []
    for name in contestants:
        peer = name in peer_names
        if name in reasons:
            absent = Row(name, *[None] * 5, peer=peer, not_run=reasons[name])
            rows.append(replace(absent, yardstick=name in yardsticks))
            continue
        low, median, high = (1e3 * _quantile(seconds[name], q) for q in (0.2, 0.5, 0.8))
        ratio: list[float | None] = [None] * 3
        best = quickest.get(kind_of[name])
        if best is not None:
            ratios = [a / b for a, b in zip(best, seconds[name], strict=True)]
            ratio = [_quantile(ratios, q) for q in (0.2, 0.5, 0.8)]
        rows.append(
            Row(
                name,
                median,
                low,
                high,
                ratio[1],
                peaks[name],
                ratio_p20=ratio[0],
                ratio_p80=ratio[2],
                peer=peer,
                device=devices[name],
                agreement=agreements.get(name),
                images=images,
                yardstick=name in yardsticks,
            )
        )
    return rows


def _device_of(result: Any) -> str | None:
    """Type of the device of the first tensor in a result; None if there is none."""
    if isinstance(result, torch.Tensor):
        return result.device.type
    if isinstance(result, Mapping):
        result = list(result.values())
    if isinstance(result, Sequence) and not isinstance(result, str):
        return next(filter(None, map(_device_of, result)), None)
    return None


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _seconds(function: Callable[[], Any], calls: int) -> float:
    _synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    _synchronize()
    return (time.perf_counter() - start) / calls


def _settle(function: Callable[[], Any]) -> None:
    stop = time.perf_counter() + SETTLING
    while time.perf_counter() < stop:
        function()


def _quantile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


# ------------------------------------------------------------------------------------- contestants
def compiled(
    function: Callable[..., Any],
    *args: Any,
    mode: str | None = None,
    fullgraph: bool = True,
    freezing: bool = False,
) -> Callable[[], Any]:
    """The contestant `torch.compile(function)(*args)`, for static shapes.

    Compilation happens in the first call, which `compare` does not time. If that call fails (no
    C++ compiler, something that Inductor cannot do) the contestant counts as not run, with the
    reason.

    Args:
        function: what eager PyTorch runs; give the plain peer's function. A mode such as
            torch.inference_mode goes around the contestant: inside it Inductor may fail.
        args: handed to it at every call.
        mode: of torch.compile. "max-autotune" chooses between templates of matrix products and
            convolutions, on a CPU as on a GPU; it changes nothing for interpolation, softmax or
            argmax, so only models with such layers profit from it as a second contestant.
        fullgraph: a graph break, or giving up after too many recompilations, makes it not run,
            where it would otherwise quietly be eager PyTorch.
        freezing: let Inductor take parameters for constants, and pack weights beforehand. Only
            without gradients; on a CPU "max-autotune" has templates for constant weights alone.
    """
    compiled_function = torch.compile(function, mode=mode, fullgraph=fullgraph, dynamic=False)
    called = False

    def contestant() -> Any:
        nonlocal called
        if called:
            return compiled_function(*args)
        try:
            with _freezing() if freezing else contextlib.nullcontext():
                result = compiled_function(*args)
        except Exception as error:
            raise NotRun(f"{type(error).__name__}: {_first_line(error)}") from error
        called = True
        return result

    return contestant


def _freezing() -> contextlib.AbstractContextManager[None]:
    from torch._inductor import config

    return config.patch(freezing=True)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    # "backend='inductor' raised:" says nothing; what it raised comes next.
    line = next((line for line in lines if line and not line.endswith("raised:")), "no message")
    return line if len(line) <= 120 else line[:117] + "..."


class Prepared:
    """A contestant that is built in its first call, which is not timed: a model, an engine.

    Args:
        build: returns the function to time. That may have an attribute `fresh`: a function that
            does the same and gives back what memory it would keep, for `peak_mib`.
    """

    def __init__(self, build: Callable[[], Callable[[], Any]]):
        self._build = build

    @functools.cached_property
    def function(self) -> Callable[[], Any]:
        return self._build()

    @property
    def fresh(self) -> Callable[[], Any]:
        return getattr(self.function, "fresh", self)

    def __call__(self) -> Any:
        return self.function()


def not_run(reason: str) -> Callable[[], Any]:
    """A contestant that does not take part: it keeps its place in the table, with the reason."""

    def contestant() -> Any:
        raise NotRun(reason)

    return contestant


def gpu_row() -> dict[str, Callable[[], Any]]:
    """The row of a CPU's table that stands for the Triton kernels, by its name."""
    absent = "" if torch.cuda.is_available() else "no CUDA device; "
    return {"Triton, GPU": not_run(f"{absent}python -m benchmarks.device measures it there")}


# ------------------------------------------------------------------------------------- memory
def peak_mib(function: Callable[[], Any], device: str = "cpu", repeats: int = 3) -> float | None:
    """Memory that one call needs beyond what is held before it, MiB.

    On a GPU, what PyTorch's allocator hands out. On Linux, the high-water mark of the process's
    resident memory less its size before the call: whatever any thread touches counts, from
    PyTorch's allocator, from `new` and `std::vector` in C++, or mapped. None elsewhere.

    Two things would make it wrong, and are seen to:

    - The C library keeps freed blocks below its mmap threshold (which grows to 32 MiB) resident,
      and a call that gets such a block back adds nothing. They are given back to the system before
      each call, where the C library can (glibc: malloc_trim, all arenas); elsewhere the result may
      be too small by what is kept.
    - The first call after that brings back pages of code and tables, and of what is imported when
      first used; so the smallest of a few calls counts.

    The kernel's count of pages lags by up to 0.25 MiB per thread: below MEMORY_RESOLUTION_MIB a
    figure means "hardly any", and tables show it so. Memory that a function keeps between calls (a
    cache, a pool) is not seen at all, unless its contestant has a `fresh` (`Prepared`).

    Args:
        function: of no argument.
        device: where it computes, "cpu" or "cuda".
        repeats: calls, on a CPU.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        return min(_resident_growth(function) for _ in range(repeats))
    except OSError:
        return None


def _resident_growth(function: Callable[[], Any]) -> float:
    _return_free_memory()
    # Linux: 5 sets the process's high-water mark back to its present size.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_kib("VmRSS")
    function()
    return max(0, _status_kib("VmHWM") - before) / 2**10


def _return_free_memory() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status_kib(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


# ------------------------------------------------------------------------------------- ceilings
def floor_of(work: Work, rows: Sequence[Row]) -> Floor:
    """The floor on the device that the rows ran on."""
    device = next((row.device for row in reversed(rows) if row.device is not None), "cpu")
    return Floor(work, ceilings(device, getattr(torch, work.dtype)), device)


def ceilings(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Ceilings:
    """What the device reaches in arithmetic and in a copy, measured once per process.

    Arithmetic is the processor's instructions on registers, and a large matrix product in PyTorch
    where it is quicker (it may have instructions that the kernels have not) or where nothing tells
    of them, as on a GPU. Either does two FLOP with each fused multiply-add; arithmetic without
    them, such as comparisons, gets to half of its rate at most. All figures are the best of a few
    repeats with as many threads as PyTorch now uses, and take a second or two.

    Args:
        device: "cpu" or "cuda".
        dtype: of the numbers.

    Raises:
        ValueError: int8 on a processor that has no instructions for it, or none that tell.
    """
    return _ceilings(device, torch.get_num_threads(), dtype)


@functools.cache
def _ceilings(device: str, threads: int, dtype: torch.dtype) -> Ceilings:
    kind = str(dtype).removeprefix("torch.")
    rates = {"instructions": instruction_rate(kind) if device == "cpu" else 0.0}
    if dtype.is_floating_point:
        rates["matrix product"] = _flop_per_s(device, dtype)
    of = max(rates, key=rates.get)
    if not rates[of]:
        raise ValueError(f"no rate of {kind} on this device is known")
    return Ceilings(rates[of], _copy_rate(device, threads), f"{of}, {kind}")


def instruction_rate(kind: str) -> float:
    """Operations per second of the processor's instructions, all operands in registers.

    A multiplication and an addition are two. As many threads as PyTorch now uses; measured once per
    process.

    Args:
        kind: "float32", "bfloat16" or "int8".

    Returns:
        The rate; 0 where there are no such instructions or no compiled module to try them.
    """
    return _instruction_rate(kind, torch.get_num_threads())


@functools.cache
def _instruction_rate(kind: str, threads: int) -> float:
    from segmenter_fast.backend import BackendError, native_module

    try:
        peak = getattr(native_module(), "peak", None)
    except BackendError:
        return 0.0
    known = peak is not None and kind in ("float32", "bfloat16", "int8")
    return max(peak(kind, threads, PEAK_SECONDS) for _ in range(3)) if known else 0.0


@functools.cache
def _copy_rate(device: str, threads: int) -> float:
    return _bytes_per_s(device, _copy_bytes(device))


def _flop_per_s(device: str, dtype: torch.dtype) -> float:
    # Large matrices suit many threads, small ones a slow machine: from 512 upwards, until the next
    # would take too long. Full float32 precision, whatever has been allowed.
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        best, side, seconds = 0.0, 512, 0.0
        while 8 * seconds < 0.1:
            a, b = torch.rand(2, side, side, device=device).to(dtype)
            out = torch.empty_like(a)
            seconds = _best_seconds(functools.partial(torch.mm, a, b, out=out))
            best = max(best, 2 * side**3 / seconds)
            side *= 2
        return best
    finally:
        torch.set_float32_matmul_precision(precision)


def _bytes_per_s(device: str, size: int) -> float:
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)  # not empty: its pages are to be there already
    return 2 * size / _best_seconds(lambda: target.copy_(source))


def _best_seconds(function: Callable[[], Any], repeats: int = 4) -> float:
    function()
    return min(_seconds(function, 1) for _ in range(repeats))


def _copy_bytes(device: str) -> int:
    """Size of each of the two tensors of the copy: large enough that it goes through memory.

    On a CPU twice the last-level cache, 64 MiB at least and a sixteenth of the memory at most. A
    virtual machine may be shown a cache of hundreds of MiB that it shares with others, and
    benchmarks with less data than that may well find them there at each call: then bytes over this
    bandwidth is the floor of a call that finds nothing there, and a share may exceed 100 %.
    """
    if device == "cuda":
        return 1 << 29
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        memory = 8 << 30
    return min(max(2 * _last_level_cache_bytes(), 64 << 20), memory // 16)


def _last_level_cache_bytes(cpus: Path = Path("/sys/devices/system/cpu")) -> int:
    """All last-level caches together; 0 where Linux does not tell."""
    sizes: dict[tuple[int, str], int] = {}  # by level and the processors that share it
    for cache in cpus.glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            kib = re.fullmatch(r"(\d+)K", (cache / "size").read_text().strip())
            level = int((cache / "level").read_text())
            shared = (cache / "shared_cpu_list").read_text().strip()
        except (OSError, ValueError):
            continue
        if kib:
            sizes[level, shared] = int(kib[1]) << 10
    last = max((level for level, _ in sizes), default=0)
    return sum(size for (level, _), size in sizes.items() if level == last)


# ------------------------------------------------------------------------------------- the machine
def machine() -> dict[str, Any]:
    """What the figures depend on: processor, GPU, threads, versions, commit (None if unknown)."""
    import segmenter_fast
    from segmenter_fast.backend import BackendError, native_module

    try:
        native = native_module().build_info() | {"simd_level": native_module().simd_level()}
    except BackendError:
        native = None
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch_simd": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in PACKAGES},
        "segmenter_fast": getattr(segmenter_fast, "__version__", None),
        "native": native,
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine_kind() -> str:
    """Name of the folder under results/: the GPU, or the CPU's instruction set and core count.

    The instruction set is the one that the compiled kernels chose, which tells more processors
    apart than PyTorch's.
    """
    from segmenter_fast.backend import BackendError, native_module

    if torch.cuda.is_available():
        return _slug(torch.cuda.get_device_name())
    try:
        capability = native_module().simd_level()
    except BackendError:
        capability = torch.backends.cpu.get_cpu_capability()
    return _slug(f"cpu {platform.machine()} {capability} {os.cpu_count()} cores")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _cpu_model() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor()


def _commit() -> str | None:
    """Short hash, with `+changes` when the work tree differs from it in more than results."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(RESULTS.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changes = git("status", "-s", "--", ":/", f":(exclude){RESULTS}")
        return git("rev-parse", "--short", "HEAD") + (CHANGED if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None


# ------------------------------------------------------------------------------------- reports
def save(
    name: str,
    cases: Mapping[str, Sequence[Row]],
    folder: Path | None = None,
    floors: Mapping[str, Floor] | None = None,
) -> Path:
    """Write results/<machine kind>/<name>.json and return its path.

    Cases that are in the file already stay there beside these if they come from the same machine,
    versions and commit, without changes to it: what takes long, or much memory, can be run in
    several commands.

    Args:
        name: of the benchmark, the stem of bench_<name>.py.
        cases: rows by case.
        folder: None is results/<machine kind>.
        floors: by case, where known.
    """
    path = (RESULTS / machine_kind() if folder is None else folder) / f"{name}.json"
    record = Record(name, machine(), {}, {})
    with contextlib.suppress(OSError, ValueError):
        earlier = read(path)
        changed = str(record.machine["commit"]).endswith(CHANGED)
        if earlier.machine == record.machine and not changed:
            record = earlier
    record.cases.update({case: list(rows) for case, rows in cases.items()})
    record.floors.update(floors or {})
    write(record, path)
    return path
