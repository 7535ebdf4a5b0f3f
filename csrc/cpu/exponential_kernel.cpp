// Compiled once per SIMD level, see exponential_kernel.h.
#include "exponential_kernel.h"

#include "exponential.h"

namespace segmenter {
namespace {

template <typename T>
Values<T> exp2_of(Values<T> x) {
  return exp2<T>(x);
}

template <typename T, Values<T> function(Values<T>)>
void map(const T* x, T* y, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const int64_t count = n - i < kLanes<T> ? n - i : kLanes<T>;
    T lanes[kLanes<T>];
    for (int j = 0; j < kLanes<T>; ++j) lanes[j] = j < count ? x[i + j] : T(1);
    store(lanes, function(load(lanes)));
    for (int j = 0; j < count; ++j) y[i + j] = lanes[j];
  }
}

}  // namespace

namespace SEGMENTER_SIMD_LEVEL {

const ExponentialKernels exponential_kernels = {
    {map<float, exp2_of<float>>, map<float, log2<float>>},
    {map<double, exp2_of<double>>, map<double, log2<double>>},
};

}  // namespace SEGMENTER_SIMD_LEVEL
}  // namespace segmenter
