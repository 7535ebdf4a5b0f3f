"""Weights of other libraries by the official names: Google's ViT, timm, MMSegmentation.

Which layout a file has is seen by its names. Nothing in it can run: `.npz` is read without pickled
objects, `.pth` by `checkpoint.read_pth`.
"""

import math
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from segmenter_fast.checkpoint import (
    CheckpointError,
    check_tensors,
    find_files,
    load_checkpoint,
    read_pth,
    read_safetensors,
    some,
    variant_name,
)
from segmenter_fast.config import NORMALIZATION, SegmenterConfig

VIT, DEIT = NORMALIZATION["vit"], NORMALIZATION["deit"]
# A single weight of ViT-L has 4 million values; an array beyond this is none.
MAX_ARRAY_BYTES = 2**30


class Weights(NamedTuple):
    """Tensors by the official names.

    Args:
        source: file and layout, in words.
        tensors: "encoder.*", and "decoder.*" if there is one.
        config: of a Segmenter that brings one.
        mean, std: of the images' normalisation where it is known.
        n_heads: of the encoder where it is known.
        norm_eps: of the encoder's layer norms.
    """

    source: str
    tensors: dict[str, Tensor]
    config: SegmenterConfig | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    n_heads: int | None = None
    norm_eps: float = 1e-5

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the position embeddings: the config's, or a square.

        Raises:
            CheckpointError: no square, and no config.
        """
        if self.config is not None:
            return self.config.grid_size
        shape = tuple(self.tensors["encoder.pos_embed"].shape)
        count = shape[1] - 1 - ("encoder.dist_token" in self.tensors) if len(shape) == 3 else 0
        side = math.isqrt(max(0, count))
        if count < 1 or side * side != count:
            raise CheckpointError(
                f"{self.source}: position embeddings must be (1, extra + N, D) with a square N "
                f"where no config says what grid they are, got {shape}"
            )
        return side, side


def read_weights(source: str | Path, **hub_options) -> Weights:
    """Read weights in any of the layouts, from a file or by a name.

    Args:
        source: see `pretrained.load_pretrained`.
        **hub_options: of `SegmenterModel.from_pretrained`.

    Raises:
        FileNotFoundError: no such file or name.
        CheckpointError: damaged or unsafe, or of a layout that is not known.
    """
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".npz":
        return _from_jax(path, read_npz(path))
    if path.is_file() and not _is_whole_checkpoint(path):
        return _from_state(path, _read_state(path))
    config, tensors = load_checkpoint(source, **hub_options)
    return Weights(str(source), tensors, config, config.mean, config.std)


def _is_whole_checkpoint(path: Path) -> bool:
    """Whether a config lies beside the weights, which then say what they are."""
    try:
        find_files(path)
    except FileNotFoundError:
        return False
    except ValueError as error:
        raise CheckpointError(
            f"{path}: weights are .npz, .pth, .pt or .safetensors files"
        ) from error
    return True


def _read_state(path: Path) -> Mapping[str, Tensor]:
    """Named tensors of a file, out of whatever they are wrapped in."""
    if path.suffix == ".safetensors":
        return check_tensors(path, read_safetensors(path))
    try:
        content = read_pth(path)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} A checkpoint of MMEngine keeps its log beside the weights; this, run where "
            "it was made, leaves the weights alone: torch.save({'state_dict': "
            "torch.load(FILE, weights_only=False)['state_dict']}, OUTPUT)"
        ) from error
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path}: no tensors, only {some(map(str, content))}")
    tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return check_tensors(path, tensors)


def _from_state(path: Path, state: Mapping[str, Tensor]) -> Weights:
    """The layout by its names."""
    if "encoder.pos_embed" in state:
        return Weights(f"{path} (Segmenter)", dict(state))
    if "backbone.pos_embed" in state or "patch_embed.projection.weight" in state:
        return _from_mmseg(path, state)
    if "pos_embed" in state and "patch_embed.proj.weight" in state:
        return _from_timm(path, state)
    raise CheckpointError(
        f"{path}: of no known layout (Segmenter, timm's ViT or DeiT, MMSegmentation's Segmenter, "
        f"or Google's ViT as .npz); it has {some(state)}"
    )


def _renamed(path: Path, state: Mapping[str, Tensor], rules) -> dict[str, Tensor]:
    """All tensors by their official names.

    Args:
        rules: (pattern of the whole name, new name, change of the tensor or None).

    Raises:
        CheckpointError: a name that no rule knows.
    """
    tensors: dict[str, Tensor] = {}
    unknown = []
    for name, value in state.items():
        for pattern, new, change in rules:
            match = re.fullmatch(pattern, name)
            if match:
                tensors[match.expand(new)] = value if change is None else change(value)
                break
        else:
            unknown.append(name)
    if unknown:
        raise CheckpointError(f"{path}: not known in a {_LAYOUT[rules]}: {some(unknown)}")
    return tensors


# --- timm ----------------------------------------------------------------------------------------

Rule = tuple[str, str, Callable[[Tensor], Tensor] | None]
TIMM: tuple[Rule, ...] = (
    (r"(cls_token|dist_token|pos_embed)", r"encoder.\1", None),
    (r"(patch_embed\.proj\.(weight|bias))", r"encoder.\1", None),
    (r"(blocks\.\d+\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(weight|bias))",
     r"encoder.\1", None),
    (r"((norm|head|head_dist)\.(weight|bias))", r"encoder.\1", None),
    (r"pre_logits\.fc\.(weight|bias)", r"encoder.pre_logits.\1", None),
)  # fmt: skip


def _from_timm(path: Path, state: Mapping[str, Tensor]) -> Weights:
    tensors = _renamed(path, state, TIMM)
    distilled = "dist_token" in state
    # Of plain ViTs timm has both normalisations, and the file does not tell which.
    mean, std = DEIT if distilled else (None, None)
    what = "timm's DeiT" if distilled else "timm's ViT"
    return Weights(f"{path} ({what})", tensors, mean=mean, std=std, norm_eps=1e-6)


# --- MMSegmentation ------------------------------------------------------------------------------


def _transposed(x: Tensor) -> Tensor:
    return x.T.contiguous()


def _blocks(theirs: str, ours: str) -> tuple[Rule, ...]:
    """Rules for the layers of MMSegmentation's transformers."""
    pairs = (
        (r"ln1\.(weight|bias)", r"norm1.\2"),
        (r"ln2\.(weight|bias)", r"norm2.\2"),
        (r"attn\.attn\.in_proj_(weight|bias)", r"attn.qkv.\2"),
        (r"attn\.attn\.out_proj\.(weight|bias)", r"attn.proj.\2"),
        (r"ffn\.layers\.0\.0\.(weight|bias)", r"mlp.fc1.\2"),
        (r"ffn\.layers\.1\.(weight|bias)", r"mlp.fc2.\2"),
    )
    return tuple(
        (rf"{theirs}layers\.(\d+)\.{old}", rf"{ours}.blocks.\1.{new}", None) for old, new in pairs
    )


