// The cross-entropy kernels. Compiled once per SIMD level, with SEGMENTER_SIMD_LEVEL naming the
// namespace; everything but the table at the end has internal linkage (see
// upsample_cross_entropy_kernel.h, and upsample_cross_entropy.h for the names A, B, C).
//
// 1. Along one output row of a cell of the patch grid every logit is linear in x, so that its
//    exponential is a geometric progression:
//      z_k(x) = left_k + (right_k - left_k) (w1 + step x)     in units of log 2
//      2^z_k(x) = first_k ratio_k^x,  first_k = 2^z_k(0),  ratio_k = 2^((right_k - left_k) step)
//    Two exponentials per class, row and cell take the place of one per class and pixel: the sum
//    over the classes costs a multiplication and an addition per class and pixel. Backward, what a
//    class receives from the row is a polynomial in its ratio,
//      sum_x a_x p_k(x) wx(x) = first_k sum_x (a_x wx(x) / S(x)) ratio_k^x,   S(x) = sum_k 2^z_k(x)
//    one for each end of the row (wx = w0, wx = w1), by Horner's rule one fused multiply-add per
//    class, pixel and end. Lanes are classes.
//
// 2. Log-sum-exp is convex. With the log-softmax of each patch in the place of its logits, corners
//    have log-sum-exp 0 and everything between them at most 0, so S <= 1: no pixel needs its
//    largest logit subtracted. Neither loss nor gradient notices, since a pixel's logits all change
//    by the same amount, the interpolated log-sum-exp.
//
// 3. What exponentials could lack is range. `prepare_cell` looks at the corners, and a cell that
//    would leave it (neighbours sure of different classes, NaN, infinity) goes pixel by pixel, from
//    the logits as they were given and with PyTorch's roundings of the weights.
//
// 4. The part of the target's class: a stretch of pixels of one label t needs only the sums of
//    their bilinear weights at the four corners. Those are the gradient's share of class t and,
//    times the corners' logits of class t, the sum of z_t. Label smoothing needs the same sums, for
//    sum_c w_c z_c is interpolated from patches like any logit: no loop over the classes.
#include "upsample_cross_entropy_kernel.h"

#include <cmath>
#include <limits>
#include <utility>

#include "../cell.h"
#include "exponential.h"
#include "log_softmax.h"
#include "pack.h"
#include "vector.h"

// Loops over the pixels of a chunk, whose sums live in registers.
#if defined(__clang__)
#define SEGMENTER_UNROLL _Pragma("unroll")
#else
#define SEGMENTER_UNROLL _Pragma("GCC unroll 16")
#endif

