"""Turn the result files of a machine into a page: benchmarks/results/<machine>/README.md.

    python -m benchmarks.report                     # every machine under benchmarks/results
    python -m benchmarks.report results/my-machine  # one folder of result files

With matplotlib (the [plot] extra) the page begins with a picture of the ratios.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent))

from records import (
    PACKAGES,
    RESULTS,
    Floor,
    Record,
    Row,
    extra_columns,
    floor_text,
    mebibytes,
    milliseconds,
    ratio,
    read,
)

PAGE, PICTURE, MODELS = "README.md", "ratios.svg", "models.png"
YARDSTICK = {"marker": "|", "ms": 8, "mew": 1.2, "mec": "black"}
"""How the picture marks one."""
LABELS = {
    "cpu": "processor",
    "cores": "cores",
    "threads": "threads used",
    "torch_simd": "PyTorch's instruction set",
    "gpu": "GPU",
    "system": "system",
    "python": "Python",
    "torch": "PyTorch",
    **{name: name for name in PACKAGES},
    "segmenter_fast": "segmenter_fast",
    "native": "native kernels",
    "commit": "commit",
}


# ------------------------------------------------------------------------------------- the page
def page(records: Sequence[Record], kind: str, picture: str | None = None) -> str:
    """Markdown of one machine's results.

    Args:
        records: of this machine.
        kind: the folder's name.
        picture: file name of the picture of ratios; None leaves it out.
    """
    shared, differing = _machine(records)
    lines = [
        f"# {kind}",
        "",
        "Written by `python -m benchmarks.report` from the JSON files beside it. How the figures",
        "are made: [benchmarks](../../README.md).",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in shared.items()),
        *_ceilings(records),
    ]
    if picture is not None:
        lines += ["", f"![Ratio to the quickest peer, by case]({picture})"]
    for record, own in zip(records, differing, strict=True):
        lines += ["", f"## {record.benchmark}"]
        if own:
            lines += ["", ", ".join(f"{name} {value}" for name, value in own.items()) + "."]
        for case, rows in record.cases.items():
            lines += ["", f"### {_escape(case)}", "", *_rows(rows, record.floors.get(case))]
    return "\n".join(lines) + "\n"


def _machine(records: Sequence[Record]) -> tuple[dict[str, str], list[dict[str, str]]]:
    """What all runs share, and what each has besides."""
    texts = [
        {
            label: _machine_text(key, record.machine[key])
            for key, label in LABELS.items()
            if record.machine.get(key) is not None
        }
        for record in records
    ]
    shared = {
        label: text
        for label, text in texts[0].items()
        if all(other.get(label) == text for other in texts)
    }
    return shared, [{k: v for k, v in text.items() if k not in shared} for text in texts]


def _machine_text(key: str, value: Any) -> str:
    if key == "native":
        build = [value.get("simd_level"), value.get("compiler"), value.get("compiler_version")]
        return " ".join(str(part) for part in build if part)
    return f"`{value}`" if key == "commit" else str(value)


def _ceilings(records: Iterable[Record]) -> list[str]:
    """The span of what was measured, by device: every run measures its own."""
    lines = []
    floors = [floor for record in records for floor in record.floors.values()]
    for device in dict.fromkeys(floor.device for floor in floors):
        found = [floor.ceilings for floor in floors if floor.device == device]
        for rate_of in dict.fromkeys(ceilings.rate_of for ceilings in found):
            rates = _span([c.flop_per_s / 1e9 for c in found if c.rate_of == rate_of])
            lines.append(f"| {device}, {rate_of} | {rates} GFLOP/s |")
        bandwidths = _span([ceilings.bytes_per_s / 1e9 for ceilings in found])
        lines.append(f"| {device}, copy, read + write | {bandwidths} GB/s |")
    return lines


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"


def _rows(rows: Sequence[Row], floor: Floor | None) -> list[str]:
    extra = extra_columns(rows, floor)
    heading = ["", "ms", "p20 to p80", "ratio", "MiB", *(name for name, _ in extra)]
    lines = [_line(heading), _line(["---"] + ["---:"] * (len(heading) - 1))]
    for row in rows:
        if row.not_run is not None:
            reason = f"not run: {_escape(row.not_run)}"
            lines.append(_line([_escape(row.contestant), reason, *[""] * (len(heading) - 2)]))
            continue
        cells = [
            _escape(row.contestant),
            milliseconds(row.ms),
            f"{milliseconds(row.ms_p20)} to {milliseconds(row.ms_p80)}",
            _ratio(row),
            _escape(mebibytes(row.peak_mib)),
            *(text(row) for _, text in extra),
        ]
        lines.append(_line(cells))
    if floor is not None:
        text = floor_text(floor)
        lines += ["", f"{text[0].upper()}{text[1:]}."]
    return lines


def _ratio(row: Row) -> str:
    """Ours in bold, a yardstick's in italics."""
    mark = "**" if is_ours(row) else "*" if row.yardstick and row.ratio is not None else ""
    return f"{mark}{ratio(row.ratio)}{mark}"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def is_ours(row: Row) -> bool:
    """Whether a row with a ratio is neither peer nor yardstick.

    In files that do not say, whether it beats the peers.
    """
    if row.ratio is None or row.yardstick:
        return False
    return row.ratio > 1 if row.peer is None else not row.peer


