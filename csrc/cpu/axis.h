// One axis of an upsampled grid as the kernels read it: plain pointers and sizes only, since code
// that host and kernels both compile (a std::vector's growth, say) would be shared across levels.
#pragma once

#include <cstdint>

namespace segmenter {

// Output coordinates [begin, end) that lie between the same two patches i0 and i1.
struct Run {
  int64_t begin, end;
  int64_t i0, i1;
};

// The runs of an axis, and the weights of i0 and i1 per output coordinate. The tables are followed
// by kTablePadding readable entries.
template <typename T>
struct AxisView {
  const Run* runs;
  int64_t n_runs;
  const T* w0;
  const T* w1;
};

constexpr int64_t kTablePadding = 16;

// Arrays of classes are padded to a multiple of this many.
constexpr int64_t kClassPadding = 16;

inline constexpr int64_t padded_classes(int64_t K) {
  return (K + kClassPadding - 1) / kClassPadding * kClassPadding;
}

}  // namespace segmenter
