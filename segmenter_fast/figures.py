"""Pictures of the analyses: attention, attended area, class embeddings, comparisons, trade-off.

What lies on pictures is drawn by Pillow, and diagrams by matplotlib, which is the `plot` extra and
is imported by the functions that need it.
"""

import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from segmenter_fast.analysis import Comparison, PatchGrid, Projection
from segmenter_fast.files import replacing
from segmenter_fast.visualize import colorize, side_by_side

# Dark violet to pale yellow, in equal steps of lightness: the order survives a black-and-white
# printer. Colours between these are interpolated.
_HEAT = np.array(
    [
        (0, 0, 4), (31, 12, 72), (85, 15, 109), (136, 34, 106), (186, 54, 85), (227, 89, 51),
        (249, 140, 9), (249, 201, 50), (252, 255, 164),
    ],
    dtype=np.float64,
)  # fmt: skip
_DIM = 0.7
_MARK = (0, 229, 255)
_DIFFERENT = (230, 0, 126)
_PAPER, _INK, _FAINT_INK, _RULE = "#ffffff", "#18181c", "#6e6e76", "#e4e4ea"
_AROUND = [math.pi / 6 * turn for turn in (0, 3, 6, 9, 1, 5, 7, 11, 2, 4, 8, 10)]
SCALE_TOP = 0.995
"""Quantile of a map at which its colours end."""


# Pictures ---------------------------------------------------------------------------------------


def _heat(values: np.ndarray) -> np.ndarray:
    """Colours (..., 3) of values in [0, 1]."""
    at = np.linspace(0.0, 1.0, len(_HEAT))
    return np.stack([np.interp(values, at, _HEAT[:, i]) for i in range(3)], axis=-1)


def _painted(grey: np.ndarray, values: np.ndarray, alpha: float) -> np.ndarray:
    """Colours over a darkened picture, which shows through where the values are small."""
    cover = alpha * np.sqrt(values)[..., None]
    return ((1 - cover) * _DIM * grey + cover * _heat(values) + 0.5).astype(np.uint8)


