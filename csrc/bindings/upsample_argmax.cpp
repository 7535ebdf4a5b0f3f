#include "bindings.h"

namespace segmenter {

void bind_upsample_argmax(py::module_& m) {
  m.def(
      "upsample_argmax",
      [](const Upsampling& upsampling, uintptr_t out_ptr, const std::string& out_dtype) {
        const LabelType type = choose("out_dtype", out_dtype, kLabelTypes);
        py::gil_scoped_release release;
        upsample_argmax(upsampling, type, reinterpret_cast<void*>(out_ptr));
      },
      py::arg("upsampling"), py::arg("out_ptr"), py::arg("out_dtype"),
      R"(Bilinear upsampling and argmax in one pass: the label of each output pixel.

Args:
    upsampling: the logits, and the output that is wanted of them.
    out_ptr: address of the labels (B, height, width), contiguous; written.
    out_dtype: "uint8", "int16" or "int32", of the labels; must hold K - 1.
Raises:
    ValueError: unknown dtype, more classes than out_dtype holds.)");
}

}  // namespace segmenter
