"""One operation per file: contract, reference, kernels, public function.

Importing the package registers the operators in Triton and in CUDA C++ beside those of the CPU.
"""

from segmenter_fast.ops import attention_triton as attention_triton
from segmenter_fast.ops import confusion_cuda as confusion_cuda
from segmenter_fast.ops import confusion_triton as confusion_triton
from segmenter_fast.ops import layer_norm_linear_triton as layer_norm_linear_triton
from segmenter_fast.ops import layer_norm_triton as layer_norm_triton
from segmenter_fast.ops import linear_residual_triton as linear_residual_triton
from segmenter_fast.ops import mask_product_triton as mask_product_triton
from segmenter_fast.ops import mlp_triton as mlp_triton
from segmenter_fast.ops import patch_embed_triton as patch_embed_triton
from segmenter_fast.ops import upsample_argmax_cuda as upsample_argmax_cuda
from segmenter_fast.ops import upsample_argmax_triton as upsample_argmax_triton
from segmenter_fast.ops import upsample_cross_entropy_triton as upsample_cross_entropy_triton
from segmenter_fast.ops import upsample_probabilities_triton as upsample_probabilities_triton
from segmenter_fast.ops import windows_triton as windows_triton
