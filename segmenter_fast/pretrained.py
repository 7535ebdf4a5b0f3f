"""Start from the weights of another model: other classes, crop, patch, decoder, or another library.

    tensors by their official names (`foreign.py`) -> fitted to the model -> copied

Fitting resamples position embeddings to the model's grid and patch filters to its patch size, and
leaves what depends on the classes as it was initialised where their number differs. Everything else
that does not fit is refused: a name that matches nothing is the classic way to train from noise
unnoticed.
"""

import logging
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from segmenter_fast.checkpoint import CLASS_PARAMETERS, CheckpointError, non_finite, some
from segmenter_fast.encoder import resize_pos_embed
from segmenter_fast.foreign import Weights, config_of, read_weights
from segmenter_fast.model import SegmenterModel
from segmenter_fast.variants import create_model_from_config

logger = logging.getLogger("segmenter_fast")

POSITIONS, FILTERS = "encoder.pos_embed", "encoder.patch_embed.proj.weight"
# Classifiers of the data that an encoder was pretrained on; segmentation has no use for them.
CLASSIFIERS = ("encoder.head.", "encoder.head_dist.", "encoder.pre_logits.")


class Report(NamedTuple):
    """What became of a model's parameters, and of the weights it was started from; names.

    Args:
        source: where the weights came from, and in which layout.
        taken: copied as they are.
        resized: resampled to another grid or patch size.
        fresh: left as they were initialised.
        ignored: in the weights, and of no use to this model.
    """

    source: str
    taken: tuple[str, ...]
    resized: tuple[str, ...]
    fresh: tuple[str, ...]
    ignored: tuple[str, ...]

    def __str__(self):
        parts = [f"{len(self.taken)} tensors taken"]
        for what in ("resized", "fresh", "ignored"):
            names = getattr(self, what)
            if names:
                word = "left as initialised" if what == "fresh" else what
                parts.append(f"{word}: {some(names)}")
        return f"started from {self.source}; " + "; ".join(parts)


def load_pretrained(model: SegmenterModel, source: str | Path, **hub_options) -> Report:
    """Give a model the weights of another one, as far as the two have the same parameters.

    Args:
        model: of any number of classes, crop and patch size, and on any device.
        source: what `SegmenterModel.from_pretrained` takes; or a file with the encoder of a
            classifier (`.npz` of Google's vision_transformer, such as the augreg weights; timm's
            ViT and DeiT as `.pth` or `.safetensors`), or with a Segmenter of MMSegmentation.
        **hub_options: of `SegmenterModel.from_pretrained`.

    Returns:
        What was taken, resized, left as initialised and ignored; also logged.

    Raises:
        FileNotFoundError: no such file or name.
        CheckpointError: damaged or unsafe weights, or such that do not fit; the model is as before.

    Source: official segm/model/factory.py (create_vit: weights and position embeddings);
    Beyer et al., FlexiViT, 2023, section 3.4 (patch filters).
    """
    return fill(model, read_weights(source, **hub_options))


def load_whole(source: str | Path, n_heads: int | None = None) -> SegmenterModel:
    """Make a model of a file that holds a whole Segmenter, such as one of MMSegmentation.

    Args:
        source: see `load_pretrained`.
        n_heads: of the encoder; None is what the file says, or one for 64 channels.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError, CheckpointError: see `load_pretrained`; an encoder alone is no model.
    """
    weights = read_weights(source)
    model = create_model_from_config(config_of(weights, n_heads))
    fill(model, weights)
    return model.eval()


def fill(model: SegmenterModel, weights: Weights) -> Report:
    """`load_pretrained` with weights that were read already."""
    report, values = fit(model, weights)
    model.load_state_dict(values, strict=True)
    logger.info("%s", report)
    return report


