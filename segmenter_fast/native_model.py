"""Reads a Segmenter for the compiled network: its sizes and parameters, if it is what it seems.

The compiled call knows nothing of modules. Whatever stands where it expects something else, a layer
that was exchanged, pruned, hooked or given a forward of its own, is for the modules to compute.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from segmenter_fast.blocks import Attention, Block, DropPath, FeedForward, LayerNorm
from segmenter_fast.decoder import DecoderLinear, MaskTransformer
from segmenter_fast.encoder import PatchEmbedding, VisionTransformer

CHANNELS = 3
"""Of images: SegmenterModel takes no others."""
HEAD_WIDTHS = (32, 64, 128)
"""Channels of a head that kernels were compiled for."""
MOST_INT8_INPUTS = 2**16
"""Of a layer in int8: as many products of a byte and a signed byte fit into 32 bits."""

_NORMS = (nn.LayerNorm, LayerNorm)
_DROPOUTS = (nn.Dropout, nn.Identity)
_DROP_PATHS = (DropPath, nn.Identity)
# Methods that the compiled call stands for; a class or an object may have got others.
_METHODS = {
    **{
        kind: ("forward",)
        for kind in (nn.Conv2d, nn.Dropout, nn.GELU, nn.Identity, nn.Linear, *_NORMS)
    },
    nn.ModuleList: ("__iter__", "__getitem__"),
    Attention: ("forward", "_packed"),
    Block: ("forward", "_run"),
    DecoderLinear: ("forward",),
    DropPath: ("forward", "factors"),
    FeedForward: ("forward",),
    MaskTransformer: ("forward", "embeddings", "_tokens"),
    PatchEmbedding: (),
    VisionTransformer: ("forward", "_tokens"),
}
_ORIGINALS: list[tuple[type, str, Callable]] = [
    (kind, name, getattr(kind, name)) for kind, names in _METHODS.items() for name in names
]
_OVERRIDDEN = frozenset(name for names in _METHODS.values() for name in names)


class Unserved(Exception):
    """The compiled call cannot stand for the model.

    Args:
        reason: what speaks against it; begins with a verb if `module` is given.
        module: that it is about.
    """

    def __init__(self, reason: str, module: nn.Module | None = None):
        super().__init__(reason)
        self.reason = reason
        self.module = module

    def about(self, model: nn.Module) -> str:
        """The reason, with the module's name."""
        if self.module is None:
            return self.reason
        names = (n for n, m in model.named_modules(remove_duplicate=False) if m is self.module)
        return f"{next(names, 'a module')} {self.reason}"


class Description(NamedTuple):
    """What the compiled network is made of.

    Args:
        shape: sizes, by the names that `_C.Network` has for them.
        parameters: by their names in the model. One that is shared has several.
        positions: those that tokens begin with: of the grid, of the class and, maybe, distillation.
    """

    shape: dict[str, Any]
    parameters: dict[str, Tensor]
    positions: tuple[Tensor, ...]

    @property
    def tensors(self) -> Iterable[Tensor]:
        """All parameters."""
        return (*self.parameters.values(), *self.positions)

    @property
    def most_inputs(self) -> int:
        """Of any linear layer in a block."""
        names = ("width", "hidden", "decoder_width", "decoder_hidden")
        return max(self.shape.get(name, 0) for name in names)


def describe(model: nn.Module) -> Description:
    """Read sizes and parameters off a model.

    Args:
        model: a `SegmenterModel`.

    Raises:
        Unserved: the compiled call would not do what the modules do; says why.
    """
    for kind, name, original in _ORIGINALS:
        if getattr(kind, name) is not original:
            raise Unserved(f"{kind.__name__}.{name} is not the original")
    try:
        return _Reader(model).description()
    except KeyError as error:
        raise Unserved(f"a module lacks {error}") from error
    except AttributeError as error:
        raise Unserved(str(error)) from error


