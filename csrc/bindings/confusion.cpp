#include "bindings.h"

namespace segmenter {

void bind_confusion(py::module_& m) {
  m.def(
      "confusion_matrix",
      [](uintptr_t labels_ptr, const std::string& labels_dtype, uintptr_t target_ptr,
         const std::string& target_dtype, int64_t pixels, int64_t K, int64_t ignore_index,
         int threads, uintptr_t counts_ptr) {
        const IntegerType labels_type = choose("labels_dtype", labels_dtype, kIntegerTypes);
        const IntegerType target_type = choose("target_dtype", target_dtype, kIntegerTypes);
        ConfusionErrors errors;
        {
          py::gil_scoped_release release;
          errors = confusion_matrix(reinterpret_cast<const void*>(labels_ptr), labels_type,
                                    reinterpret_cast<const void*>(target_ptr), target_type, pixels,
                                    K, ignore_index, threads,
                                    reinterpret_cast<int64_t*>(counts_ptr));
        }
        return std::make_pair(errors.targets, errors.labels);
      },
      py::arg("labels_ptr"), py::arg("labels_dtype"), py::arg("target_ptr"),
      py::arg("target_dtype"), py::arg("pixels"), py::arg("K"), py::arg("ignore_index"),
      py::arg("threads"), py::arg("counts_ptr"),
      R"(Adds up how many pixels of each target were given each label.

Args:
    labels_ptr, target_ptr: addresses of `pixels` integers each, contiguous.
    labels_dtype, target_dtype: "uint8", "int16", "int32" or "int64".
    pixels: how many.
    K: classes.
    ignore_index: target of the pixels that are not counted.
    threads: at most this many threads; the counts do not depend on it.
    counts_ptr: address of the counts (K, K), int64, contiguous; added to.
Returns:
    (pixels whose target, pixels whose label is outside [0, K)); these are not counted.
Raises:
    ValueError: unknown dtype, sizes that make no sense.)");
}

}  // namespace segmenter