MMSEG: tuple[Rule, ...] = (
    (r"(?:backbone\.)?(cls_token|pos_embed)", r"encoder.\1", None),
    (r"(?:backbone\.)?patch_embed\.projection\.(weight|bias)", r"encoder.patch_embed.proj.\1",
     None),
    (r"(?:backbone\.)?ln1\.(weight|bias)", r"encoder.norm.\1", None),
    *_blocks(r"(?:backbone\.)?", "encoder"),
    *_blocks(r"decode_head\.", "decoder"),
    (r"decode_head\.cls_emb", "decoder.cls_emb", None),
    (r"decode_head\.dec_proj\.(weight|bias)", r"decoder.proj_dec.\1", None),
    # Theirs are linear layers, x W^T; the official ones are matrices that x is multiplied by.
    (r"decode_head\.patch_proj\.weight", "decoder.proj_patch", _transposed),
    (r"decode_head\.classes_proj\.weight", "decoder.proj_classes", _transposed),
    (r"decode_head\.(decoder_norm|mask_norm)\.(weight|bias)", r"decoder.\1.\2", None),
    # The linear decoder: a convolution of 1 x 1.
    (r"decode_head\.conv_seg\.weight", "decoder.head.weight", lambda x: x.flatten(1)),
    (r"decode_head\.conv_seg\.bias", "decoder.head.bias", None),
)  # fmt: skip
_LAYOUT = {TIMM: "ViT or DeiT of timm", MMSEG: "Segmenter of MMSegmentation"}


