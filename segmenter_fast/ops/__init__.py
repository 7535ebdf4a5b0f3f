"""One operation per file: contract, reference, kernels, public function.

Importing the package registers the operators in Triton beside those of the CPU.
"""

from segmenter_fast.ops import upsample_argmax_triton as upsample_argmax_triton
from segmenter_fast.ops import upsample_cross_entropy_triton as upsample_cross_entropy_triton
