// Flash-style attention of one head: blocks of keys pass by, nobody keeps the scores.
//
// Softmax is usually taken of scores less their largest, so that no exponential overflows. By
// Cauchy and Schwarz a score is at most |q| |k| scale; where that is small for all keys and a block
// of queries, as it mostly is, no exponential can overflow, nothing need be subtracted, and scores
// go from registers through exp2 to the second product's left side. Otherwise the largest score so
// far is kept for each query, and sums are rescaled when it grows (online softmax: Milakov and
// Gimelshein 2018; Dao et al. 2022).
//
// Probabilities are rounded to the elements' type before the second product, and their sum is taken
// of the rounded ones: a V of equal rows passes through exactly.

#include "attention_kernel.h"

#include <cfloat>
#include <cmath>

#include "attention_parts.h"

namespace segmenter {
namespace SEGMENTER_SIMD_LEVEL {
namespace {

// Largest bound on scores, in powers of two, for which no maximum is kept.
constexpr float kLargestExponent = 96;
// Least power of two that a probability times the largest values may be then, or too few bits of it
// would be left.
constexpr float kLeastExponent = -100;

// Which lanes are below `count`.
inline Words lanes_below(int64_t count) {
  Words lanes;
  for (int i = 0; i < kFloats; ++i) lanes[i] = i < count ? -1 : 0;
  return lanes;
}

// Stores probabilities, and adds to `sum` what they are when rounded. Of an odd number of bfloat16
// vectors a vector of zeros is stored behind the last: there is room, and what follows comes later.
template <typename T, int Vectors>
inline Floats keep(T* to, const Floats* values, Floats sum) {
  if constexpr (sizeof(T) == sizeof(float)) {
    for (int v = 0; v < Vectors; ++v) {
      store(to + v * kFloats, values[v]);
      sum += values[v];
    }
  } else {
    const Words ones = Words{} + 0x3f803f80;
    for (int v = 0; v + 1 < Vectors; v += 2) {
      store_pair(to + v * kFloats, values[v], values[v + 1]);
      sum = dot<T>(sum, load_words(to + v * kFloats), ones);
    }
    if constexpr (Vectors % 2 == 1) {
      T* last = to + (Vectors - 1) * kFloats;
      store_pair(last, values[Vectors - 1], Floats{});
      sum = dot<T>(sum, load_words(last), ones);
    }
  }
  return sum;
}

template <typename T, int D>
struct Head {
  static constexpr int64_t kSteps = D / kPerWord<T>;                 // of Q K^T
  static constexpr int kWide = D < kPanel ? D / kFloats : kVectors;  // vectors of a panel of V
  static constexpr int64_t kColumns = kWide * kFloats;
  static constexpr int64_t kBlockWords = kKeyBlock * kSteps;  // of keys, and of values
  static constexpr int64_t kValueSteps = kKeyBlock / kPerWord<T>;

  static int64_t packed_words(int64_t N) { return (N + kKeyBlock - 1) / kKeyBlock * kBlockWords; }

  // Memory of one call: whole vectors of each, so that all are aligned alike.
  struct Work {
    T* queries;      // (kQueryBlock, D)
    float* sums;     // (kQueryBlock, D), of probabilities times values
    float* totals;   // (kQueryBlock, kFloats), of probabilities, lane by lane
    float* largest;  // (kQueryBlock,), of scores so far
    float* scores;   // (kRows, kKeyBlock)
    T* weights;      // (kRows, kKeyBlock) probabilities

    static constexpr int64_t kWords = kQueryBlock * (D / kPerWord<T> + D + kFloats + 1) +
                                      kRows * kKeyBlock * 2 + 6 * kAlignedWords;

    explicit Work(uint32_t* memory) {
      Taker take{memory};
      queries = take.words<T>(kQueryBlock * kSteps);
      sums = take.words<float>(kQueryBlock * D);
      totals = take.words<float>(kQueryBlock * kFloats);
      largest = take.words<float>(kQueryBlock);
      scores = take.words<float>(kRows * kKeyBlock);
      weights = take.words<T>(kRows * kKeyBlock);
    }
  };

  static float square(const T* row) {
    Floats sum = Floats{};
    for (int64_t step = 0; step < kSteps; step += kFloats) {
      const Words words = load_words(row + step * kPerWord<T>);
      sum = dot<T>(sum, words, words);
    }
    return sum_of_lanes<float>(sum);
  }

