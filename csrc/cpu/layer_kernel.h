// The layers of the network on rows of tokens, as network.cpp calls them: one table per SIMD level
// and type of elements.
#pragma once

#include <cstdint>

#include "bfloat16.h"
#include "simd.h"

namespace segmenter {

// y = x W^T + bias, with W packed (products.h). In int8, W = scales q per output, and `sums` are
// those of W's rows.
struct Linear {
  int64_t in = 0, out = 0;
  const uint32_t* panels = nullptr;
  const float* bias = nullptr;    // these have an entry for each column of each panel
  const float* scales = nullptr;  // int8 only, as is the next
  const float* sums = nullptr;
  bool int8 = false;
};

// Rows of bytes: x = low + scale q, each row with its own.
struct ByteRows {
  uint8_t* bytes;
  float *scales, *lows;
};

// What becomes of a product.
enum class After {
  store,  // T
  gelu,   // GELU of it, T
  add,    // added to float32
  copy,   // float32
};

template <typename T>
struct LayerKernels {
  int64_t panel;     // columns of a panel
  int64_t per_word;  // elements of `in` in a word of a panel

  // Packs panel `index` of a weight whose element (o, i) is at weight[o stride_out + i stride_in].
  void (*pack)(const float* weight, int64_t stride_out, int64_t stride_in, int64_t in, int64_t out,
               int64_t index, uint32_t* panel);
  // Packs `count` rows, at most a panel of them, as outputs of a layer.
  void (*pack_rows)(const T* rows, int64_t count, int64_t in, uint32_t* panel);
  // Up to five rows beyond the last are read, not written. Rows are `x_stride` and `out_stride`
  // elements apart.
  void (*linear)(const T* x, int64_t x_stride, int64_t rows, const Linear& layer, After after,
                 void* out, int64_t out_stride);

  // The same in int8; null where the level has no instruction for it.
  void (*pack_int8)(const float* weight, int64_t in, int64_t out, int64_t index, uint32_t* panel,
                    float* scales, float* sums);
  void (*to_bytes)(const T* x, int64_t x_stride, int64_t rows, int64_t in, const ByteRows& to);
  void (*linear_int8)(const ByteRows& x, int64_t rows, const Linear& layer, After after, void* out,
                      int64_t out_stride);

  // Rows of D, a multiple of 32.
  void (*layer_norm)(const float* x, int64_t rows, int64_t D, const float* weight,
                     const float* bias, float eps, T* out);
  void (*unit_length)(const float* x, int64_t rows, int64_t D, T* out);
  // Rows of K, any number, which begin a panel's columns apart in `x` and lie side by side in
  // `out`.
  void (*norm_of_classes)(const float* x, int64_t rows, int64_t K, const float* weight,
                          const float* bias, float eps, float* out);
  // One patch of a (channels, H, W) image, row by row; pixels beyond its end are 0.
  void (*read_patch)(const float* image, int64_t channels, int64_t H, int64_t W, int64_t patch,
                     int64_t y, int64_t x, T* out);
  // Runs `rounds` rounds of nothing but products, and says how many multiplications and additions
  // that were.
  int64_t (*spin)(int64_t rounds);
};

struct NetworkKernels {
  LayerKernels<float> float32;
  LayerKernels<Bfloat16> bfloat16;
  int64_t (*spin_int8)(int64_t rounds);  // null without the instruction
};

SEGMENTER_DECLARE_PRODUCT_KERNELS(NetworkKernels, network_kernels)

template <typename T>
const LayerKernels<T>& layer_kernels(SimdLevel level);
template <>
inline const LayerKernels<float>& layer_kernels<float>(SimdLevel level) {
  return SEGMENTER_PRODUCT_KERNELS(level, network_kernels).float32;
}
template <>
inline const LayerKernels<Bfloat16>& layer_kernels<Bfloat16>(SimdLevel level) {
  return SEGMENTER_PRODUCT_KERNELS(level, network_kernels).bfloat16;
}

}  // namespace segmenter
