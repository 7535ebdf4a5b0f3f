#include "simd.h"

#include <cstdlib>
#include <stdexcept>

namespace segmenter {
namespace {

constexpr SimdLevel kLevels[] = {SimdLevel::generic, SimdLevel::avx2, SimdLevel::avx512,
                                 SimdLevel::avx512_vnni, SimdLevel::avx512_bf16};

bool is_compiled(SimdLevel level) {
#if defined(SEGMENTER_X86_LEVELS)
  static_cast<void>(level);
  return true;
#else
  return level == SimdLevel::generic;
#endif
}

// Exactly the features that CMakeLists.txt switches on for the level. __builtin_cpu_supports also
// asks whether the operating system saves the wide registers.
bool cpu_has(SimdLevel level) {
#if defined(SEGMENTER_X86_LEVELS)
  __builtin_cpu_init();
  switch (level) {
    case SimdLevel::generic:
      return true;
    case SimdLevel::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case SimdLevel::avx512:
      return cpu_has(SimdLevel::avx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512dq");
    case SimdLevel::avx512_vnni:
      return cpu_has(SimdLevel::avx512) && __builtin_cpu_supports("avx512vnni");
    case SimdLevel::avx512_bf16:
      return cpu_has(SimdLevel::avx512_vnni) && __builtin_cpu_supports("avx512bf16");
  }
  return false;
#else
  return level == SimdLevel::generic;
#endif
}

}  // namespace

std::string simd_level_name(SimdLevel level) {
  switch (level) {
    case SimdLevel::avx2:
      return "avx2";
    case SimdLevel::avx512:
      return "avx512";
    case SimdLevel::avx512_vnni:
      return "avx512_vnni";
    case SimdLevel::avx512_bf16:
      return "avx512_bf16";
    default:
      return "generic";
  }
}

std::vector<std::string> compiled_simd_levels() {
  std::vector<std::string> names;
  for (SimdLevel level : kLevels) {
    if (is_compiled(level)) names.push_back(simd_level_name(level));
  }
  return names;
}

SimdLevel simd_level() {
  const char* variable = std::getenv("SEGMENTER_FAST_SIMD");
  const std::string wanted = variable ? variable : "";
  if (wanted.empty()) {
    SimdLevel best = SimdLevel::generic;
    for (SimdLevel level : kLevels) {
      if (is_compiled(level) && cpu_has(level)) best = level;
    }
    return best;
  }
  for (SimdLevel level : kLevels) {
    if (wanted != simd_level_name(level)) continue;
    if (!is_compiled(level)) {
      throw std::runtime_error("SEGMENTER_FAST_SIMD=" + wanted +
                               ": this build has no kernels for that level; unset the variable");
    }
    if (!cpu_has(level)) {
      throw std::runtime_error("SEGMENTER_FAST_SIMD=" + wanted +
                               ": this CPU lacks that level; unset the variable");
    }
    return level;
  }
  std::string names;
  for (SimdLevel level : kLevels) names += (names.empty() ? "" : ", ") + simd_level_name(level);
  throw std::invalid_argument("SEGMENTER_FAST_SIMD must be one of " + names + "; got \"" + wanted +
                              "\"");
}

}  // namespace segmenter
