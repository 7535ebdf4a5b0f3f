"""Weights of other libraries by the official names: Google's ViT, timm, MMSegmentation.

Which layout a file has is seen by its names. Nothing in it can run: `.npz` is read without pickled
objects (`npz.py`), `.pth` by `checkpoint.read_pth`.
"""

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
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
from segmenter_fast.npz import encoder_of_jax, read_npz

VIT, DEIT = NORMALIZATION["vit"], NORMALIZATION["deit"]


class Weights(NamedTuple):
    """Tensors by the official names.

    Args:
        source: file and layout, in words.
        tensors: "encoder.*", and "decoder.*" if there is one.
        config: of a Segmenter that brings one.
        mean, std: of the images' normalisation where it is known.
        n_heads: of the encoder where it is known.
        norm_eps: of the encoder's layer norms.
        class_names, palette: where the file has them.
        unused: names in the file of what no Segmenter has.
    """

    source: str
    tensors: dict[str, Tensor]
    config: SegmenterConfig | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    n_heads: int | None = None
    norm_eps: float = 1e-5
    class_names: tuple[str, ...] | None = None
    palette: tuple[tuple[int, ...], ...] | None = None
    unused: tuple[str, ...] = ()

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
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"weights are named by a path or a str, got {type(source).__name__}")
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".npz":
        return _from_jax(path)
    try:
        files = find_files(source, **hub_options)
    except FileNotFoundError:
        if not path.is_file():
            raise
        return _from_file(path)  # without a config beside it
    except ValueError as error:
        if not path.is_file():
            raise
        raise CheckpointError(
            f"{path}: weights are .npz, .pth, .pt or .safetensors files"
        ) from error
    if _is_foreign(files.weights):
        weights = _from_file(files.weights)
        mean, std = _timm_normalization(files.config)
        return weights._replace(mean=mean or weights.mean, std=std or weights.std)
    config, tensors = load_checkpoint(files.weights)
    return Weights(str(source), tensors, config, config.mean, config.std)


def _is_foreign(path: Path) -> bool:
    """Whether safetensors are not ours, whatever config lies beside them.

    Other libraries call the files of a hub repository config.json and model.safetensors, too.
    """
    if path.suffix != ".safetensors":
        return False
    try:
        with safe_open(path, "pt") as file:
            return not any(name.startswith("encoder.") for name in file.keys())
    except (SafetensorError, OSError):
        return False  # the reader says what is wrong


