#include "../cpu/exponential_kernel.h"
#include "bindings.h"

namespace segmenter {
namespace {

// Calls `function` of the float32 or float64 table on arrays at these addresses.
template <typename Function>
void apply(Function function, uintptr_t x_ptr, uintptr_t y_ptr, int64_t n,
           const std::string& dtype) {
  const ExponentialKernels& table = SEGMENTER_KERNELS(simd_level(), exponential_kernels);
  if (choose("dtype", dtype, kFloatTypes) == FloatType::float32) {
    function(table.float32, reinterpret_cast<const float*>(x_ptr), reinterpret_cast<float*>(y_ptr),
             n);
  } else {
    function(table.float64, reinterpret_cast<const double*>(x_ptr),
             reinterpret_cast<double*>(y_ptr), n);
  }
}

}  // namespace

void bind_exponential(py::module_& m) {
  m.def(
      "exp2",
      [](uintptr_t x_ptr, uintptr_t y_ptr, int64_t n, const std::string& dtype) {
        apply([](const auto& table, auto* x, auto* y, int64_t n) { table.exp2(x, y, n); }, x_ptr,
              y_ptr, n, dtype);
      },
      py::arg("x_ptr"), py::arg("y_ptr"), py::arg("n"), py::arg("dtype"),
      R"(2^x as the kernels compute it.

Args:
    x_ptr: address of n numbers up to the largest exponent; those below the smallest, and NaN, count
        as the smallest.
    y_ptr: address of n numbers; written.
    n: how many.
    dtype: "float32" or "float64", of x and y.
Raises:
    ValueError: unknown dtype.)");

  m.def(
      "log2",
      [](uintptr_t x_ptr, uintptr_t y_ptr, int64_t n, const std::string& dtype) {
        apply([](const auto& table, auto* x, auto* y, int64_t n) { table.log2(x, y, n); }, x_ptr,
              y_ptr, n, dtype);
      },
      py::arg("x_ptr"), py::arg("y_ptr"), py::arg("n"), py::arg("dtype"),
      R"(log2(x) as the kernels compute it.

Args:
    x_ptr: address of n positive normal numbers.
    y_ptr: address of n numbers; written.
    n: how many.
    dtype: "float32" or "float64", of x and y.
Raises:
    ValueError: unknown dtype.)");
}

}  // namespace segmenter
