"""`segmenter-fast`: label pictures, train, evaluate, and see what this machine offers.

Only typer and the standard library are imported here; every command imports what it needs when it
runs, so that `--help` answers at once. What can go wrong in use (a missing file, an unreadable
picture, a backend that is not there) is one line on standard error and exit status 1; wrong usage
is status 2; `--debug` shows the traceback. In the docstrings, which are the help texts, a backspace
character keeps the lines of a paragraph as they are.
"""

import contextlib
import enum
import functools
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

PACKAGE = Path(__file__).parent
LABELS_SUFFIX, OVERLAY_SUFFIX = ".png", ".overlay.png"
# Decoded images and label maps up to this are kept in memory while training.
MEMORY_LIMIT = 1 << 30
INTERRUPTED = 130  # what a shell reports for a program stopped with Ctrl-C

app = typer.Typer(
    name="segmenter-fast",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
zoo_app = typer.Typer()
app.add_typer(zoo_app, name="zoo")


class Backend(enum.StrEnum):
    """What computes; `segmenter_fast.backend` has the meaning of each."""

    auto = "auto"
    reference = "reference"
    native = "native"
    triton = "triton"


class Precision(enum.StrEnum):
    """What inference calculates in; see `segmenter_fast.SegmenterModel.precision`."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    int8 = "int8"


class DatasetKind(enum.StrEnum):
    """Where images and labels come from."""

    ade20k = "ade20k"
    pascal_context = "pascal-context"
    cityscapes = "cityscapes"
    camvid = "camvid"
    folder = "folder"
    scenes = "scenes"


class Downloaded(enum.StrEnum):
    """Data sets that `prepare` knows."""

    ade20k = "ade20k"
    cityscapes = "cityscapes"
    pascal_context = "pascal-context"


class Preset(enum.StrEnum):
    """Recipes of the paper; presets/ has a file for each."""

    ade20k = "ade20k"
    pascal_context = "pascal-context"
    cityscapes = "cityscapes"


class ProtocolName(enum.StrEnum):
    """See `segmenter_fast.protocols`."""

    train = "train"
    eval = "eval"
    weights = "weights"


class Optimizer(enum.StrEnum):
    """See `TrainOptions`."""

    sgd = "sgd"
    adamw = "adamw"


# --- Options that several commands share ---------------------------------------------------------

WeightsOption = Annotated[
    str,
    typer.Option(
        "--weights",
        "-w",
        metavar="NAME|PATH",
        help="Bundled (street, scenes), official (Seg-T-Mask/16; see 'segmenter-fast zoo'), a "
        "folder with config.json and model.safetensors or with checkpoint.pth and variant.yml, or "
        "a Hugging Face organisation/name.",
    ),
]
PrecisionOption = Annotated[
    Precision,
    typer.Option(
        help="What the network is calculated in. bfloat16 takes about half of float32's time where "
        "the hardware has it; int8 less still, on CPUs with AVX-512 VNNI."
    ),
]
BackendOption = Annotated[
    Backend, typer.Option(help="'auto' takes C++ kernels on a CPU and Triton's on an NVIDIA GPU.")
]
DeviceOption = Annotated[
    str,
    typer.Option(metavar="auto|cpu|cuda|cuda:N|mps", help="'auto' is the first GPU, else the CPU."),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(min=1, help="CPU threads; PyTorch's choice unless given.", show_default=False),
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
WindowSizeOption = Annotated[
    str | None,
    typer.Option(
        metavar="PIXELS|whole",
        help="Side of the sliding window; 'whole' shows the network the whole image at once. "
        "Unless given, the weights' own; in 'evaluate' the protocol's.",
    ),
]
WindowStrideOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="PIXELS",
        help="Step of the sliding window, at most its size. Unless given, the weights' own, or "
        "with another --window-size that size: windows side by side. In 'evaluate' the protocol's, "
        "which in 'eval' and 'train' goes with the size.",
    ),
]
ShortSideOption = Annotated[
    str | None,
    typer.Option(
        metavar="PIXELS|original",
        help="Resize the image's shorter side to this first; 'original' leaves it. The weights' "
        "own unless given, in 'evaluate' the protocol's. Label maps have the size of the image in "
        "any case.",
    ),
]
ScalesOption = Annotated[
    str,
    typer.Option(
        metavar="S,S,...",
        help="Average over the image at these scales; the paper's are 0.5,0.75,1.0,1.25,1.5,1.75.",
    ),
]
FlipOption = Annotated[
    bool | None, typer.Option("--flip/--no-flip", help="Average with the mirror image.")
]
WindowBatchOption = Annotated[
    int, typer.Option("--batch-size", min=1, help="Windows per forward pass.")
]
RootOption = Annotated[
    Path | None,
    typer.Option(help="Folder of the data. Not needed for scenes."),
]
ClassNamesOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|DATASET",
        help="For 'folder': a text file with one class name per line, a JSON list of "
        "(name, (r, g, b)), or ade20k, cityscapes, pascal_context. ROOT/classes.txt unless given.",
    ),
]
NumClassesOption = Annotated[
    int | None, typer.Option(min=1, help="For 'folder' without class names: the number of classes.")
]
IgnoreIndexOption = Annotated[
    int, typer.Option(min=0, max=255, help="For 'folder': label of pixels without a class.")
]
SceneSizeOption = Annotated[
    str | None,
    typer.Option(metavar="H,W", help="For 'scenes': pixels. The training crop's unless given."),
]
DataSeedOption = Annotated[
    int, typer.Option(min=0, help="For 'scenes': another seed draws other scenes.")
]


# --- Errors --------------------------------------------------------------------------------------


# What the RuntimeError has that PyTorch raises where the CPU's memory ends.
NO_MEMORY = "DefaultCPUAllocator: "


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and NO_MEMORY in str(error)


def _is_expected(error: Exception) -> bool:
    """Whether an error is about what was asked for, not a fault of this program."""
    if isinstance(error, BrokenPipeError):  # `segmenter-fast zoo | head`: typer ends quietly
        return False
    if isinstance(error, ValueError | OSError | ArithmeticError) or _is_out_of_memory(error):
        return True
    kind = type(error)
    # BackendError, CheckpointError and DownloadError; importing them here would import torch.
    return kind.__module__.startswith("segmenter_fast.")


def _message(error: Exception) -> str:
    if _is_out_of_memory(error):
        detail = (str(error).splitlines() or [""])[0]
        detail = detail.rsplit(NO_MEMORY, 1)[-1]
        return (
            "out of memory: try a smaller --batch-size, smaller windows or a smaller "
            f"--short-side. {detail}"
        ).rstrip()
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    text = str(error) or type(error).__name__
    if "Original Traceback" in text:  # an error of a DataLoader's worker carries its traceback
        text = text.strip().splitlines()[-1].split(": ", 1)[-1]
    return text


def _reported(command: Callable) -> Callable:
    """Turn expected errors into one line and exit status 1, unless `--debug` is given."""

    @functools.wraps(command)
    def run(*args, **options):
        try:
            return command(*args, **options)
        except Exception as error:
            if options.get("debug") or not _is_expected(error):
                raise
            typer.echo(f"error: {_message(error)}", err=True)
            raise typer.Exit(1) from error

    return run


def _usage(option: str, text: str) -> typer.BadParameter:
    return typer.BadParameter(text, param_hint=option)


# --- Reading options -----------------------------------------------------------------------------


def _numbers(option: str, text: str, kind: type, expected: str) -> list:
    """Numbers with a comma, an x or blanks between two of them."""
    parts = re.split(r"\s*[,x]\s*|\s+", text.strip().lower())
    try:
        return [kind(part) for part in parts]
    except ValueError:
        raise _usage(option, f"expected {expected}, got {text!r}") from None


def _size(option: str, text: str | None) -> tuple[int, int] | None:
    """Read (H, W) from "144,176", "144x176" or "512"."""
    if text is None:
        return None
    expected = "one number or H,W in pixels, such as 512 or 144,176"
    values = _numbers(option, text, int, expected)
    if len(values) > 2 or min(values) < 1:
        raise _usage(option, f"expected {expected}, got {text!r}")
    return (values[0], values[-1])


def _pair(option: str, text: str) -> tuple[float, float]:
    values = _numbers(option, text, float, "two numbers LOW,HIGH")
    if len(values) != 2:
        raise _usage(option, f"expected two numbers LOW,HIGH, got {text!r}")
    return (values[0], values[1])


def _pixels_or(option: str, word: str, text: str | None) -> int | str | None:
    """A positive number of pixels, `word`, or None when the option was not given."""
    if text is None or text == word:
        return text
    if not text.isdecimal() or int(text) < 1:
        raise _usage(option, f"expected a number of pixels or '{word}', got {text!r}")
    return int(text)


def _protocol(
    window_size: str | None,
    window_stride: int | None,
    short_side: str | None,
    scales: str,
    flip: bool | None,
    batch_size: int,
) -> dict[str, Any]:
    """The options of `segmenter_fast.predict` from those of the command line."""
    factors = _numbers("--scales", scales, float, "numbers such as 0.5,1.0")
    if not all(0 < factor < float("inf") for factor in factors):
        raise _usage("--scales", f"expected positive numbers such as 0.5,1.0, got {scales!r}")
    if window_size == "whole" and window_stride is not None:
        raise _usage("--window-stride", "is of windows, but --window-size whole has none")
    return {
        "window_size": _pixels_or("--window-size", "whole", window_size),
        "window_stride": window_stride,
        "short_side": _pixels_or("--short-side", "original", short_side),
        "scales": tuple(factors),
        "flip": bool(flip),
        "batch_size": batch_size,
    }


def _prepare(device: str, backend: Backend, threads: int | None, launch=None):
    """The torch device, after a check that it is there and that the backend takes it.

    `launch` is the `distributed.Launch` of one of several processes, each with a GPU of its own.
    """
    import torch

    from segmenter_fast.backend import resolve_backend

    if threads is not None:
        torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if launch is not None and device not in ("cpu", "cuda"):
        raise _usage(
            "--device", f"one of several processes takes auto, cpu or cuda, got {device!r}"
        )
    if launch is not None and device == "cuda":
        from segmenter_fast.distributed import local_gpu

        device = f"cuda:{local_gpu(launch, torch.cuda.device_count())}"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda", "mps"):
        raise _usage("--device", f"expected auto, cpu, cuda, cuda:N or mps, got {device!r}")
    if chosen.type == "cuda":
        count = torch.cuda.device_count()
        if (chosen.index or 0) >= count:
            raise ValueError(
                f"no device {device!r}: PyTorch {torch.__version__} sees {count} CUDA devices; "
                "'segmenter-fast info' lists them"
            )
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("no device 'mps': PyTorch does not see an Apple GPU here")
    resolve_backend(backend.value, chosen)
    return chosen


def _typed(ctx: typer.Context) -> set[str]:
    """Names of the options on the command line itself: no defaults, nothing from a recipe."""
    source = ctx.get_parameter_source
    return {name for name in ctx.params if getattr(source(name), "name", "") == "COMMANDLINE"}


def _check_output(
    option: str,
    path: Path,
    inputs: Sequence[Path] = (),
    known: Collection[str] | None = None,
) -> Path:
    """The path, unless it cannot be written, its suffix is not `known`, or it is an input."""
    from segmenter_fast.files import check_writable

    if path.is_dir():
        raise IsADirectoryError(f"{option}: {path} is a folder; give the name of a file in it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{option}: no such folder: {path.parent}")
    if any(path.resolve() == given.resolve() for given in inputs):
        raise ValueError(f"{option} {path} is an input and would be overwritten")
    if known is not None and path.suffix.lower() not in known:
        raise ValueError(
            f"{option}: no picture format is known for {path.name!r}; name it like 'name.png'"
        )
    try:
        check_writable(path)
    except OSError as error:
        raise type(error)(f"{option}: {path} cannot be written: {error.strerror}") from error
    return path


def _check_folder(option: str, path: Path) -> None:
    """Raise OSError unless files can be written into a folder that is there or will be made."""
    from segmenter_fast.files import check_writable

    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    try:
        check_writable(there / "written")
    except OSError as error:
        raise type(error)(f"{option}: cannot write into {there}: {error.strerror}") from error


def _image_suffixes() -> set[str]:
    """Suffixes of the pictures that Pillow can write."""
    from PIL import Image

    Image.init()
    return {suffix for suffix, kind in Image.EXTENSION.items() if kind in Image.SAVE}


def _write_text(path: Path, text: str) -> None:
    from segmenter_fast.files import replacing

    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _percent(value: float | None) -> str:
    return "-" if value is None or value != value else f"{100 * value:.2f} %"


# --- segmenter-fast ------------------------------------------------------------------------------


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(version("segmenter_fast"))
        except PackageNotFoundError:
            typer.echo("unknown: not installed")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Semantic segmentation with transformers: pictures in, label maps out.

    \b
    segmenter-fast demo                                    see it work
    segmenter-fast predict photo.jpg -w street -o labels   label a picture
    segmenter-fast zoo                                     the official models
    segmenter-fast prepare ade20k data/ade20k              is a data set complete?
    segmenter-fast plot runs/mine                          how is training going?
    segmenter-fast info                                    what runs here, and how
    segmenter-fast kernels --arch sm_90                    what a GPU would run

    'segmenter-fast COMMAND --help' explains each of them.
    """  # noqa: D301


# --- info ----------------------------------------------------------------------------------------

# What is computed, and the function of the compiled module that can do it.
OPERATIONS = (
    ("labels (upsample + argmax)", "upsample_argmax"),
    ("confusion matrix", "confusion_matrix"),
    ("probabilities", "upsample_probabilities"),
    ("cross-entropy", "upsample_cross_entropy"),
    ("windows, scales and flips", "window_labels"),
    ("attention", "attention"),
    ("patch embedding", "patch_embed"),
    ("normalised mask product", "mask_product"),
)


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version_of(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _versions() -> dict[str, str | None]:
    """Of all that a number measured here may depend on."""
    import torch

    return {
        "segmenter_fast": _version_of("segmenter_fast"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version_of("triton"),
        "numpy": _version_of("numpy"),
    }


def _information() -> dict[str, Any]:
    """Everything that `info` shows, as JSON can hold it."""
    import torch

    from segmenter_fast.backend import BackendError, native_module, resolve_backend
    from segmenter_fast.checkpoint import list_bundled

    try:
        native = native_module()
        compiled = dict(native.build_info())
        compiled["simd_level"] = native.simd_level()
        problem = None
    except BackendError as error:
        native, compiled, problem = None, None, str(error)

    def auto(device: str) -> str:
        return resolve_backend("auto", device)

    devices = [
        {
            "device": "cpu",
            "name": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "auto": auto("cpu"),
        }
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "auto": auto("cuda"),
            }
        )
    if torch.backends.mps.is_available():
        devices.append({"device": "mps", "name": "Apple GPU", "auto": auto("mps")})

    def triton() -> str:
        try:
            resolve_backend("triton", "cuda")
        except BackendError as error:
            return str(error)
        return "backend 'triton' can be imported and runs on CUDA GPUs"

    kernel = f"compiled, {compiled['simd_level']}" if compiled else "not compiled"
    return {
        "versions": _versions(),
        "compiled": compiled,
        "compiled_problem": problem,
        "devices": devices,
        "operations": {
            name: kernel if native is None or hasattr(native, function) else "PyTorch"
            for name, function in OPERATIONS
        },
        "triton_backend": triton(),
        "bundled_weights": list_bundled(),
    }


@app.command()
@_reported
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    debug: DebugOption = False,
) -> None:
    """Show versions, what is compiled in, devices, and the backend that 'auto' takes for each."""
    facts = _information()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()

    def table(title: str, *headings: str) -> Table:
        made = Table(title=title, title_justify="left", show_header=bool(headings))
        for heading in headings or ("", ""):
            made.add_column(heading, overflow="fold")
        return made

    versions = table("versions")
    for name, value in facts["versions"].items():
        versions.add_row(name, value or "none")
    console.print(versions)

    build = table("compiled module segmenter_fast._C")
    if facts["compiled"] is None:
        build.add_row("missing", escape(facts["compiled_problem"]))
    else:
        for name, value in facts["compiled"].items():
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            build.add_row(name.replace("_", " "), str(shown or "none"))
    console.print(build)

    devices = table("devices", "device", "name", "what", "backend 'auto'")
    for row in facts["devices"]:
        if row["device"] == "cpu":
            what = f"{row['cores']} cores, PyTorch uses {row['threads']} threads"
        elif "memory_gib" in row:
            what = f"compute capability {row['capability']}, {row['memory_gib']} GiB"
        else:
            what = ""
        devices.add_row(row["device"], escape(row["name"]), what, row["auto"])
    console.print(devices)

    operations = table("backend 'native' (CPU)", "operation", "runs as")
    for name, state in facts["operations"].items():
        operations.add_row(name, state)
    console.print(operations)
    console.print(escape(facts["triton_backend"]), soft_wrap=True, highlight=False)
    bundled = ", ".join(facts["bundled_weights"]) or "none"
    console.print(
        f"bundled weights: {bundled}; official models: segmenter-fast zoo", soft_wrap=True
    )


# --- predict -------------------------------------------------------------------------------------


class Job(NamedTuple):
    """One picture and the files that come of it."""

    source: Path
    labels: Path
    overlay: Path | None

    @property
    def outputs(self) -> list[Path]:
        """The files to write."""
        return [path for path in (self.labels, self.overlay) if path is not None]


def _pictures_in(
    folder: Path, recursive: bool, output: Path | None = None
) -> list[tuple[Path, Path]]:
    """Pictures of a folder, each with the sub-folder that it lies in; without those in `output`."""
    from segmenter_fast.images import IMAGE_SUFFIXES

    entries = sorted(folder.rglob("*") if recursive else folder.iterdir())
    output = None if output is None else output.resolve()
    inside = recursive and output not in (None, folder.resolve())
    found = [
        (path, path.parent.relative_to(folder))
        for path in entries
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not path.name.startswith(".")
        and path.is_file()
        and not (inside and output in path.resolve().parents)
    ]
    if not found:
        kinds = ", ".join(IMAGE_SUFFIXES)
        deeper = "" if recursive else "; --recursive looks into sub-folders"
        raise FileNotFoundError(f"no pictures ({kinds}) in the folder {folder}{deeper}")
    return found


def _jobs(
    inputs: Sequence[Path], output: Path, recursive: bool, suffix: str, overlay: bool
) -> list[Job]:
    """What to read and write; raises ValueError when two pictures would share a file."""
    pictures: dict[Path, tuple[Path, Path]] = {}
    for given in inputs:
        found = _pictures_in(given, recursive, output) if given.is_dir() else [(given, Path())]
        for path, folder in found:
            pictures.setdefault(path.resolve(), (path, folder))
    jobs = []
    for path, folder in pictures.values():
        stem = output / folder / f"{path.stem}{suffix}"
        jobs.append(
            Job(
                path,
                stem.with_name(stem.name + LABELS_SUFFIX),
                stem.with_name(stem.name + OVERLAY_SUFFIX) if overlay else None,
            )
        )
    owner: dict[Path, Path] = {}
    for job in jobs:
        for path in job.outputs:
            other = owner.setdefault(path, job.source)
            if other != job.source:
                raise ValueError(
                    f"{other} and {job.source} would both be written to {path}: rename one, or "
                    "label them into different folders"
                )
            if path.resolve() in pictures:
                raise ValueError(
                    f"{path} is an input and would be overwritten: choose another --output, or a "
                    "--suffix such as _labels"
                )
    return jobs


def _some(paths: Iterable[Path], most: int = 5) -> str:
    paths = list(paths)
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(map(str, paths[:most])) + more


@app.command()
@_reported
def predict(
    inputs: Annotated[
        list[Path], typer.Argument(metavar="IMAGE|FOLDER...", help="Pictures, or folders of them.")
    ],
    weights: WeightsOption,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="Folder to write to; made if need be."),
    ],
    window_size: WindowSizeOption = None,
    window_stride: WindowStrideOption = None,
    scales: ScalesOption = "1.0",
    flip: FlipOption = False,
    short_side: ShortSideOption = None,
    batch_size: WindowBatchOption = 4,
    overlay: Annotated[
        bool, typer.Option("--overlay/--no-overlay", help="Write NAME.overlay.png, too.")
    ] = True,
    alpha: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Strength of the overlay's colours; 0 is the picture."),
    ] = 0.5,
    suffix: Annotated[
        str, typer.Option(help="Put behind the picture's name: '_seg' writes NAME_seg.png.")
    ] = "",
    recursive: Annotated[
        bool,
        typer.Option("--recursive", "-r", help="Look into sub-folders; DIR gets the same ones."),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace label maps and overlays in DIR.")
    ] = False,
    backend: BackendOption = Backend.auto,
    precision: PrecisionOption = Precision.float32,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    debug: DebugOption = False,
) -> None:
    """Label every pixel of pictures.

    For each picture NAME.* two files are written: DIR/NAME.png, an indexed PNG
    of the picture's size whose pixel values are class numbers, and
    DIR/NAME.overlay.png, the classes in colour over the picture with a legend.
    What cannot be read is named and skipped; the exit status is then 1.

    \b
    segmenter-fast predict photo.jpg --weights street --output labels
    segmenter-fast predict photos -w Seg-B-Mask/16 -o out --scales 0.75,1 --flip
    """  # noqa: D301
    protocol = _protocol(window_size, window_stride, short_side, scales, flip, batch_size)
    if os.sep in suffix or "/" in suffix:
        raise _usage("--suffix", f"expected part of a file name, got {suffix!r}")
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"--output {output} is a file, not a folder")
    _check_folder("--output", output)
    jobs = _jobs(inputs, output, recursive, suffix, overlay)
    if not any(job.source.exists() for job in jobs):
        raise FileNotFoundError(f"no such file or folder: {_some(job.source for job in jobs)}")
    existing = [path for job in jobs for path in job.outputs if path.exists()]
    if existing and not overwrite:
        raise FileExistsError(f"{_some(existing)}: exists already; --overwrite replaces it")

    chosen = _prepare(device, backend, threads)
    for folder in {job.labels.parent for job in jobs}:
        folder.mkdir(parents=True, exist_ok=True)

    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from segmenter_fast import predict as predict_labels
    from segmenter_fast.images import load_image
    from segmenter_fast.model import SegmenterModel
    from segmenter_fast.visualize import default_palette, save_image, save_label_png
    from segmenter_fast.visualize import overlay as draw_overlay

    model = SegmenterModel.from_pretrained(
        weights, backend=backend.value, precision=precision.value, device=chosen
    )
    config = model.config
    palette = config.palette or default_palette(config.n_cls)

    started, model_seconds, skipped = time.perf_counter(), 0.0, 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("predict", total=len(jobs))
        for job in jobs:
            try:
                image = load_image(job.source)
                before = time.perf_counter()
                # Copied to the host before the clock is read: a GPU answers later.
                labels = predict_labels(model, image, **protocol).cpu()
                model_seconds += time.perf_counter() - before
            except (ValueError, FileNotFoundError) as error:
                if debug:
                    raise
                text = str(error)
                text = text if str(job.source) in text else f"{job.source}: {text}"
                progress.console.print(
                    f"skipped: {text}", markup=False, highlight=False, soft_wrap=True
                )
                skipped += 1
            else:
                save_label_png(job.labels, labels, palette)
                if job.overlay is not None:
                    picture = draw_overlay(image, labels, palette, alpha, config.class_names)
                    save_image(job.overlay, picture)
            progress.advance(task)

    done, seconds = len(jobs) - skipped, time.perf_counter() - started
    if done:
        typer.echo(
            f"{done} image{'s' * (done != 1)} in {seconds:.1f} s: {done / seconds:.2f} images/s "
            f"with files, {done / model_seconds:.2f} images/s for the model; written to {output}"
        )
    if skipped:
        typer.echo(f"error: {skipped} of {len(jobs)} pictures skipped", err=True)
        raise typer.Exit(1)


