"""The commands that draw the paper's analyses; importing this adds them to `segmenter-fast`.

As in cli.py, every command imports what it needs when it runs.
"""

import contextlib
import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from segmenter_fast.cli import (
    Backend,
    BackendOption,
    ClassNamesOption,
    Data,
    DataSeedOption,
    DatasetKind,
    DebugOption,
    DeviceOption,
    NumClassesOption,
    RootOption,
    SceneSizeOption,
    ThreadsOption,
    WeightsOption,
    _check_output,
    _classes_of,
    _image_suffixes,
    _numbers,
    _pictures_in,
    _pixels_or,
    _prepare,
    _reported,
    _size,
    _typed,
    _usage,
    _write_text,
    app,
)

HELP_PANEL = "Analyses"
MAX_CLASSES = 11  # with the picture twelve panels: three rows of four

ImageArgument = Annotated[Path, typer.Argument(metavar="IMAGE", help="Picture.")]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="Picture to write; it is replaced. Beside IMAGE with a name that says what it shows "
        "unless given.",
        show_default=False,
    ),
]
JsonOption = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write the numbers as JSON, too; replaces FILE."),
]
PanelOption = Annotated[
    int, typer.Option(min=32, metavar="PIXELS", help="Longer side of each panel.")
]
ViewOption = Annotated[
    str | None,
    typer.Option(
        "--short-side",
        metavar="PIXELS|original",
        help="The network sees the whole picture at once, its shorter side resized to this; "
        "'original' leaves it. The side of the weights' sliding window unless given: then as many "
        "patches lie along it as in training.",
    ),
]


def _check_json(path: Path | None, output: Path, inputs: Sequence[Path] = ()) -> None:
    """As `_check_output`, for the numbers of a picture `output`."""
    if path is None:
        return
    if path.resolve() == output.resolve():
        raise ValueError(f"--json and --output are both {path}: give two files")
    _check_output("--json", path, inputs)


def _figure_suffixes() -> set[str]:
    """Suffixes of the figures that matplotlib can write."""
    from matplotlib.figure import Figure

    return {f".{kind}" for kind in Figure().canvas.get_supported_filetypes()}


@contextlib.contextmanager
def _needs_plot_extra():
    """Report a missing matplotlib as an expected error, before anything is computed."""
    from segmenter_fast.figures import require_matplotlib

    try:
        yield require_matplotlib()
    except ImportError as error:
        raise ValueError(str(error)) from error


