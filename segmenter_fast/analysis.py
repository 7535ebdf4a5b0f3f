"""What a trained Segmenter looks at and what it has learnt: the numbers behind the paper's figures.

Attention of chosen queries, the mean attention distance of every head, class embeddings in a plane,
and label maps of several weights pixel by pixel. Attention is quadratic in the number of patches,
so only rows that are asked for exist, one layer after another. (With backend "reference" the layers
before them write their N x N weights out all the same: that is its definition.)

figures.py draws all of it.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from segmenter_fast.blocks import Block
from segmenter_fast.config import SegmenterConfig
from segmenter_fast.inference import evaluation_mode, network_input
from segmenter_fast.model import SegmenterModel, whole_patches
from segmenter_fast.ops.attention import attention_weights
from segmenter_fast.visualize import default_palette

MAX_PATCHES = 1 << 16
"""A view of more patches is refused: attention takes time with the square of their number."""


def whole_view(model: SegmenterModel, image, short_side: int | str | None = None) -> Tensor:
    """A picture as the network sees it when one window holds it all.

    Args:
        model: a `SegmenterModel`.
        image: a picture or network input, as `predict` takes it.
        short_side: pixels to which the shorter side is resized, the longer in proportion;
            "original" leaves it. None is the weights' window, so that as many patches lie along it
            as in training, else their short side, else the picture's own size; network input is
            left as it is.

    Returns:
        (1, 3, h, w), normalised, on the model's device in its dtype.

    Raises:
        ValueError: more than `MAX_PATCHES` patches, or as `predict`.
        TypeError, FileNotFoundError: see `predict`.
    """
    if short_side is None and not (isinstance(image, Tensor) and image.is_floating_point()):
        short_side = getattr(model.config, "window_size", None)
    view, (height, width) = network_input(model, image, short_side)
    seen = tuple(view.shape[2:])
    patches = math.prod(whole_patches(seen, model.patch_size))
    if patches > MAX_PATCHES:
        raise ValueError(
            f"an image of {height} x {width}, seen at {seen[0]} x {seen[1]} pixels, has "
            f"{patches:,} patches of {model.patch_size}, and at most {MAX_PATCHES:,} are analysed: "
            "use a smaller short_side (--short-side)"
        )
    return view


class PatchGrid(NamedTuple):
    """Where the patches of a view lie on its picture, whatever the picture's size.

    Args:
        rows, columns: number of patches.
        height, width: of a patch, as shares of the picture's. The last row and column reach past
            the picture where its view is not a whole number of patches.
    """

    rows: int
    columns: int
    height: float
    width: float

    @classmethod
    def of(cls, view: Tensor, patch_size: int) -> "PatchGrid":
        """The grid of a (1, 3, h, w) view."""
        height, width = view.shape[2:]
        return cls(
            *whole_patches((height, width), patch_size), patch_size / height, patch_size / width
        )

    def at(self, pixel: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
        """Row and column of the patch that holds pixel (x, y) of the picture of `size` (H, W)."""
        (x, y), (height, width) = pixel, size
        if not (0 <= x < width and 0 <= y < height):
            raise ValueError(
                f"pixel {x},{y} is outside of the picture: x must be in [0, {width}) and y in "
                f"[0, {height})"
            )
        return int((y + 0.5) / height / self.height), int((x + 0.5) / width / self.width)


# Attention --------------------------------------------------------------------------------------


def _packed(block: Block, x: Tensor) -> Tensor:
    """(B, N, 3, heads, d) queries, keys and values of a block, in float32 at least."""
    qkv = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, block.attn.heads, -1))
    return qkv if qkv.dtype == torch.float64 else qkv.float()


def _check_encoder(model: SegmenterModel) -> None:
    if not hasattr(getattr(model, "encoder", None), "layer_inputs"):
        kind = type(getattr(model, "encoder", model)).__name__
        raise TypeError(
            f"attention is read from segmenter_fast's VisionTransformer, got {kind}; build the "
            "model with create_model or from_pretrained"
        )


def _features(model: SegmenterModel, images: Tensor) -> Tensor:
    """Patch tokens (B, N, D) that enter the decoder."""
    return model.encoder(images, return_features=True)[:, model.encoder.num_extra_tokens :]


def _check_finite(values: Tensor, layer: int) -> None:
    if not torch.isfinite(values).all():
        raise ValueError(
            f"the attention of layer {layer} has values that are NaN or infinite: the weights are "
            f"damaged or their arithmetic overflows"
        )


def check_mask_decoder(model: SegmenterModel) -> None:
    """Raise ValueError unless the decoder has class embeddings and attention."""
    if not hasattr(model.decoder, "cls_emb"):
        raise ValueError(
            f"{type(model.decoder).__name__} has neither attention nor class embeddings: that "
            "needs weights with a mask transformer, such as Seg-B-Mask/16"
        )


@torch.inference_mode()
def attention_rows(
    model: SegmenterModel,
    images: Tensor,
    layer: int,
    queries: Sequence[int],
    decoder: bool = False,
) -> Tensor:
    """Attention from chosen tokens to all tokens, in one layer.

    The rows are those of `get_attention_map_enc` and `get_attention_map_dec`, without the others
    ever being computed: memory is proportional to `len(queries)` times the number of tokens. The
    model runs in evaluation mode, whatever mode it is in.

    Args:
        model: a `SegmenterModel`.
        images: (B, 3, H, W) floating point, normalised; see `whole_view`.
        layer: in [0, layers), or negative to count from the last.
        queries: indices of tokens. The encoder's are the class token, the distillation token of a
            DeiT, and the patches row by row; the decoder's the patches and then the classes.
        decoder: of the mask transformer instead of the encoder.

    Returns:
        (B, heads, len(queries), tokens) float32, or float64 of a float64 model; rows sum to 1.

    Raises:
        ValueError: no such layer or token, a decoder without attention, values that are not finite.
        TypeError: an encoder that is not this library's.

    Source: Strudel et al. 2021, appendix (attention maps); official segm/scripts/show_attn_map.py.
    """
    _check_encoder(model)
    if decoder:
        check_mask_decoder(model)
    part = model.decoder if decoder else model.encoder
    count = part.n_layers
    if not -count <= layer < count:
        raise ValueError(
            f"layer must be in [0, {count}), or negative to count from the last, got {layer}"
        )
    layer %= count
    with evaluation_mode(model):
        inputs = part.layer_inputs(_features(model, images) if decoder else images)
        block, x = next(itertools.islice(inputs, layer, None))
        tokens = x.shape[1]
        wrong = [query for query in queries if not 0 <= query < tokens]
        if wrong:
            raise ValueError(f"queries must be in [0, {tokens}), got {wrong[0]}")
        rows = attention_weights(_packed(block, x), list(queries))
    _check_finite(rows, layer)
    return rows


@torch.inference_mode()
def mean_attention_distance(
    model: SegmenterModel,
    images: Iterable,
    short_side: int | str | None = None,
    block_size: int = 64,
) -> Tensor:
    """How far each head of the encoder looks: the mean distance of what patches attend to.

    A query's distance is that of the patch centres, weighted by the attention among patches (class
    and distillation tokens have no place and are left out of the softmax). It is averaged over the
    queries of an image, then over the images. `block_size` queries are worked on at a time, so
    that memory is linear in the number of patches.

    Args:
        model: a `SegmenterModel`.
        images: pictures or network inputs, as `predict` takes them.
        short_side: see `whole_view`.
        block_size: queries whose rows exist at a time.

    Returns:
        (layers, heads) float64 on the CPU, in pixels of the network's view.

    Raises:
        ValueError: no images, or as `predict`.  TypeError: see `attention_rows`.

    Source: Strudel et al. 2021, appendix (size of attended area); Dosovitskiy et al. 2021, Fig. 7.
    """
    _check_encoder(model)
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    encoder, count = model.encoder, 0
    total = torch.zeros(encoder.n_layers, encoder.n_heads, dtype=torch.float64)
    with evaluation_mode(model):
        for image in images:
            view = whole_view(model, image, short_side)
            rows, columns = whole_patches(tuple(view.shape[2:]), model.patch_size)
            places = model.patch_size * torch.cartesian_prod(
                torch.arange(rows, device=view.device), torch.arange(columns, device=view.device)
            )
            for layer, (block, x) in enumerate(encoder.layer_inputs(view)):
                qkv = _packed(block, x)[:, encoder.num_extra_tokens :]
                distances = _attention_distances(qkv, places.to(qkv.dtype), block_size)
                _check_finite(distances, layer)
                total[layer] += distances.cpu().double().mean(1)
            count += 1
    if not count:
        raise ValueError("images is empty: the mean distance needs at least one")
    return total / count


def _attention_distances(qkv: Tensor, places: Tensor, block_size: int) -> Tensor:
    """(heads, N) distances from each of N places, weighted by one image's attention."""
    blocks = []
    for start in range(0, len(places), block_size):
        queries = slice(start, start + block_size)
        weights = attention_weights(qkv, queries)[0]
        # Plain differences: the matrix product that cdist prefers loses short distances.
        distance = torch.cdist(places[queries], places, compute_mode="donot_use_mm_for_euclid_dist")
        blocks.append(torch.einsum("hqk,qk->hq", weights, distance))
    return torch.cat(blocks, dim=1)


