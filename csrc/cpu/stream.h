// Copies to memory past the caches. An ordinary store to a line that is not in the cache first
// reads it from memory; where whole lines of a large output are written, and nobody reads them
// soon, that is half of the traffic. For kernels only.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "vector.h"

namespace segmenter {
namespace {

// Outputs of fewer bytes may still be in a cache when they are read.
constexpr int64_t kStreamBytes = 16 << 20;

// Stores to an address that is a multiple of the register width. The vector extension has no such
// store in GCC; other processors detect the pattern by themselves.
template <typename T>
inline void stream(T* to, Values<T> lanes) {
#if defined(__x86_64__) && SEGMENTER_VECTOR_BYTES == 64
  _mm512_stream_ps(reinterpret_cast<float*>(to), reinterpret_cast<__m512>(lanes));
#elif defined(__x86_64__) && SEGMENTER_VECTOR_BYTES == 32
  _mm256_stream_ps(reinterpret_cast<float*>(to), reinterpret_cast<__m256>(lanes));
#elif defined(__x86_64__)
  _mm_stream_ps(reinterpret_cast<float*>(to), reinterpret_cast<__m128>(lanes));
#else
  store(to, lanes);
#endif
}

// Copies `count` values.
template <typename T>
inline void stream_copy(const T* from, int64_t count, T* to) {
  constexpr uintptr_t bytes = SEGMENTER_VECTOR_BYTES;
  const int64_t unaligned = (bytes - reinterpret_cast<uintptr_t>(to) % bytes) % bytes / sizeof(T);
  int64_t i = unaligned < count ? unaligned : count;
  std::memcpy(to, from, i * sizeof(T));
  for (; i + kLanes<T> <= count; i += kLanes<T>) stream(to + i, load(from + i));
  std::memcpy(to + i, from + i, (count - i) * sizeof(T));
}

// To be called before another thread is told that the copies are complete: they are not ordered
// with ordinary stores.
inline void finish_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace segmenter
