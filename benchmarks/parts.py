"""Where the time of an image goes, part by part, beside what this machine could do at best:

    python -m benchmarks.parts                        # Seg-T-Mask/16 and Seg-B-Mask/16, batch 1
    python -m benchmarks.parts --output parts.md Seg-S-Mask/16
    python -m benchmarks.parts --precision int8 --no-modules

For each model and precision there are two tables. The first is of the one native call that a model
is under inference mode on a CPU: the seconds that it counts itself, part by part, and the labels
that are read off its logits; what they lack of the whole is waiting of one thread for another. The
second is of the modules, which training and other backends run:
every part by itself on tensors of its real shapes, all parts in turn, and the whole model with
them; a figure is the median over the rounds. There is no int8 in it, for modules have none. Where
its parts add up to more or less than the whole, caches are the reason: a part alone finds its
weights where a whole model does not.

The floor of a part is the longer of its FLOP over the machine's rate and its bytes over the
bandwidth of a copy, both measured in the same run with the same number of threads. The rate is that
of the processor's own instructions in that precision, with all operands in registers, where the
compiled module can measure it, and else that of a large matrix product in PyTorch.
"""

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_model import images
from harness import Work, ceilings, instruction_rate, machine
from records import milliseconds, percent

from segmenter_fast import BackendError, create_model
from segmenter_fast.backend import native_module
from segmenter_fast.config import MLP_RATIO, SegmenterConfig