def attention_overlay(
    image: Image.Image,
    weights: Tensor,
    grid: PatchGrid,
    alpha: float = 0.9,
    patch: tuple[int, int] | None = None,
) -> Image.Image:
    """Lay attention over a grey picture: from nothing over violet to yellow for the most.

    Args:
        image: RGB.
        weights: (rows, columns) attention to the patches.
        grid: where the patches lie.
        alpha: cover of the strongest colours in [0, 1]; weaker ones are more transparent.
        patch: (row, column) to frame.

    Returns:
        RGB of the picture's size. The scale ends at the 99.5th percentile, so that one patch that
        draws everything to itself does not leave the rest in the dark.

    Raises:
        ValueError: not the attention of this grid, or alpha outside [0, 1].
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    if tuple(weights.shape) != (grid.rows, grid.columns):
        raise ValueError(
            f"weights must be ({grid.rows}, {grid.columns}) as the grid, got {tuple(weights.shape)}"
        )
    values = weights.detach().cpu().double().numpy()
    top = np.quantile(values, SCALE_TOP)
    values = np.clip(values / (top if top > 0 else 1.0), 0.0, 1.0)
    # Every pixel takes its own patch's value: nothing is smoothed.
    down = ((np.arange(image.height) + 0.5) / image.height / grid.height).astype(int)
    along = ((np.arange(image.width) + 0.5) / image.width / grid.width).astype(int)
    grey = np.asarray(image.convert("L"), dtype=np.float64)[:, :, None]
    page = Image.fromarray(_painted(grey, values[down[:, None], along], alpha))
    return page if patch is None else mark_patch(page, patch, grid)


def mark_patch(image: Image.Image, patch: tuple[int, int], grid: PatchGrid) -> Image.Image:
    """Frame the patch (row, column) of a picture."""
    page = image.copy()
    draw = ImageDraw.Draw(page)
    (row, column), line = patch, max(2, round(min(image.size) / 140))
    left, right = (round(at * grid.width * image.width) for at in (column, column + 1))
    top, bottom = (round(at * grid.height * image.height) for at in (row, row + 1))
    # The frame stands around the patch, whose attention to itself stays visible.
    for out, colour, width in ((2 * line, (0, 0, 0), line), (line, _MARK, line)):
        box = (left - out, top - out, right + out - 1, bottom + out - 1)
        draw.rectangle(box, outline=colour, width=width)
    return page


def attention_page(
    image: Image.Image,
    maps: Sequence[tuple[str, Tensor]],
    grid: PatchGrid,
    title: str,
    alpha: float = 0.9,
    patch: tuple[int, int] | None = None,
    panel: int = 400,
) -> Image.Image:
    """A picture followed by its attention maps, in rows.

    Args:
        image: RGB.
        maps: (title, (rows, columns) attention) of each map.
        grid: where the patches lie.
        title: above it all.
        alpha, patch: see `attention_overlay`; the patch is framed in every panel.
        panel: longer side of a panel in pixels.

    Returns:
        RGB.
    """
    factor = panel / max(image.size)
    shown = image.resize(tuple(max(1, round(side * factor)) for side in image.size))
    first = shown if patch is None else mark_patch(shown, patch, grid)
    panels = [("picture", first)]
    panels += [
        (name, attention_overlay(shown, values, grid, alpha, patch)) for name, values in maps
    ]
    columns = _columns(len(panels))
    rows = [side_by_side(panels[i : i + columns]) for i in range(0, len(panels), columns)]
    width = max(row.width for row in rows)
    return _stack([_heading(title, width), *rows, _scale_bar(alpha, width)])


def _columns(count: int) -> int:
    """Columns that leave the fewest holes in the last row; of equals, the most up to five."""
    if count <= 5:
        return count
    return min((5, 4, 3), key=lambda columns: -count % columns)


def _stack(rows: Sequence[Image.Image]) -> Image.Image:
    size = (max(row.width for row in rows), sum(row.height for row in rows))
    page = Image.new("RGB", size, _PAPER)
    top = 0
    for row in rows:
        page.paste(row, (0, top))
        top += row.height
    return page


def _heading(text: str, width: int) -> Image.Image:
    """A line of text, wrapped to the width."""
    font = ImageFont.load_default(size=18)
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width - 20 or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    strip = Image.new("RGB", (width, 24 * len(lines) + 10), _PAPER)
    ImageDraw.Draw(strip).multiline_text(
        (10, 10), "\n".join(lines), fill=_INK, font=font, spacing=4
    )
    return strip


def _scale_bar(alpha: float, width: int) -> Image.Image:
    """What the colours mean."""
    font = ImageFont.load_default(size=14)
    strip = Image.new("RGB", (width, 34), _PAPER)
    shades = np.broadcast_to(np.linspace(0.0, 1.0, 160), (12, 160))
    bar = Image.fromarray(_painted(np.full((12, 160, 1), 128.0), shades, alpha))
    draw = ImageDraw.Draw(strip)
    left = 10 + math.ceil(font.getlength("0")) + 8
    draw.text((10, 15), "0", fill=_INK, font=font, anchor="lm")
    strip.paste(bar, (left, 9))
    text = f"{100 * SCALE_TOP:g}th percentile of each map"
    draw.text((left + 168, 15), text, fill=_INK, font=font, anchor="lm")
    return strip


def comparison_page(
    image: Image.Image, names: Sequence[str], compared: Comparison, panel: int = 480
) -> Image.Image:
    """A picture, the label maps of several weights, and where they differ, with one legend.

    Args:
        image: RGB, of the label maps' size.
        names: of the weights.
        compared: see `compare_labels`.
        panel: longer side of a panel in pixels, at most; pictures are never enlarged.

    Returns:
        RGB. The legend has the share of each class in each map, in their order.
    """
    factor = min(1.0, panel / max(image.size))
    size = tuple(max(1, round(side * factor)) for side in image.size)

    def fit(picture: np.ndarray) -> Image.Image:
        return Image.fromarray(picture).resize(size, Image.Resampling.NEAREST)

    panels = [("picture", image.resize(size))]
    panels += [
        (name, fit(colorize(map_, compared.palette, void=-1)))
        for name, map_ in zip(names, compared.labels, strict=True)
    ]
    grey = np.asarray(image.convert("L").convert("RGB"))
    faint = 127.5 + 0.5 * grey
    same = compared.unanimous.numpy()
    faint[~same] = 0.3 * grey[~same] + 0.7 * np.array(_DIFFERENT)
    faint = faint.astype(np.uint8)
    panels.append((f"agree on {100 * same.mean():.1f} %", fit(faint)))
    shares = compared.counts.double() / same.size
    order = sorted(range(len(compared.class_names)), key=lambda k: -float(shares[:, k].sum()))
    legend = [
        (
            compared.palette[k],
            compared.class_names[k],
            " / ".join(f"{100 * float(share):.1f}" for share in shares[:, k]) + " %",
        )
        for k in order
        if shares[:, k].any()
    ]
    legend.append((_DIFFERENT, "where they differ", f"{100 * (1 - same.mean()):.1f} %"))
    columns = _columns(len(panels))
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    return _stack([side_by_side(row, legend if row is rows[-1] else ()) for row in rows])


# Diagrams ---------------------------------------------------------------------------------------


def require_matplotlib() -> None:
    """Raise ImportError, with what to install, unless matplotlib is there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'diagrams are drawn by matplotlib: pip install "segmenter_fast[plot]"'
        ) from error