namespace segmenter {
namespace {

// How small packed logits may be in a cell that is summed as a whole: every class stays above
// kLowest; units of log 2. Exponentials are kept times 2^kOffset, since they fill only one half of
// the exponents otherwise. Then
//  - all exponentials are normal numbers and, with factors up to kLargestFactor, polynomials are
//    below kMaxChunk kLargestFactor 2^-(kLowest + kOffset) = 2^124 (float), 2^1014 (double);
//  - S is a normal number: a pixel has a weight of 1/4 or more at some corner, where the largest
//    of the K <= 2^16 classes is at least -16, so that log2 S >= -16/4 + 3/4 kLowest = -124, -979;
//  - so are the squares of ratios, up to 2^(-2 kMaxStep kLowest) = 2^120 or 2^975, as chunks of
//    more than one pixel have step <= kMaxStep.
// Classes that are below kLowest in all four corners may be lifted to it: their probability is less
// than 2^-36 or 2^-321 either way.
template <typename T>
struct Range;
template <>
struct Range<float> {
  static constexpr float lowest = -160, offset = 60, scale = 0x1p-60f;
};
template <>
struct Range<double> {
  static constexpr double lowest = -1300, offset = 310, scale = 0x1p-310;
};
template <typename T>
constexpr T kLowest = Range<T>::lowest;
template <typename T>
constexpr T kOffset = Range<T>::offset;

// Pixel by pixel, an exponential below 2^kNegligible of the largest counts as 0.
template <typename T>
constexpr T kNegligible = FloatFormat<T>::min_exponent + 26;

// Pixels per call of the kernels: the sums of so many leave registers for the progressions.
template <typename T>
constexpr int kMaxChunk = kLanes<T> == 16 ? 16 : 8;

constexpr int kChunkPadding = 16;

template <typename T>
using View = UpsampleCrossEntropyView<T>;

// ------------------------------------------------------------------------------------ packing
template <typename T>
void pack(const View<T>& view, int64_t image, int64_t y) {
  const int64_t first = (image * view.h + y) * view.columns;
  T* patches = view.patches.values + first * view.K_padded;
  pack_class_last(
      view.logits + image * view.stride_b + y * view.stride_y + view.x_begin * view.stride_x,
      view.stride_k, view.stride_x, view.K, view.columns, view.K_padded, patches);
  for (int64_t x = 0; x < view.columns; ++x) {
    T* patch = patches + x * view.K_padded;
    view.patches.smallest[first + x] = log2_softmax(patch, view.K, view.K_padded, kLowest<T>);
    if (!view.patches.weighted) continue;
    Values<T> sums{};
    for (int64_t k = 0; k < view.K_padded; k += kLanes<T>) {
      sums += load(view.weight + k) * load(patch + k);
    }
    view.patches.weighted[first + x] = sum_of_lanes<T>(sums);
  }
}

// ------------------------------------------------------------------------------------ classes
// A chunk of a row of cells, as the loops over the classes see it.
template <typename T>
struct Cell {
  Corners<const T*> logits;  // (K_padded) each
  Corners<T*> gradient;      // the same, or null
  T w1, step;                // as in Chunk
  T *first, *ratio;          // as in CrossEntropyScratch
  int64_t K_padded;
};

// sums[x] = 2^kOffset S(x) for the first N pixels of one output row of the cell; leaves the
// progressions in cell.first and cell.ratio. Even and odd pixels are two progressions of their own:
// half as long, they round half as often, and their multiplications overlap.
template <typename T, int N>
void sum_exponentials(const Cell<T>& shared, T wy0, T wy1, T* sums) {
  const Cell<T> cell = shared;
  Values<T> total[N];
  SEGMENTER_UNROLL
  for (int x = 0; x < N; ++x) total[x] = Values<T>{};
  for (int64_t k = 0; k < cell.K_padded; k += kLanes<T>) {
    const Values<T> left = blend(load(cell.logits.a + k), load(cell.logits.c + k), wy0, wy1);
    const Values<T> right = blend(load(cell.logits.b + k), load(cell.logits.d + k), wy0, wy1);
    const Values<T> slope = right - left;
    Values<T> even = exp2<T>(left + slope * cell.w1, kOffset<T>);
    store(cell.first + k, even);
    if constexpr (N == 1) {
      total[0] += even;
    } else {
      const Values<T> ratio = exp2<T>(slope * cell.step);
      store(cell.ratio + k, ratio);
      Values<T> odd = even * ratio;
      const Values<T> square = ratio * ratio;
      SEGMENTER_UNROLL
      for (int x = 0; x < N; x += 2) {
        total[x] += even;
        total[x + 1] += odd;
        if (x + 2 < N) {
          even *= square;
          odd *= square;
        }
      }
    }
  }
  sum_lanes<T, N>(total, sums);
}

// Adds to the corners' gradients what one output row gives them: the polynomials with coefficients
// to_left and to_right, times the row's own weights.
template <typename T, int N>
void add_polynomials(const Cell<T>& shared, T wy0, T wy1, const T* to_left, const T* to_right) {
  const Cell<T> cell = shared;
  const auto add = [](T* sum, Values<T> value, T weight) {
    store(sum, load(sum) + value * weight);
  };
  for (int64_t k = 0; k < cell.K_padded; k += kLanes<T>) {
    Values<T> left = splat(to_left[N - 1]), right = splat(to_right[N - 1]);
    if constexpr (N > 1) {
      const Values<T> ratio = load(cell.ratio + k);
      SEGMENTER_UNROLL
      for (int x = N - 2; x >= 0; --x) {
        left = left * ratio + to_left[x];
        right = right * ratio + to_right[x];
      }
    }
    const Values<T> first = load(cell.first + k);
    left *= first;
    right *= first;
    add(cell.gradient.a + k, left, wy0);
    add(cell.gradient.b + k, right, wy0);
    add(cell.gradient.c + k, left, wy1);
    add(cell.gradient.d + k, right, wy1);
  }
}

template <typename T>
struct RowFunctions {
  void (*sum_exponentials)(const Cell<T>&, T wy0, T wy1, T* sums);
  void (*add_polynomials)(const Cell<T>&, T wy0, T wy1, const T* to_left, const T* to_right);
};

// For chunks of 1, 2, 4, 6, ... pixels.
template <typename T, int... i>
const RowFunctions<T>& row_functions(int64_t pixels, std::integer_sequence<int, i...>) {
  static constexpr RowFunctions<T> table[] = {
      {sum_exponentials<T, 1>, add_polynomials<T, 1>},
      {sum_exponentials<T, 2 * (i + 1)>, add_polynomials<T, 2 * (i + 1)>}...};
  return table[pixels == 1 ? 0 : (pixels + 1) / 2];
}

// Whether S can be summed as it is (see the top of the file). May put other corners in the place of
// the packed ones, with classes lifted to kLowest.
template <typename T>
bool prepare_cell(const Corners<T>& smallest, T* const* lifted, Cell<T>& cell) {
  const T lowest = lesser(lesser(smallest.a, smallest.b), lesser(smallest.c, smallest.d));
  if (lowest >= kLowest<T>) return true;
  if (lowest == -std::numeric_limits<T>::infinity()) return false;
  const Corners<const T*> from = cell.logits;
  Integers<T> lost{};
  const auto lift = [](T* to, Values<T> v) { store(to, greater(v, splat(kLowest<T>))); };
  for (int64_t k = 0; k < cell.K_padded; k += kLanes<T>) {
    const Values<T> a = load(from.a + k), b = load(from.b + k);
    const Values<T> c = load(from.c + k), d = load(from.d + k);
    const Values<T> low = lesser(lesser(a, b), lesser(c, d));
    const Values<T> high = greater(greater(a, b), greater(c, d));
    lost |= (low < kLowest<T>)&(high > kLowest<T>);
    lift(lifted[0] + k, a);
    lift(lifted[1] + k, b);
    lift(lifted[2] + k, c);
    lift(lifted[3] + k, d);
  }
  if (any_lane<T>(lost)) return false;
  cell.logits = {lifted[0], lifted[1], lifted[2], lifted[3]};
  return true;
}

// ------------------------------------------------------------------------------------ labels
// The corners of a chunk outside the loops over the classes.
template <typename T>
struct ChunkCorners {
  Corners<const T*> logits;  // packed
  Corners<T> weighted;       // sum_c w_c logits[c], with label smoothing
  Corners<T*> gradient;      // or null
  Corners<T*> smoothing;     // or null
};

// Sums of bilinear weights over pixels of one label, see 4. at the top of the file.
template <typename T>
class LabelStretch {
 public:
  LabelStretch(const View<T>& view, const ChunkCorners<T>& corners, CrossEntropySums& sums)
      : view_(view), corners_(corners), sums_(sums) {}