def _class_number(names: Sequence[str], wanted: str) -> int:
    """Number of a class by its name, in any case, or by its number."""
    known = {name.casefold(): number for number, name in reversed(list(enumerate(names)))}
    if wanted.casefold() in known:
        return known[wanted.casefold()]
    if wanted.isdecimal() and int(wanted) < len(names):
        return int(wanted)
    close = difflib.get_close_matches(wanted.casefold(), known, n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else f": {', '.join(names[:20])}"
    more = ", ..." if not close and len(names) > 20 else ""
    raise _usage("--class", f"the weights know no class {wanted!r}{hint}{more}")


def _json_text(content: dict) -> str:
    return json.dumps(content, indent=2) + "\n"


@app.command(rich_help_panel=HELP_PANEL)
@_reported
def attention(
    image: ImageArgument,
    weights: WeightsOption = "street",
    layer: Annotated[
        int, typer.Option(help="Layer, from 0; negative numbers count from the last.")
    ] = -1,
    patch: Annotated[
        str | None,
        typer.Option(
            metavar="X,Y", help="Attention from the patch that holds this pixel of the picture."
        ),
    ] = None,
    cls: Annotated[
        bool,
        typer.Option(
            "--cls",
            help="From the class token; with --decoder from the embedding of each class that is "
            f"found in the picture, the {MAX_CLASSES} largest, averaged over the heads.",
        ),
    ] = False,
    class_name: Annotated[
        str | None,
        typer.Option(
            "--class",
            metavar="NAME|NUMBER",
            help="With --decoder: from the embedding of this class, head by head.",
        ),
    ] = None,
    decoder: Annotated[
        bool, typer.Option("--decoder", help="Of the mask transformer instead of the encoder.")
    ] = False,
    short_side: ViewOption = None,
    alpha: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Strength of the colours; 0 is the picture in grey."),
    ] = 0.9,
    panel: PanelOption = 400,
    output: OutputOption = None,
    backend: BackendOption = Backend.auto,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    debug: DebugOption = False,
) -> None:
    """Draw what a patch, the class token or a class attends to in a picture.

    One picture with the mean of the heads and each head of a layer over it. A
    head's title says how much of its attention is on patches; the rest is on
    the class token, or in the decoder on the classes. Only the rows of attention
    that are shown are computed.

    \b
    segmenter-fast attention photo.jpg --patch 320,240 --layer 0
    segmenter-fast attention photo.jpg --cls
    segmenter-fast attention photo.jpg --decoder --class road -o road.png
    """  # noqa: D301
    if sum((patch is not None, cls, class_name is not None)) != 1:
        raise _usage("--patch", "give one of --patch X,Y, --cls and, with --decoder, --class NAME")
    if class_name is not None and not decoder:
        raise _usage("--class", "only the decoder has classes: add --decoder")
    pixel = None
    if patch is not None:
        pixel = _numbers("--patch", patch, int, "two numbers X,Y")
        if len(pixel) != 2:
            raise _usage("--patch", f"expected two numbers X,Y, got {patch!r}")
    side = _pixels_or("--short-side", "original", short_side)

    from segmenter_fast.images import load_image

    picture = load_image(image)
    # Its name beside the picture depends on the weights; whether it can be written does not.
    suffixes = _image_suffixes()
    _check_output(
        "--output", output or image.with_name(f"{image.stem}.attention.png"), [image], suffixes
    )
    chosen = _prepare(device, backend, threads)

    from segmenter_fast.analysis import PatchGrid, attention_rows, check_mask_decoder, whole_view
    from segmenter_fast.figures import attention_page
    from segmenter_fast.model import SegmenterModel
    from segmenter_fast.visualize import save_image

    model = SegmenterModel.from_pretrained(weights, backend=backend.value, device=chosen)
    names = _classes_of(model.config).names
    if decoder:
        check_mask_decoder(model)
    view = whole_view(model, picture, side)
    grid = PatchGrid.of(view, model.patch_size)
    patches = grid.rows * grid.columns
    first = 0 if decoder else model.encoder.num_extra_tokens
    place = None
    if pixel is not None:
        place = grid.at(tuple(pixel), (picture.height, picture.width))
        queries = [first + place[0] * grid.columns + place[1]]
        source, what = f"patch in row {place[0]}, column {place[1]}", f"patch-{pixel[0]}-{pixel[1]}"
    elif class_name is not None:
        number = _class_number(names, class_name)
        queries, source = [patches + number], f"class {names[number]}"
        what = re.sub(r"\W+", "-", names[number]).strip("-")
    elif decoder:
        counts = model.labels(view).flatten().bincount(minlength=model.n_cls)
        order = counts.argsort(descending=True, stable=True)[:MAX_CLASSES].tolist()
        classes = [number for number in order if counts[number] >= 0.001 * counts.sum()]
        queries, source = [patches + number for number in classes], "each class, mean of the heads"
        what = "cls"
    else:
        queries, source, what = [0], "class token", "cls"

    rows = attention_rows(model, view, layer, queries, decoder)[0].cpu()
    on_patches = rows[:, :, first : first + patches]
    maps = on_patches.unflatten(-1, (grid.rows, grid.columns))
    if decoder and cls:
        panels = [
            (f"{names[number]}, {100 * float(counts[number] / counts.sum()):.1f} %", map_)
            for number, map_ in zip(classes, maps.mean(0), strict=True)
        ]
    else:
        shares = on_patches.sum(-1)[:, 0]
        panels = [(f"mean, {100 * shares.mean():.0f} % on patches", maps[:, 0].mean(0))]
        panels += [
            (f"head {head}, {100 * share:.0f} %", map_)
            for head, (share, map_) in enumerate(zip(shares, maps[:, 0], strict=True))
        ]
    part = "decoder" if decoder else "encoder"
    depth = layer % (model.decoder if decoder else model.encoder).n_layers
    if output is None:
        output = image.with_name(f"{image.stem}.attention-{part}-{depth}-{what}.png")
        _check_output("--output", output, [image], suffixes)
    title = f"{weights}, {part} layer {depth}: attention from the {source}"
    if decoder and cls:
        title = f"{weights}, {part} layer {depth}: attention from {source}; shares of the picture"
    save_image(output, attention_page(picture, panels, grid, title, alpha, place, panel))
    height, width = view.shape[2:]
    typer.echo(
        f"{title}\nseen at {height} x {width} pixels, {grid.rows} x {grid.columns} patches of "
        f"{model.patch_size}\nwritten to {output}"
    )