# --- Data ----------------------------------------------------------------------------------------


class Classes(NamedTuple):
    """Names of the classes, and their colours where they are known."""

    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...] | None = None


def _read_classes(source: str) -> Classes:
    """Classes from a text file, a JSON file or the name of a known data set."""
    from segmenter_fast.checkpoint import CLASSES

    known = {path.stem: path for path in CLASSES.glob("*.json")}
    path = known.get(source, Path(source))
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"--class-names: no file {source!r}, and not one of {', '.join(sorted(known))}"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: class names must be UTF-8 text ({error})") from error
    if path.suffix == ".json":
        try:
            names, colours = zip(*json.loads(text), strict=True)
            palette = tuple((int(r), int(g), int(b)) for r, g, b in colours)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: expected [[name, [r, g, b]], ...] ({error})") from error
        return Classes(tuple(map(str, names)), palette)
    names = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not names:
        raise ValueError(f"{path}: no class names; one per line is expected")
    return Classes(names)


# Options that only one kind of dataset reads.
OPTIONS_OF = {
    DatasetKind.folder: ("class_names", "num_classes", "ignore_index"),
    DatasetKind.scenes: ("scene_size", "data_seed", "count", "val_count"),
}


class Data(NamedTuple):
    """What the data options say; `split` makes a dataset of it."""

    kind: DatasetKind
    root: Path | None
    class_names: str | None
    num_classes: int | None
    ignore_index: int
    scene_size: tuple[int, int] | None
    data_seed: int

    def check(self, typed: Collection[str] | None = None) -> None:
        """Raise a usage error for options that do not go together.

        `typed` names the options of the command line: what a recipe has for other data is no
        mistake. Unless given, they are those that are not None but for the numbers with a default.
        """
        if self.kind != DatasetKind.scenes and self.root is None:
            raise _usage("--root", f"--dataset {self.kind.value} needs the folder of the data")
        if typed is None:
            optional = ("class_names", "num_classes", "scene_size")
            typed = [name for name in optional if getattr(self, name) is not None]
        for kind, names in OPTIONS_OF.items():
            for name in names:
                if name in typed and kind != self.kind:
                    raise _usage(
                        f"--{name.replace('_', '-')}",
                        f"is for --dataset {kind.value}, and --dataset {self.kind.value} was given",
                    )

    def classes(self, known: Classes | None) -> Classes:
        """Classes of a folder: as told, from ROOT/classes.txt, or those of the weights."""
        if self.class_names is not None:
            found = _read_classes(self.class_names)
        elif (self.root / "classes.txt").is_file():
            found = _read_classes(str(self.root / "classes.txt"))
        elif self.num_classes is not None:
            found = Classes(_numbered(self.num_classes))
        elif known is not None:
            found = known
        else:
            raise ValueError(
                f"the classes of {self.root} are not known: write their names to "
                f"{self.root / 'classes.txt'}, one per line, or give --class-names or --num-classes"
            )
        if self.num_classes is not None and self.num_classes != len(found.names):
            raise ValueError(
                f"--num-classes is {self.num_classes} but there are {len(found.names)} class names"
            )
        return found

    def split(self, split: str, count: int, crop: tuple[int, int], known: Classes | None = None):
        """The dataset of a split; `count` and `crop` are of scenes, `known` of the weights."""
        from segmenter_fast import data

        if self.kind == DatasetKind.scenes:
            return data.Scenes(count, self.scene_size or crop, self.data_seed, split=split)
        known_layouts = {
            DatasetKind.ade20k: data.ADE20K,
            DatasetKind.pascal_context: data.PascalContext,
            DatasetKind.cityscapes: data.Cityscapes,
            DatasetKind.camvid: data.CamVid,
        }
        if self.kind in known_layouts:
            return known_layouts[self.kind](self.root, split)
        classes = self.classes(known)
        return data.FolderDataset(
            self.root / "images" / split,
            self.root / "annotations" / split,
            classes.names,
            classes.palette,
            self.ignore_index,
        )


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(str(number) for number in range(count))


