"""The whole network as one compiled call, for inference on a CPU.

    images -> patch logits

csrc/cpu/network.cpp runs it. Weights are packed into the order that its matrix products read them
in, once for each version of the parameters, and kept beside the model: in float32 as many bytes
again as the model's, in bfloat16 half, in int8 about a quarter. The stream of tokens is float32 in
every precision.

Whatever the call does not stand for goes layer by layer, as on any device: training and everything
else that records gradients, autocast, torch.compile and export, layers that were exchanged or have
hooks. `why_not` has the whole list.
"""

import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.profiler import record_function

from segmenter_fast.backend import BackendError, native_module
from segmenter_fast.blocks import Attention, Block, DropPath, FeedForward, LayerNorm
from segmenter_fast.decoder import DecoderLinear, MaskTransformer
from segmenter_fast.encoder import PatchEmbedding, VisionTransformer, resize_pos_embed

_WIDTHS = (32, 64, 128)  # channels of a head
_LOOKED_AT = 256  # bytes of each parameter, when asking whether it has changed

_KNOWN = (
    Attention,
    Block,
    DecoderLinear,
    DropPath,
    FeedForward,
    LayerNorm,
    MaskTransformer,
    PatchEmbedding,
    VisionTransformer,
    nn.Conv2d,
    nn.Dropout,
    nn.GELU,
    nn.Identity,
    nn.LayerNorm,
    nn.Linear,
    nn.ModuleList,
)


# --------------------------------------------------------------------------- whether it can
def why_not(model: nn.Module, images: Tensor) -> str | None:
    """Why the compiled call cannot stand for the model here; None if it can.

    Args:
        model: a `SegmenterModel`.
        images: (B, 3, H, W), what it is called with.
    """
    return _why_not_now(images) or _why_not_this(model)


def _why_not_now(images: Tensor) -> str | None:
    """What speaks against it in the circumstances of a call."""
    # First, since a compiler must not trace the rest.
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "the model is being compiled or exported"
    if torch.is_grad_enabled():
        return "gradients are recorded; use torch.inference_mode()"
    if type(images) is not Tensor or images.device.type != "cpu":
        return "the images are not an ordinary tensor on a CPU"
    if images.dtype != torch.float32:
        return f"the images are {images.dtype}, not torch.float32"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return "a mode of PyTorch intercepts its operations"
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "there are hooks on all modules"
    return None


def _why_not_this(model: nn.Module) -> str | None:
    """What speaks against it in the model."""
    encoder, decoder = model.encoder, model.decoder
    if type(encoder) is not VisionTransformer:
        return f"the encoder is a {type(encoder).__name__}"
    if type(decoder) not in (DecoderLinear, MaskTransformer):
        return f"the decoder is a {type(decoder).__name__}"
    for module in _modules(model):
        if type(module) not in _KNOWN or "forward" in module.__dict__:
            kind = type(module).__name__
            return f"{_name(model, module)} is not this library's or PyTorch's own {kind}"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{_name(model, module)} has hooks"
        if module.training:
            return "the model is in training mode; call .eval()"
        for parameter in module._parameters.values():
            if parameter is None:
                continue
            if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
                which = f"{parameter.dtype} on {parameter.device}"
                return f"parameters are {which}, not float32 on a CPU"
            if type(parameter) is not nn.Parameter:
                return f"a parameter is a {type(parameter).__name__}"
    return _why_not_this_size(encoder, decoder)


def _modules(model: nn.Module) -> list[nn.Module]:
    """All modules of encoder and decoder; `named_modules` takes as long as a small network."""
    modules = {model.encoder: None, model.decoder: None}  # in order, each once
    left = list(modules)
    for module in left:  # which grows as it is gone through
        new = [m for m in module._modules.values() if m is not None and m not in modules]
        modules.update(dict.fromkeys(new))
        left += new
    return left


