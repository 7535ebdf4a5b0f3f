// Brings patch logits into the order in which the dense head's kernels read them. For kernels only.
#pragma once

#include <cstdint>
#include <cstring>

#include "../cell.h"

namespace segmenter {
namespace {

// Copies `columns` patches of K classes from `source` to `patches` (columns, K_padded), class-last.
// The entries from K to K_padded are left as they are.
template <typename T>
void pack_class_last(const T* source, int64_t stride_k, int64_t stride_x, int64_t K,
                     int64_t columns, int64_t K_padded, T* patches) {
  if (stride_k == 1) {
    for (int64_t x = 0; x < columns; ++x) {
      std::memcpy(patches + x * K_padded, source + x * stride_x, K * sizeof(T));
    }
    return;
  }
  constexpr int64_t kTile = 16;  // columns whose cache lines are filled together
  for (int64_t x_tile = 0; x_tile < columns; x_tile += kTile) {
    const int64_t x_stop = lesser(x_tile + kTile, columns);
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t x = x_tile; x < x_stop; ++x) {
        patches[x * K_padded + k] = source[k * stride_k + x * stride_x];
      }
    }
  }
}

}  // namespace
}  // namespace segmenter