@app.command("attended-area", rich_help_panel=HELP_PANEL)
@_reported
def attended_area(
    ctx: typer.Context,
    inputs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="IMAGE|FOLDER", help="Pictures, or folders of them.", show_default=False
        ),
    ] = None,
    weights: WeightsOption = "street",
    dataset: Annotated[
        DatasetKind | None,
        typer.Option(help="A dataset instead of pictures.", show_default=False),
    ] = None,
    root: RootOption = None,
    split: Annotated[
        str, typer.Option(help="'train' or 'val'; a sub-folder for 'folder' and 'camvid'.")
    ] = "val",
    limit: Annotated[
        int, typer.Option(min=1, help="At most so many images, evenly over all of them.")
    ] = 32,
    class_names: ClassNamesOption = None,
    num_classes: NumClassesOption = None,
    scene_size: SceneSizeOption = None,
    data_seed: DataSeedOption = 0,
    short_side: ViewOption = None,
    recursive: Annotated[
        bool, typer.Option("--recursive", "-r", help="Look into sub-folders of a folder.")
    ] = False,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Figure to write (.png, .svg, .pdf), and the numbers beside it as .json; both are "
            "replaced.",
        ),
    ] = Path("attended_area.png"),
    backend: BackendOption = Backend.auto,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    debug: DebugOption = False,
) -> None:
    """Measure how far each head of the encoder looks, layer by layer.

    The mean distance between a patch and what it attends to, weighted by the
    attention, over patches and images; in pixels of what the network sees.
    Needs matplotlib, which the extra 'plot' brings.

    \b
    segmenter-fast attended-area photos --weights street
    segmenter-fast attended-area --dataset camvid --root camvid --limit 16
    """  # noqa: D301
    if bool(inputs) == (dataset is not None):
        raise _usage("IMAGE", "give pictures or folders, or else a --dataset")
    side = _pixels_or("--short-side", "original", short_side)
    size = _size("--scene-size", scene_size)
    numbers = output.with_suffix(".json")
    if numbers == output:
        raise _usage("--output", f"expected a figure such as name.png, got {output}")
    if dataset is not None:
        data = Data(dataset, root, class_names, num_classes, 255, size, data_seed)
        data.check(_typed(ctx))
    pictures = []
    for given in inputs or ():
        found = _pictures_in(given, recursive) if given.is_dir() else [(given, Path())]
        pictures += [path for path, _ in found]
    with _needs_plot_extra():
        _check_output("--output", output, pictures, _figure_suffixes())
    _check_output("--output", numbers, pictures)
    chosen = _prepare(device, backend, threads)

    with _needs_plot_extra():
        import torch
        from tqdm import tqdm

        from segmenter_fast.analysis import (
            mean_attention_distance,
            uniform_attention_distance,
            whole_view,
        )
        from segmenter_fast.data.folder import spread
        from segmenter_fast.evaluate import picture_of
        from segmenter_fast.figures import attended_area_figure
        from segmenter_fast.images import load_image
        from segmenter_fast.model import SegmenterModel, whole_patches

    model = SegmenterModel.from_pretrained(weights, backend=backend.value, device=chosen)
    config = model.config
    if dataset is None:
        samples, source = spread(pictures, limit), "pictures"
    else:
        samples = spread(data.split(split, limit, config.image_size, _classes_of(config)), limit)
        source = f"{dataset.value}, {split}"
    sizes = []

    def views():
        for index in tqdm(range(len(samples)), desc="attended area", unit="image"):
            # The picture alone: a label map is not looked at, and may be missing or damaged.
            file = samples[index] if dataset is None else picture_of(samples, index)
            image = samples[index][0] if file is None else load_image(file)
            try:
                view = whole_view(model, image, side)
            except ValueError as error:
                raise ValueError(f"{file or f'image {index}'}: {error}") from error
            sizes.append(tuple(view.shape[2:]))
            yield view

    distances = mean_attention_distance(model, views())
    grids = [whole_patches(size, model.patch_size) for size in sizes]
    uniform = sum(uniform_attention_distance(g, model.patch_size) for g in grids) / len(grids)
    many = f"{len(sizes)} image{'s' * (len(sizes) != 1)}"
    seen = sorted(set(sizes))
    at = f"{seen[0][0]} x {seen[0][1]}" if len(seen) == 1 else f"{len(seen)} sizes"
    title = f"Size of attended area: {weights}\n{many} ({source}), seen at {at} pixels"
    attended_area_figure(output, distances, uniform, title)
    content = {
        "weights": weights,
        "source": source,
        "images": len(sizes),
        "sizes": [list(size) for size in seen],
        "patch_size": model.patch_size,
        "unit": "pixels",
        "mean_attention_distance": distances.tolist(),
        "uniform": uniform,
        "torch": torch.__version__,
    }
    _write_text(numbers, _json_text(content))

    from rich.console import Console
    from rich.table import Table

    table = Table(title="mean attention distance in pixels", title_justify="left")
    for column in ("layer", "least", "mean of the heads", "most"):
        table.add_column(column, justify="right")
    for number, row in enumerate(distances):
        table.add_row(str(number), f"{row.min():.1f}", f"{row.mean():.1f}", f"{row.max():.1f}")
    Console().print(table)
    typer.echo(f"attention spread evenly: {uniform:.1f}\nwritten to {output} and {numbers}")


