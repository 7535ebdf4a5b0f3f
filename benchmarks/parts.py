"""Where the time of an image goes, part by part, beside what this machine could do at best:

    python -m benchmarks.parts                        # Seg-T-Mask/16 and Seg-B-Mask/16, batch 1
    python -m benchmarks.parts --output parts.md Seg-S-Mask/16

Every part of a model, images to label maps, is run by itself on tensors of its real shapes, all
parts in turn, and the whole model with them; a figure is the median over the rounds. The floor of a
part is the longer of its FLOP over the rate of a large matrix product and its bytes over the
bandwidth of a copy, both measured in the same run and precision. Where the parts add up to more or
less than the whole, caches are the reason: a part alone finds its weights where a whole model does
not.
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
from harness import Work, ceilings, machine
from records import milliseconds, percent

from segmenter_fast import create_model
from segmenter_fast.config import MLP_RATIO

MODELS = ["Seg-T-Mask/16", "Seg-B-Mask/16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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
        Part("labels", 1, answer.labels,
             # A multiplication and a comparison for each pixel and class at worst; see
             # bench_upsample_argmax.py. Logits are read, labels written.
             Work(batch * height * width * 2, size * batch * n * k + batch * height * width)),
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


def measure(calls: list[Callable[[], object]], rounds: int) -> list[float]:
    """Median milliseconds of each call, all of them in turn."""
    from harness import _seconds

    for call in calls:
        call()
    repeats = [max(1, min(20, round(2e-3 / max(_seconds(call, 1), 1e-6)))) for call in calls]
    times = [
        [_seconds(call, n) for call, n in zip(calls, repeats, strict=True)] for _ in range(rounds)
    ]
    return [1e3 * statistics.median(column) for column in zip(*times, strict=True)]


@torch.inference_mode()
def page_of(variant: str, precision: str, batch: int, rounds: int) -> list[str]:
    """The Markdown table of a model."""
    torch.manual_seed(0)
    dtype = DTYPES[precision]
    model = create_model(variant, num_classes=150, image_size=512).to(dtype).eval()
    x = images(batch).to(dtype)
    parts = parts_of(model, x)
    *single, whole = measure([*(part.call for part in parts), lambda: model.labels(x)], rounds)
    ceiling = ceilings("cpu", dtype)
    lines = [
        f"## {variant}, {precision}, batch {batch}",
        "",
        f"512 x 512, 150 classes, random weights; {torch.get_num_threads()} threads. Ceilings: "
        f"{ceiling.flop_per_s / 1e9:,.0f} GFLOP/s, {ceiling.bytes_per_s / 1e9:,.1f} GB/s.",
        "",
        "| part | times | ms in all | share | floor, ms | floor / time |",
        "|---|---|---|---|---|---|",
    ]
    total, floors = 0.0, 0.0
    for part, time in zip(parts, single, strict=True):
        work = part.work
        one = 1e3 * max(work.flops / ceiling.flop_per_s, work.bytes / ceiling.bytes_per_s)
        floor, time = part.times * one, part.times * time
        total, floors = total + time, floors + floor
        lines.append(
            f"| {part.name} | {part.times} | {milliseconds(time)} | {percent(time / whole)} | "
            f"{milliseconds(floor)} | {percent(floor / time)} |"
        )
    lines += [
        f"| sum of the parts | | {milliseconds(total)} | {percent(total / whole)} | "
        f"{milliseconds(floors)} | {percent(floors / total)} |",
        f"| **whole model** | | **{milliseconds(whole)}** | | {milliseconds(floors)} | "
        f"{percent(floors / whole)} |",
        "",
    ]
    return lines


def main(
    models: Annotated[list[str] | None, typer.Argument(help="Variants.")] = None,
    precision: Annotated[str, typer.Option(metavar="NAME,...")] = "float32,bfloat16",
    batch: Annotated[int, typer.Option(min=1)] = 1,
    rounds: Annotated[int, typer.Option(min=1)] = 9,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Markdown file.")] = None,
) -> None:
    """Time every part of a model beside its floor."""
    about = machine()
    lines = [
        "# Where the time of an image goes",
        "",
        f"Made by `python -m benchmarks.parts` on {about['cpu']}, PyTorch {about['torch']}.",
        "",
    ]
    for variant in models or MODELS:
        for kind in precision.split(","):
            lines += page_of(variant, kind.strip(), batch, rounds)
    text = "\n".join(lines)
    typer.echo(text)
    if output is not None:
        output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