def _figure(width: float, height: float):
    """A matplotlib figure of so many inches, and its axes in the style of the house."""
    figure, [axes] = _figures(width, height, 1)
    return figure, axes


def _figures(width: float, height: float, columns: int):
    """The same with several axes, side by side."""
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=200, layout="constrained")
    row = figure.subplots(1, columns, squeeze=False)[0]
    for axes in row:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_FAINT_INK)
        axes.tick_params(colors=_FAINT_INK, labelcolor=_INK, labelsize=9)
        axes.grid(color=_RULE, linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, row


def _save(figure, path: str | os.PathLike) -> None:
    """PNG, SVG or PDF by the suffix, whole or not at all."""
    path = Path(path)
    kind = path.suffix.lower().removeprefix(".")
    if kind not in figure.canvas.get_supported_filetypes():
        raise ValueError(f"no figure format is known for {path.name!r}; name it like 'name.png'")
    import matplotlib

    # Neither dates nor random names: equal figures are equal files.
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    salted = matplotlib.rc_context({"svg.hashsalt": "segmenter_fast"})
    with replacing(path) as temporary, salted:
        figure.savefig(temporary, format=kind, metadata=undated)


def attended_area_figure(
    path: str | os.PathLike, distances: Tensor, uniform: float, title: str
) -> None:
    """Draw the mean attention distance of each head over the depth of the network.

    Args:
        path: .png, .svg or .pdf to write.
        distances: (layers, heads) pixels; see `mean_attention_distance`.
        uniform: pixels, of attention that is spread evenly.
        title: above the figure.

    Raises:
        ImportError: matplotlib is missing.  ValueError: an unknown suffix.
    """
    layers, heads = distances.shape
    figure, axes = _figure(max(5.2, 2.2 + 0.36 * layers), 3.8)
    depth = np.arange(layers)
    # Heads have no order that means anything across layers: one colour for all of them.
    axes.scatter(
        depth.repeat(heads), distances.flatten(), s=34, c="#3b6fb6", alpha=0.75, linewidths=0,
        label="head", zorder=3,
    )  # fmt: skip
    axes.plot(depth, distances.mean(1), c="#d9542b", lw=1.6, label="mean of the heads", zorder=2)
    axes.axhline(uniform, c=_FAINT_INK, lw=1.0, ls=(0, (4, 3)), label="attention spread evenly")
    axes.set_xticks(depth[:: max(1, math.ceil(layers / 16))])
    axes.set_xlim(-0.5, layers - 0.5)
    axes.set_ylim(0, 1.12 * max(uniform, float(distances.max())))
    axes.set_xlabel("encoder layer", color=_INK)
    axes.set_ylabel("mean attention distance (pixels)", color=_INK)
    axes.set_title(title, loc="left", fontsize=10.5, color=_INK)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=3, frameon=False, fontsize=9)
    _save(figure, path)


