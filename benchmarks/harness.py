"""Time contestants that have first proved to be right, interleaved, and describe the machine.

    rows = compare({"eager": plain, "native": ours}, check=lambda name, result: ...)

Each round times every contestant once, starting with another one each time, so that a change of
clock or load meets all of them. The first contestants are the peers, the others are ours, and a
ratio is the median over the rounds of (quickest peer's time / contestant's time): against a peer in
its best form, and less at the mercy of a busy machine than a time.
"""

import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"
MIN_SECONDS = 5e-3
"""A quicker contestant is called several times in a row and its time divided."""


@dataclass(frozen=True)
class Row:
    """One contestant's result.

    Attributes:
        contestant: its name.
        ms, ms_p20, ms_p80: median, 20th and 80th percentile of one call, milliseconds.
        ratio: how many times faster than the quickest peer.
        peak_mib: memory that one call needs beyond what was held before, MiB; None if unknown here.
    """

    contestant: str
    ms: float
    ms_p20: float
    ms_p80: float
    ratio: float
    peak_mib: float | None


def compare(
    contestants: dict[str, Callable[[], Any]],
    check: Callable[[str, Any], None] | None = None,
    rounds: int = 11,
    peers: int = 1,
) -> list[Row]:
    """Time contestants against each other.

    Args:
        contestants: functions of no argument by name, the peers first.
        check: called with (name, result) of every contestant before anything is timed; raises if
            the result is wrong, and then nothing is timed at all.
        rounds: how often each contestant is timed.
        peers: how many of the first contestants are peers; ratios are against the one whose median
            is the lowest.

    Returns:
        One row per contestant, in the order given.

    Raises:
        ValueError: fewer contestants than peers, or fewer than one peer or round.
        Exception: whatever `check` raises.
    """
    if not 1 <= peers <= len(contestants) or rounds < 1:
        raise ValueError(
            "need at least one round and between one peer and all contestants, got "
            f"{rounds} rounds, {peers} peers of {len(contestants)} contestants"
        )
    for name, function in contestants.items():
        result = function()
        if check is not None:
            check(name, result)
    del result

    calls, peaks = {}, {}
    for name, function in contestants.items():
        calls[name] = max(1, round(MIN_SECONDS / max(_seconds(function, 1), 1e-7)))
        peaks[name] = peak_mib(function)
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        start = i % len(names)
        for name in names[start:] + names[:start]:
            seconds[name].append(_seconds(contestants[name], calls[name]))

    best = min((seconds[name] for name in names[:peers]), key=statistics.median)
    rows = []
    for name in names:
        ratios = [a / b for a, b in zip(best, seconds[name], strict=True)]
        low, median, high = (1e3 * _quantile(seconds[name], q) for q in (0.2, 0.5, 0.8))
        rows.append(Row(name, median, low, high, statistics.median(ratios), peaks[name]))
    return rows


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


def _quantile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def peak_mib(function: Callable[[], Any]) -> float | None:
    """Memory that one call needs beyond what is held before it, MiB.

    GPU memory where there is a GPU; resident memory on Linux; None elsewhere.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        # The smaller of two: pages of a library that the system had dropped come back in the first.
        return min(_resident_growth(function) for _ in range(2))
    except OSError:
        return None


def _resident_growth(function: Callable[[], Any]) -> float:
    # Linux: 5 sets the process's high-water mark back to its present size.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_kib("VmRSS")
    function()
    return max(0, _status_kib("VmHWM") - before) / 2**10


def _status_kib(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


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
        "segmenter_fast": getattr(segmenter_fast, "__version__", None),
        "native": native,
        "commit": _commit(),
    }


def machine_kind() -> str:
    """Name of the folder under results/: the GPU, or the processor's capability and core count."""
    if torch.cuda.is_available():
        return _slug(torch.cuda.get_device_name())
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
    """Short hash, with `+changes` when the work tree differs from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(RESULTS.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "-s") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


# ------------------------------------------------------------------------------------- reports
def table(case: str, rows: Sequence[Row]) -> list[str]:
    """Lines of a readable table."""
    width = max(len(row.contestant) for row in rows)
    lines = [
        case,
        f"  {'':{width}}  {'median ms':>10} {'p20':>9} {'p80':>9} {'ratio':>8} {'MiB':>8}",
    ]
    for row in rows:
        memory = "" if row.peak_mib is None else f"{row.peak_mib:.1f}"
        lines.append(
            f"  {row.contestant:{width}}  {row.ms:10.3f} {row.ms_p20:9.3f} {row.ms_p80:9.3f} "
            f"{row.ratio:7.2f}x {memory:>8}"
        )
    return lines


def save(name: str, cases: dict[str, Sequence[Row]], folder: Path | None = None) -> Path:
    """Write results/<machine kind>/<name>.json and return its path.

    Args:
        name: of the benchmark, the stem of bench_<name>.py.
        cases: rows by case.
        folder: None is results/<machine kind>.
    """
    folder = RESULTS / machine_kind() if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "benchmark": name,
        "machine": machine(),
        "cases": {case: [asdict(row) for row in rows] for case, rows in cases.items()},
    }
    path = folder / f"{name}.json"
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)
    return path
