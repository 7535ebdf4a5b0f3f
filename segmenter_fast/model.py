"""SegmenterModel: encoder, decoder and a PatchLogits; the drop-in for the official `Segmenter`."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn

from segmenter_fast.backend import (
    BackendError,
    check_backend,
    check_precision,
    resolve_backend,
)
from segmenter_fast.config import SegmenterConfig
from segmenter_fast.patch_logits import PatchLogits

QUANTIZED = frozenset(("qkv", "proj", "fc1", "fc2"))
"""Kinds of linear layers of a block, all of which precision "int8" takes in int8 by default."""


def whole_patches(size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches that cover (H, W) pixels.

    Sides modulo the patch would do, but torch.compile cannot trace that for sides that vary.
    """
    return tuple((side + patch_size - 1) // patch_size for side in size)


def pad_to_patch(images: Tensor, patch_size: int) -> Tensor:
    """Zeros at the right and bottom up to multiples of `patch_size`.

    The images are normalised already, so the padding has the value of the mean colour.

    Source: official segm/model/utils.py, padding.
    """
    height, width = images.shape[2:]
    rows, columns = whole_patches((height, width), patch_size)
    bottom, right = rows * patch_size - height, columns * patch_size - width
    return F.pad(images, (0, right, 0, bottom)) if bottom or right else images


class SegmenterModel(nn.Module, ModelHubMixin, library_name="segmenter_fast"):
    """Semantic segmentation with transformers alone.

    Args:
        encoder: maps (B, 3, H, W) to (B, extra + N, D) when called with `return_features=True`; has
            `patch_size` and `distilled`, as `VisionTransformer`. It gets images of whole patches,
            unless it has a true `fills_patches`.
        decoder: maps (B, N, D) and (H, W) to (B, K, H / patch, W / patch), as `MaskTransformer`.
        n_cls: number of classes K.
        config: what `save_pretrained` writes; None reads it off the two modules.
        backend: "auto", "reference", "native" or "triton"; resolved at each call.
        precision: of inference, see the property.

    Source: Strudel et al. 2021; official segm/model/segmenter.py, Segmenter.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        n_cls: int,
        config: SegmenterConfig | None = None,
        backend: str = "auto",
        precision: str = "float32",
    ):
        super().__init__()
        self.n_cls = n_cls
        self.patch_size = encoder.patch_size
        self.encoder = encoder
        self.decoder = decoder
        self.config = config if config is not None else describe(encoder, decoder, n_cls)
        self.backend = backend
        self.precision = precision
        self.quantized = QUANTIZED

    @property
    def precision(self) -> str:
        """What inference calculates in, from float32 parameters.

        Inference is where nobody records gradients; autocast, if it is on, decides instead.
        "float32" is the parameters' own dtype. "bfloat16" takes matrix products and attention in
        bfloat16: on a CPU that has an instruction for it by compiled code that keeps the sums of
        layers in float32, elsewhere by autocast. "int8" takes the linear layers of the blocks in
        int8, with weights scaled by output and activations by token, and is for CPUs with AVX-512
        VNNI; the rest is then bfloat16 where the CPU has it, else float32.
        """
        return self._precision

    @precision.setter
    def precision(self, name: str) -> None:
        self._precision = check_precision(name)

    @property
    def quantized(self) -> frozenset[str]:
        """Which linear layers precision "int8" takes in int8: "qkv", "proj", "fc1", "fc2"."""
        return self._quantized

    @quantized.setter
    def quantized(self, kinds: Iterable[str]) -> None:
        kinds = frozenset(kinds)
        if not kinds <= QUANTIZED:
            raise ValueError(
                f"quantized must be among {', '.join(sorted(QUANTIZED))}; got {sorted(kinds)}"
            )
        self._quantized = kinds

    @property
    def backend(self) -> str:
        """The backend's name; setting it reaches every layer."""
        return self._backend

    @backend.setter
    def backend(self, name: str) -> None:
        self._backend = check_backend(name)
        for module in self.modules():
            if module is not self and hasattr(module, "backend"):
                module.backend = name

    @property
    def recompute(self) -> bool:
        """Whether blocks keep their inputs alone for backward: less memory, a third more time."""
        return any(getattr(module, "recompute", False) for module in self._recomputing())

    @recompute.setter
    def recompute(self, wanted: bool) -> None:
        for module in self._recomputing():
            module.recompute = wanted

    def _recomputing(self) -> list[nn.Module]:
        return [m for m in self.modules() if m is not self and hasattr(m, "recompute")]

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should leave alone."""
        encoder = {f"encoder.{name}" for name in self.encoder.no_weight_decay()}
        return encoder | {f"decoder.{name}" for name in self.decoder.no_weight_decay()}

    def _check_images(self, images: Tensor) -> None:
        if not isinstance(images, Tensor):
            raise TypeError(
                f"images must be a torch.Tensor, got {type(images).__name__}; "
                "pictures and arrays go through segmenter_fast.predict"
            )
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
        if not images.is_floating_point():
            raise TypeError(
                f"images must be floating point and normalised, got {images.dtype}; "
                "segmenter_fast.predict takes uint8 pictures"
            )
        if 0 in images.shape[2:]:
            raise ValueError(f"images have no pixels: {tuple(images.shape)}")
        device = self.encoder.pos_embed.device if hasattr(self.encoder, "pos_embed") else None
        if device is not None and device != images.device:
            raise ValueError(
                f"images are on {images.device} and the model on {device}: move one with .to()"
            )

    def _features(self, images: Tensor) -> Tensor:
        """Patch tokens without the class and distillation tokens, (B, N, D)."""
        x = self.encoder(images, return_features=True)
        return x[:, 1 + self.encoder.distilled :]

    def patch_logits(self, images: Tensor) -> PatchLogits:
        """Class scores at patch resolution, with what it takes to read them at every pixel.

        Args:
            images: (B, 3, H, W) floating point, normalised; any H and W.

        Returns:
            PatchLogits of (B, K, h, w) for an answer of (H, W).

        Raises:
            ValueError, TypeError: not such a tensor.  BackendError: the backend cannot run there.
        """
        self._check_images(images)
        resolve_backend(self.backend, images.device)
        height, width = images.shape[2:]
        size = tuple(n * self.patch_size for n in whole_patches((height, width), self.patch_size))
        logits = self._native_logits(images) if self._may_be_native(images) else None
        if logits is None:
            if not getattr(self.encoder, "fills_patches", False):
                images = pad_to_patch(images, self.patch_size)
            with self._autocast(images):
                logits = self.decoder(self._features(images), size)
        return PatchLogits(logits, size, crop=(0, 0, height, width), backend=self.backend)

    def _may_be_native(self, images: Tensor) -> bool:
        """Whether the one compiled call is to be asked; cheap, and nothing that compilers trace."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        wanted = resolve_backend(self.backend, images.device) == "native"
        if self.precision == "int8" and not wanted:
            raise BackendError(
                f"precision 'int8' runs on a CPU with backend 'native'; the images are on "
                f"{images.device} and the backend is {self.backend!r}"
            )
        return wanted

    def _native_logits(self, images: Tensor) -> Tensor | None:
        from segmenter_fast.native import inference_logits

        return inference_logits(self, images)

    def _autocast(self, images: Tensor) -> AbstractContextManager:
        """Autocast for inference in bfloat16, layer by layer."""
        kind = images.device.type
        wanted = self.precision == "bfloat16" and not torch.is_grad_enabled()
        if wanted and not torch.is_autocast_enabled(kind) and images.dtype == torch.float32:
            return torch.autocast(kind, torch.bfloat16)
        return nullcontext()

    def forward(self, images: Tensor, target: Tensor | None = None, **loss_options) -> Tensor:
        """Logits of every pixel, or the loss when a target is given.

        The loss goes through `forward` so that DistributedDataParallel, FSDP and torch.compile see
        training.

        Args:
            images: (B, 3, H, W) floating point, normalised.
            target: (B, H, W) integer labels; see `loss` for it and for `loss_options`.

        Returns:
            (B, K, H, W) logits, or the loss.
        """
        if target is None:
            if loss_options:
                raise TypeError(f"loss options {sorted(loss_options)} need a target")
            return self.patch_logits(images).logits()
        return self.loss(images, target, **loss_options)

    def labels(self, images: Tensor) -> Tensor:
        """(B, H, W) label maps, uint8 up to 256 classes; see `PatchLogits.labels`."""
        return self.patch_logits(images).labels()

    def loss(
        self,
        images: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = 255,
        reduction: str = "mean",
        check: bool = False,
    ) -> Tensor:
        """Cross-entropy of the upsampled logits, as `F.cross_entropy`.

        Args:
            images: (B, 3, H, W) floating point, normalised.
            target: (B, H, W) uint8, int16, int32 or int64 labels in [0, K) or `ignore_index`.
            weight: (K,) class weights.
            label_smoothing: in [0, 1].
            ignore_index: label without a class.
            reduction: "mean", "sum" or "none".
            check: also look at the labels on a GPU, which makes the host wait for it.

        Returns:
            Scalar, or (B, H, W) for "none". NaN for "mean" when every pixel is ignored.
        """
        return self.patch_logits(images).cross_entropy(
            target,
            weight=weight,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            reduction=reduction,
            check=check,
        )

    def get_attention_map_enc(self, im: Tensor, layer_id: int) -> Tensor:
        """(B, heads, extra + N, extra + N) attention of an encoder block; no padding."""
        return self.encoder.get_attention_map(im, layer_id)

    def get_attention_map_dec(self, im: Tensor, layer_id: int) -> Tensor:
        """(B, heads, N + K, N + K) attention of a mask transformer block."""
        if not hasattr(self.decoder, "get_attention_map"):
            raise ValueError(f"{type(self.decoder).__name__} has no attention to show")
        return self.decoder.get_attention_map(self._features(im), layer_id)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        num_classes: int | None = None,
        backend: str = "auto",
        precision: str = "float32",
        **options,
    ) -> "SegmenterModel":
        """Load weights: a folder, a file, a bundled name, the official zoo or the Hugging Face hub.

        Args:
            pretrained_model_name_or_path: a folder of ours (config.json, model.safetensors) or of
                the official code (checkpoint.pth, variant.yml); "scenes" or "street";
                "Seg-B-Mask/16" and the rest of the official zoo; "organisation/name" on the hub.
            num_classes: for fine-tuning; another number than the weights' draws the
                class-dependent parameters anew and names them in a warning.
            backend, precision: see the class.
            **options: `device`, and the hub's `revision`, `token`, `cache_dir`, `force_download`,
                `local_files_only`.

        Returns:
            The model, in evaluation mode.

        Raises:
            FileNotFoundError: nothing of that name, with what was tried.
            CheckpointError: weights that are damaged, unsafe to read, or do not fit.
            ValueError: a broken config.
        """
        from segmenter_fast.checkpoint import load_model

        model = load_model(
            pretrained_model_name_or_path,
            num_classes=num_classes,
            backend=backend,
            **options,
        )
        model.precision = precision
        return model

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        dtype: torch.dtype | None = None,
        model_card: str | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        config: None = None,
        model_card_kwargs: dict | None = None,
        **hub_options,
    ) -> str | None:
        """Write config.json and model.safetensors, each whole or not at all.

        Args:
            save_directory: made if need be; files of these names are replaced.
            dtype: floating type to store, None the parameters' own; torch.float16 halves the file.
            model_card: text of README.md; None leaves that file alone.
            push_to_hub: upload the model as well, to `repo_id` or the folder's name.
            repo_id: "organisation/name" on the Hugging Face hub.
            config, model_card_kwargs: what the hub's mixin passes; the model knows its own.
            **hub_options: of `push_to_hub`, such as `private` and `token`.

        Returns:
            The commit's address if it was uploaded.

        Raises:
            ValueError: the model has no config.  OSError: nothing was replaced.
        """
        from segmenter_fast.checkpoint import save_pretrained

        if hub_options and not push_to_hub:
            raise TypeError(f"{sorted(hub_options)} need push_to_hub=True")
        # Not the mixin's own way, which deletes the old config.json before it writes the new one.
        save_pretrained(self, save_directory, dtype=dtype, model_card=model_card)
        if push_to_hub:
            return self.push_to_hub(repo_id or Path(save_directory).name, **hub_options)
        return None