MODELS = ["Seg-T-Mask/16", "Seg-B-Mask/16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
"""Of a number in each precision."""


class Part(NamedTuple):
    """A part of a model.

    Args:
        name: of the row.
        times: how often a model has it.
        call: runs it once.
        work: what one call cannot do without.
    """

    name: str
    times: int
    call: Callable[[], object]
    work: Work


def parts_of(model, x: torch.Tensor) -> list[Part]:
    """The parts of a Segmenter with a mask transformer, in their order."""
    config, encoder, decoder = model.config, model.encoder, model.decoder
    size = x.element_size()
    batch, (height, width) = len(x), config.image_size
    n, d, k = height * width // config.patch_size**2, config.d_model, config.n_cls

    def linear(rows: int, inputs: int, outputs: int, extra: int = 0) -> Work:
        """A product with a weight matrix, its operands read and its result written once."""
        elements = rows * (inputs + outputs + extra) + inputs * outputs
        return Work(2 * rows * inputs * outputs, size * elements)

    tokens = encoder._tokens(x)
    features = encoder(x, return_features=True)[:, encoder.num_extra_tokens :]
    joined = decoder._tokens(features)
    answer = model.patch_logits(x)

    def block_parts(where: str, block, y: torch.Tensor, times: int) -> list[Part]:
        rows = y.shape[0] * y.shape[1]
        normed = block.norm1(y)
        packed = block.attn._packed(normed)
        mixed = attention(packed)
        pairs = y.shape[0] * y.shape[1] ** 2
        mlp = 2 * MLP_RATIO * rows * d
        return [
            Part(f"{where}: norm, qkv", times, lambda: block.attn._packed(block.norm1(y)),
                 linear(rows, d, 3 * d)),
            Part(f"{where}: attention", times, lambda: attention(packed),
                 Work(4 * pairs * d, size * rows * 4 * d)),
            Part(f"{where}: projection, residual", times, lambda: y + block.attn.proj(mixed),
                 linear(rows, d, d, extra=d)),
            Part(f"{where}: norm, MLP, residual", times, lambda: y + block.mlp(block.norm2(y)),
                 Work(2 * mlp * d, size * (2 * MLP_RATIO * d * d + 2 * rows * d))),
        ]  # fmt: skip

    def attention(packed: torch.Tensor) -> torch.Tensor:
        from segmenter_fast.ops.attention import attention

        return attention(packed, backend=model.backend)

    patch = 3 * config.patch_size**2
    return [
        Part("patch embedding", 1, lambda: encoder._tokens(x), linear(batch * n, patch, d)),
        *block_parts("encoder", encoder.blocks[0], tokens, config.n_layers),
        Part("encoder: last norm", 1, lambda: encoder.norm(tokens),
             Work(8 * tokens.numel(), 2 * size * tokens.numel())),
        Part("decoder: tokens", 1, lambda: decoder._tokens(features), linear(batch * n, d, d)),
        *block_parts("decoder", decoder.blocks[0], joined, config.decoder_n_layers),
        Part("decoder: masks", 1, lambda: masks(decoder, joined, (height, width)),
             Work(2 * batch * ((n + k) * d * d + n * k * d),
                  size * batch * ((n + k) * d + n * k) + 2 * size * d * d)),
        Part("labels", 1, answer.labels, labels_work(config, batch, size)),
    ]  # fmt: skip


def masks(decoder, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """What the decoder does after its blocks."""
    from segmenter_fast.decoder import to_grid
    from segmenter_fast.ops.mask_product import mask_product

    x = decoder.decoder_norm(x)
    patches = x[:, : -decoder.n_cls] @ decoder.proj_patch
    classes = x[:, -decoder.n_cls :] @ decoder.proj_classes
    norm = decoder.mask_norm
    product = mask_product(patches, classes, norm.weight, norm.bias, norm.eps, decoder.backend)
    return to_grid(product, size, decoder.patch_size)


def measure(
    calls: list[Callable[[], object]], rounds: int, between: Callable[[], object] = lambda: None
) -> list[float]:
    """Median milliseconds of each call, all of them in turn; `between` is called in each round."""
    from harness import _seconds

    for call in calls:
        call()
    repeats = [max(1, min(20, round(2e-3 / max(_seconds(call, 1), 1e-6)))) for call in calls]
    times = []
    for _ in range(rounds):
        between()
        times.append([_seconds(call, n) for call, n in zip(calls, repeats, strict=True)])
    return [1e3 * statistics.median(column) for column in zip(*times, strict=True)]


def peak(precision: str) -> tuple[float, str]:
    """Operations per second at best, a multiplication and an addition being two, and of what.

    Raises:
        BackendError: this processor has no instructions for it, and PyTorch no product.
    """
    rate = instruction_rate(precision)
    if rate:
        return rate, "instructions on registers"
    if precision not in DTYPES:
        raise BackendError(f"this processor has no products in {precision}")
    return ceilings("cpu", DTYPES[precision]).flop_per_s, "matrix product"


def seconds_of() -> Callable[..., dict[str, float]] | None:
    """`segmenter_fast.native.seconds_of`; None where there is no such call."""
    try:
        from segmenter_fast.native import seconds_of
    except ImportError:
        return None
    return seconds_of


def labels_work(config: SegmenterConfig, batch: int, size: int) -> Work:
    """Upsampling and argmax; `size` bytes in a logit.

    A multiplication and a comparison for each pixel and class at worst; see
    bench_upsample_argmax.py. Logits are read, labels written.
    """
    height, width = config.image_size
    n = height * width // config.patch_size**2
    return Work(
        batch * height * width * 2, size * batch * n * config.n_cls + batch * height * width
    )


def call_work(
    config: SegmenterConfig, precision: str, beside: str, batch: int
) -> dict[str, tuple[str, Work]]:
    """Precision and work of the parts of the one native call, by its names for them.

    Of what stays in caches between the parts nothing is counted: only the weights, which every call
    reads once, and the images. The head is the layer into the decoder, the projections of patches
    and classes, and their product.

    Args:
        config: with a mask transformer.
        precision: of the linear layers in the blocks.
        beside: of everything else but norms and labels, which are always float32.
        batch: images.
    """
    height, width = config.image_size
    patch = config.patch_size
    n, d, k = height * width // patch**2, config.d_model, config.n_cls
    inputs = 3 * patch**2
    stacks = ((config.n_layers, n + 1), (config.decoder_n_layers, n + k))  # blocks, tokens
    blocks = sum(layers for layers, _ in stacks)
    tokens = sum(layers * count for layers, count in stacks)
    pairs = sum(layers * count**2 for layers, count in stacks)
    weights = d * d * (4 + 2 * MLP_RATIO)  # of a block: qkv, proj, fc1, fc2
    image_bytes = 4 * 3 * height * width
    return {
        "embed": (
            beside,
            Work(2 * batch * n * inputs * d, batch * image_bytes + BYTES[beside] * inputs * d),
        ),
        # 2 tokens^2 d for the scores, as much for the mixture.
        "attention": (beside, Work(4 * batch * pairs * d, 0)),
        "linear": (
            precision,
            Work(2 * batch * tokens * weights, BYTES[precision] * blocks * weights),
        ),
        # Mean, variance, scale and shift: some 8 FLOP a number; two norms a block, and one after
        # each stack of blocks.
        "norm": ("float32", Work(8 * batch * d * (2 * tokens + 2 * n + k), 0)),
        "head": (
            beside,
            Work(2 * batch * ((2 * n + k) * d * d + n * k * d), BYTES[beside] * 3 * d * d),
        ),
        "labels": ("float32", labels_work(config, batch, BYTES["float32"])),
    }


HEADING = [
    "| part | times | ms in all | share | floor, ms | floor / time |",
    "|---|---|---|---|---|---|",
]


class Line(NamedTuple):
    """A part in a table: how often, milliseconds in all, and its floor in all, if known."""

    name: str
    times: int
    ms: float
    floor: float | None


def table_of(lines: list[Line], whole: float) -> list[str]:
    """Markdown lines of the parts, their sum, and the whole model's milliseconds."""

    def share(floor: float | None, ms: float) -> str:
        return f"{milliseconds(floor)} | {'' if floor is None else percent(floor / ms)}"

    total = sum(line.ms for line in lines)
    floors = [line.floor for line in lines]
    floor = None if None in floors else sum(floors)
    return [
        *HEADING,
        *(
            f"| {part.name} | {part.times} | {milliseconds(part.ms)} | "
            f"{percent(part.ms / whole)} | {share(part.floor, part.ms)} |"
            for part in lines
        ),
        f"| sum of the parts | | {milliseconds(total)} | {percent(total / whole)} | "
        f"{share(floor, total)} |",
        f"| **whole model** | | **{milliseconds(whole)}** | | {share(floor, whole)} |",
        "",
    ]


def call_lines(
    seconds: list[dict[str, float]],
    labels: float,
    work: dict[str, tuple[str, Work]],
    rates: dict[str, float],
    bandwidth: float,
) -> list[Line]:
    """The parts of the one native call.

    Args:
        seconds: of each part by name, one dict for each round.
        labels: milliseconds of upsampling and argmax.
        work: of `call_work`; a part that it lacks has no floor.
        rates: operations per second by precision.
        bandwidth: bytes per second.
    """
    names = list(dict.fromkeys(name for one in seconds for name in one))
    times = {name: 1e3 * statistics.median(one.get(name, 0.0) for one in seconds) for name in names}
    lines = []
    for name, ms in (times | {"labels": labels}).items():
        precision, least = work.get(name, ("", None))
        floor = None
        if least is not None:
            floor = 1e3 * max(least.flops / rates[precision], least.bytes / bandwidth)
        lines.append(Line(name, 1, ms, floor))
    return lines


@torch.inference_mode()
def call_page(variant: str, precision: str, batch: int, rounds: int) -> list[str]:
    """The table of a model's one native call."""
    torch.manual_seed(0)
    model = create_model(variant, num_classes=150, image_size=512).eval()
    x = images(batch)
    lines = [f"### {precision}, one call", ""]
    counted, beside = seconds_of(), precision
    if counted is None:
        return [*lines, "Not run: this version has no `segmenter_fast.native.seconds_of`.", ""]
    try:
        peak(precision)
        model.precision = precision
        answer = model.patch_logits(x)
    except (BackendError, ValueError) as reason:
        return [*lines, f"Not run: {reason}", ""]
    if precision == "int8":
        # The model's rule for what int8 leaves.
        level = native_module().simd_level()
        beside = "bfloat16" if level == "avx512_bf16" else "float32"
    seconds = []
    labels, whole = measure(
        [answer.labels, lambda: model.labels(x)],
        rounds,
        between=lambda: seconds.append(counted(model, x)),
    )
    work, rates, told = call_work(model.config, precision, beside, batch), {}, []
    for kind in dict.fromkeys(kind for kind, _ in work.values()):
        rates[kind], of = peak(kind)
        told.append(f"{kind} {rates[kind] / 1e9:,.0f} G operations/s ({of})")
    bandwidth = ceilings("cpu").bytes_per_s
    return [
        *lines,
        f"Ceilings: {', '.join(told)}; {bandwidth / 1e9:,.1f} GB/s.",
        "",
        *table_of(call_lines(seconds, labels, work, rates, bandwidth), whole),
    ]


def module_page(variant: str, precision: str, batch: int, rounds: int) -> list[str]:
    """The table of a model's modules."""
    torch.manual_seed(0)
    dtype = DTYPES[precision]
    model = create_model(variant, num_classes=150, image_size=512).to(dtype).eval()
    # Where gradients may be recorded, the whole model is its modules and not the one call; none are
    # of frozen parameters.
    model.requires_grad_(False)
    x = images(batch).to(dtype)
    parts = parts_of(model, x)
    *single, whole = measure([*(part.call for part in parts), lambda: model.labels(x)], rounds)
    ceiling = ceilings("cpu", dtype)
    flop_per_s, of = peak(precision)
    lines = []
    for (name, times, _, work), ms in zip(parts, single, strict=True):
        one = 1e3 * max(work.flops / flop_per_s, work.bytes / ceiling.bytes_per_s)
        lines.append(Line(name, times, times * ms, times * one))
    return [
        f"### {precision}, modules",
        "",
        f"Ceilings: {flop_per_s / 1e9:,.0f} GFLOP/s ({of}), {ceiling.bytes_per_s / 1e9:,.1f} GB/s.",
        "",
        *table_of(lines, whole),
    ]


def main(
    models: Annotated[list[str] | None, typer.Argument(help="Variants.")] = None,
    precision: Annotated[
        str, typer.Option(metavar="NAME,...", help="Of float32, bfloat16 and int8.")
    ] = "float32,bfloat16,int8",
    batch: Annotated[int, typer.Option(min=1)] = 1,
    rounds: Annotated[int, typer.Option(min=1)] = 9,
    modules: Annotated[bool, typer.Option(help="The tables of modules, too.")] = True,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Markdown file.")] = None,
) -> None:
    """Time every part of a model beside its floor."""
    kinds = [kind.strip() for kind in precision.split(",")]
    unknown = [kind for kind in kinds if kind not in BYTES]
    if unknown:
        raise typer.BadParameter(f"of {', '.join(BYTES)}, got {', '.join(unknown)}")
    about = machine()
    lines = [
        "# Where the time of an image goes",
        "",
        f"Made by `python -m benchmarks.parts` on {about['cpu']}, PyTorch {about['torch']}. "
        f"512 x 512, 150 classes, random weights; {about['threads']} threads.",
        "",
    ]
    for variant in models or MODELS:
        lines += [f"## {variant}, batch {batch}", ""]
        for kind in kinds:
            lines += call_page(variant, kind, batch, rounds)
            if modules and kind in DTYPES:
                lines += module_page(variant, kind, batch, rounds)
    text = "\n".join(lines)
    typer.echo(text)
    if output is not None:
        output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
