// Multi-head self-attention over a packed projection, without its N x N probabilities:
//   Y = softmax(Q K^T scale) V
#pragma once

#include <cstdint>
#include <vector>

#include "memory.h"
#include "simd.h"

namespace segmenter {

enum class ElementType { float32, bfloat16 };

// Channels per head that kernels were compiled for, and where tables have them.
inline bool attends_to(int64_t D) { return D == 32 || D == 64 || D == 128; }
inline int head_width_index(int64_t D) { return D == 32 ? 0 : D == 64 ? 1 : 2; }

// Raises std::invalid_argument on sizes that make no sense and on widths without a kernel.
void check_attention(int64_t B, int64_t N, int64_t H, int64_t D);

struct Attention {
  const void* qkv;  // (B, N, 3, H, D), the D channels of a head side by side
  ElementType type;
  int64_t B, N, H, D;
  int64_t stride_b, stride_n, stride_part, stride_h;  // in elements
  float scale;
  void* out;  // (B, N, H, D), contiguous
  int threads;
  SimdLevel simd;
  // (B, H, 2, N): m and i of each query, with which probabilities are 2^(scores log2(e) - m) i;
  // null if nobody wants them. i is NaN where a score is not finite.
  float* statistics = nullptr;
};

// Memory that a call needs beside its tensors; one may serve many calls, one after another.
struct AttentionMemory {
  Memory keys, values;       // packed
  Memory squares, sizes;     // of each block of keys: largest |k|^2, and sum of lanes' largest |v|
  std::vector<Memory> work;  // of each thread

  int64_t size() const {
    int64_t sum = keys.bytes() + values.bytes() + squares.bytes() + sizes.bytes();
    for (const Memory& memory : work) sum += memory.bytes();
    return sum;
  }
};

// Results do not depend on the number of threads. NaN where a score is not finite.
//
// Raises std::invalid_argument on sizes that make no sense and on widths without a kernel.
void attention(const Attention& call, AttentionMemory& memory);

}  // namespace segmenter
