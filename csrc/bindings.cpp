// Python module segmenter_fast._C. Kernels take addresses, sizes and strides, never tensors, so one
// build serves every version of PyTorch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cell.h"
#include "cpu/simd.h"
#include "cpu/upsample_argmax.h"

namespace py = pybind11;
using namespace segmenter;

namespace {

template <typename Value>
Value choose(const char* argument, const std::string& name,
             const std::map<std::string, Value>& choices) {
  const auto found = choices.find(name);
  if (found != choices.end()) return found->second;
  std::string expected;
  for (const auto& choice : choices) {
    expected += (expected.empty() ? "\"" : ", \"") + choice.first + "\"";
  }
  throw std::invalid_argument(std::string(argument) + ": expected one of " + expected + ", got \"" +
                              name + "\"");
}

const std::map<std::string, FloatType> kFloatTypes = {{"float32", FloatType::float32},
                                                      {"float64", FloatType::float64}};
const std::map<std::string, LabelType> kLabelTypes = {
    {"uint8", LabelType::uint8}, {"int16", LabelType::int16}, {"int32", LabelType::int32}};

py::dict build_info() {
  py::dict info;
  info["version"] = SEGMENTER_VERSION;
  info["compiler"] = SEGMENTER_COMPILER;
  info["compiler_version"] = SEGMENTER_COMPILER_VERSION;
  info["build_type"] = SEGMENTER_BUILD_TYPE;
  info["cxx_standard"] = static_cast<int>(__cplusplus / 100 % 100);
  info["simd_levels"] = compiled_simd_levels();
  info["cuda"] = false;
  return info;
}

void upsample_argmax_py(uintptr_t logits_ptr, uintptr_t out_ptr, const std::string& dtype,
                        const std::string& out_dtype, int64_t B, int64_t K, int64_t h, int64_t w,
                        int64_t stride_b, int64_t stride_k, int64_t stride_y, int64_t stride_x,
                        int64_t H, int64_t W, int64_t top, int64_t left, int64_t height,
                        int64_t width, int threads) {
  UpsampleArgmax args;
  args.logits = reinterpret_cast<const void*>(logits_ptr);
  args.labels = reinterpret_cast<void*>(out_ptr);
  args.logits_type = choose("dtype", dtype, kFloatTypes);
  args.labels_type = choose("out_dtype", out_dtype, kLabelTypes);
  args.B = B;
  args.K = K;
  args.h = h;
  args.w = w;
  args.stride_b = stride_b;
  args.stride_k = stride_k;
  args.stride_y = stride_y;
  args.stride_x = stride_x;
  args.H = H;
  args.W = W;
  args.top = top;
  args.left = left;
  args.height = height;
  args.width = width;
  args.threads = threads;
  args.simd = simd_level();
  py::gil_scoped_release release;
  upsample_argmax(args);
}

template <typename T>
py::list source_indices(int64_t in, int64_t out) {
  py::list sources;
  for (int64_t dst = 0; dst < out; ++dst) {
    const Source<T> source = source_index<T>(dst, in, out);
    sources.append(std::make_tuple(source.i0, source.i1, source.w0, source.w1));
  }
  return sources;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of segmenter_fast.";

  m.def("build_info", &build_info,
        R"(What this module was built from and with.

Returns:
    dict: version, compiler, compiler_version, build_type (str), cxx_standard (int),
    simd_levels (list of str, lowest first), cuda (bool).)");

  m.def(
      "simd_level", [] { return simd_level_name(simd_level()); },
      R"(The SIMD level that the kernels use now.

Returns:
    "generic", "avx2" or "avx512": the best that was compiled in and that the CPU has, or what the
    environment variable SEGMENTER_FAST_SIMD asks for.
Raises:
    ValueError: SEGMENTER_FAST_SIMD names an unknown level.
    RuntimeError: it names a level that this build or this CPU lacks.)");

  m.def(
      "source_indices",
      [](int64_t in_size, int64_t out_size, const std::string& dtype) {
        const FloatType type = choose("dtype", dtype, kFloatTypes);
        if (in_size < 1 || out_size < 1) {
          throw std::invalid_argument("source_indices: expected sizes >= 1, got " +
                                      std::to_string(in_size) + " and " + std::to_string(out_size));
        }
        return type == FloatType::float32 ? source_indices<float>(in_size, out_size)
                                          : source_indices<double>(in_size, out_size);
      },
      py::arg("in_size"), py::arg("out_size"), py::arg("dtype"),
      R"(The two samples and their weights that bilinear resizing blends along one axis.

Half-pixel centres, align_corners=False.

Args:
    in_size: samples of the input.
    out_size: samples of the output.
    dtype: "float32" or "float64", the precision of the logits.
Returns:
    list of (i0, i1, w0, w1), one per output sample.
Raises:
    ValueError: unknown dtype, sizes below 1.)");

  m.def("upsample_argmax", &upsample_argmax_py, py::arg("logits_ptr"), py::arg("out_ptr"),
        py::arg("dtype"), py::arg("out_dtype"), py::arg("B"), py::arg("K"), py::arg("h"),
        py::arg("w"), py::arg("stride_b"), py::arg("stride_k"), py::arg("stride_y"),
        py::arg("stride_x"), py::arg("H"), py::arg("W"), py::arg("top"), py::arg("left"),
        py::arg("height"), py::arg("width"), py::arg("threads"),
        R"(Bilinear upsampling and argmax in one pass: the label of each output pixel.

Args:
    logits_ptr: address of the logits (B, K, h, w).
    out_ptr: address of the labels (B, height, width), contiguous; written.
    dtype: "float32" or "float64", of the logits.
    out_dtype: "uint8", "int16" or "int32", of the labels; must hold K - 1.
    B, K, h, w: shape of the logits.
    stride_b, stride_k, stride_y, stride_x: their strides, in elements.
    H, W: the size that the logits are resized to, align_corners=False.
    top, left, height, width: the part of that size which is wanted.
    threads: at most this many threads; the labels do not depend on it.
Raises:
    ValueError: unknown dtype, sizes or crop out of range, more classes than out_dtype holds.)");
}