def _classes_of(config) -> Classes:
    """What weights know, by number where they have no names."""
    return Classes(config.class_names or _numbered(config.n_cls), config.palette)


def _in_memory(dataset, wanted: bool | None, samples: int):
    """Keep the decoded dataset if it is read more than once and fits, or as `wanted` says."""
    from segmenter_fast.data import InMemory

    if wanted is None and samples > len(dataset) > 0:
        size = sum(tensor.nbytes for tensor in dataset[0])
        wanted = size * len(dataset) <= MEMORY_LIMIT
    return InMemory(dataset) if wanted else dataset


# --- prepare -------------------------------------------------------------------------------------


@app.command()
@_reported
def prepare(
    dataset: Annotated[Downloaded, typer.Argument(help="Which data set.")],
    root: Annotated[
        Path, typer.Argument(help="Its folder, with the archives that were downloaded or unpacked.")
    ],
    sample: Annotated[
        int, typer.Option(min=0, help="Pictures of each split to read, evenly over it.")
    ] = 32,
    debug: DebugOption = False,
) -> None:
    """Check a downloaded data set, and lay it out if need be.

    Archives in ROOT are unpacked, files are counted, and a sample is read. What is
    missing is named, with the address to get it from and where to put it; the exit
    status is then 1. Nothing is downloaded.

    \b
    segmenter-fast prepare ade20k data/ade20k
    segmenter-fast train --dataset ade20k --root data/ade20k --init Seg-T-Mask/16 -o run
    """  # noqa: D301
    from segmenter_fast.data.prepare import PLANS
    from segmenter_fast.data.prepare import prepare as check

    report = check(dataset.value, root, sample, typer.echo)
    for line in report.found:
        typer.echo(line)
    for problem in report.problems:
        typer.echo(f"error: {problem}", err=True)
    if report.problems:
        raise typer.Exit(1)
    typer.echo(f"{PLANS[dataset.value].title} is ready: --dataset {dataset.value} --root {root}")


