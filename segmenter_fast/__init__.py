"""segmenter_fast: Segmenter (Strudel et al., ICCV 2021) as fast as the hardware allows."""

from importlib.metadata import PackageNotFoundError, version

from segmenter_fast.backend import BackendError
from segmenter_fast.checkpoint import CheckpointError
from segmenter_fast.config import SegmenterConfig
from segmenter_fast.model import SegmenterModel
from segmenter_fast.ops.upsample import (
    upsample_argmax,
    upsample_confusion,
    upsample_cross_entropy,
    upsample_logits,
    upsample_probabilities,
)
from segmenter_fast.patch_logits import PatchLogits
from segmenter_fast.predict import predict
from segmenter_fast.variants import create_model, list_variants

try:
    __version__ = version("segmenter_fast")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "BackendError",
    "CheckpointError",
    "PatchLogits",
    "SegmenterConfig",
    "SegmenterModel",
    "__version__",
    "create_model",
    "list_variants",
    "predict",
    "upsample_argmax",
    "upsample_confusion",
    "upsample_cross_entropy",
    "upsample_logits",
    "upsample_probabilities",
]
