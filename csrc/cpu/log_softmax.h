// Log-softmax of patches, in base 2. For kernels only.
//
// Log-sum-exp is convex. With the log-softmax of each patch in the place of its logits every patch
// has log-sum-exp 0, and everything between patches, a convex combination, at most 0: sums of
// exponentials cannot overflow, and no pixel needs its largest logit subtracted. All logits of a
// pixel change by the same amount, which no probability, loss or gradient notices.
#pragma once

#include <cstdint>
#include <limits>

#include "../cell.h"
#include "exponential.h"
#include "vector.h"

namespace segmenter {
namespace {

// Turns the K logits of a patch into their log2 softmax, in place, and pads it; returns the smallest,
// or -infinity, with the logits unchanged, if any is NaN, infinite or so large that arithmetic could
// overflow.
template <typename T>
T log2_softmax(T* patch, int64_t K, int64_t K_padded, T padding) {
  constexpr T infinity = std::numeric_limits<T>::infinity();
  constexpr T limit = std::numeric_limits<T>::max() / 16;
  for (int64_t k = K; k < K_padded; ++k) patch[k] = patch[K - 1];
  Values<T> largest = load(patch), smallest = largest;
  Integers<T> outside{};
  for (int64_t k = 0; k < K_padded; k += kLanes<T>) {
    const Values<T> v = load(patch + k);
    outside |= ~((v <= limit) & (v >= -limit));
    largest = greater(largest, v);
    smallest = lesser(smallest, v);
  }
  if (any_lane<T>(outside)) return -infinity;
  const T top = largest_lane<T>(largest), bottom = -largest_lane<T>(-smallest);
  for (int64_t k = K; k < K_padded; ++k) patch[k] = -infinity;
  Values<T> sums{};
  for (int64_t k = 0; k < K_padded; k += kLanes<T>) {
    const Values<T> v = (load(patch + k) - top) * T(kLog2E);
    store(patch + k, v);
    sums += exp2<T>(v);
  }
  const T log_sum = log2<T>(splat(sum_of_lanes<T>(sums)))[0];
  for (int64_t k = 0; k < K_padded; k += kLanes<T>) store(patch + k, load(patch + k) - log_sum);
  for (int64_t k = K; k < K_padded; ++k) patch[k] = padding;
  return (bottom - top) * T(kLog2E) - log_sum;
}

}  // namespace
}  // namespace segmenter
