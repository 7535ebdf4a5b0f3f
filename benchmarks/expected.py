"""What the encoder and decoder should take on an H200, worked out before anything was measured:

    python -m benchmarks.expected            # writes benchmarks/results/expected.md

For each operation of a model two times. The floor is the longer of FLOP over the matrix rate and
bytes over the bandwidth, from the operations' declarations. What is expected of our kernels is the
longest of three: FLOP over a share of that rate which good kernels are known to reach, bytes over
85 % of the bandwidth, and 3 us for each kernel, which a CUDA graph does not start faster. It is not
counted that small batches leave multiprocessors idle. Measured times are to stand beside these,
which stay as they are.
"""

import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer

sys.path.insert(0, str(Path(__file__).resolve().parent))

from records import RESULTS

from segmenter_fast.compile_report import BANDWIDTH, MATRIX_RATE
from segmenter_fast.ops import (
    attention_triton,
    layer_norm_linear_triton,
    layer_norm_triton,
    linear_residual_triton,
    mask_product_triton,
    mlp_triton,
    patch_embed_triton,
    upsample_argmax_triton,
)
from segmenter_fast.ops._linear_triton import choose
from segmenter_fast.variants import create_model

MODELS = ("Seg-T-Mask/16", "Seg-S-Mask/16", "Seg-B-Mask/16", "Seg-L-Mask/16")
BATCHES = (1, 32)
SIDE, N_CLS = 512, 150

MEMORY_SHARE = 0.85
"""Of the bandwidth: layer norms are published at 80 to 88 % of it."""

ATTENTION_SHARE = 0.48
"""Of the matrix rate at 1,025 tokens and 64 channels; the best published kernels do 0.50 at 1,024
and 0.58 at 2,048, on blocks without tails."""

PRODUCT_SHARES = ((192, 0.50), (384, 0.65), (1 << 30, 0.75))
"""By number of channels summed over: short sums leave less time between loading and storing."""

KERNEL_SECONDS = 3e-6


@dataclasses.dataclass
class Part:
    """One operation of a model.

    Args:
        name: of the operation.
        calls: how often the model calls it.
        flop, moved: of one call, and bytes.
        share: of the matrix rate that is expected; None where nothing is multiplied.
        kernels: that one call launches.
        more: bytes that our kernels move beyond `moved`, because one leaves them to another.
    """

    name: str
    calls: int
    flop: float
    moved: float
    share: float | None
    kernels: int = 1
    more: float = 0.0

    @property
    def floor(self) -> float:
        """Seconds that no method can do without."""
        flop = self.flop / MATRIX_RATE if self.share else 0.0
        return self.calls * max(flop, self.moved / BANDWIDTH)

    @property
    def expected(self) -> float:
        """Seconds that our kernels should take."""
        flop = self.flop / (MATRIX_RATE * self.share) if self.share else 0.0
        moved = (self.moved + self.more) / (BANDWIDTH * MEMORY_SHARE)
        return self.calls * max(flop, moved, self.kernels * KERNEL_SECONDS)


def product_share(channels: int) -> float:
    """Share of the matrix rate for sums over so many channels."""
    return next(share for most, share in PRODUCT_SHARES if channels <= most)