class _Reader:
    """Goes through a model slot by slot; every number is held to the parameters' own shapes."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.parameters: dict[str, Tensor] = {}

    def description(self) -> Description:
        model = self.model
        encoder = self._module(model, "encoder", VisionTransformer)
        decoder = self._module(model, "decoder", DecoderLinear, MaskTransformer)
        if not model.patch_size == encoder.patch_size == decoder.patch_size:
            raise Unserved("encoder and decoder have patches of various sizes")
        embedding = self._module(encoder, "patch_embed", PatchEmbedding)
        projection = self._module(embedding, "proj", nn.Conv2d)
        square = (encoder.patch_size,) * 2
        pixels = CHANNELS * encoder.patch_size**2
        if (projection.kernel_size, projection.stride) != (square, square) or pixels % 4:
            raise Unserved(f"patches of {projection.kernel_size} are not served")
        if (projection.padding, projection.dilation, projection.groups) != ((0, 0), (1, 1), 1):
            raise Unserved("is padded, dilated or grouped", projection)
        width, classes = projection.out_channels, decoder.n_cls
        self._layer(projection, "encoder.patch_embed.proj", (width, CHANNELS, *square), (width,))
        self._module(encoder, "dropout", *_DROPOUTS)
        shape = {
            "channels": CHANNELS,
            "patch": encoder.patch_size,
            "extra_tokens": encoder.num_extra_tokens,
            "width": width,
            "classes": classes,
            "decoder_depth": 0,
            "norm_eps": self._norm(encoder, "norm", "encoder.norm", width),
        }
        shape |= self._blocks(encoder, "encoder.blocks", width, "")
        tokens = ("cls_token", "dist_token")[: encoder.num_extra_tokens]
        positions = (encoder.pos_embed, *(getattr(encoder, name) for name in tokens))
        self._number(encoder, "pos_embed", (1, encoder.pos_embed.shape[1], width))
        for name in tokens:
            self._number(encoder, name, (1, 1, width))
        if type(decoder) is DecoderLinear:
            self._linear(decoder, "head", "decoder.head", width, classes)
        else:
            shape |= self._mask_transformer(decoder, width, classes)
        return Description(shape, self.parameters, positions)

    def _mask_transformer(self, decoder: nn.Module, encoder_width: int, classes: int) -> dict:
        width = self._module(decoder, "proj_dec", nn.Linear).out_features
        self._linear(decoder, "proj_dec", "decoder.proj_dec", encoder_width, width)
        for name, size in (
            ("cls_emb", (1, classes, width)),
            ("proj_patch", (width, width)),
            ("proj_classes", (width, width)),
        ):
            self.parameters[f"decoder.{name}"] = self._number(decoder, name, size)
        return {
            "decoder_width": width,
            "decoder_norm_eps": self._norm(decoder, "decoder_norm", "decoder.decoder_norm", width),
            "mask_eps": self._norm(decoder, "mask_norm", "decoder.mask_norm", classes),
            **self._blocks(decoder, "decoder.blocks", width, "decoder_"),
        }

    def _blocks(self, owner: nn.Module, name: str, width: int, prefix: str) -> dict[str, Any]:
        """Depth and, which all blocks have in common, heads, hidden width and eps."""
        blocks = self._module(owner, "blocks", nn.ModuleList)
        seen = []
        for i in blocks._modules:
            block = self._module(blocks, i, Block)
            attn = self._module(block, "attn", Attention)
            mlp = self._module(block, "mlp", FeedForward)
            act = self._module(mlp, "act", nn.GELU)
            if act.approximate != "none":
                raise Unserved("approximates GELU", act)
            for parent, slot, kinds in (
                (block, "drop_path", _DROP_PATHS),
                (attn, "attn_drop", _DROPOUTS),
                (attn, "proj_drop", _DROPOUTS),
                (mlp, "drop", _DROPOUTS),
            ):
                self._module(parent, slot, *kinds)
            if width % attn.heads or width // attn.heads not in HEAD_WIDTHS:
                raise Unserved(
                    f"has heads of {width} / {attn.heads} channels, not one of {HEAD_WIDTHS}", attn
                )
            hidden = self._module(mlp, "fc1", nn.Linear).out_features
            if hidden % 32:
                raise Unserved(f"has a hidden width of {hidden}, no multiple of 32", mlp)
            full = f"{name}.{i}"
            epses = {
                self._norm(block, norm, f"{full}.{norm}", width) for norm in ("norm1", "norm2")
            }
            self._linear(attn, "qkv", f"{full}.attn.qkv", width, 3 * width)
            self._linear(attn, "proj", f"{full}.attn.proj", width, width)
            self._linear(mlp, "fc1", f"{full}.mlp.fc1", width, hidden)
            self._linear(mlp, "fc2", f"{full}.mlp.fc2", hidden, width)
            seen.append((attn.heads, hidden, *epses))
        if not seen:
            raise Unserved(f"{name} are none")
        # One description stands for all blocks.
        if len(set(seen)) > 1 or len(seen[0]) > 3:
            raise Unserved(f"{name} have various heads, hidden widths or eps")
        heads, hidden, eps = seen[0]
        shape = {"depth": len(seen), "heads": heads, "hidden": hidden, "block_eps": eps}
        return {prefix + key: value for key, value in shape.items()}

    def _module(self, owner: nn.Module, slot: str, *kinds: type) -> nn.Module:
        """What stands in a slot, if it is of one of the kinds and does just what they do."""
        module = owner._modules[slot]
        if type(module) not in kinds:
            raise Unserved(f"is a {type(module).__name__}, not a {kinds[0].__name__}", module)
        if not module.__dict__.keys().isdisjoint(_OVERRIDDEN):
            raise Unserved("has methods of its own", module)
        if module._forward_hooks or module._forward_pre_hooks:
            raise Unserved("has hooks", module)
        if module.training:
            raise Unserved("the model is in training mode; call .eval()")
        return module

    def _norm(self, owner: nn.Module, slot: str, name: str, width: int) -> float:
        """Its eps."""
        norm = self._module(owner, slot, *_NORMS)
        self._layer(norm, name, (width,), (width,))
        return norm.eps

    def _linear(self, owner: nn.Module, slot: str, name: str, inputs: int, outputs: int) -> None:
        self._layer(self._module(owner, slot, nn.Linear), name, (outputs, inputs), (outputs,))

    def _layer(self, layer: nn.Module, name: str, weight: tuple, bias: tuple) -> None:
        self.parameters[f"{name}.weight"] = self._number(layer, "weight", weight)
        self.parameters[f"{name}.bias"] = self._number(layer, "bias", bias)

    def _number(self, owner: nn.Module, name: str, shape: tuple[int, ...]) -> Tensor:
        """A parameter, which must have that shape."""
        tensor = owner._parameters[name]
        if tensor is None:
            raise Unserved(f"has no {name}", owner)
        if type(tensor) is not nn.Parameter:
            raise Unserved(f"has a {type(tensor).__name__} for {name}", owner)
        if tensor.shape != shape:
            raise Unserved(f"has a {name} of {tuple(tensor.shape)}, not {shape}", owner)
        if tensor.dtype != torch.float32 or not tensor.is_cpu:
            which = f"{tensor.dtype} on {tensor.device}"
            raise Unserved(f"parameters are {which}, not float32 on a CPU")
        return tensor
