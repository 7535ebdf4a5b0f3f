// bfloat16 in memory: the upper half of a float32.
#pragma once

#include <cstdint>
#include <cstring>

namespace segmenter {

struct Bfloat16 {
  uint16_t bits;
};

// Of each file its own: kernel files are compiled for several levels, of which a linker must not
// mix functions.
namespace {

inline float to_float(float value) { return value; }
inline float to_float(Bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

// Rounds to the nearest, ties to even; NaN stays NaN.
template <typename T>
T from_float(float value);
template <>
inline float from_float<float>(float value) {
  return value;
}
template <>
inline Bfloat16 from_float<Bfloat16>(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (value != value) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

}  // namespace

}  // namespace segmenter
