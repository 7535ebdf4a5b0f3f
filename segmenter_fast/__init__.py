"""segmenter_fast: Segmenter (Strudel et al., ICCV 2021) as fast as the hardware allows.

The public names are loaded when they are first used, so that `segmenter-fast --help` does not wait
for PyTorch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from segmenter_fast.backend import BackendError
    from segmenter_fast.checkpoint import CheckpointError
    from segmenter_fast.config import SegmenterConfig
    from segmenter_fast.conversion import convert
    from segmenter_fast.inference import predict
    from segmenter_fast.model import SegmenterModel
    from segmenter_fast.ops.confusion import upsample_confusion
    from segmenter_fast.ops.upsample import upsample_logits
    from segmenter_fast.ops.upsample_argmax import upsample_argmax
    from segmenter_fast.ops.upsample_cross_entropy import upsample_cross_entropy
    from segmenter_fast.ops.upsample_probabilities import upsample_probabilities
    from segmenter_fast.patch_logits import PatchLogits
    from segmenter_fast.pretrained import load_pretrained
    from segmenter_fast.variants import create_model, list_variants

_HOME = {
    "BackendError": "backend",
    "CheckpointError": "checkpoint",
    "PatchLogits": "patch_logits",
    "SegmenterConfig": "config",
    "SegmenterModel": "model",
    "convert": "conversion",
    "create_model": "variants",
    "list_variants": "variants",
    "load_pretrained": "pretrained",
    "predict": "inference",
    "upsample_argmax": "ops.upsample_argmax",
    "upsample_confusion": "ops.confusion",
    "upsample_cross_entropy": "ops.upsample_cross_entropy",
    "upsample_logits": "ops.upsample",
    "upsample_probabilities": "ops.upsample_probabilities",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str):
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            value = version("segmenter_fast")
        except PackageNotFoundError:  # a source tree that was never installed
            value = "0+unknown"
    elif name in _HOME:
        value = getattr(importlib.import_module(f"segmenter_fast.{_HOME[name]}"), name)
    else:
        raise AttributeError(f"module 'segmenter_fast' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
