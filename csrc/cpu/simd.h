// Which instruction sets the kernels were compiled for, and which one this machine runs.
#pragma once

#include <string>
#include <vector>

namespace segmenter {

enum class SimdLevel { generic, avx2, avx512 };

// Lowest first; always begins with "generic", which is the compiler's baseline (SSE2, NEON).
std::vector<std::string> compiled_simd_levels();

// The best level that was compiled in and that the CPU has. The environment variable
// SEGMENTER_FAST_SIMD overrides it: std::invalid_argument when it names an unknown level,
// std::runtime_error when it names one that this build or this CPU lacks. Read at every call.
SimdLevel simd_level();

std::string simd_level_name(SimdLevel level);

}  // namespace segmenter
