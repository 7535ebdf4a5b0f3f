"""What a result file holds: rows, floors and the machine, written and read back.

Needs nothing but the standard library, so that results are read where PyTorch is not installed.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
MEMORY_RESOLUTION_MIB = 0.5
"""Less than this is reported as less than this: the system counts pages roughly, see peak_mib."""
PACKAGES = ("onnx", "onnxruntime", "openvino", "nncf", "transformers", "triton")
"""Whose versions `harness.machine` records besides PyTorch's."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Row:
    """One contestant's result.

    Attributes:
        contestant: its name.
        ms, ms_p20, ms_p80: median, 20th and 80th percentile of one call, milliseconds; None if it
            did not run.
        ratio: how many times faster than the quickest peer, the median over the rounds; None if it
            or every peer did not run.
        peak_mib: memory that one call needs beyond what was held before, MiB; None if unknown.
        ratio_p20, ratio_p80: percentiles of the ratio; None in files that lack them.
        peer: whether it is one of those that ratios are against; None in files that do not say.
        yardstick: whether it only stands beside the others to be compared with, neither peer nor
            ours.
        device: "cpu" or "cuda", where its result lies; None if unknown.
        not_run: why it did not run; None if it did.
        agreement: share of labels equal to those in float32, 0 to 1; None where it is no question.
        images: per call; None where a call is not about whole images.
    """

    contestant: str
    ms: float | None
    ms_p20: float | None
    ms_p80: float | None
    ratio: float | None
    peak_mib: float | None
    ratio_p20: float | None = None
    ratio_p80: float | None = None
    peer: bool | None = None
    device: str | None = None
    not_run: str | None = None
    agreement: float | None = None
    images: int | None = None
    yardstick: bool = False

    def __post_init__(self):
        times, ratios = (self.ms, self.ms_p20, self.ms_p80), (self.ratio_p20, self.ratio_p80)
        measured = (*times, self.ratio, *ratios)
        for value in (*measured, self.peak_mib, self.agreement, self.images):
            if value is not None and not _is_number(value):
                raise ValueError(f"expected numbers or nothing in a row, got {value!r}: {self}")
        if any(value is not None and value <= 0 for value in measured):
            raise ValueError(f"expected times and ratios above 0, got {self}")
        if len({value is None for value in times}) > 1 or len({v is None for v in ratios}) > 1:
            raise ValueError(f"expected all percentiles or none, got {self}")
        if self.ratio is not None and self.ms is None:
            raise ValueError(f"expected no ratio of what has no time, got {self}")
        for value in (self.contestant, self.device or "", self.not_run or ""):
            if not isinstance(value, str):
                raise ValueError(f"expected text in a row, got {value!r}: {self}")
        if self.peer not in (None, False, True) or self.yardstick not in (False, True):
            raise ValueError(f"expected true or false for peer and yardstick, got {self}")

    @property
    def images_per_s(self) -> float | None:
        return None if self.images is None or self.ms is None else 1e3 * self.images / self.ms


@dataclass(frozen=True)
class Work:
    """What one call must at least do, whatever the method.

    It belongs to the problem, so all contestants of a case share it. A benchmark derives it in
    comments.

    Args:
        flops: additions, multiplications and comparisons; a fused multiply-add counts as two.
        bytes: inputs read once and outputs written once.
        dtype: of the numbers, "float32", "bfloat16" or "int8": the processor's rate is that of its
            instructions for them.

    Raises:
        ValueError: a negative or infinite number, or nothing to do at all.
    """

    flops: float
    bytes: float
    dtype: str = "float32"

    def __post_init__(self):
        numbers = (self.flops, self.bytes)
        if not all(math.isfinite(n) and n >= 0 for n in numbers) or not any(numbers):
            raise ValueError(f"expected FLOP and bytes of at least 0 and not both 0, got {self}")


@dataclass(frozen=True)
class Ceilings:
    """What a device reached, measured in the run of the timings.

    Attributes:
        flop_per_s: of the processor's instructions or of a large matrix product.
        bytes_per_s: of a copy from memory to memory, bytes read plus bytes written.
        rate_of: what the first is of, and its dtype. Files that do not say have a matrix product.

    Raises:
        ValueError: a rate that is no positive number.
    """

    flop_per_s: float
    bytes_per_s: float
    rate_of: str = "matrix product, float32"

    def __post_init__(self):
        if not all(_is_number(r) and r > 0 for r in (self.flop_per_s, self.bytes_per_s)):
            raise ValueError(f"expected rates above 0, got {self}")


@dataclass(frozen=True)
class Floor:
    """The time below which no method gets: max(FLOP / FLOP rate, bytes / bandwidth)."""

    work: Work
    ceilings: Ceilings
    device: str = "cpu"

    @property
    def arithmetic_ms(self) -> float:
        return 1e3 * self.work.flops / self.ceilings.flop_per_s

    @property
    def memory_ms(self) -> float:
        return 1e3 * self.work.bytes / self.ceilings.bytes_per_s

    @property
    def ms(self) -> float:
        return max(self.arithmetic_ms, self.memory_ms)

    @property
    def binds(self) -> str:
        """Which of the two is the longer: "arithmetic" or "memory"."""
        return "arithmetic" if self.arithmetic_ms > self.memory_ms else "memory"

    def share(self, row: Row) -> float | None:
        """Floor / time of a row; None if it did not run."""
        return None if row.ms is None else self.ms / row.ms


