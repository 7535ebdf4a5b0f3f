"""`segmenter-fast tradeoff`; importing this adds it to the command line."""

import platform
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
    _check_folder,
    _classes_of,
    _cpu_name,
    _numbers,
    _prepare,
    _reported,
    _size,
    _typed,
    _usage,
    _version_of,
    app,
)
from segmenter_fast.cli_analysis import HELP_PANEL


def _measured(sources, data: Data, network_options, precisions, limit):
    """Tasks of weights, each with the mIoU that it has on the data."""
    from torch.utils.data import Subset

    from segmenter_fast.backend import BackendError
    from segmenter_fast.data.folder import spread
    from segmenter_fast.evaluate import evaluate
    from segmenter_fast.model import SegmenterModel
    from segmenter_fast.protocols import protocol
    from segmenter_fast.tradeoff import is_native, weights_task

    chosen, backend = network_options
    name = data.kind.name if data.kind != DatasetKind.folder else data.root.name
    tasks = []
    for source in sources:
        model = SegmenterModel.from_pretrained(source, backend=backend).to(chosen)
        config = model.config
        images = data.split("val", limit or 100, config.image_size, _classes_of(config))
        part = spread(images, limit or None)
        how = protocol(config, "weights", name)
        count = len(part) if isinstance(part, Subset) else len(images)
        text = f"{how}, {count} images"
        each = is_native(chosen, backend)
        mious = {}
        for precision in precisions if each else ["float32"]:
            model.precision = precision
            try:
                mious[precision] = 100 * evaluate(model, part, **how.options())["miou"]
            except BackendError:  # such as int8 on another CPU: timing it says why
                mious[precision] = None
        tasks += [
            weights_task(source, mious[precision if each else "float32"], name, text, precision)
            for precision in precisions
        ]
    return tasks


