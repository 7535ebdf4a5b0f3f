"""PatchLogits: a dense prediction kept at patch resolution until somebody reads it."""

import torch
from torch import Tensor

from segmenter_fast.backend import check_backend
from segmenter_fast.ops.confusion import upsample_confusion
from segmenter_fast.ops.upsample import check_geometry, upsample_logits
from segmenter_fast.ops.upsample_argmax import upsample_argmax
from segmenter_fast.ops.upsample_cross_entropy import upsample_cross_entropy
from segmenter_fast.ops.upsample_probabilities import upsample_probabilities


class PatchLogits:
    """Patch-level logits and how output pixels map onto them; each method is one way to read them.

    A pixel's logits are the half-pixel bilinear interpolation (`align_corners=False`) of `grid` to
    `size`, of which `crop` is the answer. Immutable; a pytree node, so compiled functions may take
    and return it.

    Attributes:
        grid: (B, K, h, w) the logits, one vector per patch.
        size: (H, W) in pixels, what `interpolate` would be asked for.
        crop: (top, left, height, width) in pixels, the part of `size` that is the answer.
        backend: passed on to every consumer, see `segmenter_fast.backend`.
    """

    __slots__ = ("_backend", "_crop", "_grid", "_size")

    def __init__(
        self,
        logits: Tensor,
        size: tuple[int, int],
        crop: tuple[int, int, int, int] | None = None,
        backend: str = "auto",
    ) -> None:
        """Check and keep.

        Args:
            logits: (B, K, h, w) floating point, any strides.
            size: (H, W) the full output, in pixels.
            crop: (top, left, height, width) in pixels, the part of `size` wanted; None is all.
            backend: see `segmenter_fast.backend`.

        Raises:
            ValueError: wrong rank, a size that is not positive, a crop outside it, unknown backend.
            TypeError: logits that are not floating point, sizes that are not ints.
        """
        self._size, self._crop = check_geometry(logits, size, crop)
        self._grid = logits
        self._backend = check_backend(backend)

    def labels(self) -> Tensor:
        """(B, height, width) class of each pixel; see `upsample_argmax` for its integer type."""
        return upsample_argmax(self._grid, self._size, self._crop, backend=self._backend)

    def probabilities(self, top1: bool = False) -> Tensor:
        """(B, K, height, width) softmax over classes, or its (B, height, width) largest if `top1`.

        Full contract: `upsample_probabilities`.
        """
        return upsample_probabilities(
            self._grid, self._size, self._crop, top1=top1, backend=self._backend
        )

    def cross_entropy(
        self,
        target: Tensor,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = 255,
        reduction: str = "mean",
        check: bool = False,
    ) -> Tensor:
        """Loss against a (B, height, width) label map; see `upsample_cross_entropy`."""
        return upsample_cross_entropy(
            self._grid,
            target,
            self._size,
            self._crop,
            weight=weight,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            reduction=reduction,
            check=check,
            backend=self._backend,
        )

    def confusion(self, target: Tensor, ignore_index: int = 255) -> Tensor:
        """(K, K) int64 counts, rows = target classes; see `upsample_confusion`."""
        return upsample_confusion(
            self._grid, target, self._size, self._crop, ignore_index, backend=self._backend
        )

    def logits(self) -> Tensor:
        """(B, K, height, width) logits of each pixel, the one method that writes them all out."""
        return upsample_logits(self._grid, self._size, self._crop, backend=self._backend)

    def to(self, device: torch.device | str) -> "PatchLogits":
        """The same prediction on another device."""
        return PatchLogits(self._grid.to(device), self._size, self._crop, self._backend)

    def detach(self) -> "PatchLogits":
        """The same prediction cut from the autograd graph."""
        return PatchLogits(self._grid.detach(), self._size, self._crop, self._backend)

    @property
    def grid(self) -> Tensor:
        """(B, K, h, w) the logits, one vector per patch."""
        return self._grid

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels, what `interpolate` would be asked for."""
        return self._size

    @property
    def crop(self) -> tuple[int, int, int, int]:
        """(top, left, height, width) in pixels, the part of `size` that is the answer."""
        return self._crop

    @property
    def backend(self) -> str:
        """Passed on to every consumer."""
        return self._backend

    @property
    def num_classes(self) -> int:
        """K."""
        return self._grid.shape[1]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, K, height, width) of `logits()`."""
        return (self._grid.shape[0], self._grid.shape[1], *self._crop[2:])

    @property
    def output_size(self) -> tuple[int, int]:
        """(height, width) of the answer, in pixels."""
        return self._crop[2:]

    @property
    def grid_size(self) -> tuple[int, int]:
        """(h, w), in patches."""
        return tuple(self._grid.shape[2:])

    @property
    def device(self) -> torch.device:
        """Where the logits live."""
        return self._grid.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the patch logits; reading them computes in float32 at least."""
        return self._grid.dtype

    def __repr__(self) -> str:
        """Shapes, not numbers."""
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"PatchLogits(grid={tuple(self._grid.shape)}, size={self._size}, crop={self._crop}, "
            f"{dtype}, device='{self.device}', backend={self._backend!r})"
        )


def _flatten(patch_logits: PatchLogits) -> tuple[list[Tensor], tuple]:
    return [patch_logits._grid], (patch_logits._size, patch_logits._crop, patch_logits._backend)


def _unflatten(children: list, context: tuple) -> PatchLogits:
    # Not through the constructor: tree_map may put anything in the tensor's place.
    patch_logits = object.__new__(PatchLogits)
    (patch_logits._grid,) = children
    patch_logits._size, patch_logits._crop, patch_logits._backend = context
    return patch_logits


torch.utils._pytree.register_pytree_node(
    PatchLogits,
    _flatten,
    _unflatten,
    serialized_type_name="segmenter_fast.PatchLogits",
)
