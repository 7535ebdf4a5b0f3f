// What upsample_probabilities.cpp hands to the kernels of each SIMD level: plain pointers and
// sizes, see axis.h.
#pragma once

#include <cstdint>

#include "axis.h"
#include "simd.h"

namespace segmenter {

// Output rows of one run, at most; as many as leave registers for two results per row.
constexpr int kMaxRunRows = 8;

// Output rows [begin, end) between the patch rows i0 and i1, at most kMaxRunRows. From one row to
// the next the weight of i1 grows by `step`.
template <typename T>
struct RowRun {
  int64_t begin, end;
  int64_t i0, i1;
  T step;
};

// A stretch of output columns that is worked on at a time.
template <typename T>
struct ColumnTile {
  int64_t begin, end;                // output columns
  int64_t patch_begin, patch_count;  // patch columns that they touch
  AxisView<T> cols;                  // counted from `begin`
};

template <typename T>
struct UpsampleProbabilitiesView {
  const T* logits;
  T* out;
  int64_t out_bytes;
  int64_t K;
  int64_t stride_b, stride_k, stride_y, stride_x;
  int64_t height, width;
  const RowRun<T>* runs;
  const T *wy0, *wy1;  // (height)
};

// Memory of one worker for tiles of at most `columns` output columns, a multiple of kTablePadding.
template <typename T>
struct ProbabilityScratch {
  int64_t columns;
  T* patches;          // (K, patch columns): one row of patches, class-first
  T* largest;          // (patch columns)
  uint8_t* narrow;     // (patch columns)
  T* line;             // (columns + kTablePadding)
  T* blended[2];       // (columns / lanes, K, lanes): patch rows at every output column
  uint8_t* steady[2];  // (columns / lanes)
  T* shift;            // (kMaxRunRows, columns)
  T* inverse;          // (kMaxRunRows, columns)
  T* result;           // (kMaxRunRows, columns)
};

// Computes the output rows of runs[first .. last) of one image in one tile of columns.
template <typename T>
using UpsampleProbabilitiesKernel = void (*)(const UpsampleProbabilitiesView<T>&,
                                             const ColumnTile<T>&, const ProbabilityScratch<T>&,
                                             int64_t image, int64_t first, int64_t last);

// Indexed by ProbabilityOutput.
struct UpsampleProbabilitiesKernels {
  UpsampleProbabilitiesKernel<float> float32[2];
  UpsampleProbabilitiesKernel<double> float64[2];
};

SEGMENTER_DECLARE_KERNELS(UpsampleProbabilitiesKernels, upsample_probabilities_kernels)

}  // namespace segmenter
