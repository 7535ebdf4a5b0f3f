// What windows.cpp hands to the kernels of each SIMD level: plain pointers and sizes, see axis.h.
#pragma once

#include <cstdint>

#include "axis.h"
#include "simd.h"

namespace segmenter {

template <typename T>
struct TapsView {
  const int32_t* start;
  const int32_t* index;
  const T* weight;
};

// Outputs [begin, end) that read the same `n` patches, index[0 .. n).
template <typename T>
struct TapRun {
  int64_t begin, end;
  int64_t n;
  const int32_t* index;
  // The weight of tap i at output begin + j is weight[i * stride + j]; kTablePadding readable
  // entries follow.
  const T* weight;
  int64_t stride;
};

// All windows of a view as one grid of patches, class-last.
template <typename T>
struct GridView {
  const T* patches;         // (rows, columns, K_padded)
  const uint8_t* ordinary;  // (rows, columns): all numbers, none so large that a sum could overflow
  int64_t rows, columns;
};

// Packs one row of a grid: a row of `count` windows, each `w` patches wide.
template <typename T>
struct GridRow {
  const T* logits;
  int64_t count, w;
  int64_t stride_n, stride_k, stride_x;
  int64_t K, K_padded;
  T* patches;
  uint8_t* ordinary;
};

// ------------------------------------------------------------------------------ one view, labels
template <typename T>
struct WindowLabelsView {
  GridView<T> grid;
  int64_t K, K_padded, width;
  const TapRun<T>* row_runs;
  const TapRun<T>* column_runs;
  int64_t n_column_runs;
  void* labels;  // (H, W)
};

// Memory of one worker; most_y and most_x are the largest numbers of taps.
template <typename T>
struct WindowLabelsScratch {
  T* largest;         // (K_padded)
  T* values;          // (most_y, most_x, K_padded): survivors' patches
  T* edges;           // (most_x, K_padded): survivors in one output row
  int32_t* kept;      // (K_padded)
  int32_t* row_kept;  // (K_padded)
};

struct WindowLabelsKernels {
  void (*pack_float32)(const GridRow<float>&);
  void (*pack_float64)(const GridRow<double>&);
  // The outputs of one run of rows; indexed by LabelType.
  void (*float32[3])(const WindowLabelsView<float>&, const WindowLabelsScratch<float>&, int64_t run);
  void (*float64[3])(const WindowLabelsView<double>&, const WindowLabelsScratch<double>&,
                     int64_t run);
};

SEGMENTER_DECLARE_KERNELS(WindowLabelsKernels, window_labels_kernels)

// ------------------------------------------------------------------------------ averaged softmax
template <typename T>
struct WindowProbabilitiesView {
  const GridView<T>* grids;  // log-softmaxed, one per view
  const TapsView<T>* rows;
  const TapsView<T>* columns;
  int64_t n_views;
  int64_t K, K_padded, height, width;
  int label_bytes;  // of a label; 0 if none is wanted
  void* labels;
  T* top1;
  T* all;
};

constexpr int64_t kPixelTile = 16;

// Memory of one worker.
template <typename T>
struct WindowProbabilitiesScratch {
  T* const* rows;             // per view (columns, K_padded): the grid's rows blended
  uint8_t* const* ordinary;   // per view (columns)
  T* powers;                  // (n_views, K_padded)
  T* shares;                  // (n_views): 1 / (sum of powers x n_views)
  T* mean;                    // (kPixelTile, K_padded)
};

struct WindowProbabilitiesKernels {
  void (*pack_float32)(const GridRow<float>&);
  void (*pack_float64)(const GridRow<double>&);
  // One row of outputs.
  void (*float32)(const WindowProbabilitiesView<float>&, const WindowProbabilitiesScratch<float>&,
                  int64_t y);
  void (*float64)(const WindowProbabilitiesView<double>&, const WindowProbabilitiesScratch<double>&,
                  int64_t y);
};

SEGMENTER_DECLARE_KERNELS(WindowProbabilitiesKernels, window_probabilities_kernels)

}  // namespace segmenter