def describe(encoder: nn.Module, decoder: nn.Module, n_cls: int) -> SegmenterConfig | None:
    """Read a config off two modules, or None when they are not this library's."""
    try:
        mask = hasattr(decoder, "cls_emb")
        normalization = getattr(encoder, "normalization", None)
        statistics = dict(zip(("mean", "std"), normalization, strict=True)) if normalization else {}
        return SegmenterConfig(
            n_cls=n_cls,
            image_size=encoder.patch_embed.image_size,
            patch_size=encoder.patch_size,
            d_model=encoder.d_model,
            n_layers=encoder.n_layers,
            n_heads=encoder.n_heads,
            distilled=bool(encoder.distilled),
            dropout=encoder.dropout.p,
            drop_path_rate=_last_drop_path(encoder.blocks),
            norm_eps=encoder.norm.eps,
            decoder="mask_transformer" if mask else "linear",
            decoder_n_layers=decoder.n_layers if mask else 0,
            decoder_dropout=decoder.blocks[0].attn.attn_drop.p if mask else 0.0,
            decoder_drop_path_rate=_last_drop_path(decoder.blocks) if mask else 0.0,
            **statistics,
        )
    except AttributeError:
        return None


def _last_drop_path(blocks: nn.ModuleList) -> float:
    return getattr(blocks[-1].drop_path, "drop_prob", 0.0)