  // `pixels` of one output row, whose weights sum to `left` and `right`.
  void add(int64_t label, int64_t pixels, T left, T right, T wy0, T wy1) {
    if (label != label_) {
      flush();
      label_ = label;
    }
    pixels_ += pixels;
    share_.a += left * wy0;
    share_.b += right * wy0;
    share_.c += left * wy1;
    share_.d += right * wy1;
  }

  void flush() {
    if (pixels_ > 0) {
      const T weight = view_.weight[label_], B = view_.keep * weight;
      sums_.valid_pixels += pixels_;
      sums_.weight += double(weight) * double(pixels_);
      const Corners<const T*>& z = corners_.logits;
      loss_ -= double(B) * dot({z.a[label_], z.b[label_], z.c[label_], z.d[label_]});
      if (view_.patches.weighted) loss_ -= double(view_.spread) * dot(corners_.weighted);
      if (corners_.gradient.a) {
        add_to(corners_.gradient, label_, -B);
        if (corners_.smoothing.a) add_to(corners_.smoothing, 0, T(1));
      }
    }
    pixels_ = 0;
    share_ = {0, 0, 0, 0};
  }

  // -B z_t - C sum_c w_c z_c, summed over what has been flushed; units of log 2.
  double loss() const { return loss_; }

 private:
  double dot(const Corners<T>& values) const {
    return double(share_.a) * double(values.a) + double(share_.b) * double(values.b) +
           double(share_.c) * double(values.c) + double(share_.d) * double(values.d);
  }

