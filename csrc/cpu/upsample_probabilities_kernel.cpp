// The upsample + softmax kernel. Compiled once per SIMD level, with SEGMENTER_SIMD_LEVEL naming the
// namespace; everything but the table at the end has internal linkage (see
// upsample_probabilities_kernel.h).
//
// Three facts make a probability cost little more than an addition.
//
// 1. A shift common to all classes of a patch changes no probability: interpolation is linear, so
//    it shifts all classes of a pixel alike, and softmax ignores that. Subtracting from each patch
//    its largest logit leaves values <= 0, and so are their blends, which are averages with
//    weights >= 0. Powers are then at most 1: no pixel needs a running maximum.
//
// 2. Bilinear interpolation is separable. A patch row is blended to every output column once, and
//    serves all the output rows (H / h of them above it, and as many below) that read it.
//
// 3. Between two patch rows u and v (blended, in base 2) a logit is linear from one output row to
//    the next, so its power is a geometric progression:
//      z_n = w0 u + (w1 + n step) (v - u),   2^z_n = 2^z_0 g^n,   g = 2^(step (v - u)).
//    Two exponentials per class and column serve kMaxRunRows rows, at one product each; more rows
//    would let g's rounding error grow as n.
//
// The lanes of a vector are output columns, so that sums over classes need no sum over lanes and
// the probabilities of one class leave in long contiguous stretches. Their sum must not vanish:
// that holds where all of a patch's logits lie within kWidest of its largest (every power is then a
// normal number). A block of columns that reads another patch, or one with NaN or infinities, is
// "not steady" and takes the textbook path: per pixel the largest logit, a sum, a quotient.
#include "upsample_probabilities_kernel.h"

#include <limits>
#include <type_traits>
#include <utility>

#include "../cell.h"
#include "exponential.h"
#include "stream.h"
#include "vector.h"