  static void pack(const HeadView& head, int64_t block) {
    const int64_t first = block * kKeyBlock;
    const int64_t count = first + kKeyBlock <= head.N ? kKeyBlock : head.N - first;
    const T* k = static_cast<const T*>(head.k) + first * head.stride;
    const T* v = static_cast<const T*>(head.v) + first * head.stride;
    uint32_t* keys = head.keys + block * kBlockWords;
    uint32_t* values = head.values + block * kBlockWords;
    for (int64_t i = 0; i < kKeyBlock; i += kPanel) {
      pack_transposed(k + i * head.stride, head.stride, count - i, kSteps, keys + i * kSteps);
    }
    for (int64_t column = 0; column < D; column += kColumns) {
      pack_rows(v + column, head.stride, count, kColumns, kValueSteps,
                values + column * kValueSteps);
    }
    float largest = 0;
    Floats size = Floats{};
    for (int64_t i = 0; i < count; ++i) {
      largest = larger(largest, square(k + i * head.stride));
      for (int64_t column = 0; column < D; column += kFloats) {
        const Floats x = load_floats(v + i * head.stride + column);
        const Floats magnitude = x < 0.0f ? -x : x;
        size = (size >= magnitude) | (size != size) ? size : magnitude;
      }
    }
    head.squares[block] = largest;
    float sum = 0;  // NaN or infinite if a lane is
    for (int i = 0; i < kFloats; ++i) sum += size[i];
    head.sizes[block] = sum;
  }

  // Scores of a tile of queries and up to a panel of keys, of which `last` are in the last vector:
  // straight to probabilities.
  template <int Vectors>
  static void __attribute__((noinline)) weigh(const T* queries, const uint32_t* keys, float factor,
                                              Words last, T* weights, float* totals) {
    Tile<Vectors> scores;
    clear<Vectors>(scores);
    multiply<T, Vectors>(scores, queries, D, keys, kPanel, kSteps);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      Floats values[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) values[v] = probability<T>(product(scores[r][v], factor));
      values[Vectors - 1] = (Floats)((Words)values[Vectors - 1] & last);
      float* total = totals + r * kFloats;
      store(total, keep<T, Vectors>(weights + r * kKeyBlock, values, load(total)));
    }
  }

  // The same to memory, with the largest of each query so far.
  template <int Vectors>
  static void __attribute__((noinline)) score(const T* queries, const uint32_t* keys, float factor,
                                              Words last, float* to, float* largest) {
    Tile<Vectors> scores;
    clear<Vectors>(scores);
    multiply<T, Vectors>(scores, queries, D, keys, kPanel, kSteps);
    for (int r = 0; r < kRows; ++r) {
      Floats most = load(largest + r * kFloats);
      for (int v = 0; v < Vectors; ++v) {
        Floats x = product(scores[r][v], factor);
        if (v == Vectors - 1) x = last ? x : splat(-INFINITY);
        most = x > most ? x : most;
        store(to + r * kKeyBlock + v * kFloats, x);
      }
      store(largest + r * kFloats, most);
    }
  }

  // Calls f(vectors, key, lanes of the last vector) for panels of a block; `vectors` is a constant.
  template <typename Function>
  static void for_panels(int64_t count, Function&& f) {
    for (int64_t key = 0; key < count; key += kPanel) {
      const int64_t left = count - key < kPanel ? count - key : kPanel;
      const int64_t vectors = (left + kFloats - 1) / kFloats;
      const Words last = lanes_below(left - (vectors - 1) * kFloats);
      switch (vectors) {
        case 1:
          f(std::integral_constant<int, 1>{}, key, last);
          break;
        case 2:
          f(std::integral_constant<int, 2>{}, key, last);
          break;
        case 3:
          f(std::integral_constant<int, kVectors == 4 ? 3 : 2>{}, key, last);
          break;
        default:
          f(std::integral_constant<int, kVectors>{}, key, last);
      }
    }
  }

  // sums = rescale sums + weights V, for one tile of queries and one block of keys.
  static void __attribute__((noinline)) gather(const T* weights, const uint32_t* values,
                                               int64_t steps, const float* rescale, float* sums) {
    for (int64_t column = 0; column < D; column += kColumns) {
      // From zero, and added to the sums so far: shorter chains of additions round less.
      Tile<kWide> tile;
      clear<kWide>(tile);
      multiply<T, kWide>(tile, weights, kKeyBlock, values + column * kValueSteps, kColumns, steps);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        float* to = sums + r * D + column;
        for (int v = 0; v < kWide; ++v) {
          store(to + v * kFloats, load(to + v * kFloats) * rescale[r] + tile[r][v]);
        }
      }
    }
  }

