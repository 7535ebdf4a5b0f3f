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

// a b, rounded. What is subtracted from a score was rounded, too: fused into one operation, the
// difference of the largest score and itself would not be 0, nor its probability 1.
inline Floats product(Floats a, float b) {
  Floats result = a * b;
#if defined(__x86_64__)
  asm("" : "+v"(result));
#elif defined(__aarch64__)
  asm("" : "+w"(result));
#else
  asm("" : "+m"(result));
#endif
  return result;
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
