#include "../cpu/upsample_cross_entropy.h"

#include <array>
#include <tuple>

#include "bindings.h"

namespace segmenter {
namespace {

std::tuple<double, int64_t> cross_entropy(const Upsampling& upsampling, uintptr_t target_ptr,
                                          const std::string& target_dtype, uintptr_t weight_ptr,
                                          double label_smoothing, int64_t ignore_index, bool mean,
                                          uintptr_t upstream_ptr, uintptr_t losses_ptr,
                                          uintptr_t gradient_ptr,
                                          const std::array<int64_t, 4>& gradient_strides) {
  CrossEntropy c;
  c.target = reinterpret_cast<const void*>(target_ptr);
  c.target_type = choose("target_dtype", target_dtype, kIntegerTypes);
  c.weight = reinterpret_cast<const void*>(weight_ptr);
  c.label_smoothing = label_smoothing;
  c.ignore_index = ignore_index;
  c.mean = mean;
  c.upstream = reinterpret_cast<const void*>(upstream_ptr);
  c.losses = reinterpret_cast<void*>(losses_ptr);
  c.gradient = reinterpret_cast<void*>(gradient_ptr);
  std::tie(c.gradient_stride_b, c.gradient_stride_k, c.gradient_stride_y, c.gradient_stride_x) =
      std::tuple_cat(gradient_strides);
  py::gil_scoped_release release;
  const CrossEntropyResult result = upsample_cross_entropy(upsampling, c);
  return {result.loss, result.wrong_labels};
}

}  // namespace

void bind_upsample_cross_entropy(py::module_& m) {
  m.def("upsample_cross_entropy", &cross_entropy, py::arg("upsampling"), py::arg("target_ptr"),
        py::arg("target_dtype"), py::arg("weight_ptr") = 0, py::arg("label_smoothing") = 0.0,
        py::arg("ignore_index") = 255, py::arg("mean") = false, py::arg("upstream_ptr") = 0,
        py::arg("losses_ptr") = 0, py::arg("gradient_ptr") = 0,
        py::arg("gradient_strides") = std::array<int64_t, 4>{},
        R"(Bilinear upsampling and cross-entropy in one pass, with the gradient if it is wanted.

Addresses of numbers are of the logits' dtype; 0 where something is not given or not wanted.

Args:
    upsampling: the logits, and the output that the target covers.
    target_ptr: address of the labels (B, height, width), contiguous.
    target_dtype: "uint8", "int16", "int32" or "int64", of the target.
    weight_ptr: address of (K,) factors, one per class; 0: all are 1.
    label_smoothing: share of the target that is spread over all classes.
    ignore_index: label of the pixels that count for nothing, be it a class or not.
    mean: divide loss and gradient by the weights of the pixels that count.
    upstream_ptr: address of (B, height, width), contiguous, the gradient of each pixel's loss;
        0: all are 1.
    losses_ptr: address of (B, height, width), contiguous; each pixel's loss is written.
    gradient_ptr: address of (B, K, h, w); the gradient of the logits is written.
    gradient_strides: of the gradient, in elements.
Returns:
    (loss, wrong_labels): sum or mean over the pixels of upstream times loss, float; how many labels
    are neither in [0, K) nor ignore_index, int. If there are any, nothing else is of use. Where the
    output is empty, nothing is written.
Raises:
    ValueError: unknown dtype, more than 65,535 classes, no target.)");
}

}  // namespace segmenter
