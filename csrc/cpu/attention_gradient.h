// Gradient of attention() with respect to the packed projection.
#pragma once

#include "attention.h"

namespace segmenter {

struct AttentionGradient {
  const void* qkv;  // (B, N, 3, H, D), the D channels of a head side by side
  ElementType type;
  int64_t B, N, H, D;
  int64_t stride_b, stride_n, stride_part, stride_h;  // of qkv, in elements
  float scale;
  const void* out;          // (B, N, H, D), contiguous: what attention() wrote
  const float* statistics;  // (B, H, 2, N): what it wrote into Attention::statistics
  const void* upstream;     // (B, N, H, D), contiguous
  void* gradient;           // (B, N, 3, H, D), contiguous
  int threads;
  SimdLevel simd;
};

// Results do not depend on the number of threads. Memory grows with N, not with its square.
//
// Raises std::invalid_argument on sizes that make no sense and on widths without a kernel.
void attention_gradient(const AttentionGradient& call);

}  // namespace segmenter