# --- train ---------------------------------------------------------------------------------------


def _read_recipe(ctx: typer.Context, name: str | None) -> str | None:
    """Make the options in a YAML file the defaults of this call."""
    if name is None:
        return None
    path = Path(name)
    if not path.is_file():
        path = PACKAGE / "weights" / name
        if not path.is_file():
            bundled = sorted((PACKAGE / "weights").glob("*/recipe*.yaml"))
            names = ", ".join(str(p.relative_to(PACKAGE / "weights")) for p in bundled)
            raise typer.BadParameter(f"no file {name!r}; recipes of the bundled weights: {names}")
    ctx.default_map = _over(ctx.default_map, _options_in(ctx, path))
    return name


def _read_preset(ctx: typer.Context, preset: Preset | None) -> Preset | None:
    """Make the options of a preset the defaults of this call; --config comes after it."""
    if preset is not None:
        options = _options_in(ctx, PACKAGE / "presets" / f"{preset.value}.yaml")
        # Options are read in the order in which they are typed: --config may have been first.
        ctx.default_map = _over(options, ctx.default_map)
    return preset


def _over(below: dict[str, Any] | None, above: dict[str, Any] | None) -> dict[str, Any]:
    """Both, `above` winning: its steps over the epochs of `below`, too."""
    below, above = below or {}, above or {}
    length = {"steps", "epochs"}
    if above.keys() & length:
        below = {key: value for key, value in below.items() if key not in length}
    return below | above


