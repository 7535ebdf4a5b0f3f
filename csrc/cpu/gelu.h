// GELU on vectors of lanes: x Phi(x), with Phi the share of a normal distribution below x. For
// kernels only.
//
// Phi(x) = 1/2 + x P(x^2), and 0 or 1 where |x| is large. Both polynomials were fitted by Lawson's
// iteration, which evens out the largest errors of x Phi(x).
#pragma once

#include "products.h"

namespace segmenter {
namespace {

template <typename T>
struct GeluFormat;

// Largest error 9e-7, at x = 4.9, where float32 numbers are 5e-7 apart. In powers of
// 2 x^2 / end^2 - 1, which is in [-1, 1]: those of x^2 alone would cancel.
template <>
struct GeluFormat<float> {
  static constexpr float end = 5.4f;
  static constexpr float slope = 2 / (5.4f * 5.4f), offset = -1;
  static constexpr float terms[] = {
      0.13092811405658722f,    -0.06532768905162811f,  0.048498596996068954f,
      -0.039219558238983154f,  0.032139599323272705f,  -0.02562161535024643f,
      0.019457804039120674f,   -0.014477322809398174f, 0.010346504859626293f,
      -0.0057028355076909065f, 0.002376520074903965f,  -0.0021310574375092983f,
      0.002018742263317108f,   -0.0006932258838787675f};
};

// Largest error 4.6e-5, which bfloat16 rounds away.
template <>
struct GeluFormat<Bfloat16> {
  static constexpr float end = 4.55f;
  static constexpr float slope = 1, offset = 0;
  static constexpr float terms[] = {
      0.3986791968345642f,    -0.06592428684234619f,    0.009548480622470379f,
      -0.001026919111609459f, 7.972650928422809e-05f,   -4.2954898162861355e-06f,
      1.508224585222706e-07f, -3.0803177786253855e-09f, 2.7619696460479126e-11f};
};

// To the accuracy that T has.
template <typename T>
inline Floats gelu(Floats x) {
  using Format = GeluFormat<T>;
  // Written so that NaN passes.
  Floats t = x > Format::end ? splat(Format::end) : x;
  t = t < -Format::end ? splat(-Format::end) : t;
  const Floats u = t * t * Format::slope + Format::offset;
  constexpr int n = sizeof(Format::terms) / sizeof(float);
  Floats p = splat(Format::terms[n - 1]);
  for (int i = n - 2; i >= 0; --i) p = p * u + Format::terms[i];
  p = p * t + 0.5f;
  p = p > 1.0f ? splat(1.0f) : p;
  // Exactly 0 for large negative x, whose multiple of next to nothing could be a lot. bfloat16's
  // polynomial is below 0 there, and shortly before.
  p = (sizeof(T) == sizeof(float) ? x < -Format::end : p < 0.0f) ? Floats{} : p;
  return x * p;
}

}  // namespace
}  // namespace segmenter
