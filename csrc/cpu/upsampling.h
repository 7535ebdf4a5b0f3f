// What every reader of upsampled patch logits is given: the logits, and the part of their bilinear
// upsampling that is wanted.
#pragma once

#include <cstdint>
#include <string>

#include "simd.h"

namespace segmenter {

enum class FloatType { float32, float64 };
enum class IntegerType { uint8, int16, int32, int64 };

struct Upsampling {
  const void* logits;  // (B, K, h, w), any strides
  FloatType type;
  int64_t B, K, h, w;
  int64_t stride_b, stride_k, stride_y, stride_x;  // in elements
  int64_t H, W;                                    // the size that (h, w) is resized to
  int64_t top, left, height, width;                // the part of it that is the answer
  int threads;
  SimdLevel simd;

  bool empty() const { return B == 0 || height == 0 || width == 0; }
};

// std::invalid_argument on sizes that make no sense, a crop outside the size, missing logits.
void check(const Upsampling& upsampling);

// "(1, 2, 3)", for messages.
std::string shape_text(std::initializer_list<int64_t> sizes);

}  // namespace segmenter
