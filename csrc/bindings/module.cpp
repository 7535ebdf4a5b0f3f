#include <sstream>
#include <string>
#include <vector>

#include "bindings.h"

using namespace segmenter;

namespace {

#if defined(SEGMENTER_CUDA)
std::vector<std::string> words(const std::string& text) {
  std::istringstream stream(text);
  std::vector<std::string> found;
  for (std::string word; stream >> word;) found.push_back(word);
  return found;
}
#endif

py::dict build_info() {
  py::dict info;
  info["version"] = SEGMENTER_VERSION;
  info["compiler"] = SEGMENTER_COMPILER;
  info["compiler_version"] = SEGMENTER_COMPILER_VERSION;
  info["build_type"] = SEGMENTER_BUILD_TYPE;
  info["cxx_standard"] = static_cast<int>(__cplusplus / 100 % 100);
  info["simd_levels"] = compiled_simd_levels();
#if defined(SEGMENTER_CUDA)
  info["cuda"] = SEGMENTER_CUDA;
  info["cuda_architectures"] = words(SEGMENTER_CUDA_ARCHS);
#else
  info["cuda"] = py::none();
  info["cuda_architectures"] = py::list();
#endif
  info["sanitizers"] = SEGMENTER_SANITIZE;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of segmenter_fast.";

  m.def("build_info", &build_info,
        R"(What this module was built from and with.

Returns:
    dict: version, compiler, compiler_version, build_type (str), cxx_standard (int),
    simd_levels (list of str, lowest first), cuda (str, the version of nvcc, or None if CUDA C++ was
    left out), cuda_architectures (list of str, such as "90a"), sanitizers (str, empty in a build
    for use).)");

  m.def(
      "simd_level", [] { return simd_level_name(simd_level()); },
      R"(The SIMD level that the kernels use now.

Returns:
    "generic", "avx2", "avx512", "avx512_vnni" or "avx512_bf16": the best that was compiled in and
    that the CPU has, or what the environment variable SEGMENTER_FAST_SIMD asks for.
Raises:
    ValueError: SEGMENTER_FAST_SIMD names an unknown level.
    RuntimeError: it names a level that this build or this CPU lacks.)");

#if defined(SEGMENTER_CUDA)
  py::module_ cuda = m.def_submodule("cuda", "Kernels in CUDA C++.");
  bind_cuda(cuda);
#endif
  bind_attention(m);
  bind_confusion(m);
  bind_exponential(m);
  bind_network(m);
  bind_upsampling(m);
  bind_upsample_argmax(m);
  bind_upsample_cross_entropy(m);
  bind_upsample_probabilities(m);
  bind_windows(m);
}