@app.command(rich_help_panel=HELP_PANEL)
@_reported
def tradeoff(
    ctx: typer.Context,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Folder for the page, table, JSON and figure."
        ),
    ],
    variants: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Models to time at full size, with their published mIoU; 'none' leaves them out. "
            "T, S, B and L, linear and mask, patches of 8, 16 and 32 unless given.",
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="On a CPU of float32, bfloat16 and int8, which are the default; elsewhere of "
            "float32, bfloat16 and float16, by default the first two.",
        ),
    ] = None,
    size: Annotated[int, typer.Option(min=32, help="Side of the images, in pixels.")] = 512,
    num_model_classes: Annotated[
        int, typer.Option("--classes", min=1, help="Of the models at full size.")
    ] = 150,
    scenes: Annotated[
        bool,
        typer.Option(
            "--small/--no-small",
            help="The small models that were trained on procedural scenes, with their mIoU there.",
        ),
    ] = True,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            "--weights",
            "-w",
            metavar="NAME|PATH",
            help="Weights to measure on --dataset, images per second and mIoU; repeatable.",
        ),
    ] = None,
    dataset: Annotated[DatasetKind | None, typer.Option(help="For --weights.")] = None,
    root: RootOption = None,
    class_names: ClassNamesOption = None,
    num_classes: NumClassesOption = None,
    scene_size: SceneSizeOption = None,
    data_seed: DataSeedOption = 0,
    peers: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Other architectures as points: peers.json, as 'pytest benchmarks/bench_peers.py "
            "--benchmark-only --save-results' writes it on this machine.",
        ),
    ] = None,
    limit: Annotated[
        int, typer.Option(min=0, help="Measure mIoU on so many images at most; 0 is all.")
    ] = 0,
    passes: Annotated[
        int, typer.Option(min=1, help="Over all models; images/s are medians over them.")
    ] = 3,
    batches: Annotated[
        str,
        typer.Option(
            metavar="N,...", help="Batch sizes, from 1; larger ones are tried while they gain."
        ),
    ] = "1,2,4,8,16,32,64",
    seconds: Annotated[
        float, typer.Option(min=0.1, help="Calls that would take longer are not made.")
    ] = 30.0,
    backend: BackendOption = Backend.auto,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    debug: DebugOption = False,
) -> None:
    """Images per second against mIoU on this machine: a table and the paper's figure.

    mIoU is published (with its source), or that of small models trained by this project, or
    measured here for --weights, on a CPU in each precision. Speed is always measured here, with
    random weights.

    \b
    segmenter-fast tradeoff --output tradeoff
    segmenter-fast tradeoff --variants none --no-small -w street -w runs/mine/best \\
        --dataset camvid --root camvid --output tradeoff
    """  # noqa: D301
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    data = None
    if weights:
        if dataset is None:
            raise _usage("--dataset", "needed to measure the mIoU of --weights")
        data = Data(
            dataset,
            root,
            class_names,
            num_classes,
            255,
            _size("--scene-size", scene_size),
            data_seed,
        )
        data.check(_typed(ctx))
    elif dataset is not None or root is not None:
        raise _usage("--dataset", "is for measuring the mIoU of --weights, which are none")
    _check_folder("--output", output)
    counts = tuple(_numbers("--batches", batches, int, "numbers such as 1,2,4"))

    import torch

    from segmenter_fast import tradeoff as work
    from segmenter_fast.backend import native_module
    from segmenter_fast.figures import tradeoff_figure

    if counts[0] != 1 or list(counts) != sorted(set(counts)):
        raise _usage("--batches", f"must rise from 1, got {batches}")
    names = work.variants() if variants is None else [v.strip() for v in variants.split(",")]
    chosen = _prepare(device, backend, threads)
    known = work.precisions(chosen, backend.value)
    if precision is None:
        kinds = [kind for kind in known if kind != "float16"]
    else:
        kinds = [kind.strip() for kind in precision.split(",")]
    unknown = [kind for kind in kinds if kind not in known]
    if unknown:
        raise _usage("--precision", f"of {', '.join(known)}, got {', '.join(unknown)}")
    tasks = []
    if names != ["none"]:
        tasks += work.published_tasks(names, kinds, size, num_model_classes)
    if scenes:
        tasks += work.small_tasks(kinds)
    if weights:
        tasks += _measured(weights, data, (chosen, backend.value), kinds, limit)
    if not tasks:
        raise _usage("--variants", "nothing to measure")
    gpu = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else None
    machine = {
        "device": gpu or _cpu_name(),
        "threads": None if gpu else torch.get_num_threads(),
        "backend": backend.value,
        "torch": torch.__version__,
        "segmenter_fast": _version_of("segmenter_fast"),
        "native": native_module().simd_level() if chosen.type == "cpu" else None,
        "python": platform.python_version(),
        "passes": passes,
        "batches": counts,
    }
    others = []
    if peers is not None:
        if (size, num_model_classes) != (512, 150):
            raise _usage("--peers", "were timed at --size 512 and --classes 150, and so must ours")
        try:
            others = work.peer_rows(peers, machine["device"], machine["threads"])
        except ValueError as error:
            raise _usage("--peers", str(error)) from error

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        timed = bar.add_task("", total=passes * len(tasks))
        speeds = work.measure(
            tasks,
            chosen,
            backend.value,
            passes,
            counts,
            seconds,
            lambda text: bar.update(timed, description=text, advance=1),
        )
    rows = work.rows_of(tasks, speeds) + others
    title = machine["device"] + (f", {machine['threads']} threads" if not gpu else "")
    heading = [
        f"# Images per second against mIoU: {title}",
        "",
        "Made by `segmenter-fast tradeoff`. Images per second: images to label maps, batch 1, "
        f"random weights, medians over the calls of {passes} passes over all models. The best of "
        f"the batches {', '.join(map(str, counts))}, which are tried while they gain. Parts are "
        "shares of the time of one call, counted by the one native call on a CPU and by "
        "PyTorch's profiler elsewhere. mIoU: as the last column says; that of published and "
        "small models is of float32.",
    ]
    if others:
        heading += [
            "",
            "Other architectures, and some of these in PyTorch's own operators, are timed by "
            "`benchmarks/bench_peers.py` in the same way, eager or compiled, whichever is quicker. "
            "Recipes differ from source to source: their mIoU is for orientation.",
        ]
    # The figure last: what was measured is kept, whatever becomes of it.
    work.write_tables(output, rows, machine, "\n".join(heading))
    try:
        for name in ("tradeoff.png", "tradeoff.svg"):
            tradeoff_figure(output / name, rows, title)
    except (ImportError, ValueError) as error:  # no matplotlib, or no row has both
        typer.echo(f"no figure: {error}", err=True)
    else:
        picture = ["", "![images per second against mIoU](tradeoff.png)"]
        work.write_tables(output, rows, machine, "\n".join(heading + picture))
    typer.echo("\n".join(work.table(rows)))
    typer.echo(f"written to {output}")