# ------------------------------------------------------------------------------------- the picture
def draw(records: Sequence[Record], path: Path) -> bool:
    """Draw each case's ratios on one logarithmic axis; False if there are none.

    A bar is our quickest form, with a line from its 20th to its 80th percentile; dots are our other
    forms, circles the peers, strokes the yardsticks.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "segmenter_fast"  # equal figures, equal files
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator

    groups = []
    for record in records:
        cases = {
            case: [row for row in rows if row.ratio is not None]
            for case, rows in record.cases.items()
        }
        cases = {case: rows for case, rows in cases.items() if any(map(is_ours, rows))}
        if cases:
            groups.append((record.benchmark, cases))
    if not groups:
        return False

    colours = plt.get_cmap("Dark2").colors
    height, positions = 0.0, []
    for _, cases in groups:
        positions.append([height + 0.9 + i for i in range(len(cases))])
        height += 0.9 + len(cases)
    drawn = [row for _, cases in groups for rows in cases.values() for row in rows]
    ratios, yardsticks = [row.ratio for row in drawn], any(row.yardstick for row in drawn)

    figure, axes = plt.subplots(figsize=(9, 0.9 + 0.42 * height), layout="constrained")
    axes.set_xscale("log")
    axes.set_xlim(min(0.5, 0.8 * min(ratios)), 1.9 * max(*ratios, 1))
    axes.set_ylim(height + 0.1, -0.1)  # downwards
    left = axes.get_xlim()[0]
    background = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # over the grid
    for i, ((benchmark, cases), places) in enumerate(zip(groups, positions, strict=True)):
        colour = colours[i % len(colours)]
        axes.text(left, places[0] - 0.85, f" {benchmark}", va="center", weight="bold", color=colour)
        for (case, rows), y in zip(cases.items(), places, strict=True):
            best = max((row for row in rows if is_ours(row)), key=lambda row: row.ratio)
            axes.barh(y, best.ratio - 1, left=1, height=0.32, color=colour, zorder=2)
            end = best.ratio
            if best.ratio_p20 is not None and best.ratio_p80 is not None:
                axes.plot([best.ratio_p20, best.ratio_p80], [y, y], color="black", lw=1, zorder=3)
                end = max(end, best.ratio_p80)
            for mark, others in (
                ({"mfc": colour, "mec": "white"}, [r.ratio for r in rows if is_ours(r)]),
                (
                    {"mfc": "white", "mec": "black"},
                    [r.ratio for r in rows if not is_ours(r) and not r.yardstick],
                ),
                (YARDSTICK, [r.ratio for r in rows if r.yardstick]),
            ):
                others = [value for value in others if value != best.ratio]
                style = {"marker": "o", "ms": 4.5, "mew": 0.8} | mark
                axes.plot(others, [y] * len(others), ls="", zorder=4, **style)
            axes.text(
                max(end, 1) * 1.06,
                y,
                ratio(best.ratio),
                va="center",
                weight="bold",
                fontsize=9,
                color=colour,
            )
            axes.text(1.02, y - 0.33, case, va="center", fontsize=8, zorder=5, bbox=background)
    axes.axvline(1, color="black", lw=1, zorder=3)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
    axes.xaxis.set_minor_locator(LogLocator(subs=range(1, 10)))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda x, _: ""))
    axes.grid(axis="x", color="gainsboro", lw=0.7, zorder=0)
    axes.set_yticks([])
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel("times faster than the quickest peer (logarithmic)")
    axes.legend(
        handles=[
            Line2D([], [], color="gray", lw=6, label="ours, quickest form"),
            Line2D([], [], color="black", lw=1, label="p20 to p80"),
            Line2D([], [], ls="", marker="o", mfc="gray", mec="white", label="our other forms"),
            Line2D([], [], ls="", marker="o", mfc="white", mec="black", label="peers", ms=4.5),
            *([Line2D([], [], ls="", label="yardsticks", **YARDSTICK)] if yardsticks else []),
        ],
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=4 + yardsticks,
        frameon=False,
        fontsize=8,
    )
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return True


def draw_models(record: Record, path: Path) -> bool:
    """Draw images per second of whole models by contestant; False if there are none.

    A panel for each model, a colour for each precision: strong for ours, pale for peers.
    """
    from matplotlib.figure import Figure

    cases = {
        case: [row for row in rows if row.images_per_s is not None]
        for case, rows in record.cases.items()
    }
    names = list(dict.fromkeys(row.contestant for rows in cases.values() for row in rows))
    if not names:
        return False

    def precision_of(name: str) -> str:
        return name.rsplit(", ", 1)[-1]

    precisions = list(dict.fromkeys(map(precision_of, names)))
    names.sort(key=lambda name: precisions.index(precision_of(name)))  # keeps their order
    colours = dict(zip(precisions, ("#2166ac", "#1b7837", "#b35806", "#762a83"), strict=False))

    figure = Figure(figsize=(4.2 + 3.1 * len(cases), 1.1 + 0.27 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(cases), sharey=True, squeeze=False)[0]
    for axes, (case, rows) in zip(panels, cases.items(), strict=True):
        for row in rows:
            y = names.index(row.contestant)
            colour = colours.get(precision_of(row.contestant), "#555555")
            axes.barh(y, row.images_per_s, color=colour, alpha=0.9 if is_ours(row) else 0.35)
            weight = "bold" if is_ours(row) else "normal"
            text = f" {row.images_per_s:.3g}"
            axes.text(row.images_per_s, y, text, va="center", fontsize=8, weight=weight)
        axes.set_title(case.split(", ")[0], fontsize=10)
        axes.set_xlabel("images per second", fontsize=9)
        axes.set_xlim(0, 1.18 * max(row.images_per_s for row in rows))
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=110)
    return True


# ------------------------------------------------------------------------------------- the command
def write_page(folder: Path, picture: bool = True) -> list[Path]:
    """Write a folder's page, and its picture if asked for; return what was written.

    Raises:
        ValueError: no result file there, or one that is none.
        ImportError: a picture without matplotlib.
    """
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise ValueError(f"no result files in {folder}")
    records = [read(path) for path in paths]
    drawn = picture and draw(records, folder / PICTURE)
    (folder / PAGE).write_text(
        page(records, folder.resolve().name, PICTURE if drawn else None), encoding="utf-8"
    )
    written = [folder / PAGE] + [folder / PICTURE] * drawn
    for record in records:
        if picture and record.benchmark == "model" and draw_models(record, folder / MODELS):
            written.append(folder / MODELS)
    return written


def report(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders of result files; all machines if none is named."),
    ] = None,
    plot: Annotated[
        bool, typer.Option(help="Draw the ratios, too; needs matplotlib, the [plot] extra.")
    ] = True,
) -> None:
    """Write README.md, and a picture of the ratios, beside the result files of a machine."""
    # results.json is what training runs write: benchmarks.ablations, benchmarks.curves.
    timed = (path for path in RESULTS.glob("*/*.json") if path.name != "results.json")
    folders = folders or sorted({path.parent for path in timed})
    try:
        for folder in folders:
            for path in write_page(folder, plot):
                typer.echo(f"written: {path}")
    except ImportError as error:
        typer.echo(f"{error}: install segmenter_fast[plot], or add --no-plot", err=True)
        raise typer.Exit(2) from None
    except (OSError, ValueError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    typer.run(report)