def uniform_attention_distance(grid: tuple[int, int], patch_size: int) -> float:
    """Mean distance in pixels between two patches of a grid: that of attention spread evenly.

    Args:
        grid: rows and columns.
        patch_size: pixels.
    """
    # Patches that lie i rows apart: `rows` pairs for i = 0, and 2 (rows - i) for each other i.
    steps = [np.arange(n, dtype=np.float64) for n in grid]
    pairs = [np.where(i > 0, 2 * (n - i), n) for i, n in zip(steps, grid, strict=True)]
    distances = np.hypot(steps[0][:, None], steps[1])
    return float(patch_size * (pairs[0] @ distances @ pairs[1]) / math.prod(grid) ** 2)


# Class embeddings -------------------------------------------------------------------------------


class Projection(NamedTuple):
    """Vectors in few dimensions.

    Args:
        coordinates: (K, dimensions) float64.
        share: (dimensions,) share of the vectors' spread (variance) along each axis.
    """

    coordinates: Tensor
    share: Tensor


def svd_projection(vectors: Tensor, dimensions: int = 2) -> Projection:
    """Project vectors on the axes along which they differ most.

    The axes are the right singular vectors of the vectors less their mean. The component of an axis
    that is largest in size is made positive, so that the picture is not mirrored by chance.

    Args:
        vectors: (K, D).
        dimensions: how many axes; those past the rank are 0.
    """
    if vectors.ndim != 2 or 0 in vectors.shape:
        raise ValueError(f"vectors must be (K, D), got {tuple(vectors.shape)}")
    if dimensions < 1:
        raise ValueError(f"dimensions must be at least 1, got {dimensions}")
    vectors = vectors.detach().cpu().double()
    if not torch.isfinite(vectors).all():
        raise ValueError("vectors have values that are NaN or infinite")
    u, s, vt = torch.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    signs = vt.gather(1, vt.abs().argmax(1, keepdim=True)).sign().flatten()
    missing = max(0, dimensions - len(s))
    coordinates = F.pad(u * s * signs, (0, missing))[:, :dimensions]
    spread = F.pad(s.square() / s.square().sum().clamp_min(1e-300), (0, missing))[:dimensions]
    return Projection(coordinates, spread)


