// What upsample_argmax.cpp hands to the kernels of each SIMD level: plain pointers and sizes, see
// axis.h.
#pragma once

#include <cstdint>

#include "axis.h"
#include "simd.h"

namespace segmenter {

template <typename T>
struct UpsampleArgmaxView {
  const T* logits;
  void* labels;
  int64_t K, K_padded;
  int64_t stride_b, stride_k, stride_y, stride_x;
  int64_t height, width;
  int64_t x_begin, x_end;  // patch columns that any output pixel touches
  AxisView<T> rows, cols;
};

// Memory of one worker; arrays of classes have K_padded entries.
template <typename T>
struct Scratch {
  T* patches[2];         // (x_end - x_begin, K_padded): patch rows, class-last
  uint8_t* ordinary[2];  // (x_end - x_begin): whether all of a patch's logits are ordinary numbers
  int32_t* kept;         // classes that survive in the cell
  T* corners[4];         // their corners a, b, c, d
  T* left;               // their values on the cell's left and right edge, in one output row
  T* right;
  int32_t* row_kept;  // classes that survive in the row
};

// Labels the output rows of rows.runs[first .. last) of one image.
template <typename T>
using UpsampleArgmaxKernel = void (*)(const UpsampleArgmaxView<T>&, const Scratch<T>&,
                                      int64_t image, int64_t first, int64_t last);

// Indexed by LabelType.
struct UpsampleArgmaxKernels {
  UpsampleArgmaxKernel<float> float32[3];
  UpsampleArgmaxKernel<double> float64[3];
};

SEGMENTER_DECLARE_KERNELS(UpsampleArgmaxKernels, upsample_argmax_kernels)

}  // namespace segmenter