def _name(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _why_not_this_size(encoder: VisionTransformer, decoder: nn.Module) -> str | None:
    embedding = encoder.patch_embed.proj
    pixels = embedding.in_channels * encoder.patch_size**2
    square = (encoder.patch_size, encoder.patch_size)
    if embedding.kernel_size != square or embedding.stride != square or pixels % 4:
        return f"patches of {embedding.in_channels} x {embedding.kernel_size} are not served"
    for blocks in (encoder.blocks, getattr(decoder, "blocks", ())):
        for block in blocks:
            attn, mlp = block.attn, block.mlp
            width, channels = divmod(attn.qkv.in_features, attn.heads)
            if channels or width not in _WIDTHS:
                return (
                    f"heads have {attn.qkv.in_features} / {attn.heads} channels, not one of "
                    f"{_WIDTHS}"
                )
            if mlp.fc1.out_features % 32:
                return f"the hidden width {mlp.fc1.out_features} is no multiple of 32"
            if mlp.act.approximate != "none":
                return "GELU is approximated"
            layers = (block.norm1, block.norm2, attn.qkv, attn.proj, mlp.fc1, mlp.fc2)
            if any(layer.bias is None or layer.weight is None for layer in layers):
                return "a layer has no bias or no weight"
        # One number stands for those of all blocks.
        if len({norm.eps for block in blocks for norm in (block.norm1, block.norm2)}) > 1:
            return "layer norms have various eps"
    return None


def _why_not_float(precision: str) -> str | None:
    """What speaks against it in the CPU, for a precision that PyTorch has as well."""
    level = native_module().simd_level()
    if precision == "bfloat16":
        if level != "avx512_bf16":
            return f"kernels use the level {level}, which has no products of bfloat16"
        # oneDNN's products in AMX are several times quicker than any in vectors.
        has_tiles = getattr(torch.cpu, "_is_amx_tile_supported", None)
        if has_tiles is not None and has_tiles():
            return "PyTorch has AMX here"
    elif level == "generic":
        return "PyTorch's products are quicker than those that a compiler makes without AVX2"
    return None


# --------------------------------------------------------------------------- parameters
def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for part in ("encoder", "decoder"):
        yield from getattr(model, part).named_parameters(prefix=part)


def _fingerprint(model: nn.Module) -> tuple:
    """Something that differs once parameters have been exchanged or changed.

    PyTorch counts changes, but not those through `.data`: for these a part of each parameter is
    looked at. Parameters made in inference mode are not counted, and looked at whole.
    """
    tensors = [t for m in _modules(model) for t in m._parameters.values() if t is not None]
    counted = [t for t in tensors if not t.is_inference()]
    versions = tuple((t.data_ptr(), t._version) for t in counted)
    sample = native_module().sample
    hashes = [
        sample([t.data_ptr() for t in some], [t.nbytes for t in some], most)
        for some, most in (
            (counted, _LOOKED_AT),
            ([t for t in tensors if t.is_inference()], 2**62),
        )
    ]
    return (versions, *hashes)


def _shape(model: nn.Module) -> dict[str, Any]:
    encoder, decoder = model.encoder, model.decoder
    first = encoder.blocks[0]
    shape = {
        "channels": encoder.patch_embed.proj.in_channels,
        "patch": encoder.patch_size,
        "extra_tokens": encoder.num_extra_tokens,
        "width": first.attn.qkv.in_features,
        "depth": len(encoder.blocks),
        "heads": first.attn.heads,
        "hidden": first.mlp.fc1.out_features,
        "block_eps": first.norm1.eps,
        "norm_eps": encoder.norm.eps,
        "classes": decoder.n_cls,
        "decoder_depth": 0,
    }
    if isinstance(decoder, MaskTransformer):
        first = decoder.blocks[0]
        shape |= {
            "decoder_width": first.attn.qkv.in_features,
            "decoder_depth": len(decoder.blocks),
            "decoder_heads": first.attn.heads,
            "decoder_hidden": first.mlp.fc1.out_features,
            "decoder_block_eps": first.norm1.eps,
            "decoder_norm_eps": decoder.decoder_norm.eps,
            "mask_eps": decoder.mask_norm.eps,
        }
    return shape


class NativeNetwork:
    """A model's packed weights, and the call that uses them.

    Args:
        model: a `SegmenterModel` that `why_not` has nothing against.
        precision: "float32", "bfloat16" or "int8".
        quantized: kinds of layers that "int8" takes in int8.

    Raises:
        BackendError: int8 on a CPU without an instruction for it.
    """

    def __init__(self, model: nn.Module, precision: str, quantized: frozenset[str]):
        native = native_module()
        level = native.simd_level()
        if precision == "int8" and level not in ("avx512_vnni", "avx512_bf16"):
            raise BackendError(
                f"precision 'int8' needs a CPU with AVX-512 VNNI; kernels use the level {level!r}. "
                "Use precision='float32'."
            )
        self.fingerprint = _fingerprint(model)
        halves = precision == "bfloat16" or (precision == "int8" and level == "avx512_bf16")
        # Contiguous copies must live until they are packed.
        tensors = {name: tensor.detach().contiguous() for name, tensor in _tensors(model)}
        self._network = native.Network(
            _shape(model),
            {name: tensor.data_ptr() for name, tensor in tensors.items()},
            "bfloat16" if halves else "float32",
            quantized if precision == "int8" else set(),
            torch.get_num_threads(),
        )
        self._positions: dict[tuple[int, int], Tensor] = {}
        self.level = level

    @property
    def bytes(self) -> int:
        """That the packed weights take."""
        return self._network.bytes

    def _positions_of(self, encoder: VisionTransformer, grid: tuple[int, int]) -> Tensor:
        """(extra + N, D) embeddings that tokens begin with."""
        if grid not in self._positions:
            extra, embed = encoder.num_extra_tokens, encoder.pos_embed
            # As in VisionTransformer: the number of tokens counts, not the grid's shape.
            if extra + grid[0] * grid[1] != embed.shape[1]:
                embed = resize_pos_embed(embed, encoder.patch_embed.grid_size, grid, extra)
            positions = embed[0].clone()
            positions[0] += encoder.cls_token[0, 0]
            if encoder.distilled:
                positions[1] += encoder.dist_token[0, 0]
            if len(self._positions) >= 4:  # images of many sizes
                self._positions.clear()
            self._positions[grid] = positions.contiguous()
        return self._positions[grid]

    def __call__(
        self, model: nn.Module, images: Tensor, timed: bool = False
    ) -> tuple[Tensor, dict[str, float]]:
        """(B, K, h, w) logits, class-last in memory, and the seconds of each part if `timed`."""
        batch, _, height, width = images.shape
        patch = model.patch_size
        grid = (-(-height // patch), -(-width // patch))
        positions = self._positions_of(model.encoder, grid)
        images = images.contiguous()
        logits = torch.empty(batch, *grid, model.n_cls)
        with record_function("segmenter_fast::network"):
            seconds = self._network.run(
                images.data_ptr(),
                (batch, height, width),
                positions.data_ptr(),
                logits.data_ptr(),
                torch.get_num_threads(),
                timed,
            )
        return logits.permute(0, 3, 1, 2), seconds


# --------------------------------------------------------------------------- one for each model
_networks: "weakref.WeakKeyDictionary[nn.Module, tuple[tuple, NativeNetwork]]" = (
    weakref.WeakKeyDictionary()
)
_lock = threading.Lock()


def network_of(model: nn.Module) -> NativeNetwork:
    """The model's network in its present precision, packed anew if parameters have changed.

    One is kept for each model, as long as the model lives.
    """
    key = (model.precision, model.quantized, native_module().simd_level())
    with _lock:
        kept = _networks.get(model)
        if kept is None or kept[0] != key or kept[1].fingerprint != _fingerprint(model):
            # The old one goes first, so that there are never two.
            _networks.pop(model, None)
            kept = (key, NativeNetwork(model, model.precision, model.quantized))
            _networks[model] = kept
        return kept[1]


def inference_logits(model: nn.Module, images: Tensor) -> Tensor | None:
    """Patch logits by the compiled call; None where layers are to be called one by one.

    Args:
        model: a `SegmenterModel`; backend and device have been looked at.
        images: (B, 3, H, W).

    Returns:
        (B, K, h, w) float32, class-last in memory.

    Raises:
        BackendError: precision "int8", which nothing else has, and the call cannot stand for the
            model; with the reason.
    """
    reason = why_not(model, images)
    if reason is None and model.precision != "int8":
        reason = _why_not_float(model.precision)
    if reason is None:
        return network_of(model)(model, images)[0]
    if model.precision == "int8" and not torch.is_grad_enabled():
        raise BackendError(
            f"precision 'int8' is for inference with this library's own layers on a CPU: {reason}"
        )
    return None


def seconds_of(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Where the time of one call goes.

    Args:
        model: a `SegmenterModel` in evaluation mode on a CPU.
        images: (B, 3, H, W) float32, normalised.

    Returns:
        Seconds, averaged over the threads: "embed" (patches to tokens), "attention", "linear",
        "norm" and "head" (from the decoder's tokens to its logits). Waiting is in none of them but
        attention.

    Raises:
        BackendError: the compiled call cannot stand for the model; with the reason.
    """
    with torch.inference_mode():
        reason = why_not(model, images)
        if reason is not None:
            raise BackendError(f"the network is not run by one compiled call: {reason}")
        return network_of(model)(model, images, timed=True)[1]
