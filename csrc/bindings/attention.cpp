#include "../cpu/attention.h"

#include <array>
#include <tuple>

#include "../cpu/attention_gradient.h"
#include "bindings.h"

namespace segmenter {
namespace {

using Four = std::array<int64_t, 4>;

// What both calls say of the packed projection.
template <typename Call>
Call call_of(uintptr_t qkv_ptr, const std::string& dtype, const Four& shape, const Four& strides,
             float scale, int threads) {
  Call call;
  call.qkv = reinterpret_cast<const void*>(qkv_ptr);
  call.type = choose("dtype", dtype, kElementTypes);
  std::tie(call.B, call.N, call.H, call.D) = std::tuple_cat(shape);
  std::tie(call.stride_b, call.stride_n, call.stride_part, call.stride_h) = std::tuple_cat(strides);
  call.scale = scale;
  call.threads = threads;
  call.simd = simd_level();
  return call;
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def(
      "attention",
      [](uintptr_t qkv_ptr, const std::string& dtype, const Four& shape, const Four& strides,
         float scale, uintptr_t out_ptr, int threads, uintptr_t statistics_ptr) {
        auto call = call_of<Attention>(qkv_ptr, dtype, shape, strides, scale, threads);
        call.out = reinterpret_cast<void*>(out_ptr);
        call.statistics = reinterpret_cast<float*>(statistics_ptr);
        py::gil_scoped_release release;
        AttentionMemory memory;
        attention(call, memory);
      },
      py::arg("qkv_ptr"), py::arg("dtype"), py::arg("shape"), py::arg("strides"), py::arg("scale"),
      py::arg("out_ptr"), py::arg("threads"), py::arg("statistics_ptr") = 0,
      R"(Softmax(Q K^T scale) V of every head.

Args:
    qkv_ptr: address of the packed projection (B, N, 3, H, D), whose last dimension is contiguous.
    dtype: "float32" or "bfloat16", of both tensors.
    shape: (B, N, H, D); D is 32, 64 or 128.
    strides: of B, N, the 3 and H, in elements.
    scale: of the scores.
    out_ptr: address of the result (B, N, H, D), contiguous; written.
    threads: at most this many threads; no result depends on it.
    statistics_ptr: address of (B, H, 2, N) float32, written: what the gradient takes; 0 if it is
        not wanted.
Raises:
    ValueError: unknown dtype, a width without a kernel; SEGMENTER_FAST_SIMD names an unknown level.
    RuntimeError: SEGMENTER_FAST_SIMD names a level that this build or this CPU lacks.)");

  m.def(
      "attention_gradient",
      [](uintptr_t qkv_ptr, const std::string& dtype, const Four& shape, const Four& strides,
         float scale, uintptr_t out_ptr, uintptr_t statistics_ptr, uintptr_t upstream_ptr,
         uintptr_t gradient_ptr, int threads) {
        auto call = call_of<AttentionGradient>(qkv_ptr, dtype, shape, strides, scale, threads);
        call.out = reinterpret_cast<const void*>(out_ptr);
        call.statistics = reinterpret_cast<const float*>(statistics_ptr);
        call.upstream = reinterpret_cast<const void*>(upstream_ptr);
        call.gradient = reinterpret_cast<void*>(gradient_ptr);
        py::gil_scoped_release release;
        attention_gradient(call);
      },
      py::arg("qkv_ptr"), py::arg("dtype"), py::arg("shape"), py::arg("strides"), py::arg("scale"),
      py::arg("out_ptr"), py::arg("statistics_ptr"), py::arg("upstream_ptr"),
      py::arg("gradient_ptr"), py::arg("threads"),
      R"(Gradient of the packed projection.

Args:
    qkv_ptr, dtype, shape, strides, scale: as for `attention`; the dtype is that of all tensors
        but the statistics.
    out_ptr: address of what `attention` wrote, (B, N, H, D).
    statistics_ptr: address of the statistics that it wrote, (B, H, 2, N) float32.
    upstream_ptr: address of the result's gradient (B, N, H, D), contiguous.
    gradient_ptr: address of the gradient (B, N, 3, H, D), contiguous; written.
    threads: at most this many threads; no result depends on it.
Raises:
    As `attention`.)");
}

}  // namespace segmenter