  void add_to(const Corners<T*>& to, int64_t index, T factor) const {
    to.a[index] += factor * share_.a;
    to.b[index] += factor * share_.b;
    to.c[index] += factor * share_.c;
    to.d[index] += factor * share_.d;
  }

  const View<T>& view_;
  const ChunkCorners<T>& corners_;
  CrossEntropySums& sums_;
  double loss_ = 0;
  int64_t label_ = 0, pixels_ = 0;
  Corners<T> share_ = {0, 0, 0, 0};
};

template <typename T>
inline bool is_class(const View<T>& view, int64_t label) {
  return label != view.ignore_index && label >= 0 && label < view.K;
}

template <typename Label>
inline int64_t stretch_end(const Label* target, int64_t begin, int64_t end) {
  // Without a branch per pixel: most chunks have one label.
  bool same = true;
  for (int64_t x = begin + 1; x < end; ++x) same &= target[x] == target[begin];
  if (same) return end;
  int64_t x = begin + 1;
  while (target[x] == target[begin]) ++x;
  return x;
}

// Reads one row of labels: factors[x] = A times upstream, 0 where ignored, and the rest goes to
// `stretch`. Returns whether any pixel counts. `target`, `upstream` and the weights begin at the
// chunk's first pixel.
template <typename T, typename Label>
bool read_labels(const View<T>& view, const Chunk<T>& chunk, const Label* target, const T* upstream,
                 T wy0, T wy1, LabelStretch<T>& stretch, CrossEntropySums& sums, T* factors) {
  const int64_t n = chunk.end - chunk.begin;
  const T* w1 = view.col_weights.w1 + chunk.begin;
  bool any = false;
  for (int64_t begin = 0, end; begin < n; begin = end) {
    end = stretch_end(target, begin, n);
    const int64_t label = target[begin];
    if (!is_class(view, label)) {
      if (label != view.ignore_index) sums.wrong_labels += end - begin;
      for (int64_t x = begin; x < end; ++x) factors[x] = 0;
      continue;
    }
    any = true;
    const T A = view.keep * view.weight[label] + view.spread_weight;
    T all = static_cast<T>(end - begin);
    T right = all * (chunk.w1 + chunk.step * T(0.5) * static_cast<T>(begin + end - 1));
    if (upstream) {
      all = right = 0;
      for (int64_t x = begin; x < end; ++x) {
        factors[x] = upstream[x] * A;
        all += upstream[x];
        right += upstream[x] * w1[x];
      }
    } else {
      for (int64_t x = begin; x < end; ++x) factors[x] = A;
    }
    stretch.add(label, end - begin, all - right, right, wy0, wy1);
  }
  return any;
}

// The losses of one row of a chunk, given lse[x] in units of log 2. The part of the target's class
// is not negative, nor does rounding make it so.
template <typename T, typename Label>
void write_losses(const View<T>& view, const ChunkCorners<T>& corners, const Chunk<T>& chunk,
                  const Label* target, T wy0, T wy1, const T* lse, T* losses) {
  const Corners<const T*>& z = corners.logits;
  const T* w0 = view.col_weights.w0 + chunk.begin;
  const T* w1 = view.col_weights.w1 + chunk.begin;
  const T left_weighted = blend(corners.weighted.a, corners.weighted.c, wy0, wy1);
  const T right_weighted = blend(corners.weighted.b, corners.weighted.d, wy0, wy1);
  for (int64_t x = 0; x < chunk.end - chunk.begin; ++x) {
    const int64_t t = target[x];
    T loss = 0;
    if (is_class(view, t)) {
      const T left = blend(z.a[t], z.c[t], wy0, wy1), right = blend(z.b[t], z.d[t], wy0, wy1);
      loss = view.keep * view.weight[t] * greater(lse[x] - blend(left, right, w0[x], w1[x]), T(0));
      if (view.patches.weighted) {
        const T weighted = blend(left_weighted, right_weighted, w0[x], w1[x]);
        loss += view.spread_weight * lse[x] - view.spread * weighted;
      }
    }
    losses[x] = loss * T(kLn2);
  }
}

// ------------------------------------------------------------------------------------ pixels
// One pixel from the logits as they were given, its largest logit subtracted: as PyTorch has it,
// infinities and NaN included. `corners` are K_padded logits each, the weights PyTorch's own.
// Returns the loss in natural units, without upstream.
template <typename T>
T single_pixel(const View<T>& view, const Corners<const T*>& corners, const ChunkCorners<T>& chunk,
               const Corners<T>& weights, int64_t label, T upstream, T* values) {
  constexpr T infinity = std::numeric_limits<T>::infinity();
  const int64_t K = view.K, K_padded = view.K_padded;
  Values<T> largest = splat(-infinity);
  Integers<T> nan{};
  for (int64_t k = 0; k < K_padded; k += kLanes<T>) {
    const Values<T> v = load(corners.a + k) * weights.a + load(corners.b + k) * weights.b +
                        (load(corners.c + k) * weights.c + load(corners.d + k) * weights.d);
    store(values + k, v);
    nan |= v != v;
    largest = greater(v, largest);
  }
  for (int64_t k = K; k < K_padded; ++k) values[k] = -infinity;
  const T top = largest_lane<T>(largest);
  const bool defined = top > -infinity && top < infinity && !any_lane<T>(nan);

  const bool valid = is_class(view, label);
  const T class_weight = valid ? view.weight[label] : T(0);
  const T B = view.keep * class_weight;
  const T A = valid ? upstream * (B + view.spread_weight) : T(0);
  const T z_t = valid ? values[label] - top : T(0);
  T weighted = 0;
  if (view.patches.weighted) {
    for (int64_t k = 0; k < K; ++k) weighted += view.weight[k] * (values[k] - top);
  }
  Values<T> sums{};
  for (int64_t k = 0; k < K_padded; k += kLanes<T>) {
    const Values<T> v = (load(values + k) - top) * T(kLog2E);
    const Values<T> e = v > kNegligible<T> ? exp2<T>(v) : Values<T>{};
    store(values + k, e);
    sums += e;
  }
  const T sum = defined ? sum_of_lanes<T>(sums) : std::numeric_limits<T>::quiet_NaN();

  if (chunk.gradient.a) {
    // Not left out where ignored: 0 times NaN is NaN, in PyTorch too.
    const T factor = A / sum;
    const auto add = [&](T* gradient, T weight) {
      for (int64_t k = 0; k < K_padded; k += kLanes<T>) {
        store(gradient + k, load(gradient + k) + load(values + k) * (factor * weight));
      }
      if (valid) gradient[label] -= upstream * B * weight;
    };
    add(chunk.gradient.a, weights.a);
    add(chunk.gradient.b, weights.b);
    add(chunk.gradient.c, weights.c);
    add(chunk.gradient.d, weights.d);
    if (valid && chunk.smoothing.a) {
      *chunk.smoothing.a += upstream * weights.a;
      *chunk.smoothing.b += upstream * weights.b;
      *chunk.smoothing.c += upstream * weights.c;
      *chunk.smoothing.d += upstream * weights.d;
    }
  }
  if (!valid) return 0;
  const T lse = std::log(sum);
  T loss = B * (lse - z_t);
  if (view.patches.weighted) loss += view.spread_weight * lse - view.spread * weighted;
  return loss;
}

// Copies the corners' logits as they were given; entries from K on repeat the last class.
template <typename T>
Corners<const T*> read_given(const View<T>& view, int64_t image, const Run& ys,
                             const Chunk<T>& chunk, T* const* given) {
  const int64_t y[4] = {ys.i0, ys.i0, ys.i1, ys.i1};
  const int64_t x[4] = {chunk.i0, chunk.i1, chunk.i0, chunk.i1};
  for (int i = 0; i < 4; ++i) {
    pack_class_last(
        view.logits + image * view.stride_b + y[i] * view.stride_y + x[i] * view.stride_x,
        view.stride_k, view.stride_x, view.K, 1, view.K_padded, given[i]);
    for (int64_t k = view.K; k < view.K_padded; ++k) given[i][k] = given[i][view.K - 1];
  }
  return {given[0], given[1], given[2], given[3]};
}

// The pixels of one row of a chunk, one by one.
template <typename T, typename Label>
void single_pixels(const View<T>& view, const Corners<const T*>& given,
                   const ChunkCorners<T>& corners, const Chunk<T>& chunk, int64_t image, int64_t y,
                   T* values, CrossEntropySums& sums) {
  const T wy0 = view.rows.w0[y], wy1 = view.rows.w1[y];
  for (int64_t x = chunk.begin; x < chunk.end; ++x) {
    const int64_t i = (image * view.height + y) * view.width + x;
    const T wx0 = view.cols.w0[x], wx1 = view.cols.w1[x];
    const int64_t label = static_cast<const Label*>(view.target)[i];
    const T upstream = view.upstream ? view.upstream[i] : T(1);
    const T loss = single_pixel(view, given, corners, {wx0 * wy0, wx1 * wy0, wx0 * wy1, wx1 * wy1},
                                label, upstream, values);
    if (view.losses) view.losses[i] = loss;
    if (is_class(view, label)) {
      sums.loss += double(upstream) * double(loss);
      sums.weight += double(view.weight[label]);
      ++sums.valid_pixels;
    } else if (label != view.ignore_index) {
      ++sums.wrong_labels;
    }
  }
}

// ------------------------------------------------------------------------------------ cells
// One row of a chunk, all classes and pixels at once. Returns sum_x factors[x] lse[x] by lanes.
template <typename T, typename Label>
Values<T> row_of_chunk(const View<T>& view, const Cell<T>& cell, const ChunkCorners<T>& corners,
                       const Chunk<T>& chunk, const Label* target, T wy0, T wy1, const T* factors,
                       T* losses) {
  const RowFunctions<T>& functions = row_functions<T>(
      chunk.end - chunk.begin, std::make_integer_sequence<int, kMaxChunk<T> / 2>{});
  // Entries past the last pixel hold anything; they meet a factor 0 or are not used.
  T totals[kChunkPadding], lse[kChunkPadding];
  T to_left[kChunkPadding], to_right[kChunkPadding];
  functions.sum_exponentials(cell, wy0, wy1, totals);
  Values<T> sums{};
  for (int64_t x = 0; x < chunk.end - chunk.begin; x += kLanes<T>) {
    const Values<T> total = load(totals + x), factor = load(factors + x);
    const Values<T> log_total = log2<T>(total * Range<T>::scale);
    store(lse + x, log_total);
    sums += factor * log_total;
    const Values<T> coefficient = factor / total;
    store(to_left + x, coefficient * load(view.col_weights.w0 + chunk.begin + x));
    store(to_right + x, coefficient * load(view.col_weights.w1 + chunk.begin + x));
  }
  if (cell.gradient.a) functions.add_polynomials(cell, wy0, wy1, to_left, to_right);
  if (losses) write_losses(view, corners, chunk, target, wy0, wy1, lse, losses);
  return sums;
}

// Whether no product with these pixels' upstream overflows, nor the largest of them is lost in one
// that underflows; false for NaN.
template <typename T>
bool is_moderate(const View<T>& view, const T* upstream, int64_t n) {
  T largest = upstream ? T(0) : T(1);
  bool moderate = true;
  for (int64_t x = 0; upstream && x < n; ++x) {
    const T size = std::abs(upstream[x]);
    moderate &= size <= view.largest_upstream;
    largest = greater(largest, size);
  }
  return moderate && largest <= view.largest_upstream &&
         (largest >= view.smallest_upstream || largest == 0);
}

template <typename T, typename Label>
void row_of_cells(const View<T>& view, const CrossEntropyScratch<T>& scratch, int64_t image,
                  int64_t run, CrossEntropySums& sums) {
  const Run& ys = view.rows.runs[run];
  const int64_t columns = view.columns, K_padded = view.K_padded;
  const int64_t upper = (image * view.h + ys.i0) * columns;
  const int64_t lower = (image * view.h + ys.i1) * columns;

  // Memory of this row alone; one row of patches takes everything where upper and lower are one.
  const int64_t own = (image * view.rows.n_runs + run) * 2 * columns;
  const int64_t own_lower = ys.i0 == ys.i1 ? own : own + columns;
  if (view.sums.gradients) {
    std::memset(view.sums.gradients + own * K_padded, 0, 2 * columns * K_padded * sizeof(T));
  }
  if (view.sums.smoothing) {
    std::memset(view.sums.smoothing + own, 0, 2 * columns * sizeof(T));
  }

  for (int64_t i = 0; i < view.n_chunks; ++i) {
    const Chunk<T>& chunk = view.chunks[i];
    const int64_t x0 = chunk.i0 - view.x_begin, x1 = chunk.i1 - view.x_begin;
    const int64_t n = chunk.end - chunk.begin;
    // `first` and `second` are the upper and lower row of patches in an array of rows.
    const auto at_corners = [&](auto* base, int64_t size, int64_t first, int64_t second) {
      return corners_at(base + first * size, base + second * size, x0, x1, size);
    };
    ChunkCorners<T> corners{};
    corners.logits = at_corners(static_cast<const T*>(view.patches.values), K_padded, upper, lower);
    if (view.patches.weighted) {
      const Corners<T*> at = at_corners(view.patches.weighted, 1, upper, lower);
      corners.weighted = {*at.a, *at.b, *at.c, *at.d};
    }
    if (view.sums.gradients) {
      corners.gradient = at_corners(view.sums.gradients, K_padded, own, own_lower);
    }
    if (view.sums.smoothing) {
      corners.smoothing = at_corners(view.sums.smoothing, 1, own, own_lower);
    }
    const Corners<T*> smallest = at_corners(view.patches.smallest, 1, upper, lower);
    Cell<T> cell = {corners.logits, corners.gradient, chunk.w1, chunk.step,
                    scratch.first,  scratch.ratio,    K_padded};
    const bool whole =
        prepare_cell({*smallest.a, *smallest.b, *smallest.c, *smallest.d}, scratch.lifted, cell);
    Corners<const T*> given{};  // read when a row first needs them

    LabelStretch<T> stretch(view, corners, sums);
    Values<T> weighted_lse{};
    T factors[kChunkPadding] = {};
    for (int64_t y = ys.begin; y < ys.end; ++y) {
      const int64_t first = (image * view.height + y) * view.width + chunk.begin;
      const Label* target = static_cast<const Label*>(view.target) + first;
      const T* upstream = view.upstream ? view.upstream + first : nullptr;
      T* losses = view.losses ? view.losses + first : nullptr;
      if (!whole || !is_moderate(view, upstream, n)) {
        if (!given.a) given = read_given(view, image, ys, chunk, scratch.given);
        single_pixels<T, Label>(view, given, corners, chunk, image, y, scratch.values, sums);
        continue;
      }
      const T wy0 = view.row_weights.w0[y], wy1 = view.row_weights.w1[y];
      const bool any = read_labels(view, chunk, target, upstream, wy0, wy1, stretch, sums, factors);
      if (any) {
        weighted_lse += row_of_chunk(view, cell, corners, chunk, target, wy0, wy1, factors, losses);
      } else if (losses) {
        for (int64_t x = 0; x < n; ++x) losses[x] = 0;
      }
    }
    stretch.flush();
    sums.loss += kLn2 * (double(sum_of_lanes<T>(weighted_lse)) + stretch.loss());
  }
}

// ------------------------------------------------------------------------------------ gradient
template <typename T>
void finish(const View<T>& view, int64_t image, int64_t y, T scale) {
  const int64_t K = view.K, K_padded = view.K_padded, columns = view.columns;
  // The memory of the first row of cells that touches this row of patches takes up the others'.
  T *gradients = nullptr, *smoothing = nullptr;
  for (int64_t run = 0; run < view.rows.n_runs; ++run) {
    const Run& ys = view.rows.runs[run];
    if (ys.i0 != y && ys.i1 != y) continue;
    const int64_t own = ((image * view.rows.n_runs + run) * 2 + (ys.i0 == y ? 0 : 1)) * columns;
    T* more = view.sums.gradients + own * K_padded;
    T* more_smoothing = view.sums.smoothing ? view.sums.smoothing + own : nullptr;
    if (!gradients) {
      gradients = more;
      smoothing = more_smoothing;
      continue;
    }
    for (int64_t i = 0; i < columns * K_padded; ++i) gradients[i] += more[i];
    if (smoothing) {
      for (int64_t x = 0; x < columns; ++x) smoothing[x] += more_smoothing[x];
    }
  }

  T* out = view.gradient + image * view.gradient_stride_b + y * view.gradient_stride_y;
  const int64_t stride_k = view.gradient_stride_k, stride_x = view.gradient_stride_x;
  const int64_t x_begin = gradients ? view.x_begin : view.w;
  const int64_t x_end = gradients ? view.x_begin + columns : view.w;
  for (int64_t x = 0; x < columns && gradients; ++x) {
    T* patch = gradients + x * K_padded;
    const T share = smoothing ? view.spread * smoothing[x] : T(0);
    if (smoothing) {
      for (int64_t k = 0; k < K; ++k) patch[k] -= share * view.weight[k];
    }
    for (int64_t k = 0; k < K; ++k) patch[k] *= scale;
  }
  if (stride_k == 1) {
    for (int64_t x = 0; x < view.w; ++x) {
      if (x < x_begin || x >= x_end) {
        std::memset(out + x * stride_x, 0, K * sizeof(T));
      } else {
        std::memcpy(out + x * stride_x, gradients + (x - x_begin) * K_padded, K * sizeof(T));
      }
    }
    return;
  }
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t x = 0; x < x_begin; ++x) out[k * stride_k + x * stride_x] = 0;
    for (int64_t x = x_begin; x < x_end; ++x) {
      out[k * stride_k + x * stride_x] = gradients[(x - x_begin) * K_padded + k];
    }
    for (int64_t x = x_end; x < view.w; ++x) out[k * stride_k + x * stride_x] = 0;
  }
}

template <typename T>
constexpr UpsampleCrossEntropyFunctions<T> kFunctions = {
    kMaxChunk<T>,
    pack<T>,
    {row_of_cells<T, uint8_t>, row_of_cells<T, int16_t>, row_of_cells<T, int32_t>,
     row_of_cells<T, int64_t>},
    finish<T>};

}  // namespace

namespace SEGMENTER_SIMD_LEVEL {

const UpsampleCrossEntropyKernels upsample_cross_entropy_kernels = {kFunctions<float>,
                                                                    kFunctions<double>};

}  // namespace SEGMENTER_SIMD_LEVEL
}  // namespace segmenter