def class_embedding_figure(
    path: str | os.PathLike,
    projection: Projection,
    class_names: Sequence[str],
    palette: Sequence[Sequence[int]],
    title: str,
) -> None:
    """Draw classes as named points in the plane of a projection.

    Args:
        path: .png, .svg or .pdf to write.
        projection: of two dimensions at least; the first two are drawn.
        class_names, palette: K names, of which the part before a comma is shown, and RGB colours.
        title: above the figure.

    Raises:
        ImportError: matplotlib is missing.  ValueError: an unknown suffix.
    """
    count = len(class_names)
    side = min(5.2 + count / 25, 11.0)
    figure, axes = _figure(1.1 * side, side)
    x, y = projection.coordinates[:, :2].T.numpy()
    axes.axhline(0, c=_RULE, lw=1.2, zorder=1)
    axes.axvline(0, c=_RULE, lw=1.2, zorder=1)
    axes.scatter(
        x, y, s=90 if count <= 40 else 36, c=np.asarray(palette) / 255, edgecolors=_FAINT_INK,
        linewidths=0.6, zorder=3,
    )  # fmt: skip
    for set_label, share, axis in zip(
        (axes.set_xlabel, axes.set_ylabel), projection.share, ("first", "second"), strict=False
    ):
        set_label(
            f"{axis} singular direction ({100 * float(share):.0f} % of the spread)", color=_INK
        )
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.14)
    axes.set_title(title, loc="left", fontsize=10.5, color=_INK)
    names = [name.split(",")[0] for name in class_names]
    _name_points(figure, axes, x, y, names, 9 if count <= 40 else 6.5)
    _save(figure, path)


# A patch's colour, a precision's line and a decoder's marker.
_PATCH_COLOURS = {8: "#1b7837", 16: "#2166ac", 32: "#b2182b"}
_OTHER_COLOUR = "#7f7f7f"
_PRECISION_LINES = {"float32": "-", "bfloat16": (0, (5, 2)), "float16": ":", "int8": (0, (1, 1.5))}
_DECODER_MARKERS = {"mask": "o", "linear": "s", "": "D"}


def tradeoff_figure(path: str | os.PathLike, rows: Sequence[dict[str, Any]], title: str) -> None:
    """Draw images per second (logarithmic) against mIoU: a curve for each patch size.

    Each decoder and precision has a curve of its own. Other architectures are points.

    Args:
        path: .png, .svg or .pdf to write.
        rows: of `tradeoff.rows_of` and `tradeoff.peer_rows`; those without a speed or an mIoU are
            left out.
        title: above the figure.

    Raises:
        ImportError: matplotlib is missing.  ValueError: no row has both, or an unknown suffix.
    """
    rows = [row for row in rows if row["images_per_second"] and row["miou"] is not None]
    if not rows:
        raise ValueError("nothing to draw: no row has both images per second and an mIoU")
    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    figure, columns = _figures(6.4 * len(datasets), 5.4, len(datasets))
    figure.suptitle(title, fontsize=10.5, color=_INK, x=0.01, ha="left")
    for axes, dataset in zip(columns, datasets, strict=True):
        _draw_tradeoff(axes, [row for row in rows if row["dataset"] == dataset])
    figure.legend(
        handles=_tradeoff_legend(rows), loc="outside lower center", ncols=6, frameon=False,
        fontsize=8.5,
    )  # fmt: skip
    for axes, dataset in zip(columns, datasets, strict=True):
        mine = [row for row in rows if row["dataset"] == dataset]
        # A model's name stands once, at its slowest precision.
        named: dict[str, dict[str, Any]] = {}
        for row in sorted(mine, key=lambda row: row["images_per_second"]):
            named.setdefault(row["model"], row)
        _name_points(
            figure,
            axes,
            np.array([row["images_per_second"] for row in mine]),
            np.array([row["miou"] for row in mine]),
            [row["model"] if named[row["model"]] is row else "" for row in mine],
            6.5,
        )
    _save(figure, path)