def _blocks(count: int, batch: int, n: int, width: int) -> Iterator[Part]:
    dtype, share = torch.bfloat16, product_share(width)
    tokens = {"batch": batch, "n": n, "width": width}
    qkv = layer_norm_linear_triton._work(layer_norm_linear_triton._make_inputs(dtype, **tokens))
    feed = mlp_triton._work(mlp_triton._make_inputs(dtype, **tokens))
    projection = linear_residual_triton._make_inputs(dtype, **tokens)
    qkv_input = attention_triton._make_inputs(dtype, batch, n, width // 64, 64)
    # A norm apart writes what the product reads: 4 bytes per channel more.
    apart = {name: not choose(name, width, dtype).norm for name in ("layer_norm_linear", "mlp")}
    norm = 4 * batch * n * width
    # The hidden layer is written and read: it does not fit into the chip.
    hidden = 4 * batch * n * 4 * width
    part = "layer_norm_linear"
    yield Part(part, count, *qkv, share, 1 + apart[part], norm * apart[part])
    yield Part("attention", count, *attention_triton._work(qkv_input), ATTENTION_SHARE)
    yield Part("linear_residual", count, *linear_residual_triton._work(projection), share)
    yield Part("mlp", count, *feed, share, 2 + apart["mlp"], hidden + norm * apart["mlp"])


def parts_of(model: str, batch: int) -> list[Part]:
    """The operations from normalised images to labels, in their order."""
    dtype, grid = torch.bfloat16, SIDE // 16
    with torch.device("meta"):
        config = create_model(model, num_classes=N_CLS, image_size=SIDE).config
        width, n = config.d_model, grid * grid
        image = {"batch": batch, "height": SIDE, "width": SIDE, "patch": 16, "d": width}
        pixels = patch_embed_triton._work(patch_embed_triton._make_inputs(dtype, **image))
        parts = [Part("patch_embed", 1, *pixels, product_share(3 * 16 * 16))]
        parts += _blocks(config.n_layers, batch, n + 1, width)

        def norm(rows: int) -> Part:
            inputs = layer_norm_triton._make_inputs(dtype, rows, width)
            return Part("layer_norm", 1, *layer_norm_triton._work(inputs), None)

        def linear(rows: int) -> Part:
            flop, moved = 2 * rows * width * width, 2 * (2 * rows + width) * width
            return Part("linear", 1, flop, moved, product_share(width))

        parts += [norm(batch * (n + 1)), linear(batch * n)]
        parts += [
            dataclasses.replace(part, name=f"{part.name}, decoder")
            for part in _blocks(config.decoder_n_layers, batch, n + N_CLS, width)
        ]
        parts += [norm(batch * (n + N_CLS)), linear(batch * n), linear(batch * N_CLS)]
        vectors = mask_product_triton._make_inputs(dtype, batch, n, N_CLS, width)
        masks = mask_product_triton._work(vectors)
        parts.append(Part("mask_product", 1, *masks, product_share(width)))
        logits = {"n_cls": N_CLS, "grid": (grid, grid), "size": (SIDE, SIDE)}
        labels = upsample_argmax_triton._make_inputs(dtype, batch, **logits)
        parts.append(Part("upsample_argmax", 1, 0.0, upsample_argmax_triton._work(labels)[1], None))
    return parts


def page() -> str:
    """All tables, as Markdown."""
    *shares, (_, rest) = PRODUCT_SHARES
    lines = [
        "# What is expected on an H200",
        "",
        "Written by `python -m benchmarks.expected`, before anything was measured. Images of "
        f"{SIDE} x {SIDE} to labels of {N_CLS} classes, the model in bfloat16. Floors: "
        f"{MATRIX_RATE / 1e12:g} TFLOP/s and {BANDWIDTH / 1e12:g} TB/s, both measured through "
        "PyTorch on such a GPU. Expected: matrix products at "
        + ", ".join(f"{share:.0%} of the rate to {most} channels" for most, share in shares)
        + f" and {rest:.0%} beyond, attention at {ATTENTION_SHARE:.0%}, memory at "
        f"{MEMORY_SHARE:.0%} of the bandwidth, no kernel in less than {KERNEL_SECONDS * 1e6:g} us "
        "(within a CUDA graph; without one the host starts some 15 us apart). That a small batch "
        "does not fill the GPU is not counted, so batch 1 of T and S is an upper bound.",
        "",
        "| model | batch | floor, images/s | expected, images/s |",
        "| --- | --: | --: | --: |",
    ]
    tables: list[str] = []
    for model in MODELS:
        for batch in BATCHES:
            parts = parts_of(model, batch)
            floor, expected = (sum(getattr(p, of) for p in parts) for of in ("floor", "expected"))
            rates = f"{batch / floor:,.0f} | {batch / expected:,.0f}"
            lines.append(f"| {model} | {batch} | {rates} |")
            tables += [
                "",
                f"## {model}, batch {batch}",
                "",
                "| operation | calls | GFLOP | MB | floor, us | expected, us | share of the time |",
                "| --- | --: | --: | --: | --: | --: | --: |",
            ]
            for p in parts:
                tables.append(
                    f"| {p.name} | {p.calls} | {p.calls * p.flop / 1e9:,.1f} | "
                    f"{p.calls * p.moved / 1e6:,.1f} | {p.floor * 1e6:,.1f} | "
                    f"{p.expected * 1e6:,.1f} | {p.expected / expected:.1%} |"
                )
    return "\n".join(lines + tables) + "\n"


def main(
    output: Annotated[Path, typer.Option(help="Page to write.")] = RESULTS / "expected.md",
) -> None:
    """Write floors and expected times of T, S, B and L at batch 1 and 32 on an H200."""
    temporary = output.with_name(output.name + ".tmp")
    temporary.write_text(page())
    os.replace(temporary, output)
    typer.echo(f"written to {output}")


if __name__ == "__main__":
    typer.run(main)
