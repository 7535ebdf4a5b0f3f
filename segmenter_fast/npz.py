"""Google's ViTs (vision_transformer, big_vision) by the official names, from `.npz` files."""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from segmenter_fast.checkpoint import CheckpointError, some

# Trained weights hardly compress; what grows beyond this factor is made to fill the memory.
MAX_EXPANSION = 4
# What the names begin with: nothing in the published weights, or where a training keeps them.
PREFIXES = ("", "opt/target/", "params/", "params/img/", "img/")


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Arrays in an `.npz` file; nothing is unpickled.

    Raises:
        CheckpointError: damaged, with objects, or of more than it can hold.
    """
    with open(path, "rb") as file:  # an unreadable file is an OSError, a damaged one is not
        try:
            with zipfile.ZipFile(file) as archive:
                claimed = sum(record.file_size for record in archive.infolist())
            size = path.stat().st_size
            if claimed > MAX_EXPANSION * size:
                raise CheckpointError(
                    f"{path}: holds {size} bytes but claims {claimed} bytes of arrays"
                )
            file.seek(0)
            with np.load(file, allow_pickle=False) as content:
                arrays = {name: content[name] for name in content.files}
        except CheckpointError:
            raise
        except Exception as error:  # a damaged file makes zipfile, zlib and NumPy raise anything
            raise CheckpointError(
                f"{path}: damaged, or not an .npz of plain arrays ({type(error).__name__}: {error})"
            ) from error
    wrong = [name for name, value in arrays.items() if not isinstance(value, np.ndarray)]
    if wrong:
        raise CheckpointError(f"{path}: not an .npz of plain arrays: {some(wrong)}")
    return arrays


def encoder_of_jax(
    path: Path, arrays: Mapping[str, np.ndarray]
) -> tuple[dict[str, Tensor], int | None, tuple[str, ...]]:
    """Make a state of our encoder of a ViT's arrays.

    Args:
        path: where they are from, for errors.
        arrays: as `read_npz` has them.

    Returns:
        The tensors by the official names, float32; the heads, None without a block; the names that
        are of something else, such as a text encoder or an optimiser.

    Raises:
        CheckpointError: arrays that no ViT has, or lacks.

    Source: vision_transformer's models_vit.py; big_vision's models/vit.py.
    """
    prefix = next((p for p in PREFIXES if f"{p}embedding/kernel" in arrays), "")
    ours = {name: value for name, value in arrays.items() if name.startswith(prefix)}
    wrong = [name for name, value in ours.items() if value.dtype.kind != "f"]
    if wrong:
        raise CheckpointError(f"{path}: expected floating point arrays: {some(wrong)}")
    with np.errstate(over="ignore"):  # what becomes infinite is refused with all that is
        left = {
            name.removeprefix(prefix): torch.from_numpy(value.astype(np.float32))
            for name, value in ours.items()
        }
    tensors, n_heads = _renamed(path, left)
    if left:
        raise CheckpointError(f"{path}: not known in a ViT of Google's: {some(left)}")
    return tensors, n_heads, tuple(name for name in arrays if name not in ours)


def _renamed(path: Path, left: dict[str, Tensor]) -> tuple[dict[str, Tensor], int | None]:
    """The tensors by the official names, which are taken out of `left`; and the heads.

    Kernels are (in, out) there; queries, keys and values apart, and split by heads.
    """
    tensors: dict[str, Tensor] = {}

    def take(name: str, *ranks: int) -> Tensor:
        if name not in left:
            raise CheckpointError(f"{path}: not a ViT of Google's vision_transformer: no {name}")
        shape = tuple(left[name].shape)
        if len(shape) not in ranks or 0 in shape:
            raise CheckpointError(
                f"{path}: {name} has the shape {shape}; expected {' or '.join(map(str, ranks))} "
                "dimensions"
            )
        return left.pop(name)

    def dense(theirs: str, ours: str, rank: int = 2) -> None:
        kernel, bias = take(f"{theirs}/kernel", rank), take(f"{theirs}/bias", 1)
        if kernel.shape[-1] != len(bias):
            raise CheckpointError(
                f"{path}: {theirs} has a kernel {tuple(kernel.shape)} and a bias of {len(bias)}"
            )
        tensors[f"{ours}.weight"] = kernel.flatten(0, -2).T.contiguous()
        tensors[f"{ours}.bias"] = bias

    def norm(theirs: str, ours: str) -> None:
        tensors[f"{ours}.weight"] = take(f"{theirs}/scale", 1)
        tensors[f"{ours}.bias"] = take(f"{theirs}/bias", 1)

    tensors["encoder.cls_token"] = take("cls", 3)
    if "pos_embedding" in left:  # of the grid alone: the class token has no position there
        grid = take("pos_embedding", 3)
        positions = torch.cat((torch.zeros_like(grid[:, :1]), grid), dim=1)
    else:
        positions = take("Transformer/posembed_input/pos_embedding", 3)
    tensors["encoder.pos_embed"] = positions
    filters = take("embedding/kernel", 4)
    tensors["encoder.patch_embed.proj.weight"] = filters.permute(3, 2, 0, 1).contiguous()
    tensors["encoder.patch_embed.proj.bias"] = take("embedding/bias", 1)
    norm("Transformer/encoder_norm", "encoder.norm")
    depth = 1 + max(
        (int(n) for n in re.findall(r"encoderblock_(\d+)/", "\n".join(left))), default=-1
    )
    n_heads = None
    for i in range(depth):
        theirs, ours = f"Transformer/encoderblock_{i}", f"encoder.blocks.{i}"
        # Older versions of flax counted the layers of a block, newer ones those of a kind.
        old = f"{theirs}/LayerNorm_2/scale" in left
        second, attention, mlp = (2, 1, 3) if old else (1, 0, 0)
        attention = f"{theirs}/MultiHeadDotProductAttention_{attention}"
        parts = [f"{attention}/{name}" for name in ("query", "key", "value")]
        kernels = [take(f"{part}/kernel", 3) for part in parts]
        biases = [take(f"{part}/bias", 2) for part in parts]
        if len({kernel.shape for kernel in kernels}) > 1:
            raise CheckpointError(f"{path}: {attention} has kernels of several shapes")
        n_heads = kernels[0].shape[1]
        # (D, heads, D / heads) each: rows of the packed matrix in the order of heads.
        qkv = torch.cat([kernel.flatten(1).T for kernel in kernels])
        tensors[f"{ours}.attn.qkv.weight"] = qkv.contiguous()
        tensors[f"{ours}.attn.qkv.bias"] = torch.cat([bias.flatten() for bias in biases])
        dense(f"{attention}/out", f"{ours}.attn.proj", rank=3)
        norm(f"{theirs}/LayerNorm_0", f"{ours}.norm1")
        norm(f"{theirs}/LayerNorm_{second}", f"{ours}.norm2")
        dense(f"{theirs}/MlpBlock_{mlp}/Dense_0", f"{ours}.mlp.fc1")
        dense(f"{theirs}/MlpBlock_{mlp}/Dense_1", f"{ours}.mlp.fc2")
    for theirs in ("pre_logits", "head"):
        if f"{theirs}/kernel" in left:
            dense(theirs, f"encoder.{theirs}")
    return tensors, n_heads
