// 2^x to within 1.5 ulp and log2(x) to within 2.7 ulp on vectors of lanes. For kernels only.
// Softmax kernels work in base 2: logits are multiplied by log2(e) once per patch, and every
// exponential of a pixel is then a power of two, whose whole part is an addition to the
// floating-point exponent.
#pragma once

#include <cstdint>

#include "vector.h"

namespace segmenter {
namespace {

constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

template <typename T>
struct FloatFormat;

template <>
struct FloatFormat<float> {
  static constexpr int mantissa_bits = 23;
  static constexpr int32_t sqrt_half = 0x3f3504f3;  // bits of sqrt(1/2)
  static constexpr float min_exponent = -126;
  static constexpr float round_magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr int log2_terms = 5;
  static constexpr float two_log2e = 2.88539004f;  // 2 log2(e) = two_log2e + two_log2e_rest
  static constexpr float two_log2e_rest = 3.85192607e-08f;
  // (2^r - 1) / r on [-1/2, 1/2], fitted for the smallest largest relative error of 2^r (2e-9).
  static constexpr float exp2_terms[] = {0.693147182f,   0.240226477f,  0.0555033237f,
                                         0.00961843692f, 0.0013398875f, 0.00015353362f};
};

template <>
struct FloatFormat<double> {
  static constexpr int mantissa_bits = 52;
  static constexpr int64_t sqrt_half = 0x3fe6a09e667f3bcd;
  static constexpr double min_exponent = -1022;
  static constexpr double round_magic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int log2_terms = 10;
  static constexpr double two_log2e = 2.8853900817779268;
  static constexpr double two_log2e_rest = 4.0710547481862066e-17;
  // ln(2)^(n+1) / (n+1)!, the Taylor series: the first term left out is 4e-18.
  static constexpr double exp2_terms[] = {
      0.69314718055994529,    0.24022650695910069,    0.055504108664821576,
      0.0096181291076284769,  0.0013333558146428441,  0.00015403530393381606,
      1.5252733804059837e-05, 1.3215486790144307e-06, 1.0178086009239696e-07,
      7.0549116208011209e-09, 4.4455382718708101e-10, 2.5678435993488196e-11,
      1.3691488853904124e-12};
};

// 2^(x + offset) where the result is an ordinary number. The offset is a small whole number, which
// costs nothing and does not round.
template <typename T>
inline Values<T> exp2_ordinary(Values<T> x, T offset = 0) {
  using Format = FloatFormat<T>;
  const T magic = Format::round_magic + offset;
  const Values<T> shifted = x + magic;  // its low bits hold round(x) + offset
  const Values<T> r = x - (shifted - magic);
  constexpr int n = sizeof(Format::exp2_terms) / sizeof(T);
  Values<T> power = splat(Format::exp2_terms[n - 1]);
  for (int i = n - 2; i >= 0; --i) power = power * r + Format::exp2_terms[i];
  power = power * r + T(1);
  return (Values<T>)((Integers<T>)power + ((Integers<T>)shifted << Format::mantissa_bits));
}

// 2^(x + offset) for x + offset up to the largest exponent. Below the smallest normal number's
// exponent, and for NaN, the result is that number: negligible beside a sum of exponentials, yet
// never zero to divide by. Callers that must tell apart infinities and NaN do so themselves.
template <typename T>
inline Values<T> exp2(Values<T> x, T offset = 0) {
  const T smallest = FloatFormat<T>::min_exponent - offset;
  return exp2_ordinary<T>(x > smallest ? x : splat(smallest), offset);
}

// 2^x as exp2_ordinary, with a relative error of 7.5e-5, which bfloat16 rounds away.
inline Values<float> exp2_rough(Values<float> x) {
  constexpr float magic = FloatFormat<float>::round_magic;
  const Values<float> shifted = x + magic;
  const Values<float> r = x - (shifted - magic);
  Values<float> power = r * 0.055171668f + 0.242611122f;
  power = power * r + 0.693260986f;
  power = power * r + 0.999928074f;
  return (Values<float>)((Integers<float>)power + ((Integers<float>)shifted << 23));
}

// log2(x) for positive normal x: with x = 2^e m, m in [sqrt(1/2), sqrt(2)) and s = (m-1)/(m+1),
//   log2(x) = e + 2 log2(e) (s + s^3/3 + s^5/5 + ...).
// The first coefficient is taken as the sum of two numbers, or its rounding would show.
template <typename T>
inline Values<T> log2(Values<T> x) {
  using Format = FloatFormat<T>;
  const Integers<T> bits = (Integers<T>)x;
  const Integers<T> exponent = (bits - Format::sqrt_half) >> Format::mantissa_bits;
  const Values<T> m = (Values<T>)(bits - (exponent << Format::mantissa_bits));
  const Values<T> s = (m - T(1)) / (m + T(1));
  const Values<T> square = s * s;
  Values<T> series = splat(T(2 * kLog2E / (2 * Format::log2_terms - 1)));
  for (int i = Format::log2_terms - 2; i >= 1; --i) {
    series = series * square + T(2 * kLog2E / (2 * i + 1));
  }
  series = series * square + Format::two_log2e_rest;
  return __builtin_convertvector(exponent, Values<T>) + (s * Format::two_log2e + s * series);
}

}  // namespace
}  // namespace segmenter
