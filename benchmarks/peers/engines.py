"""Our model in ONNX Runtime and OpenVINO: one file, exported from plain PyTorch.

For int8 there is a second file: NNCF, OpenVINO's own tool, quantises the first one.

The graph ends at patch resolution and `upsample_argmax` reads the labels, which is the best form
here: with upsampling and argmax inside the graph (`full_size`) both engines write out K maps of
full size, and are slower than with this project's kernel behind them.

Both get as many threads as PyTorch. They keep the memory between calls that one call needs;
`fresh` gives it back, so that it can be measured.
"""

import copy
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import NotRun
from torch import Tensor, nn

from peers import need
from segmenter_fast.blocks import Attention
from segmenter_fast.model import SegmenterModel


class FusedAttention(Attention):
    """Attention by PyTorch's `scaled_dot_product_attention`."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._packed(x).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(y))


def plain(model: SegmenterModel, share: bool = False) -> SegmenterModel:
    """The same model in PyTorch's own operators, with its fused attention, for evaluation.

    Nothing of this project's kernels is left in it: a peer, and what an exporter can read.

    Args:
        model: to copy.
        share: take its parameters themselves, not copies of them.
    """
    copied = copy.deepcopy(model, {id(p): p for p in model.parameters()} if share else None).eval()
    copied.backend = "reference"
    for module in copied.modules():
        if isinstance(module, Attention):
            module.__class__ = FusedAttention
    return copied


class PatchLogits(nn.Module):
    """Images to logits at patch resolution."""

    def __init__(self, model: SegmenterModel):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.patch_logits(images).grid


class Labels(PatchLogits):
    """Images to label maps, in operators that every engine has.

    Softmax is left out, for it changes no label. The classes stay last in memory, as the decoder
    leaves them: PyTorch upsamples and compares them so in a quarter of the time. Both in float32,
    whatever the model computes in: in bfloat16 other labels would win. An exported graph knows
    nothing of memory and is the same either way.
    """

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images).float().contiguous(memory_format=torch.channels_last)
        full = F.interpolate(logits, size=images.shape[2:], mode="bilinear")
        return full.argmax(1).to(torch.int32)


def export_onnx(model: SegmenterModel, images: Tensor, path: Path, full_size: bool = False) -> Path:
    """Write an ONNX file for images of one shape.

    Args:
        model: to export.
        images: (B, 3, H, W) float32, the shape to export for.
        path: of the file.
        full_size: end at label maps (B, H, W) int32, not at logits (B, K, h, w) float32.

    Returns:
        The path.

    Raises:
        NotRun: onnx or onnxscript is absent.
    """
    need("onnx")
    need("onnxscript")
    module = (Labels if full_size else PatchLogits)(plain(model)).eval()
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)  # it tells of operators of torchvision, which nobody needs
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(module, (images,), dynamo=True, verbose=False)
    finally:
        exporter.setLevel(level)
    program.save(path)
    return path


def quantise(path: Path, images: Sequence[Tensor], output: Path) -> Path:
    """Quantise an ONNX file to int8 after training, and write it for OpenVINO.

    NNCF's own choices for transformers (products of attention in int8 as well, outliers smoothed)
    with symmetric activations, the preset "performance". The other preset has unsymmetric ones: it
    is up to twice as slow and keeps a few per cent more of the labels at best.

    Args:
        path: the ONNX file.
        images: (B, 3, H, W) float32 tensors of its shape, by which ranges are chosen.
        output: .xml file to write; the weights go beside it.

    Returns:
        `output`.

    Raises:
        NotRun: nncf or openvino is absent.
    """
    openvino, nncf = need("openvino"), need("nncf")
    nncf.set_log_level(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = nncf.quantize(
            openvino.Core().read_model(str(path)),
            nncf.Dataset([x.numpy() for x in images]),
            preset=nncf.QuantizationPreset.PERFORMANCE,
            subset_size=len(images),
            model_type=nncf.ModelType.TRANSFORMER,
        )
    openvino.save_model(quantised, str(output), compress_to_fp16=False)
    return output


class OnnxRuntime:
    """Runs an ONNX file in float32: images to whatever the file ends at.

    Raises:
        NotRun: onnxruntime is absent.
    """

    def __init__(self, path: Path):
        self._runtime = need("onnxruntime")
        options = self._runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Or they go on looking for work after a call, on the next contestant's processors.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self._session = self._runtime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        self._input = self._session.get_inputs()[0].name

    def __call__(self, images: Tensor) -> Tensor:
        return self._run(images, None)

    def fresh(self, images: Tensor) -> Tensor:
        """The same; the arena shrinks to what it had in the beginning."""
        options = self._runtime.RunOptions()
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        return self._run(images, options)

    def _run(self, images: Tensor, options: object) -> Tensor:
        (result,) = self._session.run(None, {self._input: images.numpy()}, options)
        return torch.from_numpy(result)


class OpenVino:
    """Runs a file in float32, bfloat16 or int8: images to whatever the file ends at.

    Args:
        path: an ONNX file, which OpenVINO reads itself, or what `quantise` wrote.
        precision: "f32", "bf16", or "int8" for a quantised file: what is not quantised in it is
            then computed in bfloat16, where the processor can, which is the quicker choice.

    Raises:
        NotRun: openvino is absent, or the processor cannot compute in that precision.
    """

    def __init__(self, path: Path, precision: str = "f32"):
        openvino = need("openvino")
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "int8" else precision,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        self._compiled = openvino.Core().compile_model(str(path), "CPU", options)
        # Where there is no such instruction, float32 is taken in silence.
        taken = self._compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if taken != precision and precision != "int8":
            raise NotRun(f"OpenVINO computes in {taken} on this processor")
        self._request = self._compiled.create_infer_request()

    def __call__(self, images: Tensor) -> Tensor:
        results = self._request.infer([images.numpy()], share_inputs=True, share_outputs=True)
        return torch.from_numpy(results[0])

    def fresh(self, images: Tensor) -> Tensor:
        """The same; the result is copied and all memory between layers is given back."""
        result = self(images).clone()
        self._compiled.release_memory()
        return result