@dataclass(frozen=True)
class Record:
    """One result file: a benchmark on a machine.

    Attributes:
        benchmark: the stem of bench_<name>.py.
        machine: what `harness.machine` says.
        cases: rows by case.
        floors: by case, of those cases that declare their work.
    """

    benchmark: str
    machine: dict[str, Any]
    cases: dict[str, list[Row]]
    floors: dict[str, Floor] = field(default_factory=dict)


def write(record: Record, path: Path) -> None:
    """Write a record as JSON; the file is replaced in one step."""
    content = {
        "benchmark": record.benchmark,
        "machine": record.machine,
        "cases": {case: [asdict(row) for row in rows] for case, rows in record.cases.items()},
        "floors": {
            case: asdict(floor) | {"floor_ms": floor.ms, "binds": floor.binds}
            for case, floor in record.floors.items()
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def read(path: Path) -> Record:
    """Read a result file, also an older one, which lacks some of what is written now.

    Raises:
        ValueError: not a result file.
        OSError: no such file.
    """
    known = {f.name for f in fields(Row)}
    try:
        content = json.loads(path.read_text())
        cases = {
            case: [Row(**{k: v for k, v in row.items() if k in known}) for row in rows]
            for case, rows in content["cases"].items()
        }
        floors = {
            case: Floor(Work(**floor["work"]), Ceilings(**floor["ceilings"]), floor["device"])
            for case, floor in content.get("floors", {}).items()
        }
        benchmark, machine = content["benchmark"], content["machine"]
        if not isinstance(benchmark, str) or not isinstance(machine, dict):
            raise ValueError(f"expected a name and a machine, got {benchmark!r} and {machine!r}")
        return Record(benchmark, machine, cases, floors)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a result file of these benchmarks: {path} ({error!r})") from error


# ------------------------------------------------------------------------------------- numbers
def number(value: float) -> str:
    """At least two significant digits, none after the point from ten on: 0.043, 1.2, 380."""
    if abs(value) >= 9.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 0.995 else f"{value:.2g}"


def milliseconds(value: float | None) -> str:
    """Three significant digits, and all of those before the point; nothing if unknown."""
    return "" if value is None else _three_digits(value)


def images_per_s(value: float | None) -> str:
    return "" if value is None else _three_digits(value)


def ratio(value: float | None) -> str:
    return "" if value is None else f"{_three_digits(value)}x"


def _three_digits(value: float) -> str:
    for limit, decimals in ((0.0995, 4), (0.9995, 3), (9.995, 2), (99.95, 1)):
        if abs(value) < limit:
            return f"{value:.{decimals}f}"
    return f"{value:,.0f}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{number(100 * value)} %"


def agreement(value: float | None) -> str:
    """Two decimals, rounded down: 100 % is all of them."""
    return "" if value is None else f"{math.floor(1e4 * value + 1e-6) / 100:.2f} %"


def mebibytes(value: float | None) -> str:
    """As "12.3"; "<0.5" below what can be measured, and nothing if unknown."""
    if value is None:
        return ""
    return f"<{MEMORY_RESOLUTION_MIB}" if value < MEMORY_RESOLUTION_MIB else f"{value:,.1f}"


def floor_text(floor: Floor) -> str:
    """One sentence: the floor, and what it follows from."""
    work, ceilings = floor.work, floor.ceilings
    return (
        f"floor {number(floor.ms)} ms, {floor.binds} binds: "
        f"{_metric(work.flops)}FLOP at {_metric(ceilings.flop_per_s)}FLOP/s "
        f"({ceilings.rate_of}), "
        f"{_metric(work.bytes)}B at {_metric(ceilings.bytes_per_s)}B/s"
    )


def _metric(value: float) -> str:
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{number(value / scale)} {prefix}"
    return f"{number(value)} "


def extra_columns(
    rows: Sequence[Row], floor: Floor | None
) -> list[tuple[str, Callable[[Row], str]]]:
    """Heading and text of the columns that not every case has."""
    columns: list[tuple[str, Callable[[Row], str]]] = []
    if any(row.images is not None for row in rows):
        columns.append(("images/s", lambda row: images_per_s(row.images_per_s)))
    if floor is not None:
        columns.append(("floor / time", lambda row: percent(floor.share(row))))
    if any(row.agreement is not None for row in rows):
        columns.append(("same labels", lambda row: agreement(row.agreement)))
    return columns


def table(case: str, rows: Sequence[Row], floor: Floor | None = None) -> list[str]:
    """Lines of a readable table, the floor beneath the case's name."""
    width = max(len(row.contestant) for row in rows)
    extra = extra_columns(rows, floor)
    lines = [case]
    if floor is not None:
        lines.append(f"  {floor_text(floor)}")
    heading = f"  {'':{width}}  {'median ms':>10} {'p20':>9} {'p80':>9} {'ratio':>9} {'MiB':>9}"
    lines.append(heading + "".join(f" {name:>13}" for name, _ in extra))
    for row in rows:
        if row.not_run is not None:
            lines.append(f"  {row.contestant:{width}}  not run: {row.not_run}")
            continue
        times = [milliseconds(ms) for ms in (row.ms, row.ms_p20, row.ms_p80)]
        line = (
            f"  {row.contestant:{width}}  {times[0]:>10} {times[1]:>9} {times[2]:>9} "
            f"{ratio(row.ratio):>9} {mebibytes(row.peak_mib):>9}"
        )
        lines.append(line + "".join(f" {text(row):>13}" for _, text in extra))
    return lines
