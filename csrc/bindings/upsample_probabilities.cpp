#include "../cpu/upsample_probabilities.h"

#include "bindings.h"

namespace segmenter {

void bind_upsample_probabilities(py::module_& m) {
  m.def(
      "upsample_probabilities",
      [](const Upsampling& upsampling, uintptr_t out_ptr, bool top1) {
        const ProbabilityOutput output = top1 ? ProbabilityOutput::top1 : ProbabilityOutput::all;
        py::gil_scoped_release release;
        upsample_probabilities(upsampling, output, reinterpret_cast<void*>(out_ptr));
      },
      py::arg("upsampling"), py::arg("out_ptr"), py::arg("top1"),
      R"(Bilinear upsampling and softmax in one pass.

Args:
    upsampling: the logits, and the output that is wanted of them.
    out_ptr: address of the probabilities, contiguous, of the logits' type; written.
    top1: whether that is the largest of each pixel, (B, height, width), or all, (B, K, height,
        width).
Raises:
    ValueError: out_ptr is null though there are pixels.)");
}

}  // namespace segmenter
