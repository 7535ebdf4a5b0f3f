// What upsample_cross_entropy.cpp hands to the kernels of each SIMD level: plain pointers and
// sizes, see axis.h.
#pragma once

#include <cstdint>

#include "axis.h"
#include "simd.h"

namespace segmenter {

// Output columns [begin, end) between patches i0 and i1, few enough for one call of a kernel. The
// weight of i1 is w1 in the first column and grows by `step` per column, exactly: `step` is 0 where
// all columns take the value of one patch.
template <typename T>
struct Chunk {
  int64_t begin, end;
  int64_t i0, i1;
  T w1, step;
};

// Weights of i0 and i1 per output coordinate; followed by kTablePadding readable entries.
template <typename T>
struct WeightsView {
  const T* w0;
  const T* w1;
};

// Patch logits as kernels read them, written by `pack`. Everything is in units of log 2.
template <typename T>
struct PackedPatches {
  T* values;    // (B, h, columns, K_padded): log2 softmax of the patch
  T* smallest;  // (B, h, columns): over the classes; -infinity for patches that are not ordinary
  T* weighted;  // (B, h, columns): sum_c w_c values[c]; null without label smoothing
};

// What the rows of cells add to their upper and lower row of patches: separate memory for each, so
// that nothing is shared between threads. Null when no gradient is wanted.
template <typename T>
struct PatchRowSums {
  T* gradients;  // (B, n_runs, 2, columns, K_padded)
  T* smoothing;  // (B, n_runs, 2, columns): sum of upstream times bilinear weight
};

template <typename T>
struct UpsampleCrossEntropyView {
  const T* logits;
  int64_t K, K_padded, h, w;
  int64_t stride_b, stride_k, stride_y, stride_x;
  int64_t height, width;
  int64_t x_begin, columns;                 // patch columns that output pixels touch
  AxisView<T> rows, cols;                   // weights as PyTorch rounds them
  WeightsView<T> row_weights, col_weights;  // weights rounded once
  const Chunk<T>* chunks;
  int64_t n_chunks;

  const void* target;  // (B, height, width)
  const T* upstream;   // (B, height, width) or null
  const T* weight;     // (K_padded), 0 from K on
  T keep;              // 1 - s
  T spread;            // s/K
  T spread_weight;     // s/K W
  // Rows whose largest upstream is outside these, and not 0, go pixel by pixel.
  T smallest_upstream, largest_upstream;
  int64_t ignore_index;

  T* losses;    // (B, height, width) or null
  T* gradient;  // (B, K, h, w) or null
  int64_t gradient_stride_b, gradient_stride_k, gradient_stride_y, gradient_stride_x;

  PackedPatches<T> patches;
  PatchRowSums<T> sums;
};

// Memory of one worker.
template <typename T>
struct CrossEntropyScratch {
  T* first;      // (K_padded): exponentials of the chunk's first pixel in one output row
  T* ratio;      // (K_padded): from one pixel to the next
  T* values;     // (K_padded): the logits of one pixel
  T* lifted[4];  // (K_padded) each: a cell's packed corners, classes too small for T lifted
  T* given[4];   // (K_padded) each: a cell's corners as they were given
};

// What one row of cells adds up.
struct CrossEntropySums {
  double loss, weight;
  int64_t valid_pixels, wrong_labels;
};

// Factors A times upstream up to the largest size cannot overflow a polynomial, see the kernel; if
// the largest of a row is not below the smallest, nothing that matters beside it underflows.
constexpr double kLargestFactor = 0x1p20, kSmallestFactor = 0x1p-40;
// Nor can the ratio between pixels this far apart, in patches. Chunks have one column if their step
// is larger: with fewer than three columns to a cell a progression saves nothing.
constexpr double kMaxStep = 0.375;

template <typename T>
struct UpsampleCrossEntropyFunctions {
  int64_t max_chunk;  // columns
  // Packs row y of an image's patches.
  void (*pack)(const UpsampleCrossEntropyView<T>&, int64_t image, int64_t y);
  // Sums, losses and PatchRowSums of the output rows of rows.runs[run]. Indexed by IntegerType.
  void (*row_of_cells[4])(const UpsampleCrossEntropyView<T>&, const CrossEntropyScratch<T>&,
                          int64_t image, int64_t run, CrossEntropySums&);
  // Adds up the PatchRowSums of row y of an image's patches, in the order of the runs, and writes
  // `scale` times the sum into the gradient.
  void (*finish)(const UpsampleCrossEntropyView<T>&, int64_t image, int64_t y, T scale);
};

struct UpsampleCrossEntropyKernels {
  UpsampleCrossEntropyFunctions<float> float32;
  UpsampleCrossEntropyFunctions<double> float64;
};

SEGMENTER_DECLARE_KERNELS(UpsampleCrossEntropyKernels, upsample_cross_entropy_kernels)

}  // namespace segmenter
