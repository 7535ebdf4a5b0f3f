#include <array>
#include <tuple>

#include "../cell.h"
#include "bindings.h"

namespace segmenter {
namespace {

Upsampling make_upsampling(uintptr_t logits_ptr, const std::string& dtype,
                           const std::array<int64_t, 4>& shape,
                           const std::array<int64_t, 4>& strides,
                           const std::array<int64_t, 2>& size, const std::array<int64_t, 4>& crop,
                           int threads) {
  Upsampling u;
  u.logits = reinterpret_cast<const void*>(logits_ptr);
  u.type = choose("dtype", dtype, kFloatTypes);
  std::tie(u.B, u.K, u.h, u.w) = std::tuple_cat(shape);
  std::tie(u.stride_b, u.stride_k, u.stride_y, u.stride_x) = std::tuple_cat(strides);
  std::tie(u.H, u.W) = std::tuple_cat(size);
  std::tie(u.top, u.left, u.height, u.width) = std::tuple_cat(crop);
  u.threads = threads;
  u.simd = simd_level();
  check(u);
  return u;
}

template <typename T>
py::list source_indices(int64_t in, int64_t out) {
  py::list sources;
  for (int64_t dst = 0; dst < out; ++dst) {
    const Source<T> source = source_index<T>(dst, in, out);
    sources.append(std::make_tuple(source.i0, source.i1, source.w0, source.w1));
  }
  return sources;
}

}  // namespace

void bind_upsampling(py::module_& m) {
  py::class_<Upsampling>(m, "Upsampling", R"(Patch logits, and the part of their bilinear upsampling that is wanted.

Args:
    logits_ptr: address of the logits; they must outlive this object.
    dtype: "float32" or "float64", of the logits.
    shape: (B, K, h, w) of the logits.
    strides: of the logits, in elements.
    size: (H, W) that they are resized to, align_corners=False.
    crop: (top, left, height, width), the part of that size which is wanted.
    threads: at most this many threads; no result depends on it.
Raises:
    ValueError: unknown dtype, sizes or crop out of range; SEGMENTER_FAST_SIMD names an unknown level.
    RuntimeError: SEGMENTER_FAST_SIMD names a level that this build or this CPU lacks.)")
      .def(py::init(&make_upsampling), py::arg("logits_ptr"), py::arg("dtype"), py::arg("shape"),
           py::arg("strides"), py::arg("size"), py::arg("crop"), py::arg("threads"));

  m.def(
      "source_indices",
      [](int64_t in_size, int64_t out_size, const std::string& dtype) {
        const FloatType type = choose("dtype", dtype, kFloatTypes);
        if (in_size < 1 || out_size < 1) {
          throw std::invalid_argument("source_indices: expected sizes >= 1, got " +
                                      std::to_string(in_size) + " and " + std::to_string(out_size));
        }
        return type == FloatType::float32 ? source_indices<float>(in_size, out_size)
                                          : source_indices<double>(in_size, out_size);
      },
      py::arg("in_size"), py::arg("out_size"), py::arg("dtype"),
      R"(The two samples and their weights that bilinear resizing blends along one axis.

Half-pixel centres, align_corners=False.

Args:
    in_size: samples of the input.
    out_size: samples of the output.
    dtype: "float32" or "float64", the precision of the logits.
Returns:
    list of (i0, i1, w0, w1), one per output sample.
Raises:
    ValueError: unknown dtype, sizes below 1.)");
}

}  // namespace segmenter