  // Probabilities of a tile of queries and a block of keys, relative to the largest score so far.
  static void weigh_online(const T* queries, const uint32_t* keys, float factor, int64_t count,
                           const Work& work, float* so_far, float* totals, float* rescale) {
    alignas(64) float largest[kRows * kFloats];
    for (float& x : largest) x = -INFINITY;
    for_panels(count, [&](auto vectors, int64_t key, Words last) {
      score<vectors.value>(queries, keys + key * kSteps, factor, last, work.scores + key, largest);
    });
    for (int r = 0; r < kRows; ++r) {
      const float most = largest_lane<float>(load(largest + r * kFloats));
      const float before = so_far[r];
      const float now = most > before ? most : before;
      so_far[r] = now;
      rescale[r] = std::exp2(before - now);
      Floats total = load(totals + r * kFloats) * rescale[r];
      for (int64_t key = 0; key < count; key += kFloats) {
        const Floats x = load(work.scores + r * kKeyBlock + key) - now;
        // Lanes beyond the last key have score -infinity, and add nothing.
        const Words inside = key + kFloats <= count ? Words{} - 1 : lanes_below(count - key);
        Floats value[1] = {probability<T>(x > -126.0f ? x : splat(-126.0f))};
        // What is no number stays none.
        value[0] = (Floats)((Words)(x - x == 0.0f ? value[0] : x - x) & inside);
        total = keep<T, 1>(work.weights + r * kKeyBlock + key, value, total);
      }
      store(totals + r * kFloats, total);
    }
  }

  static void attend(const HeadView& head, int64_t first, int64_t count, uint32_t* memory) {
    const Work work(memory);
    const int64_t tiles = (count + kRows - 1) / kRows;
    const T* q = static_cast<const T*>(head.q) + first * head.stride;
    float q_square = 0;
    for (int64_t i = 0; i < tiles * kRows; ++i) {
      T* to = work.queries + i * D;
      if (i >= count) {
        std::memset(to, 0, D * sizeof(T));
        continue;
      }
      std::memcpy(to, q + i * head.stride, D * sizeof(T));
      q_square = larger(q_square, square(to));
    }
    const int64_t blocks = (head.N + kKeyBlock - 1) / kKeyBlock;
    float k_square = 0, size = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      k_square = larger(k_square, head.squares[block]);
      size = larger(size, head.sizes[block]);
    }
    const float factor = head.scale * static_cast<float>(kLog2E);
    const float bound = std::sqrt(q_square) * std::sqrt(k_square) * std::fabs(factor);
    // Nor may sums of probabilities times values overflow, or get lost. False for NaN. A single key
    // comes with the probability 1 that it has where the largest score is subtracted.
    const bool bounded = head.N > 1 && bound <= kLargestExponent &&
                         bound + std::log2(head.N * (size + 1)) < 126 &&
                         std::log2(size) - bound > kLeastExponent;

    std::memset(work.sums, 0, tiles * kRows * D * sizeof(float));
    std::memset(work.totals, 0, tiles * kRows * kFloats * sizeof(float));
    for (int64_t i = 0; i < tiles * kRows; ++i) work.largest[i] = -FLT_MAX;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t begin = block * kKeyBlock;
      const int64_t keys_count = begin + kKeyBlock <= head.N ? kKeyBlock : head.N - begin;
      const int64_t whole = (keys_count + kFloats - 1) / kFloats * kFloats;
      const uint32_t* keys = head.keys + block * kBlockWords;
      const uint32_t* values = head.values + block * kBlockWords;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const T* queries = work.queries + tile * kRows * D;
        float* totals = work.totals + tile * kRows * kFloats;
        float rescale[kRows] = {1, 1, 1, 1, 1, 1};
        if (bounded) {
          for_panels(keys_count, [&](auto vectors, int64_t key, Words last) {
            weigh<vectors.value>(queries, keys + key * kSteps, factor, last, work.weights + key,
                                 totals);
          });
        } else {
          weigh_online(queries, keys, factor, keys_count, work, work.largest + tile * kRows, totals,
                       rescale);
        }
        gather(work.weights, values, whole / kPerWord<T>, rescale, work.sums + tile * kRows * D);
      }
    }

    T* out = static_cast<T*>(head.out) + first * head.out_stride;
    for (int64_t i = 0; i < count; ++i) {
      const float total = sum_of_lanes<float>(load(work.totals + i * kFloats));
      const float inverse = 1.0f / total;
      if (head.statistics != nullptr) {
        float* statistics = head.statistics + first + i;
        // A whole number, which takes nothing from the scores' precision when it is subtracted.
        const float m = bounded ? std::round(std::log2(total)) : work.largest[i];
        statistics[0] = m;
        statistics[head.N] = bounded ? std::exp2(m) / total : inverse;
      }
      for (int64_t column = 0; column < D; column += 2 * kFloats) {
        const float* from = work.sums + i * D + column;
        store_pair(out + i * head.out_stride + column, load(from) * inverse,
                   load(from + kFloats) * inverse);
      }
    }
  }

  static constexpr HeadKernels kernels() { return {&packed_words, &pack, Work::kWords, &attend}; }
};

}  // namespace

const AttentionKernels attention_kernels = {
    {{Head<float, 32>::kernels(), Head<float, 64>::kernels(), Head<float, 128>::kernels()},
     {Head<Bfloat16, 32>::kernels(), Head<Bfloat16, 64>::kernels(),
      Head<Bfloat16, 128>::kernels()}}};

}  // namespace SEGMENTER_SIMD_LEVEL
}  // namespace segmenter
