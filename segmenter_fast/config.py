"""All that describes a Segmenter except its numbers: one dataclass, stored as config.json."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

# Input normalisation by the name that official checkpoints use (segm/data/utils.py, STATS).
NORMALIZATION = {
    "vit": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "deit": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
DECODERS = ("linear", "mask_transformer")
MLP_RATIO = 4  # d_ff = 4 d_model in every published model


@dataclasses.dataclass(frozen=True)
class SegmenterConfig:
    """A model's architecture, how its input is normalised, and what its classes are called.

    Args:
        n_cls: number of classes K.
        image_size: (H, W) in pixels of the training crop; fixes the grid of position embeddings.
        patch_size: side of a square patch in pixels.
        d_model: token width; the mask transformer uses the same.
        n_layers, n_heads: of the encoder.
        variant: name in the paper's notation, such as "Seg-B-Mask/16".
        backbone: the official (timm) name of the encoder, such as "vit_base_patch16_384".
        distilled: a DeiT encoder with a distillation token.
        dropout, drop_path_rate: of the encoder.
        norm_eps: of the encoder's layer norms; 1e-5 in the official code, 1e-6 in timm and mmseg.
        decoder: "linear" or "mask_transformer".
        decoder_n_layers, decoder_dropout, decoder_drop_path_rate: of the mask transformer.
        mean, std: per RGB channel, for images scaled to [0, 1].
        class_names, palette: K names, K (r, g, b) colours of 0 to 255.
        window_size, window_stride: sliding-window inference, in pixels.
        short_side: length in pixels to which prediction first resizes an image's shorter side;
            None takes the image as it is.
        dataset: what the weights were trained on.

    Raises:
        ValueError: a value that no model can have, named.
    """

    n_cls: int
    image_size: tuple[int, int]
    patch_size: int
    d_model: int
    n_layers: int
    n_heads: int
    variant: str | None = None
    backbone: str | None = None
    distilled: bool = False
    dropout: float = 0.0
    drop_path_rate: float = 0.1
    norm_eps: float = 1e-5
    decoder: str = "mask_transformer"
    decoder_n_layers: int = 2
    decoder_dropout: float = 0.1
    decoder_drop_path_rate: float = 0.0
    mean: tuple[float, float, float] = NORMALIZATION["vit"][0]
    std: tuple[float, float, float] = NORMALIZATION["vit"][1]
    class_names: tuple[str, ...] | None = None
    palette: tuple[tuple[int, int, int], ...] | None = None
    window_size: int | None = None
    window_stride: int | None = None
    short_side: int | None = None
    dataset: str | None = None

    def __post_init__(self):
        # JSON has lists and no tuples: one canonical form makes a round trip compare equal.
        def fix(name, value):
            object.__setattr__(self, name, value)

        size = self.image_size
        fix("image_size", (size, size) if isinstance(size, int) else tuple(int(s) for s in size))
        fix("mean", tuple(float(v) for v in self.mean))
        fix("std", tuple(float(v) for v in self.std))
        if self.class_names is not None:
            fix("class_names", tuple(str(name) for name in self.class_names))
        if self.palette is not None:
            fix("palette", tuple(tuple(int(c) for c in colour) for colour in self.palette))
        self._check()

    def _check(self):
        def need(condition, text):
            if not condition:
                raise ValueError(f"SegmenterConfig: {text}")

        for name in ("n_cls", "patch_size", "d_model", "n_layers", "n_heads"):
            value = getattr(self, name)
            need(
                isinstance(value, int) and value > 0,
                f"{name} must be a positive int, got {value!r}",
            )
        need(len(self.image_size) == 2, f"image_size must be (H, W), got {self.image_size}")
        need(
            all(s > 0 and s % self.patch_size == 0 for s in self.image_size),
            f"image_size {self.image_size} must be multiples of patch_size {self.patch_size}",
        )
        need(
            self.d_model % self.n_heads == 0,
            f"d_model {self.d_model} must be divisible by n_heads {self.n_heads}",
        )
        need(self.decoder in DECODERS, f"decoder must be one of {DECODERS}, got {self.decoder!r}")
        for name in ("dropout", "drop_path_rate", "decoder_dropout", "decoder_drop_path_rate"):
            value = getattr(self, name)
            need(0 <= value < 1, f"{name} must be in [0, 1), got {value!r}")
        need(
            isinstance(self.norm_eps, float) and 0 < self.norm_eps < 1,
            f"norm_eps must be a float in (0, 1), got {self.norm_eps!r}",
        )
        for name in ("mean", "std"):
            value = getattr(self, name)
            need(len(value) == 3, f"{name} must have 3 values (RGB), got {value}")
        need(min(self.std) > 0, f"std must be positive, got {self.std}")
        for name in ("class_names", "palette"):
            value = getattr(self, name)
            if value is not None:
                need(
                    len(value) == self.n_cls,
                    f"{name} has {len(value)} entries but n_cls is {self.n_cls}",
                )
        if self.palette is not None:
            need(
                all(len(c) == 3 and all(0 <= v <= 255 for v in c) for c in self.palette),
                "palette entries must be (r, g, b) with values 0 to 255",
            )
        for name in ("window_size", "window_stride", "short_side"):
            value = getattr(self, name)
            need(
                value is None or (isinstance(value, int) and value > 0),
                f"{name} must be a positive int or None, got {value!r}",
            )

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches at `image_size`."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def decoder_n_heads(self) -> int:
        """Heads of the mask transformer: width 64, as the official factory has it.

        A token width that 64 does not divide keeps the encoder's number of heads.
        """
        return self.d_model // 64 if self.d_model % 64 == 0 else self.n_heads

    def replace(self, **changes) -> "SegmenterConfig":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def with_classes(self, num_classes: int, class_names=None, palette=None) -> "SegmenterConfig":
        """A copy for another set of classes; names and palette are dropped unless given."""
        return self.replace(n_cls=num_classes, class_names=class_names, palette=palette)

    def to_dict(self) -> dict[str, Any]:
        """Plain dict of JSON-able values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SegmenterConfig":
        """Inverse of `to_dict`. Unknown and missing keys raise ValueError by name."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"SegmenterConfig: unknown keys {unknown}; known are {sorted(known)}")
        required = {
            field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING
        }
        missing = sorted(required - set(values))
        if missing:
            raise ValueError(f"SegmenterConfig: missing keys {missing}")
        return cls(**values)

    def to_json(self) -> str:
        """The content of config.json."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "SegmenterConfig":
        """Inverse of `to_json`."""
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"config.json must hold an object, got {type(values).__name__}")
        return cls.from_dict(values)
