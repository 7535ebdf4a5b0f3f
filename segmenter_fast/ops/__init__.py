"""One operation per file: contract, reference, kernels, public function.

Importing the package registers the operators in Triton beside those of the CPU.
"""

from segmenter_fast.ops import upsample_argmax_triton as upsample_argmax_triton