namespace segmenter {
namespace {

// In base 2: powers down to 2^-kWidest, and products of them with g <= 1, stay normal numbers.
template <typename T>
constexpr T kWidest = std::is_same<T, float>::value ? T(100) : T(900);

// patches[k, x] = log2(e) (l_k - max_c l_c) for one row of patches; narrow[x] tells whether a patch
// stays within kWidest. NaN and infinities lead to a NaN in the pixels where PyTorch has one.
template <typename T>
void pack_patches(const UpsampleProbabilitiesView<T>& view, const ColumnTile<T>& tile,
                  const ProbabilityScratch<T>& scratch, int64_t image, int64_t y) {
  const int64_t columns = tile.patch_count, step = view.stride_x;
  const T* source =
      view.logits + image * view.stride_b + y * view.stride_y + tile.patch_begin * step;
  T* largest = scratch.largest;
  for (int64_t x = 0; x < columns; ++x) {
    largest[x] = -std::numeric_limits<T>::infinity();
    scratch.narrow[x] = 1;
  }
  for (int64_t k = 0; k < view.K; ++k) {
    const T* logits = source + k * view.stride_k;
    for (int64_t x = 0; x < columns; ++x) largest[x] = greater(logits[x * step], largest[x]);
  }
  // A finite logit stays finite, however far below the largest.
  constexpr T lowest = std::numeric_limits<T>::lowest(), farthest = lowest / 4;
  for (int64_t k = 0; k < view.K; ++k) {
    const T* logits = source + k * view.stride_k;
    T* patches = scratch.patches + k * columns;
    for (int64_t x = 0; x < columns; ++x) {
      const T logit = logits[x * step];
      const T below = logit - largest[x];
      patches[x] = (below < farthest && logit >= lowest ? farthest : below) * T(kLog2E);
      scratch.narrow[x] &= patches[x] >= -kWidest<T>;
    }
  }
}

// blended[., k, .] = patches[k, i0] w0 + patches[k, i1] w1 at the tile's columns, a block of lanes
// after the other.
template <typename T>
void blend_columns(const UpsampleProbabilitiesView<T>& view, const ColumnTile<T>& tile,
                   const ProbabilityScratch<T>& scratch, T* blended, uint8_t* steady) {
  constexpr int lanes = kLanes<T>;
  const AxisView<T>& cols = tile.cols;
  const int64_t blocks = (tile.end - tile.begin + lanes - 1) / lanes;
  for (int64_t k = 0; k < view.K; ++k) {
    const T* patches = scratch.patches + k * tile.patch_count;
    for (int64_t r = 0; r < cols.n_runs; ++r) {
      const Run& xs = cols.runs[r];
      const Values<T> left = splat(patches[xs.i0 - tile.patch_begin]);
      const Values<T> right = splat(patches[xs.i1 - tile.patch_begin]);
      // Lanes past the run's end are written again by the next run.
      for (int64_t x = xs.begin; x < xs.end; x += lanes) {
        store(scratch.line + x, blend(left, right, load(cols.w0 + x), load(cols.w1 + x)));
      }
    }
    for (int64_t block = 0; block < blocks; ++block) {
      store(blended + (block * view.K + k) * lanes, load(scratch.line + block * lanes));
    }
  }
  for (int64_t block = 0; block < blocks; ++block) steady[block] = 1;
  for (int64_t r = 0; r < cols.n_runs; ++r) {
    const Run& xs = cols.runs[r];
    const uint8_t* narrow = scratch.narrow;
    if (narrow[xs.i0 - tile.patch_begin] && narrow[xs.i1 - tile.patch_begin]) continue;
    for (int64_t block = xs.begin / lanes; block * lanes < xs.end; ++block) steady[block] = 0;
  }
}

// One block of columns in one run of rows.
template <typename T>
struct Block {
  const T *upper, *lower;  // (K, lanes)
  int64_t K;
  const T *w0, *w1;  // (rows)
  T step;
};

// 2^z of one class in the run's first row, and the ratio of a row's to that of the row before.
template <typename T>
struct Progression {
  Values<T> power, ratio;
};

template <typename T>
inline Progression<T> progression(const Block<T>& block, int64_t k) {
  const Values<T> upper = load(block.upper + k * kLanes<T>);
  const Values<T> lower = load(block.lower + k * kLanes<T>);
  return {exp2<T>(blend(upper, lower, block.w0[0], block.w1[0])),
          exp2<T>((lower - upper) * block.step)};
}

// Per row the sum over classes of 2^z, and with kLargest the largest of them.
template <typename T, int N, bool kLargest>
inline void reduce_rows(const Block<T>& block, Values<T>* sum, Values<T>* largest) {
  Values<T> s[N] = {}, m[N] = {};
  for (int64_t k = 0; k < block.K; ++k) {
    auto [power, ratio] = progression(block, k);
    for (int n = 0; n < N; ++n) {
      s[n] += power;
      if (kLargest) m[n] = greater(power, m[n]);
      power *= ratio;
    }
  }
  for (int n = 0; n < N; ++n) {
    sum[n] = s[n];
    if (kLargest) largest[n] = m[n];
  }
}

// 2^x for x <= 0 with the special values: 0 where it underflows, NaN of NaN.
template <typename T>
inline Values<T> exp2_special(Values<T> x) {
  const Values<T> power = x > FloatFormat<T>::min_exponent ? exp2<T>(x) : Values<T>{};
  return x == x ? power : x;
}

template <typename T>
inline Values<T> logit(const Block<T>& block, int64_t k, int row) {
  return blend(load(block.upper + k * kLanes<T>), load(block.lower + k * kLanes<T>),
               block.w0[row], block.w1[row]);
}

// The largest z of one row and the sum over classes of 2^(z - largest), whatever the logits. +inf
// gives inf - inf = NaN, and so does a row whose logits are all -inf.
template <typename T>
void reduce_row(const Block<T>& block, int row, Values<T>& largest, Values<T>& sum) {
  largest = splat(-std::numeric_limits<T>::infinity());
  for (int64_t k = 0; k < block.K; ++k) largest = greater(logit(block, k, row), largest);
  sum = Values<T>{};
  for (int64_t k = 0; k < block.K; ++k) sum += exp2_special<T>(logit(block, k, row) - largest);
}

template <typename T>
inline void store_some(T* to, Values<T> values, int64_t count) {
  if (count >= kLanes<T>) {
    store(to, values);
  } else {
    std::memcpy(to, &values, count * sizeof(T));
  }
}

// A run of N rows between two blended patch rows, in one tile.
template <typename T>
struct Strip {
  const T *upper, *lower;  // (blocks, K, lanes)
  const uint8_t *upper_steady, *lower_steady;
  int64_t K, columns;
  const T *w0, *w1;
  T step;
  int64_t width;  // of an output row
  int64_t plane;  // from one class of the output to the next
  bool stream;    // the output, past the caches