def _options_in(ctx: typer.Context, path: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{path}: not YAML: {error}") from error
    if not isinstance(values, dict):
        raise typer.BadParameter(f"{path}: expected lines 'option: value'")
    other = {"preset", "config", "debug", "help", "resume"}
    known = {option.name for option in ctx.command.params} - other
    recipe = {str(key).replace("-", "_"): value for key, value in values.items()}
    unknown = sorted(recipe.keys() - known)
    if unknown:
        raise typer.BadParameter(f"{path}: unknown options {', '.join(unknown)}")
    return {
        key: ",".join(map(str, value)) if isinstance(value, list) else value
        for key, value in recipe.items()
        if value is not None
    }


def _recipe_text(params: dict[str, Any]) -> str:
    """The options of this call as `--config` reads them."""
    import yaml

    left_out = {"preset", "config", "debug", "resume", "output", "threads", "device"}
    recipe = {
        name: value if isinstance(value, bool | int | float) else str(value)
        for name, value in params.items()
        if value is not None and name not in left_out
    }
    return yaml.safe_dump(recipe, sort_keys=False)


def _check_recipe(output: Path, params: dict[str, Any]) -> None:
    """Raise ValueError if a run is resumed on other data or as another model.

    The trainer compares the options that are its own.
    """
    import dataclasses

    import yaml

    from segmenter_fast.train import TrainOptions

    path = output / "recipe.yaml"
    if not path.is_file():
        return
    before = yaml.safe_load(path.read_text(encoding="utf-8"))
    now = yaml.safe_load(_recipe_text(params))
    ours = {field.name for field in dataclasses.fields(TrainOptions)}
    # These may change: where the data lie now, and how they are read.
    ours |= {"root", "in_memory", "backend", "epochs"}
    changed = [
        f"{name}: {before.get(name)} then, {now.get(name)} now"
        for name in sorted((before.keys() | now.keys()) - ours)
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise ValueError(
            f"the run in {output} was started with other options ({'; '.join(changed)})"
        )


def _run_length(ctx: typer.Context, steps: int | None, epochs: float | None) -> tuple:
    """(steps, epochs), one of them None; the command line's wins over a recipe's."""
    if steps is not None and epochs is not None:
        typed = _typed(ctx) & {"steps", "epochs"}
        if len(typed) != 1:
            raise _usage("--steps", "give --steps or --epochs, not both")
        return (steps, None) if typed == {"steps"} else (None, epochs)
    return steps, epochs


def _starting_model(
    variant: str | None,
    weights,
    num_classes: int,
    changes: dict[str, Any],
    backend: str,
    talks: bool,
):
    """A fresh model; with weights, one that starts from them, and is like theirs unless named."""
    from segmenter_fast.checkpoint import variant_name
    from segmenter_fast.foreign import config_of
    from segmenter_fast.pretrained import fill
    from segmenter_fast.variants import create_model, create_model_from_config

    image_size = changes.pop("image_size")
    if variant is not None:
        if weights is not None and weights.mean:
            changes |= {"mean": weights.mean, "std": weights.std}
        model = create_model(variant, num_classes, image_size or 512, backend=backend, **changes)
    else:
        config = config_of(weights)
        if image_size is not None and image_size != config.image_size:
            window = {"window_size": min(image_size), "window_stride": min(image_size)}
            changes = window | changes | {"image_size": image_size}
        if changes.get("patch_size", config.patch_size) != config.patch_size:
            changes |= {"backbone": None}  # its name has the patch size
        config = config.replace(**changes | {"n_cls": num_classes})
        config = config.replace(variant=variant_name(config))
        model = create_model_from_config(config, backend=backend)
    if weights is not None:
        report = fill(model, weights)
        if talks:
            typer.echo(report)
    return model


# Options of one group in the help.
_data = functools.partial(typer.Option, rich_help_panel="Data")
_network = functools.partial(typer.Option, rich_help_panel="Model")
_learning = functools.partial(typer.Option, rich_help_panel="Optimisation")


@app.command()
@_reported
def train(
    ctx: typer.Context,
    dataset: Annotated[
        DatasetKind,
        _data(
            help="'folder' is any data laid out as ROOT/images/{train,val} and "
            "ROOT/annotations/{train,val}, label maps as one-channel PNG; 'camvid' the same with "
            "CamVid's 11 classes; 'ade20k', 'pascal-context' and 'cityscapes' are as downloaded, "
            "see 'segmenter-fast prepare'; 'scenes' is drawn on the fly."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Folder for best/, last/, log.jsonl, recipe.yaml."
        ),
    ],
    preset: Annotated[
        Preset | None,
        typer.Option(
            callback=_read_preset,
            is_eager=True,
            help="The paper's recipe for a data set. --config and the command line win over it.",
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|NAME",
            callback=_read_recipe,
            is_eager=True,
            help="YAML file of these options ('lr: 0.001'), or a bundled one such as "
            "street/recipe-1.yaml. The command line wins over it.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a stopped run in DIR with the same options.")
    ] = False,
    model: Annotated[
        str | None,
        _network(
            metavar="VARIANT",
            help="Such as Seg-T-Mask/16: size N, T, S, B or L; Mask or not; patch 8, 16 or 32.",
        ),
    ] = None,
    init: Annotated[
        str | None,
        _network(
            metavar="NAME|PATH",
            help="Weights to start from: any that 'predict' takes, of any number of classes; or a "
            "file with a ViT or DeiT of timm (.pth, .safetensors), a ViT of Google (.npz), a "
            "Segmenter of MMSegmentation. Without --model the model is theirs.",
        ),
    ] = None,
    image_size: Annotated[
        str | None,
        _network(
            metavar="H,W",
            help="Training crop in pixels, multiples of the patch size. 512 or --init's unless "
            "given.",
        ),
    ] = None,
    patch_size: Annotated[
        int | None,
        _network(
            min=1,
            help="Side of a patch in pixels, if other than --init's: its filters are resampled. "
            "The name of --model has it.",
        ),
    ] = None,
    drop_path: Annotated[
        float | None,
        _network(
            min=0.0, max=1.0, help="Stochastic depth of the encoder. 0.1 or --init's unless given."
        ),
    ] = None,
    decoder_dropout: Annotated[
        float | None,
        _network(
            min=0.0, max=1.0, help="Dropout of the mask transformer. 0.1 or --init's unless given."
        ),
    ] = None,
    window_size: Annotated[
        str | None,
        _network(
            metavar="PIXELS|whole",
            help="Window of prediction, kept with the weights. The crop's short side unless given.",
        ),
    ] = None,
    window_stride: Annotated[
        int | None,
        _network(min=1, metavar="PIXELS", help="Step of that window. Its size unless given."),
    ] = None,
    short_side: Annotated[
        str | None,
        _network(
            metavar="PIXELS|original",
            help="Prediction resizes an image's shorter side to this; kept with the weights. "
            "'original' unless given.",
        ),
    ] = None,
    root: Annotated[Path | None, _data(help="Folder of the data. Not needed for scenes.")] = None,
    class_names: Annotated[
        str | None,
        _data(
            metavar="FILE|DATASET",
            help="For 'folder': a text file with one class name per line, a JSON list of "
            "(name, (r, g, b)), or ade20k, cityscapes, pascal_context. ROOT/classes.txt unless "
            "given.",
        ),
    ] = None,
    num_classes: Annotated[
        int | None, _data(min=1, help="For 'folder' without class names: the number of classes.")
    ] = None,
    ignore_index: Annotated[
        int, _data(min=0, max=255, help="For 'folder': label of pixels without a class.")
    ] = 255,
    count: Annotated[int, _data(min=1, help="For 'scenes': to train on.")] = 2000,
    val_count: Annotated[int, _data(min=1, help="For 'scenes': to validate on.")] = 100,
    scene_size: Annotated[
        str | None,
        _data(metavar="H,W", help="For 'scenes': pixels. The training crop's unless given."),
    ] = None,
    data_seed: Annotated[int, _data(min=0, help="For 'scenes': which ones.")] = 0,
    in_memory: Annotated[
        bool | None,
        _data(
            "--in-memory/--from-disk",
            help="Decode the data once and keep it. Up to 1 GiB unless given.",
        ),
    ] = None,
    workers: Annotated[int, _data(min=0, help="Processes that decode and augment; 0 is none.")] = 0,
    scale: Annotated[
        str,
        _data(
            metavar="LOW,HIGH",
            help="Random factor before the crop, on a picture's size or that of the data set.",
        ),
    ] = "0.5,2.0",
    jitter: Annotated[
        float, _data(min=0.0, max=2.0, help="Strength of random colour changes; 0 is none.")
    ] = 1.0,
    steps: Annotated[
        int | None, _learning(min=1, help="Optimiser steps. 10000 unless given.")
    ] = None,
    epochs: Annotated[
        float | None, _learning(min=0.0, help="Passes over the data, instead of --steps.")
    ] = None,
    batch_size: Annotated[
        int, _learning(min=1, help="Crops per step, of all processes together.")
    ] = 8,
    accumulate: Annotated[
        int,
        _learning(min=1, help="Make a step in so many passes, each of which needs less memory."),
    ] = 1,
    optimizer: Annotated[Optimizer, _learning(help="SGD with momentum, or AdamW.")] = Optimizer.sgd,
    lr: Annotated[float, _learning(help="Learning rate after the warm-up.")] = 1e-3,
    min_lr: Annotated[float, _learning(help="Learning rate at the end.")] = 1e-5,
    warmup: Annotated[int, _learning(min=0, help="Steps of warm-up.")] = 0,
    weight_decay: Annotated[
        float, _learning(min=0.0, help="Of weights, not of biases and norms.")
    ] = 0.0,
    clip: Annotated[float, _learning(min=0.0, help="Largest gradient norm; 0 is no limit.")] = 0.0,
    class_weights: Annotated[
        float,
        _learning(
            min=0.0,
            max=1.0,
            help="Weigh a class by (share of pixels)^-P; 0 is none, 0.5 suits rare classes.",
        ),
    ] = 0.0,
    label_smoothing: Annotated[float, _learning(min=0.0, max=1.0, help="Of the loss.")] = 0.0,
    ema: Annotated[
        float,
        _learning(
            help="Decay of the averaged weights that are kept, such as 0.998; 0 does not average."
        ),
    ] = 0.0,
    amp: Annotated[bool, _learning("--amp/--no-amp", help="bfloat16 arithmetic.")] = False,
    recompute: Annotated[
        bool,
        _learning(
            "--recompute/--keep",
            help="Keep less for the backward pass and compute it again: activation checkpointing.",
        ),
    ] = False,
    compile: Annotated[
        bool, _learning("--compile/--eager", help="torch.compile the model.")
    ] = False,
    seed: Annotated[int, _learning(min=0, help="Of all that is random.")] = 0,
    save_every: Annotated[
        int, typer.Option(min=1, help="Steps between saves, which --resume continues from.")
    ] = 500,
    val_every: Annotated[
        int,
        typer.Option(min=0, help="Steps between validations, which save, too. 0: --save-every."),
    ] = 0,
    log_every: Annotated[
        int, typer.Option(min=1, help="Steps between rows of log.jsonl and TensorBoard.")
    ] = 50,
    val_limit: Annotated[
        int, typer.Option(min=0, help="Validate on so many images at most; 0 is all.")
    ] = 0,
    backend: BackendOption = Backend.auto,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    debug: DebugOption = False,
) -> None:
    """Train a model, and keep the weights that do best on the validation split.

    The defaults are the paper's recipe for ADE20K except for the number of steps.
    DIR/best and DIR/last are folders for --weights; DIR/log.jsonl is what
    'segmenter-fast plot DIR' draws; DIR/recipe.yaml holds the options. SIGTERM saves
    and ends with status 0.

    \b
    segmenter-fast train --model Seg-T-Mask/16 --dataset folder --root data \\
        --image-size 256 --epochs 50 --output runs/mine
    segmenter-fast train --config runs/mine/recipe.yaml -o runs/mine --resume
    torchrun --nproc-per-node 8 -m segmenter_fast.train --preset ade20k \\
        --root data/ade20k --init Seg-S-Mask/16 --output runs/ade
    """  # noqa: D301
    data = Data(
        dataset,
        root,
        class_names,
        num_classes,
        ignore_index,
        _size("--scene-size", scene_size),
        data_seed,
    )
    typed = _typed(ctx)
    data.check(typed)
    if window_size == "whole" and "window_stride" in typed:
        raise _usage("--window-stride", "is of windows, but --window-size whole has none")
    if model is None and init is None:
        raise _usage("--model", "give a --model such as Seg-T-Mask/16, or weights to --init from")
    if model is not None and patch_size is not None:
        raise _usage("--patch-size", f"the name of --model {model} has it already")
    steps, epochs = _run_length(ctx, steps, epochs)
    crop = _size("--image-size", image_size)
    zoom = _pair("--scale", scale)
    window = _pixels_or("--window-size", "whole", window_size)
    shorter = _pixels_or("--short-side", "original", short_side)

    import math

    import torch

    from segmenter_fast import distributed
    from segmenter_fast.foreign import read_weights
    from segmenter_fast.train import TrainOptions
    from segmenter_fast.train import train as run

    launch = distributed.launched()
    chosen = _prepare(device, backend, threads, launch)
    if launch is not None:
        distributed.join(launch, chosen)
    talks = distributed.rank() == 0

    weights, known, scene = None, None, crop or (512, 512)
    if init is not None:
        with distributed.one_goes_first(launch):
            weights = read_weights(init)
        if weights.config is not None:
            known, scene = _classes_of(weights.config), crop or weights.config.image_size
    train_set = data.split("train", count, scene, known)
    val_set = data.split("val", val_count, scene, known)
    if epochs is not None:
        steps = max(1, math.ceil(len(train_set) * epochs / batch_size))
    options = TrainOptions(
        steps=steps or TrainOptions.steps,
        batch_size=batch_size,
        accumulate=accumulate,
        optimizer=optimizer.value,
        lr=lr,
        min_lr=min_lr,
        warmup=warmup,
        weight_decay=weight_decay,
        clip=clip,
        scale=zoom,
        jitter=jitter,
        class_weights=class_weights,
        label_smoothing=label_smoothing,
        ema=ema,
        amp=amp,
        recompute=recompute,
        compile=compile,
        save_every=save_every,
        val_every=val_every,
        log_every=log_every,
        val_limit=val_limit,
        workers=workers,
        seed=seed,
    )
    changes: dict[str, Any] = {
        "image_size": crop,
        "class_names": train_set.class_names,
        "palette": train_set.palette,
        "dataset": dataset.name if dataset != DatasetKind.folder else root.name or None,
    }
    if patch_size is not None:
        changes["patch_size"] = patch_size
    if drop_path is not None:
        changes["drop_path_rate"] = drop_path
    if decoder_dropout is not None:
        changes["decoder_dropout"] = decoder_dropout
    if window == "whole":
        changes |= {"window_size": None, "window_stride": None}
    elif window is not None:
        changes |= {"window_size": window, "window_stride": window_stride or window}
    elif window_stride is not None:
        raise _usage("--window-stride", "needs --window-size, too")
    if shorter is not None:
        changes["short_side"] = None if shorter == "original" else shorter

    torch.manual_seed(seed)  # of the initialisation
    network = _starting_model(
        model, weights, train_set.num_classes, changes, backend.value, talks
    ).to(chosen)
    train_set = _in_memory(train_set, in_memory, options.steps * batch_size)
    val_set = _in_memory(val_set, in_memory, len(val_set) * (options.steps // save_every))
    if resume:
        _check_recipe(output, ctx.params)
    elif talks and not any((output / name).exists() for name in ("state.pt", "log.jsonl")):
        output.mkdir(parents=True, exist_ok=True)
        _write_text(output / "recipe.yaml", _recipe_text(ctx.params))
    try:
        result = run(network, train_set, val_set, output, options, resume=resume)
    except KeyboardInterrupt:
        saved = (output / "state.pt").exists()
        text = (
            f"the same command with --resume continues {output}" if saved else "nothing was saved"
        )
        typer.echo(f"\nstopped: {text}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    distributed.leave()
    if not talks:
        return
    if not result["finished"]:
        typer.echo(
            f"stopped by SIGTERM after step {result['steps']}, saved: the same command with "
            f"--resume continues {output}"
        )
        return
    best = output / "best"
    typer.echo(
        f"best mIoU {_percent(result['best_miou'])} at step {result['best_step']} of "
        f"{result['steps']}: {best}\n"
        f"label pictures with it: segmenter-fast predict IMAGE --weights {best} --output labels"
    )


# --- plot ----------------------------------------------------------------------------------------


@app.command()
@_reported
def plot(
    runs: Annotated[list[Path], typer.Argument(help="Folders that 'train' has written.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="PNG to write.")
    ] = Path("curves.png"),
    debug: DebugOption = False,
) -> None:
    """Draw the curves of training runs: loss, mIoU, learning rate, images per second.

    \b
    segmenter-fast plot runs/mine runs/other -o curves.png
    """  # noqa: D301
    _check_output("--output", output)
    from segmenter_fast.runlog import plot_runs

    try:
        plot_runs(runs, output)
    except ImportError as error:  # matplotlib is an extra
        raise ValueError(str(error)) from error
    typer.echo(f"written to {output}")


# --- evaluate ------------------------------------------------------------------------------------


@app.command()
@_reported
def evaluate(
    ctx: typer.Context,
    weights: WeightsOption,
    dataset: Annotated[
        DatasetKind,
        typer.Option(help="'folder' reads ROOT/images/SPLIT and ROOT/annotations/SPLIT."),
    ],
    root: RootOption = None,
    split: Annotated[
        str,
        typer.Option(
            help="'train' or 'val'; a sub-folder for 'folder' and 'camvid'; 'test' of ade20k and "
            "cityscapes has no labels and is for --submission."
        ),
    ] = "val",
    protocol: Annotated[
        ProtocolName | None,
        typer.Option(
            help="Official training's, official stand-alone evaluation's, or windows and size "
            "that the weights come with. Unless given: 'eval' for ade20k, pascal-context and "
            "cityscapes, 'weights' for other data.",
            show_default=False,
        ),
    ] = None,
    multiscale: Annotated[
        bool,
        typer.Option(
            "--multiscale",
            help="The paper's six scales, with mirror images unless --no-flip is given.",
        ),
    ] = False,
    window_size: WindowSizeOption = None,
    window_stride: WindowStrideOption = None,
    scales: ScalesOption = "1.0",
    flip: FlipOption = None,
    short_side: ShortSideOption = None,
    batch_size: WindowBatchOption = 4,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many images, evenly over the split.")
    ] = None,
    object_areas: Annotated[
        str,
        typer.Option(
            metavar="A,B|none",
            help="Pixels from which an object is medium and from which it is large; COCO's unless "
            "given. 'none' leaves out the sizes of objects.",
        ),
    ] = "1024,9216",
    submission: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="For ade20k and cityscapes: write label maps as their servers take them into "
            "this empty or new folder.",
        ),
    ] = None,
    class_names: ClassNamesOption = None,
    num_classes: NumClassesOption = None,
    ignore_index: IgnoreIndexOption = 255,
    count: Annotated[int, typer.Option(min=1, help="For 'scenes': how many.")] = 100,
    scene_size: SceneSizeOption = None,
    data_seed: DataSeedOption = 0,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Processes that read images ahead. Unless given: 4 beside a GPU, else none.",
            show_default=False,
        ),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write it all as JSON, too; replaces FILE."),
    ] = None,
    backend: BackendOption = Backend.auto,
    precision: PrecisionOption = Precision.float32,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    debug: DebugOption = False,
) -> None:
    """Measure weights on a dataset: mean IoU, accuracies, IoU of classes and of object sizes.

    Label maps are compared at their own size. The protocol (windows, scales,
    resizing) is printed with the numbers, since they depend on it. Started by
    torchrun or srun, several processes share the images.

    \b
    segmenter-fast evaluate --weights street --dataset camvid --root camvid
    segmenter-fast evaluate --weights Seg-T-Mask/16 --dataset ade20k --root ade20k --multiscale
    torchrun --nproc-per-node 4 -m segmenter_fast.evaluate --weights Seg-L-Mask/16 \\
        --dataset ade20k --root ade20k --protocol train
    """  # noqa: D301
    typed = _typed(ctx)
    if multiscale and "scales" in typed:
        raise _usage("--multiscale", f"names its own scales, but --scales is {scales!r}")
    if multiscale and flip is None:
        flip = True
    options = _protocol(window_size, window_stride, short_side, scales, flip, batch_size)
    areas = None
    if object_areas != "none":
        expected = "two numbers of pixels in order, such as 1024,9216, or 'none'"
        areas = _numbers("--object-areas", object_areas, int, expected)
        if len(areas) != 2 or not 0 < areas[0] <= areas[1]:
            raise _usage("--object-areas", f"expected {expected}, got {object_areas!r}")
    data = Data(
        dataset,
        root,
        class_names,
        num_classes,
        ignore_index,
        _size("--scene-size", scene_size),
        data_seed,
    )
    data.check(typed)
    if json_file is not None:
        _check_output("--json", json_file)

    from segmenter_fast import distributed
    from segmenter_fast.data.folder import spread
    from segmenter_fast.evaluate import evaluate as measure
    from segmenter_fast.evaluate import picture_of
    from segmenter_fast.model import SegmenterModel
    from segmenter_fast.protocols import MULTISCALE
    from segmenter_fast.protocols import protocol as resolve
    from segmenter_fast.submission import SERVERS, write_submission

    if submission is not None:
        if dataset.name not in SERVERS:
            raise _usage(
                "--submission",
                f"is for ade20k and cityscapes; 'segmenter-fast predict' writes label maps of any "
                f"pictures, got --dataset {dataset.value}",
            )
        if submission.exists() and (not submission.is_dir() or any(submission.iterdir())):
            raise ValueError(f"--submission: {submission} is there already and is no empty folder")
        _check_folder("--submission", submission)
    launch = distributed.launched()
    chosen = _prepare(device, backend, threads, launch)
    if launch is not None:
        distributed.join(launch, chosen)
    talks = distributed.rank() == 0

    with distributed.one_goes_first(launch):
        model = SegmenterModel.from_pretrained(
            weights, backend=backend.value, precision=precision.value, device=chosen
        )
    config = model.config
    if multiscale:
        options["scales"] = MULTISCALE
    batch_size = options.pop("batch_size")
    used = resolve(config, protocol and protocol.value, dataset.name, **options)
    samples = data.split(split, count, config.image_size, _classes_of(config))
    names = list(samples.class_names)
    if samples.num_classes != config.n_cls:
        raise ValueError(
            f"weights {weights!r} know {config.n_cls} classes but the data have "
            f"{samples.num_classes}: their label numbers do not mean the same. Take weights "
            "trained on these classes, or train some: 'segmenter-fast train --init'"
        )
    warning = _names_differ(config.class_names, names)
    if warning and talks:
        typer.echo(f"warning: {warning}", err=True)
    labelled = getattr(samples, "labelled", True)
    if not labelled and submission is None:
        raise ValueError(f"split {split!r} has no labels to measure by; give --submission DIR")
    chosen_samples = spread(samples, limit)

    write = None
    if submission is not None:
        submission.mkdir(parents=True, exist_ok=True)

        def write(index, labels):
            picture = picture_of(chosen_samples, index)
            write_submission(submission, dataset.name, picture, labels)

    if workers is None:
        workers = 0 if chosen.type == "cpu" else min(4, os.cpu_count() or 1)
    result = measure(
        model,
        chosen_samples,
        progress=talks,
        ignore_index=samples.ignore_index,
        shared=True,
        object_areas=areas if labelled else None,
        workers=workers,
        each=write,
        batch_size=batch_size,
        **used.options(),
    )
    distributed.leave()
    if not talks:
        return

    part = "" if len(chosen_samples) == len(samples) else f" (of {len(samples)})"
    where = (
        f"of {weights} on {dataset.value}, split {split}, {result['images']} images{part}, "
        f"{result['images_per_second']:.2f} images/s with reading and counting"
    )
    if labelled:
        _print_result(result, names, areas)
    typer.echo(f"{where}\nprotocol: {used}")
    if submission is not None:
        typer.echo(f"label maps for the server of {dataset.value} written to {submission}")
    if json_file is not None:
        content = {
            "weights": weights,
            "variant": config.variant,
            "dataset": dataset.value,
            "root": None if root is None else str(root),
            "split": split,
            "images_of_split": len(samples),
            "protocol": used._asdict() | {"batch_size": batch_size},
            "precision": precision.value,
            **_machine(backend.value, chosen, launch),
            **_as_json(result, names, areas),
            "warning": warning,
        }
        _write_text(json_file, json.dumps(content, indent=2, allow_nan=False) + "\n")
        typer.echo(f"written to {json_file}")


def _names_differ(ours: Sequence[str] | None, theirs: Sequence[str]) -> str | None:
    """What to say about weights and data that name a class differently."""
    if ours is None:
        return None
    differ = [n for n, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]]
    if not differ:
        return None
    n = differ[0]
    return (
        f"{len(differ)} of {len(ours)} classes have another name in the data than in the weights, "
        f"such as number {n}: {theirs[n]!r} and {ours[n]!r}. If that is not the same class, the "
        "result means nothing"
    )


