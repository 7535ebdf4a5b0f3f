#include "../cpu/attention.h"

#include <array>
#include <tuple>

#include "bindings.h"

namespace segmenter {

void bind_attention(py::module_& m) {
  m.def(
      "attention",
      [](uintptr_t qkv_ptr, const std::string& dtype, const std::array<int64_t, 4>& shape,
         const std::array<int64_t, 4>& strides, float scale, uintptr_t out_ptr, int threads) {
        Attention call;
        call.qkv = reinterpret_cast<const void*>(qkv_ptr);
        call.type = choose("dtype", dtype, kElementTypes);
        std::tie(call.B, call.N, call.H, call.D) = std::tuple_cat(shape);
        std::tie(call.stride_b, call.stride_n, call.stride_part, call.stride_h) =
            std::tuple_cat(strides);
        call.scale = scale;
        call.out = reinterpret_cast<void*>(out_ptr);
        call.threads = threads;
        call.simd = simd_level();
        py::gil_scoped_release release;
        AttentionMemory memory;
        attention(call, memory);
      },
      py::arg("qkv_ptr"), py::arg("dtype"), py::arg("shape"), py::arg("strides"), py::arg("scale"),
      py::arg("out_ptr"), py::arg("threads"),
      R"(Softmax(Q K^T scale) V of every head.

Args:
    qkv_ptr: address of the packed projection (B, N, 3, H, D), whose last dimension is contiguous.
    dtype: "float32" or "bfloat16", of both tensors.
    shape: (B, N, H, D); D is 32, 64 or 128.
    strides: of B, N, the 3 and H, in elements.
    scale: of the scores.
    out_ptr: address of the result (B, N, H, D), contiguous; written.
    threads: at most this many threads; no result depends on it.
Raises:
    ValueError: unknown dtype, a width without a kernel; SEGMENTER_FAST_SIMD names an unknown level.
    RuntimeError: SEGMENTER_FAST_SIMD names a level that this build or this CPU lacks.)");
}

}  // namespace segmenter
