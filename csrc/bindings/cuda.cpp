// The submodule segmenter_fast._C.cuda, which a build without CUDA C++ lacks.
#include <array>
#include <tuple>

#include "../cuda/confusion.h"
#include "../cuda/upsample_argmax.h"
#include "bindings.h"

namespace segmenter {
namespace {

const std::map<std::string, cuda::LogitType> kLogitTypes = {
    {"float16", cuda::LogitType::float16},
    {"bfloat16", cuda::LogitType::bfloat16},
    {"float32", cuda::LogitType::float32},
    {"float64", cuda::LogitType::float64}};

void launch_upsample_argmax(uintptr_t logits_ptr, const std::string& dtype,
                     const std::array<int64_t, 4>& shape, const std::array<int64_t, 4>& strides,
                     const std::array<int64_t, 2>& size, const std::array<int64_t, 4>& crop,
                     uintptr_t out_ptr, const std::string& out_dtype, int device,
                     uintptr_t stream) {
  Upsampling u = {};
  u.logits = reinterpret_cast<const void*>(logits_ptr);
  std::tie(u.B, u.K, u.h, u.w) = std::tuple_cat(shape);
  std::tie(u.stride_b, u.stride_k, u.stride_y, u.stride_x) = std::tuple_cat(strides);
  std::tie(u.H, u.W) = std::tuple_cat(size);
  std::tie(u.top, u.left, u.height, u.width) = std::tuple_cat(crop);
  u.threads = 1;
  const cuda::LogitType type = choose("dtype", dtype, kLogitTypes);
  const LabelType label_type = choose("out_dtype", out_dtype, kLabelTypes);
  py::gil_scoped_release release;
  cuda::upsample_argmax(u, type, label_type, reinterpret_cast<void*>(out_ptr), {device, stream});
}

void launch_confusion_matrix(uintptr_t labels_ptr, const std::string& labels_dtype, uintptr_t target_ptr,
                      const std::string& target_dtype, int64_t pixels, int64_t K,
                      int64_t ignore_index, uintptr_t counts_ptr, uintptr_t errors_ptr, int device,
                      uintptr_t stream) {
  const IntegerType labels_type = choose("labels_dtype", labels_dtype, kIntegerTypes);
  const IntegerType target_type = choose("target_dtype", target_dtype, kIntegerTypes);
  py::gil_scoped_release release;
  cuda::confusion_matrix(reinterpret_cast<const void*>(labels_ptr), labels_type,
                         reinterpret_cast<const void*>(target_ptr), target_type, pixels, K,
                         ignore_index, reinterpret_cast<int64_t*>(counts_ptr),
                         reinterpret_cast<int64_t*>(errors_ptr), {device, stream});
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("upsample_argmax", &launch_upsample_argmax, py::arg("logits_ptr"), py::arg("dtype"),
        py::arg("shape"), py::arg("strides"), py::arg("size"), py::arg("crop"), py::arg("out_ptr"),
        py::arg("out_dtype"), py::arg("device"), py::arg("stream"),
        R"(Bilinear upsampling and argmax in one pass: the label of each output pixel.

Returns as soon as the kernel is in the stream.

Args:
    logits_ptr: address of the logits in the device's memory.
    dtype: "float16", "bfloat16", "float32" or "float64", of the logits.
    shape: (B, K, h, w) of the logits.
    strides: of the logits, in elements.
    size: (H, W) that they are resized to, align_corners=False.
    crop: (top, left, height, width), the part of that size which is wanted.
    out_ptr: address of the labels (B, height, width) in the device's memory, contiguous; written.
    out_dtype: "uint8", "int16" or "int32", of the labels; must hold K - 1.
    device: index of the GPU.
    stream: handle of its stream, a cudaStream_t as an int; 0 is the default stream.
Raises:
    ValueError: unknown dtype, sizes or crop out of range, more classes than out_dtype holds.
    RuntimeError: the kernel cannot be launched, with CUDA's message.)");

  m.def("confusion_matrix", &launch_confusion_matrix, py::arg("labels_ptr"), py::arg("labels_dtype"),
        py::arg("target_ptr"), py::arg("target_dtype"), py::arg("pixels"), py::arg("K"),
        py::arg("ignore_index"), py::arg("counts_ptr"), py::arg("errors_ptr"), py::arg("device"),
        py::arg("stream"),
        R"(Adds up how many pixels of each target were given each label.

Returns as soon as the kernel is in the stream.

Args:
    labels_ptr, target_ptr: addresses of `pixels` integers each in the device's memory, contiguous.
    labels_dtype, target_dtype: "uint8", "int16", "int32" or "int64".
    pixels: how many.
    K: classes.
    ignore_index: target of the pixels that are not counted.
    counts_ptr: address of the counts (K, K), int64, contiguous; added to.
    errors_ptr: address of (2,) int64; the pixels whose target, and those whose label is outside
        [0, K), are added. They are not counted.
    device: index of the GPU.
    stream: handle of its stream, a cudaStream_t as an int; 0 is the default stream.
Raises:
    ValueError: unknown dtype, sizes that make no sense.
    RuntimeError: the kernel cannot be launched, with CUDA's message.)");
}

}  // namespace segmenter
