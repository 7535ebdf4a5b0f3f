// What attention's kernels share, forward and backward. For kernels only.
#pragma once

#include "exponential.h"
#include "products.h"

namespace segmenter {
namespace {

// 2^x for a weight that will be rounded to T.
template <typename T>
inline Floats probability(Floats x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return exp2_ordinary<float>(x);
  } else {
    return exp2_rough(x);
  }
}

// Words that an aligned piece of memory may lose.
constexpr int64_t kAlignedWords = 16;

// Divides memory into pieces, so that vectors are aligned alike in all of them.
struct Taker {
  uint32_t* memory;

  template <typename U>
  U* words(int64_t count) {
    const uintptr_t address = (reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64;
    memory = reinterpret_cast<uint32_t*>(address) + count;
    return reinterpret_cast<U*>(address);
  }
};

}  // namespace
}  // namespace segmenter
