// The geometry of bilinear upsampling: which patch-grid cell an output pixel lies in, and how its
// value is blended from the cell's corners. Half-pixel centres, align_corners=False.
//
//   a --- b    value(y, x) = wx0 * (wy0 * a + wy1 * c)
//   |     |                + wx1 * (wy0 * b + wy1 * d)
//   c --- d
//
// Everything is `static inline`: kernels are compiled once per instruction set, and a function with
// external linkage would be merged by the linker into whichever copy it meets first.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define SEGMENTER_HD __host__ __device__ static inline
#else
#define SEGMENTER_HD static inline
#endif

namespace segmenter {

// One output coordinate's pair of source coordinates and the weight of each.
template <typename T>
struct Source {
  int64_t i0, i1;
  T w0, w1;
};

// The source of output coordinate `dst` when `in` samples are resized to `out`, in T's precision as
// PyTorch's CPU and CUDA kernels compute it:
//   src = max(scale * (dst + 0.5) - 0.5, 0),  scale = in / out.
// The fused multiply-add is written out because PyTorch's compilers contract this expression; with
// two roundings the weights would be off by an ulp and, where src is a whole number, so would i0.
template <typename T>
SEGMENTER_HD Source<T> source_index(int64_t dst, int64_t in, int64_t out) {
  if (in == out) return {dst, dst, T(1), T(0)};
  const T scale = T(in) / T(out);
  T src = std::fma(scale, T(dst) + T(0.5), T(-0.5));
  if (src < T(0)) src = T(0);
  // PyTorch takes the floor in single precision for every type.
  int64_t i0 = static_cast<int64_t>(std::floor(static_cast<float>(src)));
  if (i0 > in - 1) i0 = in - 1;
  T w1 = src - T(i0);
  if (w1 < T(0)) w1 = T(0);
  if (w1 > T(1)) w1 = T(1);
  return {i0, i0 < in - 1 ? i0 + 1 : i0, T(1) - w1, w1};
}

// V is a scalar or a vector of lanes, here and below.
template <typename V, typename W>
SEGMENTER_HD V blend(V first, V second, W w0, W w1) {
  return first * w0 + second * w1;
}

template <typename V>
SEGMENTER_HD V lesser(V a, V b) {
  return a < b ? a : b;
}

template <typename V>
SEGMENTER_HD V greater(V a, V b) {
  return a > b ? a : b;
}

// One of something per corner of a cell, named as above.
template <typename V>
struct Corners {
  V a, b, c, d;
};

// The four patches around a cell, from the rows of patches above and below it; x0 and x1 are the
// columns of its corners, and a patch takes `size` entries.
template <typename T>
SEGMENTER_HD Corners<T*> corners_at(T* upper, T* lower, int64_t x0, int64_t x1, int64_t size) {
  return {upper + x0 * size, upper + x1 * size, lower + x0 * size, lower + x1 * size};
}

// Lowers the pruning bound by a few roundings, so that no class that could tie is dropped. `taps` is
// the number of weights that meet in a value, of both axes together: 4 in a cell.
//
// Why pruning is exact. Weights are >= 0 and rounding is monotone, so a computed value never
// decreases when an input grows. Let class j have all its inputs >= m and class k all its inputs
// <= M < m, and let v(t) be the value computed from inputs that all equal t. Then
//   value_k <= v(M) <= v(m) <= value_j   at every pixel that reads these inputs:
// k never beats j, and it can only tie where v(M) == v(m). Per tap there is a product, an addition
// and half an ulp of the weight, so v differs from the identity by less than `taps` epsilon, and such
// an M is within 2 taps epsilon of m. Keeping every class with M >= bound - 4 taps epsilon |bound|
// therefore leaves exactly the argmax, ties included, that a scan of all classes with the same
// arithmetic finds. `tiny`, the smallest normal number, covers products that underflow.
template <typename T>
SEGMENTER_HD T keep_ties(T bound, int64_t taps, T epsilon, T tiny) {
  const T magnitude = bound < T(0) ? -bound : bound;
  return bound - T(4 * taps) * (epsilon * magnitude + tiny);
}

}  // namespace segmenter