def fit(model: SegmenterModel, weights: Weights) -> tuple[Report, dict[str, Tensor]]:
    """The model's state with what the weights have for it, and an account of that.

    Raises:
        CheckpointError: weights that do not fit, with the names.
    """
    state, given = model.state_dict(), dict(weights.tensors)
    for what, names in (
        ("not floating point", [n for n, x in given.items() if not x.is_floating_point()]),
        ("NaN or infinite values", non_finite(given)),
    ):
        if names:
            raise CheckpointError(f"{weights.source}: {what}: {some(names)}")
    _check_kinship(model, weights)
    ignored = {
        name for name in given if name.startswith(CLASSIFIERS) and not _same(name, given, state)
    }
    kind, theirs = _decoder_kind(state), _decoder_kind(given)
    if kind != theirs:
        ignored |= {name for name in given if name.startswith("decoder.")}
    for name in ignored:
        del given[name]

    resized = []
    for name, refit in ((POSITIONS, _refit_positions), (FILTERS, _refit_filters)):
        if name in given:
            value = refit(model, given[name], weights)
            if value is not given[name]:
                resized.append(name)
                given[name] = value

    by_class = CLASS_PARAMETERS.get(kind, ())
    if not _differ_in_classes_alone(by_class, given, state):
        by_class = ()
    ignored |= set(by_class)
    for name in by_class:
        del given[name]

    wrong = [
        f"{name} is {tuple(given[name].shape)}, the model's {tuple(state[name].shape)}"
        for name in given
        if name in state and not _same(name, given, state)
    ]
    unknown = [name for name in given if name not in state]
    # A decoder or classifier that the weights have no part of is left as initialised.
    missing = [
        name
        for name in state
        if name not in given and name.startswith("encoder.") and not name.startswith(CLASSIFIERS)
    ]
    if any(name.startswith("decoder.") for name in given):
        missing += [
            name
            for name in state
            if name.startswith("decoder.") and name not in given and name not in by_class
        ]
    heads = weights.config.n_heads if weights.config else weights.n_heads
    agree = heads in (None, model.encoder.n_heads)
    unlike = [] if agree else [f"{heads}, the model's {model.encoder.n_heads}"]
    problems = [
        f"{what}: {some(names)}"
        for what, names in (
            ("other shapes", wrong),
            ("not in the model", unknown),
            ("missing", missing),
            ("heads", unlike),  # which no shape tells
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{weights.source} does not fit {_what(model)}; {'; '.join(problems)}"
        )
    report = Report(
        weights.source,
        tuple(name for name in given if name not in resized),
        tuple(resized),
        tuple(name for name in state if name not in given),
        (*sorted(ignored), *weights.unused),
    )
    return report, state | given


def _decoder_kind(tensors: dict[str, Tensor]) -> str | None:
    names = [name for name in tensors if name.startswith("decoder.")]
    linear = all(name.startswith("decoder.head.") for name in names)
    return ("linear" if linear else "mask_transformer") if names else None


def _same(name: str, one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return name in one and name in two and one[name].shape == two[name].shape


def _differ_in_classes_alone(names: tuple[str, ...], given, state) -> bool:
    """Whether the class parameters are all there, and are those of another number of classes."""
    counts = set()
    for name in names:
        if name not in given or name not in state:
            return False
        theirs, ours = list(given[name].shape), list(state[name].shape)
        axis = 1 if name == "decoder.cls_emb" else 0
        if len(theirs) != len(ours):
            return False
        counts.add((theirs.pop(axis), ours.pop(axis)))
        if theirs != ours:
            return False
    return len(counts) == 1 and len(set(*counts)) == 2


def _what(model: SegmenterModel) -> str:
    config = model.config
    if config is None:
        return "the model"
    return f"a model of {config.n_layers} layers, width {config.d_model}, {config.decoder}" + (
        f" ({config.variant})" if config.variant else ""
    )


def _check_kinship(model: SegmenterModel, weights: Weights) -> None:
    """The distillation token, which both have or neither, and the normalisation."""
    distilled = "encoder.dist_token" in weights.tensors
    if distilled != bool(model.encoder.distilled):
        has, wants = ("a", "no") if distilled else ("no", "a")
        raise CheckpointError(
            f"{weights.source} has {has} distillation token and the model {wants}: "
            + ("take a -DeiT variant" if distilled else "take a variant without -DeiT")
        )
    config = model.config
    if config and weights.mean and (weights.mean, weights.std) != (config.mean, config.std):
        logger.warning(
            "%s was trained on images normalised with mean %s and std %s, the model's config has "
            "%s and %s: create_model(..., mean=, std=) sets them",
            weights.source, weights.mean, weights.std, config.mean, config.std,
        )  # fmt: skip


def _refit_positions(model: SegmenterModel, positions: Tensor, weights: Weights) -> Tensor:
    """Position embeddings at the model's grid; bilinear, as the official code has it."""
    extra = model.encoder.num_extra_tokens
    if positions.ndim != 3 or positions.shape[:1] != (1,) or positions.shape[1] <= extra:
        raise CheckpointError(
            f"{weights.source}: {POSITIONS} must be (1, {extra} + N, D), "
            f"got {tuple(positions.shape)}"
        )
    old, new = weights.grid, model.encoder.patch_embed.grid_size
    return positions if old == new else resize_pos_embed(positions.float(), old, new, extra)


def _refit_filters(model: SegmenterModel, filters: Tensor, weights: Weights) -> Tensor:
    """Patch filters at the model's patch size."""
    new = model.patch_size
    if filters.ndim != 4 or filters.shape[2] != filters.shape[3]:
        raise CheckpointError(
            f"{weights.source}: {FILTERS} must be (D, 3, P, P), got {tuple(filters.shape)}"
        )
    return filters if filters.shape[2] == new else resize_filters(filters.float(), new)


def resize_filters(filters: Tensor, patch_size: int) -> Tensor:
    """Resample patch filters so that a resized patch has the product that the patch had.

    With B the linear map that resizes a patch x, <B x, w'> = <x, w> holds for all x if B^T w' = w.
    The pseudo-inverse of B^T solves it exactly for larger patches, and for smaller ones in the
    mean over patches of white noise, where resizing loses what nothing can bring back.

    Args:
        filters: (D, C, P, P).
        patch_size: of the result, in pixels.

    Returns:
        (D, C, patch_size, patch_size), dtype of `filters`.

    Source: Beyer et al., FlexiViT, 2023, section 3.4.
    """
    old = filters.shape[-1]
    basis = torch.eye(old * old, dtype=torch.float64).reshape(old * old, 1, old, old)
    size = (patch_size, patch_size)
    images = F.interpolate(basis, size=size, mode="bilinear", antialias=patch_size < old)
    transposed = images.reshape(old * old, -1)  # B^T: one row for each pixel of the old patch
    flat = filters.reshape(-1, old * old).to("cpu", torch.float64)
    resized = flat @ torch.linalg.pinv(transposed).T
    shape = (*filters.shape[:2], patch_size, patch_size)
    return resized.reshape(shape).to(filters.device, filters.dtype)
