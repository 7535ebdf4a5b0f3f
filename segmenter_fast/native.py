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

import os
import threading
import weakref

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack
from torch.profiler import record_function
from torch.utils._device import DeviceContext

from segmenter_fast.backend import BackendError, native_module
from segmenter_fast.encoder import VisionTransformer, resize_pos_embed
from segmenter_fast.native_model import MOST_INT8_INPUTS, Description, Unserved, describe

_LOOKED_AT = 256  # bytes of each parameter, when asking whether it has changed
_KEPT_POSITIONS = 64 << 20  # bytes of position embeddings, of images of various sizes


# --------------------------------------------------------------------------- whether it can
def why_not(model: nn.Module, images: Tensor) -> str | None:
    """Why the compiled call cannot stand for the model here; None if it can.

    Args:
        model: a `SegmenterModel`.
        images: (B, 3, H, W), what it is called with.
    """
    reason = _why_not_now(model, images)
    if reason is None:
        try:
            describe(model)
        except Unserved as error:
            reason = error.about(model)
    return reason


def _why_not_now(model: nn.Module, images: Tensor) -> str | None:
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
    # A default device concerns new tensors alone.
    watching = torch._C._len_torch_function_stack() and any(
        type(mode) is not DeviceContext for mode in _get_current_function_mode_stack()
    )
    if watching or torch._C._len_torch_dispatch_stack():
        return "a mode of PyTorch intercepts its operations"
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return "a transform of torch.func or forward-mode differentiation is at work"
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "there are hooks on all modules"
    return _why_not_this_class(type(model))