def _size_words(areas: Sequence[int]) -> tuple[str, str, str]:
    return (f"below {areas[0]} pixels", f"{areas[0]} to {areas[1] - 1}", f"from {areas[1]}")


def _print_result(result: dict[str, Any], names: Sequence[str], areas) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    objects = result.get("objects", {})
    table = Table(title="IoU of each class", title_justify="left")
    table.add_column("class")
    for column in ("share of pixels", "IoU", *objects):
        table.add_column(column, justify="right")
    total = int(result["confusion"].sum())
    for number, name in enumerate(names):
        share = int(result["confusion"][number].sum()) / total if total else None
        values = (result["iou"][number], *(size["iou"][number] for size in objects.values()))
        table.add_row(escape(name), _percent(share), *map(_percent, values))
    Console().print(table)
    typer.echo(
        f"mIoU {_percent(result['miou'])}, pixel accuracy {_percent(result['pixel_accuracy'])}, "
        f"mean accuracy {_percent(result['mean_accuracy'])}, frequency-weighted IoU "
        f"{_percent(result['frequency_weighted_iou'])}"
    )
    if objects:
        sizes = (
            f"{name} ({words}) {_percent(objects[name]['miou'])} of {objects[name]['objects']}"
            for name, words in zip(objects, _size_words(areas), strict=True)
        )
        typer.echo(f"mIoU by the size of objects: {', '.join(sizes)}")