@torch.inference_mode()
def class_embedding_projection(
    model: SegmenterModel, image=None, short_side: int | str | None = None, dimensions: int = 2
) -> Projection:
    """The mask transformer's class embeddings by `svd_projection`: as learnt, or for an image.

    Args:
        model: a `SegmenterModel` with a mask transformer.
        image: None takes the learnt parameters `decoder.cls_emb`. A picture or network input, as
            `predict` takes it, takes what the decoder makes of them: the vectors of length 1 whose
            scalar products with the patches are the masks.
        short_side: of the image; see `whole_view`.
        dimensions: how many axes.

    Returns:
        Projection of the K classes.

    Raises:
        ValueError: a linear decoder, or as `predict`.

    Source: Strudel et al. 2021, appendix (class embeddings).
    """
    check_mask_decoder(model)
    if image is None:
        return svd_projection(model.decoder.cls_emb[0], dimensions)
    with evaluation_mode(model):
        view = whole_view(model, image, short_side)
        _, classes = model.decoder.embeddings(_features(model, view))
    return svd_projection(F.normalize(classes[0].cpu().double(), dim=-1), dimensions)


# Label maps -------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """Label maps of several weights in one numbering of the classes.

    Args:
        labels: M maps (H, W) int32.
        class_names, palette: of the common numbering.
        counts: (M, K) int64, pixels of each class.
        agreement: (M, M) float64, share of the pixels that two maps give the same class.
        unanimous: (H, W) bool, where all maps agree.
    """

    labels: list[Tensor]
    class_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    counts: Tensor
    agreement: Tensor
    unanimous: Tensor


def compare_labels(labels: Sequence[Tensor], configs: Sequence[SegmenterConfig]) -> Comparison:
    """Compare label maps of one picture by the names of the classes.

    Classes of one name are one class, whatever their numbers; its colour is that of the first
    weights that know it. Weights without names are compared by number, which takes equally many
    classes in all of them.

    Args:
        labels: M maps (H, W) of integers in [0, K of their config).
        configs: M configs of the models that made them.

    Raises:
        ValueError: fewer than two maps, sizes that differ, a label that is no class, or classes
            that cannot be matched.
    """
    if len(labels) < 2 or len(labels) != len(configs):
        raise ValueError(
            f"two label maps at least and a config for each are compared, got {len(labels)} maps "
            f"and {len(configs)} configs"
        )
    sizes = [tuple(map_.shape) for map_ in labels]
    if len(set(sizes)) > 1 or len(sizes[0]) != 2:
        raise ValueError(f"label maps must have one size (H, W), got {sizes}")
    numbers = {config.n_cls for config in configs}
    by_name = all(config.class_names is not None for config in configs)
    if not by_name and len(numbers) > 1:
        raise ValueError(
            f"weights without class names are compared by number, but they have {sorted(numbers)} "
            "classes"
        )
    merged: dict[str | int, tuple[str, tuple[int, int, int]]] = {}
    unused = iter(default_palette(2 * sum(config.n_cls for config in configs)))
    tables = []
    for config in configs:
        colours = config.palette or default_palette(config.n_cls)
        names = config.class_names or tuple(map(str, range(config.n_cls)))
        keys = names if by_name else range(config.n_cls)
        for key, name, colour in zip(keys, names, map(tuple, colours), strict=True):
            taken = {used for _, used in merged.values()}
            if key not in merged:
                while colour in taken:
                    colour = tuple(next(unused))
                merged[key] = (name, colour)
        order = list(merged)
        tables.append(torch.tensor([order.index(key) for key in keys], dtype=torch.int32))
    for map_, table in zip(labels, tables, strict=True):
        if map_.numel() and not 0 <= int(map_.min()) <= int(map_.max()) < len(table):
            raise ValueError(f"labels must be in [0, {len(table)}), got {int(map_.max())}")
    maps = [table[map_.cpu().long()] for map_, table in zip(labels, tables, strict=True)]
    stacked = torch.stack(maps)
    counts = [torch.bincount(map_.flatten(), minlength=len(merged)) for map_ in maps]
    return Comparison(
        maps,
        tuple(name for name, _ in merged.values()),
        tuple(colour for _, colour in merged.values()),
        torch.stack(counts),
        torch.stack([(stacked == map_).double().mean((1, 2)) for map_ in maps]),
        (stacked == maps[0]).all(0),
    )
