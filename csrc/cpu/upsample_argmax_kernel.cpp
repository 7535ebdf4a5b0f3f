// The upsample + argmax kernel. Compiled once per SIMD level, with SEGMENTER_SIMD_LEVEL naming the
// namespace; everything but the table at the end has internal linkage (see
// upsample_argmax_kernel.h).
//
// Inside one cell of the patch grid every upsampled logit is a convex combination of the cell's
// four corners. So the class with the best smallest corner sets a bound, and a class whose largest
// corner is below it wins nowhere in the cell. The same holds again on each output row of the cell,
// with the row's two ends in the place of the corners. Of K classes a handful is left, often one,
// and then the pixels are a fill. cell.h says why this stays exact under rounding.
#include "upsample_argmax_kernel.h"

#include <limits>

#include "../cell.h"
#include "argmax.h"
#include "pack.h"
#include "vector.h"

namespace segmenter {
namespace {

// Cells of this many pixels or fewer are not worth a bound.
constexpr int64_t kFewPixels = 2;

// Copies one row of patches to class-last order and pads the classes with copies of the last one:
// a copy never wins over the original, which comes first, so no loop over classes needs a tail.
// Marks the patches whose logits are all ordinary numbers: no NaN, no infinity, and nothing so
// large that a blend could overflow.
template <typename T>
void pack_row(const UpsampleArgmaxView<T>& view, int64_t image, int64_t y, T* patches,
              uint8_t* ordinary) {
  const int64_t K = view.K, K_padded = view.K_padded;
  const int64_t columns = view.x_end - view.x_begin;
  const T* source =
      view.logits + image * view.stride_b + y * view.stride_y + view.x_begin * view.stride_x;
  pack_class_last(source, view.stride_k, view.stride_x, K, columns, K_padded, patches);
  const Values<T> limit = splat(std::numeric_limits<T>::max() / 4);
  for (int64_t x = 0; x < columns; ++x) {
    T* patch = patches + x * K_padded;
    for (int64_t k = K; k < K_padded; ++k) patch[k] = patch[K - 1];
    Integers<T> inside = ~Integers<T>{};
    for (int64_t k = 0; k < K_padded; k += kLanes<T>) {
      const Values<T> v = load(patch + k);
      inside &= (v <= limit) & (v >= -limit);
    }
    ordinary[x] = 1;
    for (int i = 0; i < kLanes<T>; ++i) ordinary[x] &= inside[i] != 0;
  }
}

// The argmax at one pixel over all classes, whatever their values.
template <typename T>
int32_t label_pixel(const Corners<const T*>& corners, int64_t K_padded, T wy0, T wy1, T wx0, T wx1) {
  Argmax<T> argmax;
  for (int64_t k = 0; k < K_padded; k += kLanes<T>) {
    const Values<T> left = blend(load(corners.a + k), load(corners.c + k), wy0, wy1);
    const Values<T> right = blend(load(corners.b + k), load(corners.d + k), wy0, wy1);
    argmax.add(blend(left, right, wx0, wx1));
  }
  return argmax.winner();
}

// Writes the classes that no other beats in the whole cell to `kept`, in order; returns their
// number.
template <typename T>
int64_t prune_cell(const Corners<const T*>& corners, int64_t K, int64_t K_padded, T* largest_corner,
                   int32_t* kept) {
  Values<T> best = splat(-std::numeric_limits<T>::infinity());
  for (int64_t k = 0; k < K_padded; k += kLanes<T>) {
    const Values<T> a = load(corners.a + k), b = load(corners.b + k);
    const Values<T> c = load(corners.c + k), d = load(corners.d + k);
    best = greater(best, lesser(lesser(a, b), lesser(c, d)));
    store(largest_corner + k, greater(greater(a, b), greater(c, d)));
  }
  const T bound = keep_ties(largest_lane<T>(best), 4, std::numeric_limits<T>::epsilon(),
                            std::numeric_limits<T>::min());
  int64_t n = 0;
  for (int64_t k = 0; k < K; ++k) {
    kept[n] = static_cast<int32_t>(k);
    n += largest_corner[k] >= bound;
  }
  return n;
}

// Blends the n kept classes' corners to the two ends of one output row, prunes again, and moves the
// survivors to the front of left, right and row_kept; returns their number.
template <typename T>
int64_t prune_row(const Scratch<T>& scratch, int64_t n, T wy0, T wy1) {
  Values<T> best = splat(-std::numeric_limits<T>::infinity());
  for (int64_t j = 0; j < n; j += kLanes<T>) {
    const Values<T> left =
        blend(load(scratch.corners[0] + j), load(scratch.corners[2] + j), wy0, wy1);
    const Values<T> right =
        blend(load(scratch.corners[1] + j), load(scratch.corners[3] + j), wy0, wy1);
    best = greater(best, lesser(left, right));
    store(scratch.left + j, left);
    store(scratch.right + j, right);
  }
  const T bound = keep_ties(largest_lane<T>(best), 4, std::numeric_limits<T>::epsilon(),
                            std::numeric_limits<T>::min());
  int64_t m = 0;
  for (int64_t j = 0; j < n; ++j) {
    const T left = scratch.left[j], right = scratch.right[j];
    scratch.left[m] = left;
    scratch.right[m] = right;
    scratch.row_kept[m] = scratch.kept[j];
    m += greater(left, right) >= bound;
  }
  return m;
}

// Labels pixels [begin, end) of one output row among the m classes that survive there.
template <typename T, typename Label>
void label_row(const UpsampleArgmaxView<T>& view, const Scratch<T>& scratch, int64_t m,
               int64_t begin, int64_t end, Label* row) {
  typedef Label Labels __attribute__((vector_size(sizeof(Label) * kLanes<T>)));
  using Integer = typename LaneInteger<T>::type;
  for (int64_t x = begin; x < end; x += kLanes<T>) {
    const Values<T> wx0 = load(view.cols.w0 + x), wx1 = load(view.cols.w1 + x);
    Values<T> best = splat(-std::numeric_limits<T>::infinity());
    Integers<T> best_k{};
    for (int64_t j = 0; j < m; ++j) {
      const Values<T> value = blend(wx0, wx1, scratch.left[j], scratch.right[j]);
      const Integers<T> better = value > best;
      best = better ? value : best;
      best_k = better ? static_cast<Integer>(scratch.row_kept[j]) - Integers<T>{} : best_k;
    }
    const Labels labels = __builtin_convertvector(best_k, Labels);
    // Lanes past the cell's end are written too where the row has room: the next cell, to the
    // right, writes those pixels afterwards.
    if (x + kLanes<T> <= view.width) {
      std::memcpy(row + x, &labels, sizeof(labels));
    } else {
      for (int i = 0; x + i < end; ++i) row[x + i] = labels[i];
    }
  }
}

template <typename Label>
inline void fill(Label* row, int64_t begin, int64_t end, int32_t label) {
  for (int64_t x = begin; x < end; ++x) row[x] = static_cast<Label>(label);
}

template <typename T, typename Label>
void label_cell_pixel_by_pixel(const UpsampleArgmaxView<T>& view, const Corners<const T*>& corners,
                               const Run& ys, const Run& xs, Label* labels) {
  for (int64_t y = ys.begin; y < ys.end; ++y) {
    for (int64_t x = xs.begin; x < xs.end; ++x) {
      labels[y * view.width + x] =
          static_cast<Label>(label_pixel(corners, view.K_padded, view.rows.w0[y], view.rows.w1[y],
                                         view.cols.w0[x], view.cols.w1[x]));
    }
  }
}

template <typename T, typename Label>
void label_cell(const UpsampleArgmaxView<T>& view, const Scratch<T>& scratch,
                const Corners<const T*>& corners, const Run& ys, const Run& xs, Label* labels) {
  const int64_t n = prune_cell(corners, view.K, view.K_padded, scratch.left, scratch.kept);
  if (n == 1) {
    for (int64_t y = ys.begin; y < ys.end; ++y) {
      fill(labels + y * view.width, xs.begin, xs.end, scratch.kept[0]);
    }
    return;
  }
  // Up to a whole number of lanes, again with copies of the last class.
  for (int64_t j = 0; j < n || j % kLanes<T> != 0; ++j) {
    const int32_t k = scratch.kept[lesser(j, n - 1)];
    scratch.corners[0][j] = corners.a[k];
    scratch.corners[1][j] = corners.b[k];
    scratch.corners[2][j] = corners.c[k];
    scratch.corners[3][j] = corners.d[k];
  }
  for (int64_t y = ys.begin; y < ys.end; ++y) {
    const int64_t m = prune_row(scratch, n, view.rows.w0[y], view.rows.w1[y]);
    Label* row = labels + y * view.width;
    if (m == 1) {
      fill(row, xs.begin, xs.end, scratch.row_kept[0]);
    } else {
      label_row(view, scratch, m, xs.begin, xs.end, row);
    }
  }
}

template <typename T, typename Label>
void label_rows(const UpsampleArgmaxView<T>& view, const Scratch<T>& scratch, int64_t image,
                int64_t first, int64_t last) {
  Label* labels = static_cast<Label*>(view.labels) + image * view.height * view.width;
  int64_t packed[2] = {-1, -1};  // the patch row that each half of the scratch memory holds
  for (int64_t r = first; r < last; ++r) {
    const Run& ys = view.rows.runs[r];
    const int64_t needed[2] = {ys.i0, ys.i1};
    for (int64_t y : needed) {
      if (packed[y % 2] == y) continue;
      pack_row(view, image, y, scratch.patches[y % 2], scratch.ordinary[y % 2]);
      packed[y % 2] = y;
    }
    const T *upper = scratch.patches[ys.i0 % 2], *lower = scratch.patches[ys.i1 % 2];
    const uint8_t *upper_ordinary = scratch.ordinary[ys.i0 % 2],
                  *lower_ordinary = scratch.ordinary[ys.i1 % 2];
    for (int64_t c = 0; c < view.cols.n_runs; ++c) {
      const Run& xs = view.cols.runs[c];
      const int64_t x0 = xs.i0 - view.x_begin, x1 = xs.i1 - view.x_begin;
      const Corners<const T*> corners = corners_at(upper, lower, x0, x1, view.K_padded);
      const bool ordinary =
          upper_ordinary[x0] & upper_ordinary[x1] & lower_ordinary[x0] & lower_ordinary[x1];
      if (!ordinary || (ys.end - ys.begin) * (xs.end - xs.begin) <= kFewPixels) {
        label_cell_pixel_by_pixel(view, corners, ys, xs, labels);
      } else {
        label_cell(view, scratch, corners, ys, xs, labels);
      }
    }
  }
}

}  // namespace

namespace SEGMENTER_SIMD_LEVEL {

const UpsampleArgmaxKernels upsample_argmax_kernels = {
    {label_rows<float, uint8_t>, label_rows<float, int16_t>, label_rows<float, int32_t>},
    {label_rows<double, uint8_t>, label_rows<double, int16_t>, label_rows<double, int32_t>},
};

}  // namespace SEGMENTER_SIMD_LEVEL
}  // namespace segmenter