@app.command("class-embeddings", rich_help_panel=HELP_PANEL)
@_reported
def class_embeddings(
    weights: WeightsOption = "street",
    image: Annotated[
        Path | None,
        typer.Option(
            help="What the decoder makes of the embeddings for this picture, instead of the "
            "learnt ones.",
            show_default=False,
        ),
    ] = None,
    short_side: ViewOption = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Figure (.png, .svg, .pdf); it is replaced."
        ),
    ] = Path("class_embeddings.png"),
    json_file: JsonOption = None,
    backend: BackendOption = Backend.auto,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    debug: DebugOption = False,
) -> None:
    """Draw the mask transformer's class embeddings in the plane that shows most of them.

    The embeddings less their mean, projected on their first two singular
    directions. Classes that lie together are alike to the network. Needs
    matplotlib, which the extra 'plot' brings.

    \b
    segmenter-fast class-embeddings --weights Seg-B-Mask/16
    segmenter-fast class-embeddings --image photo.jpg -o photo_classes.svg
    """  # noqa: D301
    side = _pixels_or("--short-side", "original", short_side)
    inputs = [] if image is None else [image]
    with _needs_plot_extra():
        _check_output("--output", output, inputs, _figure_suffixes())
    _check_json(json_file, output, inputs)
    chosen = _prepare(device, backend, threads)

    with _needs_plot_extra():
        from segmenter_fast.analysis import class_embedding_projection
        from segmenter_fast.figures import class_embedding_figure
        from segmenter_fast.images import load_image
        from segmenter_fast.model import SegmenterModel
        from segmenter_fast.visualize import default_palette

    picture = None if image is None else load_image(image)
    model = SegmenterModel.from_pretrained(weights, backend=backend.value, device=chosen)
    projection = class_embedding_projection(model, picture, side)
    names, known_palette = _classes_of(model.config)
    palette = known_palette or default_palette(len(names))
    state = "learnt" if image is None else f"after the decoder, for {image.name}"
    class_embedding_figure(
        output, projection, names, palette, f"Class embeddings, {state}: {weights}"
    )
    if json_file is not None:
        content = {
            "weights": weights,
            "image": None if image is None else str(image),
            "share": projection.share.tolist(),
            "coordinates": dict(zip(names, projection.coordinates.tolist(), strict=True)),
        }
        _write_text(json_file, _json_text(content))
    shares = " and ".join(f"{100 * float(share):.0f} %" for share in projection.share)
    typer.echo(f"{len(names)} classes; the axes show {shares} of the spread\nwritten to {output}")


