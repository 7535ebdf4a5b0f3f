// Which instruction sets the kernels were compiled for, and which one this machine runs.
#pragma once

#include <string>
#include <vector>

namespace segmenter {

// The last two add what the encoder's matrix products gain from: dot products of bytes, and of
// pairs of bfloat16. Each level includes those before it.
enum class SimdLevel { generic, avx2, avx512, avx512_vnni, avx512_bf16 };

// Lowest first; always begins with "generic", which is the compiler's baseline (SSE2, NEON).
std::vector<std::string> compiled_simd_levels();

// The best level that was compiled in and that the CPU has. The environment variable
// SEGMENTER_FAST_SIMD overrides it: std::invalid_argument when it names an unknown level,
// std::runtime_error when it names one that this build or this CPU lacks. Read at every call.
SimdLevel simd_level();

std::string simd_level_name(SimdLevel level);

// Each kernel file is compiled once per level and ends in a table of function pointers in the
// level's namespace. SEGMENTER_DECLARE_KERNELS declares the tables, SEGMENTER_KERNELS picks one.
#define SEGMENTER_DECLARE_KERNELS(Type, name) \
  namespace generic {                         \
  extern const Type name;                     \
  }                                           \
  namespace avx2 {                            \
  extern const Type name;                     \
  }                                           \
  namespace avx512 {                          \
  extern const Type name;                     \
  }

// The same for kernels that are compiled for the last two levels as well.
#define SEGMENTER_DECLARE_PRODUCT_KERNELS(Type, name) \
  SEGMENTER_DECLARE_KERNELS(Type, name)               \
  namespace avx512_vnni {                             \
  extern const Type name;                             \
  }                                                   \
  namespace avx512_bf16 {                             \
  extern const Type name;                             \
  }

#if defined(SEGMENTER_X86_LEVELS)
#define SEGMENTER_KERNELS(level, name)         \
  ((level) >= SimdLevel::avx512 ? avx512::name \
   : (level) == SimdLevel::avx2 ? avx2::name   \
                                : generic::name)
#define SEGMENTER_PRODUCT_KERNELS(level, name)             \
  ((level) == SimdLevel::avx512_bf16   ? avx512_bf16::name \
   : (level) == SimdLevel::avx512_vnni ? avx512_vnni::name \
                                       : SEGMENTER_KERNELS(level, name))
#else
#define SEGMENTER_KERNELS(level, name) (static_cast<void>(level), generic::name)
#define SEGMENTER_PRODUCT_KERNELS(level, name) SEGMENTER_KERNELS(level, name)
#endif

}  // namespace segmenter