def _machine(backend: str, device, launch) -> dict[str, Any]:
    """What computed, for a JSON file."""
    import torch

    from segmenter_fast.backend import resolve_backend

    on_gpu = device.type == "cuda"
    return {
        "backend": resolve_backend(backend, device),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        "threads": torch.get_num_threads(),
        "processes": 1 if launch is None else launch.world_size,
        "versions": _versions(),
    }


def _as_json(result: dict[str, Any], names: Sequence[str], areas) -> dict[str, Any]:
    """A result without tensors and NaN: what was not counted is null."""

    def plain(values: dict[str, Any]) -> dict[str, Any]:
        out = {
            key: None if isinstance(value, float) and value != value else value
            for key, value in values.items()
        }
        out["iou"] = dict(zip(names, values["iou"], strict=True))
        out["confusion"] = values["confusion"].tolist()
        return out

    out = plain(result)
    if "objects" in result:
        sizes = {name: plain(values) for name, values in result["objects"].items()}
        out["objects"] = {"areas": list(areas), **sizes}
    return out


# --- convert -------------------------------------------------------------------------------------


@app.command()
@_reported
def convert(
    checkpoint: Annotated[
        str, typer.Argument(help="A whole Segmenter: MMSegmentation's .pth, or any --weights.")
    ],
    output: Annotated[Path, typer.Argument(help="Folder for config.json and model.safetensors.")],
    heads: Annotated[
        int | None,
        typer.Option(min=1, help="Of the encoder's attention. One for 64 channels unless known."),
    ] = None,
    class_names: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|DATASET",
            help="A text file with one class name per line, a JSON list of (name, (r, g, b)), or "
            "ade20k, cityscapes, pascal_context. Those of the checkpoint unless given.",
        ),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Turn a checkpoint of another library into a folder for --weights.

    \b
    segmenter-fast convert segmenter_vit-b_mask_8x1_512x512_160k_ade20k.pth runs/mmseg \\
        --class-names ade20k
    """  # noqa: D301
    names = None if class_names is None else _read_classes(class_names)

    from segmenter_fast.pretrained import load_whole

    model = load_whole(checkpoint, heads)
    if names is not None:
        if len(names.names) != model.n_cls:
            raise _usage(
                "--class-names", f"{len(names.names)} names for a model of {model.n_cls} classes"
            )
        model.config = model.config.replace(class_names=names.names, palette=names.palette)
    model.save_pretrained(output)
    config = model.config
    what = config.variant or (
        f"{config.n_layers} layers, width {config.d_model}, {config.n_heads} heads, "
        f"{config.decoder}, patch {config.patch_size}"
    )
    typer.echo(f"{what}, {config.n_cls} classes, crop {config.image_size}: written to {output}")


# --- demo ----------------------------------------------------------------------------------------


@app.command()
@_reported
def demo(
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE", help="Picture to write; it is replaced."),
    ] = Path("segmenter_fast_demo.png"),
    weights: WeightsOption = "scenes",
    size: Annotated[str, typer.Option(metavar="H,W", help="Of the scenes, in pixels.")] = "384,512",
    seed: Annotated[int, typer.Option(min=0, help="Another seed draws other scenes.")] = 29,
    scenes: Annotated[int, typer.Option(min=1, help="Scenes that the mIoU is taken over.")] = 24,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds of timing, at most.")] = 7,
    backend: BackendOption = Backend.auto,
    threads: ThreadsOption = None,
    debug: DebugOption = False,
) -> None:
    """See it work: a drawn scene with exactly known labels, predicted, measured and timed.

    Needs no arguments and no downloads. Writes input, truth and prediction side
    by side as one picture, prints the mIoU, and times the official algorithm
    beside the fast path.
    """
    pixels = _size("--size", size)
    _check_output("--output", output, known=_image_suffixes())
    _prepare("cpu", backend, threads)
    from segmenter_fast.demo import run_demo

    run_demo(
        weights=weights,
        size=pixels,
        seed=seed,
        output=output,
        repeats=repeats,
        backend=backend.value,
        scenes=scenes,
    )


# --- zoo -----------------------------------------------------------------------------------------


@zoo_app.callback(invoke_without_command=True)
@_reported
def zoo(
    ctx: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    debug: DebugOption = False,
) -> None:
    """List the official models, with the mIoU their authors published.

    \b
    segmenter-fast zoo
    segmenter-fast zoo download Seg-T-Mask/16
    segmenter-fast predict photo.jpg --weights Seg-T-Mask/16 --output labels

    A download is kept in SEGMENTER_FAST_CACHE, or else ~/.cache/segmenter_fast.
    """  # noqa: D301
    if ctx.invoked_subcommand is not None:
        return
    from segmenter_fast.zoo import FILES, ZOO, cache_folder

    folder = cache_folder() / "zoo"
    rows = [
        {
            "name": model.name,
            "variant": model.variant,
            "crop": model.resolution,
            "miou": model.miou,
            "miou_multiscale": model.miou_multiscale,
            "downloaded": all((folder / model.name / file).is_file() for file in FILES),
        }
        for model in ZOO
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return

    from rich.console import Console
    from rich.table import Table

    # Without a frame it fits 80 columns.
    table = Table(box=None)
    table.add_column("name", no_wrap=True)
    table.add_column("model", no_wrap=True)
    for heading in ("crop", "mIoU", "scales", "here"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["name"],
            row["variant"],
            str(row["crop"]),
            f"{row['miou']:.1f}",
            f"{row['miou_multiscale']:.1f}",
            "yes" if row["downloaded"] else "no",
        )
    console = Console()
    console.print(table)
    console.print(
        "mIoU in percent, at one scale and at several. --weights takes a name; a model's alone is "
        f"the first of its kind. Downloads are kept in {folder}.",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )


@zoo_app.command()
@_reported
def download(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help="Such as Seg-T-Mask/16, cityscapes/seg_large_mask."),
    ],
    cache_dir: Annotated[
        Path | None, typer.Option(help="Folder to keep it in, instead of SEGMENTER_FAST_CACHE.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Fetch again, and accept other files than the first.")
    ] = False,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds to wait for an answer, and for each piece.")
    ] = 10.0,
    debug: DebugOption = False,
) -> None:
    """Download an official model, or continue a download that was cut off."""
    from segmenter_fast.zoo import download as fetch

    folder = fetch(name, cache_dir, timeout=timeout, force=force)
    typer.echo(f"{name}: {folder}")


# --- kernels -------------------------------------------------------------------------------------


class Dtype(enum.StrEnum):
    """What kernels are compiled for."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def _without_interpreter(words: Sequence[str]) -> int:
    """Run this program where Triton compiles, which it decides on import; returns the status."""
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = (str(PACKAGE.parent), environ.get("PYTHONPATH"))
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, "-P", "-m", "segmenter_fast", *words]
    return subprocess.run(command, env=environ).returncode


