// Windows, scales and flips to labels or probabilities, from patch logits; nothing of size
// K x H x W is stored unless it is the answer.
//
// A view is one scaled, perhaps mirrored, copy of an image, cut into windows. What becomes of its
// patch logits S before the softmax is linear and separable: upsampling a window, shifting it to its
// place, averaging overlaps, resizing, mirroring. So an output pixel's logits are a short sum,
//
//   z_k(y, x) = sum_i sum_j ty_i tx_j S_k(row_i, column_j),
//
// with S all windows' patches as one grid, and weights >= 0 that sum to 1: a convex combination.
// Taps are the rows of the two axes' operators. With several views, p = mean over views of
// softmax(z).
#pragma once

#include <vector>

#include "upsample_argmax.h"
#include "upsampling.h"

namespace segmenter {

// One axis: output y reads entries start[y] to start[y + 1] of index and weight.
struct Taps {
  const int32_t* start;   // (size + 1)
  const int32_t* index;   // increasing within an output
  const void* weight;     // of the logits' type
};

struct WindowView {
  const void* logits;     // (rows * columns, K, h, w), windows in row-major order
  int64_t rows, columns;  // of windows
  int64_t h, w;
  int64_t stride_n, stride_k, stride_y, stride_x;  // in elements
  Taps y, x;
};

struct Windows {
  std::vector<WindowView> views;
  FloatType type;
  int64_t K, H, W;
  int threads;
  SimdLevel simd;
};

// Labels (H, W) of a single view: the argmax of its logits. The first class wins ties, NaN counts as
// the largest value. They do not depend on the number of threads or the SIMD level.
// std::invalid_argument on sizes or tables that make no sense.
void window_labels(const Windows& windows, LabelType type, void* labels);

// What is wanted of the averaged probabilities; null for what is not.
struct WindowOutputs {
  LabelType labels_type;
  void* labels;  // (H, W)
  void* top1;    // (H, W), of the logits' type
  void* all;     // (K, H, W), of the logits' type
};

// No result depends on the number of threads. std::invalid_argument as above.
void window_probabilities(const Windows& windows, const WindowOutputs& outputs);

}  // namespace segmenter