  int64_t blocks() const { return (columns + kLanes<T> - 1) / kLanes<T>; }
  bool steady(int64_t block) const { return upper_steady[block] & lower_steady[block]; }
  Block<T> block(int64_t i) const {
    const int64_t offset = i * K * kLanes<T>;
    return {upper + offset, lower + offset, K, w0, w1, step};
  }
};

// out[y, x] = max_k p_k = max_k 2^z_k / sum_k 2^z_k
template <typename T, int N>
void write_top1(const Strip<T>& strip, const ProbabilityScratch<T>&, T* out) {
  for (int64_t i = 0; i < strip.blocks(); ++i) {
    const Block<T> block = strip.block(i);
    Values<T> top1[N];
    if (strip.steady(i)) {
      Values<T> sum[N];
      reduce_rows<T, N, true>(block, sum, top1);
      for (int n = 0; n < N; ++n) top1[n] /= sum[n];
    } else {
      for (int n = 0; n < N; ++n) {
        Values<T> largest, sum;
        reduce_row(block, n, largest, sum);
        top1[n] = T(1) / sum;
      }
    }
    const int64_t x = i * kLanes<T>;
    for (int n = 0; n < N; ++n) store_some(out + n * strip.width + x, top1[n], strip.columns - x);
  }
}

// out[k, y, x] = p_k = 2^(z_k - shift) / sum_c 2^(z_c - shift), with shift 0 in steady blocks. The
// powers are computed twice, for the sum and for the quotient, by the same instructions: they sum
// to 1 as if they had been kept.
template <typename T, int N>
void write_all(const Strip<T>& strip, const ProbabilityScratch<T>& scratch, T* out) {
  constexpr int lanes = kLanes<T>;
  const int64_t columns = scratch.columns;
  for (int64_t i = 0; i < strip.blocks(); ++i) {
    const Block<T> block = strip.block(i);
    Values<T> sum[N], shift[N] = {};
    if (strip.steady(i)) {
      reduce_rows<T, N, false>(block, sum, nullptr);
    } else {
      for (int n = 0; n < N; ++n) reduce_row(block, n, shift[n], sum[n]);
    }
    for (int n = 0; n < N; ++n) {
      store(scratch.inverse + n * columns + i * lanes, T(1) / sum[n]);
      store(scratch.shift + n * columns + i * lanes, shift[n]);
    }
  }
  for (int64_t k = 0; k < strip.K; ++k, out += strip.plane) {
    for (int64_t i = 0; i < strip.blocks(); ++i) {
      const Block<T> block = strip.block(i);
      T* result = scratch.result + i * lanes;
      const T* inverse = scratch.inverse + i * lanes;
      if (strip.steady(i)) {
        auto [power, ratio] = progression(block, k);
        for (int n = 0; n < N; ++n) {
          store(result + n * columns, power * load(inverse + n * columns));
          power *= ratio;
        }
      } else {
        const T* shift = scratch.shift + i * lanes;
        for (int n = 0; n < N; ++n) {
          const Values<T> power =
              exp2_special<T>(logit(block, k, n) - load(shift + n * columns));
          store(result + n * columns, power * load(inverse + n * columns));
        }
      }
    }
    for (int n = 0; n < N; ++n) {
      const T* result = scratch.result + n * columns;
      if (strip.stream) {
        stream_copy(result, strip.columns, out + n * strip.width);
      } else {
        std::memcpy(out + n * strip.width, result, strip.columns * sizeof(T));
      }
    }
  }
  if (strip.stream) finish_streams();
}

template <typename T>
using StripWriter = void (*)(const Strip<T>&, const ProbabilityScratch<T>&, T*);

// The writer of n rows is writers[n - 1].
template <typename T, bool kAll, int... n>
inline StripWriter<T> strip_writer(int64_t rows, std::integer_sequence<int, n...>) {
  constexpr StripWriter<T> writers[] = {(kAll ? write_all<T, n + 1> : write_top1<T, n + 1>)...};
  return writers[rows - 1];
}

template <typename T, bool kAll>
void probability_rows(const UpsampleProbabilitiesView<T>& view, const ColumnTile<T>& tile,
                      const ProbabilityScratch<T>& scratch, int64_t image, int64_t first,
                      int64_t last) {
  T* out = view.out + image * (kAll ? view.K : 1) * view.height * view.width + tile.begin;
  int64_t held[2] = {-1, -1};  // the patch row that each half of the scratch memory holds
  for (int64_t r = first; r < last; ++r) {
    const RowRun<T>& ys = view.runs[r];
    const int64_t needed[2] = {ys.i0, ys.i1};
    for (int64_t y : needed) {
      if (held[y % 2] == y) continue;
      pack_patches(view, tile, scratch, image, y);
      blend_columns(view, tile, scratch, scratch.blended[y % 2], scratch.steady[y % 2]);
      held[y % 2] = y;
    }
    Strip<T> strip;
    strip.upper = scratch.blended[ys.i0 % 2];
    strip.lower = scratch.blended[ys.i1 % 2];
    strip.upper_steady = scratch.steady[ys.i0 % 2];
    strip.lower_steady = scratch.steady[ys.i1 % 2];
    strip.K = view.K;
    strip.columns = tile.end - tile.begin;
    strip.w0 = view.wy0 + ys.begin;
    strip.w1 = view.wy1 + ys.begin;
    strip.step = ys.step;
    strip.width = view.width;
    strip.plane = view.height * view.width;
    strip.stream = view.out_bytes >= kStreamBytes;
    strip_writer<T, kAll>(ys.end - ys.begin, std::make_integer_sequence<int, kMaxRunRows>{})(
        strip, scratch, out + ys.begin * view.width);
  }
}

}  // namespace

namespace SEGMENTER_SIMD_LEVEL {

const UpsampleProbabilitiesKernels upsample_probabilities_kernels = {
    {probability_rows<float, false>, probability_rows<float, true>},
    {probability_rows<double, false>, probability_rows<double, true>},
};

}  // namespace SEGMENTER_SIMD_LEVEL
}  // namespace segmenter
