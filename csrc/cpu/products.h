// The inner loop of every matrix product here: a tile of kRows rows of A times a panel of columns,
// in registers. For kernels only.
//
// Both matrices are read in words of 32 bits, which hold one float or two neighbouring bfloat16 of
// the dimension that is summed over: a "step" of the loop. A is read where it lies, row by row, and
// a word of it is spread over a vector. B is packed beforehand into panels of kPanel columns: for
// each step, the words of all of the panel's columns, one after another. A tile takes kRows x
// kVectors registers for its sums (24 of AVX-512's 32, 12 of the others' 16), so that a step has
// far more multiplications than loads.
//
// Source of the idea: Goto and van de Geijn 2008, as in BLIS and oneDNN.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "bfloat16.h"
#include "tiles.h"
#include "vector.h"

namespace segmenter {
namespace {

constexpr int kRows = kTileRows;
constexpr int kVectors = SEGMENTER_VECTOR_BYTES == 64 ? 4 : 2;
constexpr int kFloats = kLanes<float>;
constexpr int kPanel = kVectors * kFloats;
constexpr int kLineWords = 16;  // of a line of the caches

using Floats = Values<float>;
using Words = Integers<float>;

// Elements of a word.
template <typename T>
constexpr int kPerWord = sizeof(uint32_t) / sizeof(T);

inline Words load_words(const void* from) {
  Words words;
  std::memcpy(&words, from, sizeof(words));
  return words;
}

inline void store_words(void* to, Words words) { std::memcpy(to, &words, sizeof(words)); }

inline Words spread_word(const void* from) {
  int32_t word;
  std::memcpy(&word, from, sizeof(word));
  return word - Words{};
}

// sum + the scalar product of a and b, word by word.
template <typename T>
inline Floats dot(Floats sum, Words a, Words b);

template <>
inline Floats dot<float>(Floats sum, Words a, Words b) {
  return sum + (Floats)a * (Floats)b;
}

template <>
inline Floats dot<Bfloat16>(Floats sum, Words a, Words b) {
#if defined(__AVX512BF16__)
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  const int32_t high = static_cast<int32_t>(0xffff0000);
  sum = sum + (Floats)(a << 16) * (Floats)(b << 16);
  return sum + (Floats)(a & high) * (Floats)(b & high);
#endif
}

typedef uint16_t Halves __attribute__((vector_size(SEGMENTER_VECTOR_BYTES / 2)));

// from_float<Bfloat16>, lane by lane.
inline Halves round_to_halves(Floats x) {
  const Words bits = (Words)x;
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(x == x ? rounded : (bits >> 16) | 0x40, Halves);
}

inline void store_one(float* to, Floats lanes) { store(to, lanes); }
inline void store_one(Bfloat16* to, Floats lanes) {
  const Halves halves = round_to_halves(lanes);
  std::memcpy(to, &halves, sizeof(halves));
}

// Two vectors to as many values of type T, in order.
inline void store_pair(float* to, Floats first, Floats second) {
  store(to, first);
  store(to + kFloats, second);
}

inline void store_pair(Bfloat16* to, Floats first, Floats second) {
#if defined(__AVX512BF16__)
  const __m512bh both = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  std::memcpy(to, &both, sizeof(both));
#else
  const Halves halves[2] = {round_to_halves(first), round_to_halves(second)};
  std::memcpy(to, halves, sizeof(halves));
#endif
}

// A vector of values of type T as floats.
inline Floats load_floats(const float* from) { return load(from); }
inline Floats load_floats(const Bfloat16* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof(halves));
  return (Floats)(__builtin_convertvector(halves, Words) << 16);
}

template <int Vectors>
using Tile = Floats[kRows][Vectors];

template <int Vectors>
inline void clear(Tile<Vectors>& sums) {
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < Vectors; ++v) sums[r][v] = Floats{};
  }
}

// sums[r][v] += sum over steps of a[r][step] b[step][v]. Reads kRows rows of A, `stride` elements
// apart, and the first Vectors vectors of each step of a panel of `panel` words. With Ahead, a line
// of `ahead` is brought into the second cache at each step.
template <typename T, int Vectors, bool Ahead = false>
inline void multiply(Tile<Vectors>& sums, const T* a, int64_t stride, const uint32_t* b,
                     int64_t panel, int64_t steps, const uint32_t* ahead = nullptr) {
#pragma GCC unroll 2
  for (int64_t step = 0; step < steps; ++step, b += panel, a += kPerWord<T>) {
    if constexpr (Ahead) __builtin_prefetch(ahead + step * kLineWords, 0, 2);
    Words columns[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) columns[v] = load_words(b + v * kFloats);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const Words row = spread_word(a + r * stride);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sums[r][v] = dot<T>(sums[r][v], row, columns[v]);
    }
  }
}

// The larger of two, or the one that is no number: it must not get lost.
inline float larger(float a, float b) { return a >= b || a != a ? a : b; }

// Packs `columns` rows of a matrix, `stride` elements apart, as the columns of one panel: what
// multiplies by the transposed matrix. Columns beyond are 0.
template <typename T>
void pack_transposed(const T* from, int64_t stride, int64_t columns, int64_t steps,
                     uint32_t* panel) {
  for (int64_t column = 0; column < kPanel; ++column) {
    if (column >= columns) {
      for (int64_t step = 0; step < steps; ++step) panel[step * kPanel + column] = 0;
      continue;
    }
    const T* row = from + column * stride;
    for (int64_t step = 0; step < steps; ++step) {
      std::memcpy(&panel[step * kPanel + column], row + step * kPerWord<T>, sizeof(uint32_t));
    }
  }
}

// Packs `width` columns of a matrix of `rows` rows, `stride` elements apart, as they are; `width`
// is a multiple of a vector. Rows up to a whole step are filled up with 0, and so are
// further steps up to `steps`.
inline void pack_rows(const float* from, int64_t stride, int64_t rows, int64_t width, int64_t steps,
                      uint32_t* panel) {
  for (int64_t step = 0; step < steps; ++step, panel += width) {
    if (step < rows) {
      std::memcpy(panel, from + step * stride, width * sizeof(float));
    } else {
      std::memset(panel, 0, width * sizeof(float));
    }
  }
}

inline void pack_rows(const Bfloat16* from, int64_t stride, int64_t rows, int64_t width,
                      int64_t steps, uint32_t* panel) {
  for (int64_t step = 0; step < steps; ++step, panel += width) {
    const Bfloat16* even = from + 2 * step * stride;
    const Bfloat16* odd = even + stride;
    if (2 * step + 1 < rows) {
      for (int64_t i = 0; i < width; ++i) {
        panel[i] = even[i].bits | static_cast<uint32_t>(odd[i].bits) << 16;
      }
    } else if (2 * step < rows) {
      for (int64_t i = 0; i < width; ++i) panel[i] = even[i].bits;
    } else {
      std::memset(panel, 0, width * sizeof(uint32_t));
    }
  }
}

}  // namespace
}  // namespace segmenter
