// Vectors of lanes through the extension that GCC and Clang share: arithmetic, comparison and
// `mask ? a : b` work lane by lane, and the compiler picks the instructions. For kernels only:
// SEGMENTER_VECTOR_BYTES is the register width of the level being compiled.
#pragma once

#include <cstdint>
#include <cstring>

namespace segmenter {
namespace {

template <typename T>
struct LaneInteger;
template <>
struct LaneInteger<float> {
  using type = int32_t;
};
template <>
struct LaneInteger<double> {
  using type = int64_t;
};

template <typename T>
constexpr int kLanes = SEGMENTER_VECTOR_BYTES / sizeof(T);

template <typename T>
struct Vectors {
  using Integer = typename LaneInteger<T>::type;
  typedef T Values __attribute__((vector_size(SEGMENTER_VECTOR_BYTES)));
  // Class numbers, and the masks that comparisons give: all bits set where true.
  typedef Integer Integers __attribute__((vector_size(SEGMENTER_VECTOR_BYTES)));
};

template <typename T>
using Values = typename Vectors<T>::Values;
template <typename T>
using Integers = typename Vectors<T>::Integers;

template <typename T>
inline Values<T> load(const T* from) {
  Values<T> lanes;
  std::memcpy(&lanes, from, sizeof(lanes));
  return lanes;
}

template <typename T>
inline void store(T* to, Values<T> lanes) {
  std::memcpy(to, &lanes, sizeof(lanes));
}

template <typename T>
inline Values<T> splat(T value) {
  return value - Values<T>{};
}

template <typename T>
inline T largest_lane(Values<T> lanes) {
  T largest = lanes[0];
  for (int i = 1; i < kLanes<T>; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
  return largest;
}

}  // namespace
}  // namespace segmenter