@app.command(rich_help_panel=HELP_PANEL)
@_reported
def compare(
    image: ImageArgument,
    more: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME|PATH", help="More weights.", show_default=False),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            "--weights",
            "-w",
            metavar="NAME|PATH",
            help="Weights to compare, as for 'predict'; give two at least, behind one --weights "
            "or each behind its own.",
            show_default=False,
        ),
    ] = None,
    panel: PanelOption = 480,
    output: OutputOption = None,
    json_file: JsonOption = None,
    backend: BackendOption = Backend.auto,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    debug: DebugOption = False,
) -> None:
    """Draw the label maps of several weights side by side, and count where they agree.

    Every model predicts by the protocol of its own weights (windows, resizing).
    Classes are matched by name, so the weights may know different ones.

    \b
    segmenter-fast compare photo.jpg --weights street runs/mine
    """  # noqa: D301
    chosen_weights = [*(weights or ()), *(more or ())]
    if len(chosen_weights) < 2:
        raise _usage("--weights", f"give two weights at least, got {len(chosen_weights)}")

    from segmenter_fast.images import load_image

    picture = load_image(image)
    output = output or image.with_name(f"{image.stem}.compare.png")
    _check_output("--output", output, [image], _image_suffixes())
    _check_json(json_file, output, [image])
    chosen = _prepare(device, backend, threads)

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from segmenter_fast import predict
    from segmenter_fast.analysis import compare_labels
    from segmenter_fast.figures import comparison_page
    from segmenter_fast.model import SegmenterModel
    from segmenter_fast.visualize import save_image

    labels, configs = [], []
    for name in chosen_weights:
        model = SegmenterModel.from_pretrained(name, backend=backend.value, device=chosen)
        labels.append(predict(model, picture).cpu())
        configs.append(model.config)
    compared = compare_labels(labels, configs)
    save_image(output, comparison_page(picture, chosen_weights, compared, panel))

    console = Console()
    table = Table(title="pixels of each class", title_justify="left")
    table.add_column("class")
    for name in chosen_weights:
        table.add_column(escape(name), justify="right")
    for number in compared.counts.sum(0).argsort(descending=True, stable=True).tolist():
        counts = compared.counts[:, number].tolist()
        if any(counts):
            table.add_row(escape(compared.class_names[number]), *(f"{n:,}" for n in counts))
    console.print(table)
    if len(chosen_weights) > 2:
        table = Table(title="share of pixels that agree", title_justify="left")
        table.add_column("")
        for name in chosen_weights:
            table.add_column(escape(name), justify="right")
        for name, row in zip(chosen_weights, compared.agreement, strict=True):
            table.add_row(escape(name), *(f"{100 * share:.2f} %" for share in row))
        console.print(table)
    everywhere = float(compared.unanimous.double().mean())
    if json_file is not None:
        content = {
            "image": str(image),
            "weights": chosen_weights,
            "agreement": compared.agreement.tolist(),
            "unanimous": everywhere,
            "pixels": {
                name: compared.counts[:, number].tolist()
                for number, name in enumerate(compared.class_names)
            },
        }
        _write_text(json_file, _json_text(content))
    typer.echo(f"agree on {100 * everywhere:.2f} % of the pixels\nwritten to {output}")
