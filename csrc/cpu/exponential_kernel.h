// exp2 and log2 of exponential.h over arrays: how tests reach what kernels are made of.
#pragma once

#include <cstdint>

#include "simd.h"

namespace segmenter {

template <typename T>
struct ExponentialFunctions {
  void (*exp2)(const T* x, T* y, int64_t n);
  void (*log2)(const T* x, T* y, int64_t n);
};

struct ExponentialKernels {
  ExponentialFunctions<float> float32;
  ExponentialFunctions<double> float64;
};

SEGMENTER_DECLARE_KERNELS(ExponentialKernels, exponential_kernels)

}  // namespace segmenter
