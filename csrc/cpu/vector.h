// Vectors of lanes through the extension that GCC and Clang share: arithmetic, comparison and
// `mask ? a : b` work lane by lane, and the compiler picks the instructions. For kernels only:
// SEGMENTER_VECTOR_BYTES is the register width of the level being compiled.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

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

// Lanes of (a, b), side by side, numbered 2 i and 2 i + 1: added to each other.
template <typename T, int... i>
inline Values<T> add_pairs(Values<T> a, Values<T> b, std::integer_sequence<int, i...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, (2 * i)...) + __builtin_shufflevector(a, b, (2 * i + 1)...);
#else
  return __builtin_shuffle(a, b, Integers<T>{(2 * i)...}) +
         __builtin_shuffle(a, b, Integers<T>{(2 * i + 1)...});
#endif
}

template <typename T>
inline T sum_of_lanes(Values<T> lanes) {
  for (int n = kLanes<T>; n > 1; n /= 2) {
    lanes = add_pairs<T>(lanes, lanes, std::make_integer_sequence<int, kLanes<T>>{});
  }
  return lanes[0];
}

template <typename T>
inline bool any_lane(Integers<T> mask) {
  bool any = false;
  for (int i = 0; i < kLanes<T>; ++i) any |= mask[i] != 0;
  return any;
}

// sums[i] = sum of the lanes of rows[i], for N rows: a transposition and a sum in log2(lanes) steps
// of pairwise additions. `sums` has room for N rounded up to whole vectors.
template <typename T, int N>
inline void sum_lanes(const Values<T>* rows, T* sums) {
  constexpr int lanes = kLanes<T>;
  for (int first = 0; first < N; first += lanes) {
    Values<T> tree[lanes];
    for (int i = 0; i < lanes; ++i) tree[i] = first + i < N ? rows[first + i] : Values<T>{};
    for (int n = lanes / 2; n > 0; n /= 2) {
      for (int i = 0; i < n; ++i) {
        tree[i] = add_pairs<T>(tree[2 * i], tree[2 * i + 1],
                               std::make_integer_sequence<int, lanes>{});
      }
    }
    store(sums + first, tree[0]);
  }
}

}  // namespace
}  // namespace segmenter
