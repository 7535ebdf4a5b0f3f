// labels[b, y, x] = argmax over k of bilinear(logits[b, k])[top + y, left + x], where bilinear
// resizes (h, w) to (H, W) with half-pixel centres; nothing of size K x H x W is ever stored.
#pragma once

#include <cstdint>

#include "simd.h"

namespace segmenter {

enum class FloatType { float32, float64 };
enum class LabelType { uint8, int16, int32 };

struct UpsampleArgmax {
  const void* logits;  // (B, K, h, w), any strides
  void* labels;        // (B, height, width), contiguous
  FloatType logits_type;
  LabelType labels_type;
  int64_t B, K, h, w;
  int64_t stride_b, stride_k, stride_y, stride_x;  // in elements
  int64_t H, W;
  int64_t top, left, height, width;
  int threads;
  SimdLevel simd;
};

// The first class wins ties and NaN counts as the largest value, as in torch.argmax. The labels do
// not depend on the number of threads or the SIMD level. std::invalid_argument on bad sizes.
void upsample_argmax(const UpsampleArgmax& args);

}  // namespace segmenter