def _timm_normalization(path: Path) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Mean and std that a config.json of timm names; None where there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))["pretrained_cfg"]
        mean, std = (tuple(map(float, values[key])) for key in ("mean", "std"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None, None
    return (mean, std) if len(mean) == len(std) == 3 and min(std) > 0 else (None, None)


def _from_file(path: Path) -> Weights:
    """The layout by its names."""
    content = read_safetensors(path) if path.suffix == ".safetensors" else _read_trusted(path)
    state: Mapping[str, Any] = content
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(content.get(key), Mapping):
            state = content[key]
            break
    state = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not state:
        raise CheckpointError(f"{path}: no tensors, only {some(map(str, content))}")
    # DistributedDataParallel wraps all there is.
    if all(isinstance(name, str) and name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    state = check_tensors(path, state)
    if "encoder.pos_embed" in state:
        return Weights(f"{path} (Segmenter)", state)
    if "backbone.pos_embed" in state or "patch_embed.projection.weight" in state:
        return _from_mmseg(path, state, content.get("meta"))
    if "pos_embed" in state and "patch_embed.proj.weight" in state:
        return _from_timm(path, state)
    raise CheckpointError(
        f"{path}: of no known layout (Segmenter, timm's ViT or DeiT, MMSegmentation's Segmenter, "
        f"or Google's ViT as .npz); it has {some(state)}"
    )


def _read_trusted(path: Path) -> dict[str, Any]:
    """`read_pth`, with a way out for checkpoints that hold a training's objects."""
    try:
        return read_pth(path)
    except CheckpointError as error:
        if "it asks for" not in str(error):
            raise
        raise CheckpointError(
            f"{error} Checkpoints of MMEngine and timm keep objects of the training beside the "
            "weights. If you trust this one, this line, run where it was made, keeps the weights "
            'alone: python -c "import torch; '
            f"c = torch.load('{path}', 'cpu', weights_only=False); "
            "torch.save({'state_dict': c.get('state_dict', c.get('model'))}, 'weights.pth')\""
        ) from error


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
            if match and match.expand(new) not in tensors:
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
    return x.T.contiguous() if x.ndim == 2 else x


def _without_window(x: Tensor) -> Tensor:
    return x.flatten(1) if x.ndim == 4 else x


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
    (r"decode_head\.conv_seg\.weight", "decoder.head.weight", _without_window),
    (r"decode_head\.conv_seg\.bias", "decoder.head.bias", None),
)  # fmt: skip
_LAYOUT = {TIMM: "ViT or DeiT of timm", MMSEG: "Segmenter of MMSegmentation"}


def _from_mmseg(path: Path, state: Mapping[str, Tensor], meta: Any) -> Weights:
    # Heads for training alone; and the classifier that every head of theirs is made with, which
    # the mask transformer never used, and did not remove at first.
    heads = ["auxiliary_head."]
    if "decode_head.cls_emb" in state:
        heads.append("decode_head.conv_seg.")
    unused = tuple(name for name in state if name.startswith(tuple(heads)))
    tensors = _renamed(path, {n: x for n, x in state.items() if n not in unused}, MMSEG)
    # Their patch projection has no bias unless asked for since version 1.2, and always before.
    filters = tensors.get("encoder.patch_embed.proj.weight")
    if filters is not None:
        zeros = torch.zeros(filters.shape[:1])
        tensors.setdefault("encoder.patch_embed.proj.bias", zeros)
    names, palette = _mmseg_classes(meta)
    return Weights(
        f"{path} (MMSegmentation)",
        tensors,
        mean=VIT[0],
        std=VIT[1],
        norm_eps=1e-6,
        class_names=names,
        palette=palette,
        unused=unused,
    )


def _mmseg_classes(meta: Any) -> tuple[tuple | None, tuple | None]:
    """Class names and palette out of a checkpoint's `meta`, of MMEngine or before; None if odd."""
    meta = meta if isinstance(meta, Mapping) else {}
    about = meta.get("dataset_meta")
    about = about if isinstance(about, Mapping) else {}
    names = about.get("classes", meta.get("CLASSES"))
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        return None, None
    palette = about.get("palette", meta.get("PALETTE"))
    try:
        palette = tuple(tuple(int(value) for value in colour) for colour in palette)
    except (TypeError, ValueError):
        palette = ()
    good = len(palette) == len(names) and all(
        len(colour) == 3 and 0 <= min(colour) and max(colour) <= 255 for colour in palette
    )
    return tuple(names), palette if good else None


# --- Google's vision_transformer -----------------------------------------------------------------


def _from_jax(path: Path) -> Weights:
    tensors, n_heads, unused = encoder_of_jax(path, read_npz(path))
    return Weights(
        f"{path} (Google's ViT)",
        tensors,
        mean=VIT[0],
        std=VIT[1],
        n_heads=n_heads,
        norm_eps=1e-6,
        unused=unused,
    )


# --- A whole model -------------------------------------------------------------------------------


def config_of(weights: Weights, n_heads: int | None = None) -> SegmenterConfig:
    """The architecture of a whole Segmenter, which its config knows, or its tensors tell.

    Args:
        weights: with a decoder.
        n_heads: of the encoder; None is one for 64 channels, as in all published models.

    Raises:
        CheckpointError: no decoder, tensors of no Segmenter, or other heads than it has.
    """
    if weights.config is not None:
        if n_heads not in (None, weights.config.n_heads):
            raise CheckpointError(
                f"{weights.source} has {weights.config.n_heads} heads by its config, not {n_heads}"
            )
        return weights.config
    tensors = weights.tensors
    if not any(name.startswith("decoder.") for name in tensors):
        raise CheckpointError(
            f"{weights.source} is no whole Segmenter but an encoder: name the model that is to "
            "start from it (create_model or --model)"
        )

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
    # Names of another number of classes are of another data set than the one it was trained on.
    named = weights.class_names is not None and len(weights.class_names) == n_cls
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
            class_names=weights.class_names if named else None,
            palette=weights.palette if named else None,
            window_size=min(grid) * patch,
            window_stride=min(grid) * patch,
        )
        return config.replace(variant=variant_name(config))
    except ValueError as error:
        raise CheckpointError(f"{weights.source}: no possible Segmenter ({error})") from error