def _from_mmseg(path: Path, state: Mapping[str, Tensor]) -> Weights:
    # The training heads beside the decoder are of no use here.
    state = {name: value for name, value in state.items() if not name.startswith("auxiliary_head.")}
    tensors = _renamed(path, state, MMSEG)
    source = f"{path} (MMSegmentation)"
    return Weights(source, tensors, mean=VIT[0], std=VIT[1], norm_eps=1e-6)


# --- Google's vision_transformer -----------------------------------------------------------------


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Arrays of numbers in an `.npz` file; nothing is unpickled.

    Raises:
        CheckpointError: damaged, with objects, or larger than any weights.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {record.filename: record.file_size for record in archive.infolist()}
        big = [name for name, size in sizes.items() if size > MAX_ARRAY_BYTES]
        if big:
            raise CheckpointError(f"{path}: larger than any weight: {some(big)}")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except CheckpointError:
        raise
    except (ValueError, KeyError, OSError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        if isinstance(error, OSError) and not path.is_file():
            raise
        raise CheckpointError(
            f"{path}: damaged, or not an .npz of plain arrays ({error})"
        ) from error
    wrong = [name for name, value in arrays.items() if value.dtype.kind != "f"]
    if wrong:
        raise CheckpointError(f"{path}: expected floating point arrays: {some(wrong)}")
    return arrays


def _from_jax(path: Path, arrays: Mapping[str, np.ndarray]) -> Weights:
    """Kernels are (in, out) there; queries, keys and values apart, and split by heads."""
    left = {name: torch.from_numpy(value).float() for name, value in arrays.items()}

    def take(name: str) -> Tensor:
        if name not in left:
            raise CheckpointError(f"{path}: not a ViT of Google's vision_transformer: no {name}")
        return left.pop(name)

    def dense(theirs: str, ours: str) -> None:
        kernel, bias = take(f"{theirs}/kernel"), take(f"{theirs}/bias")
        tensors[f"{ours}.weight"] = kernel.reshape(-1, bias.numel()).T.contiguous()
        tensors[f"{ours}.bias"] = bias.flatten()

    def norm(theirs: str, ours: str) -> None:
        tensors[f"{ours}.weight"] = take(f"{theirs}/scale")
        tensors[f"{ours}.bias"] = take(f"{theirs}/bias")

    tensors: dict[str, Tensor] = {
        "encoder.cls_token": take("cls"),
        "encoder.pos_embed": take("Transformer/posembed_input/pos_embedding"),
        "encoder.patch_embed.proj.weight": take("embedding/kernel")
        .permute(3, 2, 0, 1)
        .contiguous(),
        "encoder.patch_embed.proj.bias": take("embedding/bias"),
    }
    norm("Transformer/encoder_norm", "encoder.norm")
    depth = 1 + max(
        (int(n) for n in re.findall(r"encoderblock_(\d+)/", "\n".join(left))), default=-1
    )
    n_heads = None
    for i in range(depth):
        theirs, ours = f"Transformer/encoderblock_{i}", f"encoder.blocks.{i}"
        attention = f"{theirs}/MultiHeadDotProductAttention_1"
        parts = [f"{attention}/{name}" for name in ("query", "key", "value")]
        kernels, biases = ([take(f"{p}/{kind}") for p in parts] for kind in ("kernel", "bias"))
        if any(kernel.ndim != 3 for kernel in kernels):
            raise CheckpointError(f"{path}: {parts[0]}/kernel must be (D, heads, D / heads)")
        n_heads = kernels[0].shape[1]
        # (D, heads, D / heads) each: rows of the packed matrix in the order of heads.
        qkv = torch.cat([kernel.flatten(1).T for kernel in kernels])
        tensors[f"{ours}.attn.qkv.weight"] = qkv.contiguous()
        tensors[f"{ours}.attn.qkv.bias"] = torch.cat([bias.flatten() for bias in biases])
        dense(f"{attention}/out", f"{ours}.attn.proj")
        norm(f"{theirs}/LayerNorm_0", f"{ours}.norm1")
        norm(f"{theirs}/LayerNorm_2", f"{ours}.norm2")
        dense(f"{theirs}/MlpBlock_3/Dense_0", f"{ours}.mlp.fc1")
        dense(f"{theirs}/MlpBlock_3/Dense_1", f"{ours}.mlp.fc2")
    for theirs, ours in (("pre_logits", "encoder.pre_logits"), ("head", "encoder.head")):
        if f"{theirs}/kernel" in left:
            dense(theirs, ours)
    if left:
        raise CheckpointError(f"{path}: not known in a ViT of Google's: {some(left)}")
    source = f"{path} (Google's ViT)"
    return Weights(source, tensors, mean=VIT[0], std=VIT[1], n_heads=n_heads, norm_eps=1e-6)


# --- A whole model -------------------------------------------------------------------------------


def config_of(weights: Weights, n_heads: int | None = None) -> SegmenterConfig:
    """The architecture of a whole Segmenter, which its config knows, or its tensors tell.

    Args:
        weights: with a decoder.
        n_heads: of the encoder; None is one for 64 channels, as in all published models.

    Raises:
        CheckpointError: no decoder, or tensors of no Segmenter.
    """
    if weights.config is not None:
        return weights.config
    tensors = weights.tensors

    def need(name: str, rank: int) -> Tensor:
        if name not in tensors or tensors[name].ndim != rank:
            raise CheckpointError(
                f"{weights.source} is no whole Segmenter: {name} is missing or odd"
            )
        return tensors[name]

    def depth(part: str) -> int:
        numbers = re.findall(rf"^{part}\.blocks\.(\d+)\.", "\n".join(tensors), re.MULTILINE)
        return 1 + max(map(int, numbers), default=-1)

    filters = need("encoder.patch_embed.proj.weight", 4)
    width, patch = filters.shape[0], filters.shape[2]
    distilled = "encoder.dist_token" in tensors
    need("encoder.pos_embed", 3)
    grid = weights.grid
    mask = "decoder.cls_emb" in tensors
    n_cls = need("decoder.cls_emb", 3).shape[1] if mask else need("decoder.head.weight", 2).shape[0]
    heads = n_heads or weights.n_heads or max(1, width // 64)
    mean, std = (weights.mean, weights.std) if weights.mean else (DEIT if distilled else VIT)
    try:
        config = SegmenterConfig(
            n_cls=n_cls,
            image_size=(grid[0] * patch, grid[1] * patch),
            patch_size=patch,
            d_model=width,
            n_layers=depth("encoder"),
            n_heads=heads,
            distilled=distilled,
            norm_eps=weights.norm_eps,
            decoder="mask_transformer" if mask else "linear",
            decoder_n_layers=depth("decoder") if mask else 0,
            mean=mean,
            std=std,
            window_size=min(grid) * patch,
            window_stride=min(grid) * patch,
        )
        return config.replace(variant=variant_name(config))
    except ValueError as error:
        raise CheckpointError(f"{weights.source}: no possible Segmenter ({error})") from error