def _why_not_this_class(kind: type) -> str | None:
    from segmenter_fast.model import SegmenterModel

    if kind._features is not SegmenterModel._features:
        return f"{kind.__name__} has features of its own"
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
def _extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first number to its last."""
    if tensor.is_contiguous():
        return tensor.nbytes
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((n - 1) * step for n, step in steps)) * tensor.itemsize


def _held(tensor: Tensor) -> Tensor:
    """The same numbers, whose memory stays also if another thread gives the model other memory.

    Not by `detach`, which works without the interpreter's lock: the other's `.data =`, as
    `model.to(...)` has it, could free the memory before it is held.
    """
    return tensor.data


def _fingerprint(description: Description) -> tuple:
    """Something that differs once sizes or parameters have been exchanged or changed.

    PyTorch counts changes, but not those through `.data`: for these a part of each parameter is
    looked at. Parameters made in inference mode are not counted, and looked at whole.
    """
    counted, others, versions = [], [], []
    for tensor in description.tensors:
        held = _held(tensor)
        if tensor.is_inference():
            others.append(held)
        else:
            counted.append(held)
            versions.append((held.data_ptr(), tensor._version, held.stride()))
    sample = native_module().sample
    hashes = [
        sample([t.data_ptr() for t in some], [_extent(t) for t in some], most)
        for some, most in ((counted, _LOOKED_AT), (others, 2**62))
    ]
    return (*description.shape.values(), *versions, *hashes)


class NativeNetwork:
    """A model's packed weights, and the call that uses them.

    Args:
        description: of the model.
        precision: "float32", "bfloat16" or "int8".
        quantized: kinds of layers that "int8" takes in int8.

    Raises:
        BackendError: int8 on a CPU without an instruction for it, or of layers too wide for it.
    """

    def __init__(self, description: Description, precision: str, quantized: frozenset[str]):
        native = native_module()
        level = native.simd_level()
        if precision == "int8" and level not in ("avx512_vnni", "avx512_bf16"):
            raise BackendError(
                f"precision 'int8' needs a CPU with AVX-512 VNNI; kernels use the level {level!r}. "
                "Use precision='float32'."
            )
        if precision == "int8" and description.most_inputs > MOST_INT8_INPUTS:
            raise BackendError(
                f"precision 'int8' takes layers of {MOST_INT8_INPUTS} inputs at most; one has "
                f"{description.most_inputs}. Use another precision."
            )
        self.fingerprint = _fingerprint(description)
        halves = precision == "bfloat16" or (precision == "int8" and level == "avx512_bf16")
        tensors = {
            name: _held(tensor).resolve_neg().contiguous()
            for name, tensor in description.parameters.items()
        }
        self._network = native.Network(
            description.shape,
            {name: (tensor.data_ptr(), tensor.numel()) for name, tensor in tensors.items()},
            "bfloat16" if halves else "float32",
            quantized if precision == "int8" else set(),
            torch.get_num_threads(),
        )
        self._shape = description.shape
        self._positions: dict[tuple[int, int], Tensor] = {}
        self.level = level

    @property
    def bytes(self) -> int:
        """That the packed weights take."""
        return self._network.bytes

    def _positions_of(self, encoder: VisionTransformer, grid: tuple[int, int]) -> Tensor:
        """(extra + N, D) embeddings that tokens begin with."""
        positions = self._positions.get(grid)
        if positions is not None:
            return positions
        extra, embed = encoder.num_extra_tokens, _held(encoder.pos_embed)
        # As in VisionTransformer: the number of tokens counts, not the grid's shape.
        if extra + grid[0] * grid[1] != embed.shape[1]:
            embed = resize_pos_embed(embed, encoder.patch_embed.grid_size, grid, extra)
        positions = embed[0].clone(memory_format=torch.contiguous_format)
        positions[0] += _held(encoder.cls_token)[0, 0]
        if encoder.distilled:
            positions[1] += _held(encoder.dist_token)[0, 0]
        kept = dict(self._positions)  # several threads may be here, each with its own
        if sum(p.nbytes for p in kept.values()) + positions.nbytes > _KEPT_POSITIONS:
            kept.clear()
        if positions.nbytes <= _KEPT_POSITIONS:
            kept[grid] = positions
        self._positions = kept
        return positions

    def __call__(
        self, model: nn.Module, images: Tensor, timed: bool = False
    ) -> tuple[Tensor, dict[str, float]]:
        """(B, K, h, w) logits, class-last in memory, and the seconds of each part if `timed`."""
        batch, channels, height, width = images.shape
        patch, classes = self._shape["patch"], self._shape["classes"]
        if channels != self._shape["channels"]:
            raise ValueError(f"images must have {self._shape['channels']} channels, not {channels}")
        grid = (-(-height // patch), -(-width // patch))
        positions = self._positions_of(model.encoder, grid)
        # Its own tensor, whatever becomes of the caller's meanwhile.
        images = _held(images).resolve_neg().contiguous()
        logits = torch.empty(batch, *grid, classes, dtype=torch.float32, device="cpu")
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


def _new_lock() -> None:
    global _lock
    _lock = threading.Lock()


# A child may be forked while another thread, which it does not have, holds the lock.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)


def network_of(model: nn.Module) -> NativeNetwork:
    """The model's network in its present precision, packed anew if parameters have changed.

    One is kept for each model, as long as the model lives; see `forget`.

    Raises:
        BackendError: the compiled call cannot stand for the model; with the reason.
    """
    try:
        description = describe(model)
    except Unserved as error:
        raise _not_one_call(error.about(model)) from error
    return _network_of(model, description)


def _not_one_call(reason: str) -> BackendError:
    return BackendError(f"the network is not run by one compiled call: {reason}")


def _network_of(model: nn.Module, description: Description) -> NativeNetwork:
    key = (model.precision, model.quantized, native_module().simd_level())
    with _lock:
        kept = _networks.get(model)
        if kept is None or kept[0] != key or kept[1].fingerprint != _fingerprint(description):
            # The old one goes first, so that there are never two.
            _networks.pop(model, None)
            kept = None
            network = NativeNetwork(description, model.precision, model.quantized)
            kept = _networks[model] = (key, network)
        return kept[1]


def forget(model: nn.Module) -> None:
    """Drop a model's packed weights; the next call packs them anew.

    To give back their memory, or after writing to single numbers of a parameter through `.data`,
    of which PyTorch keeps no count.

    Args:
        model: a `SegmenterModel`; one that has no packed weights is left alone.
    """
    with _lock:
        _networks.pop(model, None)


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
    reason = _why_not_now(model, images)
    if reason is None and model.precision != "int8":
        reason = _why_not_float(model.precision)
    if reason is None:
        try:
            return _network_of(model, describe(model))(model, images)[0]
        except Unserved as error:
            if model.precision != "int8":
                return None
            reason = error.about(model)
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
            raise _not_one_call(reason)
        return network_of(model)(model, images, timed=True)[1]
