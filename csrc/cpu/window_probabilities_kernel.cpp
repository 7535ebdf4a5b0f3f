// Softmax averaged over views, once per SIMD level. Per output row the grid's rows are blended once
// for all columns. Then pixel by pixel, so that the views' powers stay in the nearest cache: one pass
// over the classes of each view blends along x and takes powers, and one over all normalises them
// and adds them up.
//
// No maximum is subtracted: patches are log-softmaxed, and a pixel is a convex combination of them
// (log_softmax.h). Only a pixel whose sum comes out too small, or that reads a NaN or an infinity, is
// evaluated again minus its maximum.
#include <cmath>
#include <limits>

#include "../cell.h"
#include "argmax.h"
#include "exponential.h"
#include "log_softmax.h"
#include "pack.h"
#include "vector.h"
#include "windows_kernel.h"

namespace segmenter {
namespace {

// The logit of the classes that only fill up a vector.
template <typename T>
constexpr T kAbsent = T(-1e30);

// Ordinary patches are log-softmaxed; others are multiplied by log2(e) only.
template <typename T>
void pack_grid_row(const GridRow<T>& row) {
  for (int64_t n = 0; n < row.count; ++n) {
    T* patches = row.patches + n * row.w * row.K_padded;
    pack_class_last(row.logits + n * row.stride_n, row.stride_k, row.stride_x, row.K, row.w,
                    row.K_padded, patches);
    for (int64_t x = 0; x < row.w; ++x) {
      T* patch = patches + x * row.K_padded;
      const T smallest = log2_softmax(patch, row.K, row.K_padded, kAbsent<T>);
      const bool ordinary = smallest > -std::numeric_limits<T>::infinity();
      row.ordinary[n * row.w + x] = ordinary;
      for (int64_t k = 0; k < row.K && !ordinary; ++k) patch[k] *= T(kLog2E);
    }
  }
}

// The sums of powers that need no second look: 65,536 classes at the least power are nothing beside.
template <typename T>
constexpr T kLeastSum = sizeof(T) == 4 ? T(0x1p-60) : T(0x1p-600);

// One pixel's taps along x.
template <typename T>
struct Columns {
  int64_t n;
  const int32_t* index;
  const T* weight;
};

// power = 2^z for the blend z of N columns of `row`; returns the sum. N = 0 means any number.
template <typename T, int N>
T blend_and_sum(const T* row, const Columns<T>& columns, int64_t K_padded, T* power) {
  // Copies, since the compiler must take every store below for a change of the tables.
  const T* from[N > 0 ? N : 1];
  Values<T> weight[N > 0 ? N : 1];
  for (int j = 0; j < N; ++j) {
    from[j] = row + columns.index[j] * K_padded;
    weight[j] = splat(columns.weight[j]);
  }
  Values<T> sum{};
  for (int64_t k = 0; k < K_padded; k += kLanes<T>) {
    Values<T> z{};
    if constexpr (N > 0) {
      for (int j = 0; j < N; ++j) z += load(from[j] + k) * weight[j];
    } else {
      for (int64_t j = 0; j < columns.n; ++j) {
        z += load(row + columns.index[j] * K_padded + k) * columns.weight[j];
      }
    }
    const Values<T> e = exp2<T>(z);
    store(power + k, e);
    sum += e;
  }
  return sum_of_lanes<T>(sum);
}

template <typename T>
T blend_and_sum(const T* row, const Columns<T>& columns, int64_t K_padded, T* power) {
  switch (columns.n) {
    case 1:
      return blend_and_sum<T, 1>(row, columns, K_padded, power);
    case 2:
      return blend_and_sum<T, 2>(row, columns, K_padded, power);
    case 3:
      return blend_and_sum<T, 3>(row, columns, K_padded, power);
    case 4:
      return blend_and_sum<T, 4>(row, columns, K_padded, power);
    default:
      return blend_and_sum<T, 0>(row, columns, K_padded, power);
  }
}

// The same for any logits, minus their maximum. A pixel that reads a NaN or +infinity, or nothing
// but -infinity, is NaN in every class.
template <typename T>
T blend_and_sum_minus_largest(const T* row, const Columns<T>& columns, int64_t K, int64_t K_padded,
                              T* power) {
  T largest = -std::numeric_limits<T>::infinity();
  bool defined = true;
  for (int64_t k = 0; k < K; ++k) {
    T z = 0;
    for (int64_t j = 0; j < columns.n; ++j) {
      z += row[columns.index[j] * K_padded + k] * columns.weight[j];
    }
    power[k] = z;
    defined &= z == z;
    largest = greater(largest, z);
  }
  defined &= std::abs(largest) < std::numeric_limits<T>::infinity();
  T sum = 0;
  for (int64_t k = 0; k < K_padded; ++k) {
    if (k >= K) {
      power[k] = 0;
    } else {
      power[k] = defined ? std::exp2(power[k] - largest) : std::numeric_limits<T>::quiet_NaN();
    }
    sum += power[k];
  }
  return sum;
}

template <typename T>
void blend_rows(const GridView<T>& grid, const TapsView<T>& taps, int64_t y, int64_t K_padded,
                T* out, uint8_t* ordinary) {
  const int64_t length = grid.columns * K_padded;
  const int32_t begin = taps.start[y], end = taps.start[y + 1];
  for (int64_t x = 0; x < grid.columns; ++x) {
    ordinary[x] = 1;
    for (int32_t t = begin; t < end; ++t) {
      ordinary[x] &= grid.ordinary[taps.index[t] * grid.columns + x];
    }
  }
  if (end - begin == 2) {
    const T *a = grid.patches + taps.index[begin] * length,
            *b = grid.patches + taps.index[begin + 1] * length;
    const T wa = taps.weight[begin], wb = taps.weight[begin + 1];
    for (int64_t i = 0; i < length; i += kLanes<T>) {
      store(out + i, load(a + i) * wa + load(b + i) * wb);
    }
    return;
  }
  for (int64_t i = 0; i < length; i += kLanes<T>) {
    Values<T> sum{};
    for (int32_t t = begin; t < end; ++t) {
      sum += load(grid.patches + taps.index[t] * length + i) * taps.weight[t];
    }
    store(out + i, sum);
  }
}

template <typename T>
void write_label(const WindowProbabilitiesView<T>& view, int64_t pixel, const T* mean) {
  Argmax<T> argmax;
  for (int64_t k = 0; k < view.K_padded; k += kLanes<T>) argmax.add(load(mean + k));
  const int32_t label = argmax.winner();
  switch (view.label_bytes) {
    case 1:
      static_cast<uint8_t*>(view.labels)[pixel] = static_cast<uint8_t>(label);
      break;
    case 2:
      static_cast<int16_t*>(view.labels)[pixel] = static_cast<int16_t>(label);
      break;
    default:
      static_cast<int32_t*>(view.labels)[pixel] = label;
  }
}

template <typename T>
void average_row(const WindowProbabilitiesView<T>& view,
                 const WindowProbabilitiesScratch<T>& scratch, int64_t y) {
  const int64_t K_padded = view.K_padded;
  for (int64_t v = 0; v < view.n_views; ++v) {
    blend_rows(view.grids[v], view.rows[v], y, K_padded, scratch.rows[v], scratch.ordinary[v]);
  }
  for (int64_t tile = 0; tile < view.width; tile += kPixelTile) {
    const int64_t pixels = lesser(kPixelTile, view.width - tile);
    for (int64_t p = 0; p < pixels; ++p) {
      const int64_t x = tile + p;
      T* mean = scratch.mean + p * K_padded;
      for (int64_t v = 0; v < view.n_views; ++v) {
        const TapsView<T>& taps = view.columns[v];
        const int32_t begin = taps.start[x];
        const Columns<T> columns = {taps.start[x + 1] - begin, taps.index + begin,
                                    taps.weight + begin};
        T* power = scratch.powers + v * K_padded;
        bool ordinary = true;
        for (int64_t j = 0; j < columns.n; ++j) {
          ordinary &= scratch.ordinary[v][columns.index[j]] != 0;
        }
        T sum = 0;
        if (ordinary) sum = blend_and_sum(scratch.rows[v], columns, K_padded, power);
        // Beside a smaller sum the least power, which stands for 0, might show.
        if (!(sum >= kLeastSum<T>)) {
          sum = blend_and_sum_minus_largest(scratch.rows[v], columns, view.K, K_padded, power);
        }
        scratch.shares[v] = T(1) / (sum * T(view.n_views));
      }
      for (int64_t k = 0; k < K_padded; k += kLanes<T>) {
        Values<T> total = load(scratch.powers + k) * scratch.shares[0];
        for (int64_t v = 1; v < view.n_views; ++v) {
          total += load(scratch.powers + v * K_padded + k) * scratch.shares[v];
        }
        store(mean + k, total);
      }
      const int64_t pixel = y * view.width + x;
      if (view.label_bytes) write_label(view, pixel, mean);
      if (view.top1) {
        T top = mean[0];
        for (int64_t k = 1; k < view.K; ++k) top = greater(mean[k], top);
        view.top1[pixel] = mean[0] == mean[0] ? top : mean[0];
      }
    }
    if (view.all) {
      for (int64_t k = 0; k < view.K; ++k) {
        T* out = view.all + (k * view.height + y) * view.width + tile;
        for (int64_t p = 0; p < pixels; ++p) out[p] = scratch.mean[p * K_padded + k];
      }
    }
  }
}

}  // namespace

namespace SEGMENTER_SIMD_LEVEL {

const WindowProbabilitiesKernels window_probabilities_kernels = {
    pack_grid_row<float>,
    pack_grid_row<double>,
    average_row<float>,
    average_row<double>,
};

}  // namespace SEGMENTER_SIMD_LEVEL
}  // namespace segmenter