@app.command()
@_reported
def kernels(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help="Parts of operations' names. All unless given."),
    ] = None,
    archs: Annotated[
        list[str] | None,
        typer.Option(
            "--arch",
            metavar="sm_NN",
            help="GPU to compile for; may be repeated. 80, 86, 89, 90 and 100 unless given.",
        ),
    ] = None,
    dtypes: Annotated[
        list[Dtype] | None,
        typer.Option("--dtype", help="May be repeated. All of the operation's unless given."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write it as Markdown, too."),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", "-j", min=1, help="Compilers at the same time; one per core."),
    ] = None,
    cuda: Annotated[bool, typer.Option(help="Look at the kernels in CUDA C++, too.")] = True,
    debug: DebugOption = False,
) -> None:
    """Compile every Triton kernel ahead of time, and show what it uses. Needs no GPU.

    \b
    segmenter-fast kernels --arch sm_90                 what an H200 would run
    segmenter-fast kernels cross_entropy --arch sm_80   one operation, on an A100
    segmenter-fast kernels --output report.md           everything, as a page

    For each configuration: registers, bytes of spilled registers, shared memory,
    instructions of tensor cores and of the tensor memory accelerator, occupancy.
    Beside them the time that the operation takes at least on an H200.

    The exit status is 1 if a kernel spills, if it multiplies 16-bit matrices
    without tensor cores (on sm_90 without HGMMA), if a block needs more shared
    memory than there is, or if a kernel does not compile. What Triton has
    compiled before comes from its cache.
    """  # noqa: D301
    if output is not None:
        _check_output("--output", output)
    if os.environ.get("TRITON_INTERPRET"):
        words = [f"--arch={text}" for text in archs or ()]
        words += [f"--dtype={dtype.value}" for dtype in dtypes or ()]
        words += [] if output is None else [f"--output={output}"]
        words += [] if jobs is None else [f"--jobs={jobs}"]
        words += ["--cuda" if cuda else "--no-cuda", *(["--debug"] if debug else [])]
        raise typer.Exit(_without_interpreter(["kernels", *words, "--", *(names or ())]))
    import torch
    from rich.console import Console
    from tqdm import tqdm

    from segmenter_fast.compile_report import make_report, show, to_markdown
    from segmenter_fast.ops._triton import ARCHITECTURES

    chosen = [text.removeprefix("sm_") for text in archs or map(str, ARCHITECTURES)]
    for text in chosen:
        if text not in map(str, ARCHITECTURES):
            known = ", ".join(f"sm_{arch}" for arch in ARCHITECTURES)
            raise _usage("--arch", f"expected one of {known}, got {text!r}")
    with contextlib.ExitStack() as stack:

        def progress(total: int) -> Callable[[], None]:
            bar = tqdm(total=total, desc="compile", unit="kernel", disable=None)
            return stack.enter_context(bar).update

        report = make_report(
            names=names or (),
            archs=sorted({int(text) for text in chosen}),
            dtypes=[getattr(torch, dtype.value) for dtype in dtypes] if dtypes else None,
            processes=jobs or os.cpu_count() or 1,
            with_cuda=cuda,
            progress=progress,
        )
    show(report, Console())
    if output is not None:
        _write_text(output, to_markdown(report))
        typer.echo(f"written to {output}")
    if report.problems:
        raise typer.Exit(1)


# Last, because it takes options and functions from above; it adds its commands to `app`.
import segmenter_fast.cli_analysis  # noqa: E402
import segmenter_fast.cli_tradeoff  # noqa: E402


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; ends the process with its exit status.

    Args:
        args: words after the program's name; None takes those of this process.
    """
    app(args=None if args is None else list(args), prog_name="segmenter-fast")


if __name__ == "__main__":
    sys.exit(segmenter_fast.cli.main())  # of the copy that has all commands