def _draw_tradeoff(axes, rows: Sequence[dict[str, Any]]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    groups = dict.fromkeys((r["patch"], r["decoder"], r["precision"]) for r in rows)
    for patch, decoder, precision in groups:
        points = sorted(
            (r["images_per_second"], r["miou"])
            for r in rows
            if (r["patch"], r["decoder"], r["precision"]) == (patch, decoder, precision)
        )
        axes.plot(
            *zip(*points, strict=True),
            ls=_PRECISION_LINES[precision] if decoder else "",
            lw=1.2,
            color=_PATCH_COLOURS.get(patch, _OTHER_COLOUR),
            marker=_DECODER_MARKERS[decoder],
            markersize=4.5,
            zorder=3 if decoder else 2,
        )
    kinds = ", ".join(dict.fromkeys(row["kind"] for row in rows))
    axes.set_xscale("log")
    axes.set_xlabel("images per second, batch 1", color=_INK)
    axes.set_ylabel(f"mIoU on {rows[0]['dataset']} ({kinds})", color=_INK)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(0.1)


def _tradeoff_legend(rows: Sequence[dict[str, Any]]) -> list:
    from matplotlib.lines import Line2D

    ours = [row for row in rows if row["decoder"]]
    handles = [
        Line2D(
            [], [], color=_PATCH_COLOURS.get(patch, _OTHER_COLOUR), lw=2.5, label=f"patch {patch}"
        )
        for patch in sorted({row["patch"] for row in ours})
    ]
    handles += [
        Line2D([], [], color=_INK, ls="", marker=_DECODER_MARKERS[decoder], label=label)
        for decoder, label in (("mask", "mask transformer"), ("linear", "linear decoder"))
        if any(row["decoder"] == decoder for row in ours)
    ]
    handles += [
        Line2D([], [], color=_INK, lw=1.2, ls=line, label=precision)
        for precision, line in _PRECISION_LINES.items()
        if any(row["precision"] == precision for row in ours)
    ]
    if len(ours) < len(rows):
        others = ", ".join(dict.fromkeys(r["precision"] for r in rows if not r["decoder"]))
        label = f"others in PyTorch, {others}"
        marker = _DECODER_MARKERS[""]
        handles.append(Line2D([], [], color=_OTHER_COLOUR, ls="", marker=marker, label=label))
    return handles


def _name_points(figure, axes, x, y, names: Sequence[str], size: float) -> None:
    """Put each name beside its point where it covers no other name and no point; "" is no name."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.draw_without_rendering()
    renderer = FigureCanvasAgg(figure).get_renderer()
    # All lengths in points, which are the same in every file format.
    point = 72 / figure.dpi
    places = axes.transData.transform(np.stack([x, y], axis=1)) * point
    frame = axes.get_window_extent(renderer)
    frame = [side * point for side in (frame.x0, frame.y0, frame.x1, frame.y1)]
    dot = 1.1 * size
    taken = [(px - dot / 2, py - dot / 2, px + dot / 2, py + dot / 2) for px, py in places]
    for i, name in enumerate(names):
        if not name:
            continue
        text = axes.annotate(
            name, (x[i], y[i]), (0, 0), textcoords="offset points", fontsize=size,
            color=_INK, ha="center", va="center", zorder=4,
        )  # fmt: skip
        extent = text.get_window_extent(renderer)
        half = (extent.width * point / 2, extent.height * point / 2)
        # Right, above, left, below, then between them; then all that a little further out.
        for ring, angle in itertools.product(range(40), _AROUND):
            reach = 0.75 * dot + 0.4 * size * ring
            dx = math.cos(angle) * (reach + half[0])
            dy = math.sin(angle) * (reach + half[1])
            middle = (places[i, 0] + dx, places[i, 1] + dy)
            box = (*np.subtract(middle, half), *np.add(middle, half))
            inside = frame[0] < box[0] and frame[1] < box[1] and box[2] < frame[2]
            if inside and box[3] < frame[3] and not any(_overlap(box, other) for other in taken):
                break
        taken.append(box)
        text.set_position((dx, dy))
        if ring > 1:
            # A line from the point to the edge of the name, not through it.
            short = 1 - min(h / abs(d) for h, d in zip(half, (dx, dy), strict=True) if d)
            axes.annotate(
                "", (x[i], y[i]), (dx * short, dy * short), textcoords="offset points", zorder=2,
                arrowprops={"arrowstyle": "-", "color": _FAINT_INK, "lw": 0.5},
            )  # fmt: skip


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two boxes (left, bottom, right, top) share any area."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
