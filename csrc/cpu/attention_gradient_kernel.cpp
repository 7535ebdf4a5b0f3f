// Gradient of one head's attention, a block of keys at a time: with rows of queries q, keys k,
// values v, upstream gradients u and outputs y, m and i as forward wrote them, and delta = <u, y>,
//
//   P^T = 2^(k q^T scale log2(e) - m) i       dP^T = v u^T        dS^T = P^T (dP^T - delta)
//   dv  = P^T u       dk = dS^T q scale       dq^T = k^T dS^T scale
//
// Weights are computed transposed: a row is a key. So they are at once the left side of dv and dk
// and, as they lie, the right side of dq^T; m, i and delta are vectors like them; and one pass
// makes all of it in five products, the least there is. What a block of keys adds to dq goes to the
// memory of its chunk of keys; a second pass adds the chunks up, always in the same order.
//
// Exponents are at most 0, but for rounding, and weights those of forward to the last bit or two,
// however large the scores. Where softmax is sure of itself dP and delta nearly cancel, so delta is
// summed in the order in which dP is.

#include "attention_gradient_kernel.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "attention_parts.h"

namespace segmenter {
namespace SEGMENTER_SIMD_LEVEL {
namespace {

// Powers of two below are held here: nothing beside a sum that is 1 at least, and after division by
// that sum still no denormal number, which many processors are slow at.
constexpr float kLeast = -100;

template <typename T, int D>
struct HeadGradient {
  static constexpr bool kPairs = sizeof(T) < sizeof(float);          // two elements in a word
  static constexpr int64_t kSteps = D / kPerWord<T>;                 // of sums over channels
  static constexpr int kWide = D < kPanel ? D / kFloats : kVectors;  // vectors of a panel of rows
  static constexpr int64_t kColumns = kWide * kFloats;
  static constexpr int64_t kStripSteps = kStrip / kPerWord<T>;
  static constexpr int64_t kStripWords = kStripSteps * D;
  static constexpr int64_t kStrips = kGradientQueries / kStrip;
  static constexpr int64_t kChannelTiles = (D + kRows - 1) / kRows;

  static_assert(kStrip % kPanel == 0 && kGradientKeys % (2 * kRows) == 0);

  // Memory of one pass.
  struct Work {
    T* keys;           // (kGradientKeys, D)
    T* values;         // (kGradientKeys, D)
    T* channels;       // (kChannelTiles kRows, kGradientKeys): keys transposed
    float* dk;         // (kGradientKeys, D)
    float* dv;         // (kGradientKeys, D)
    T* weights;        // (kStrips, kGradientKeys, kStrip): P^T
    T* slopes;         // (kStrips, kGradientKeys, kStrip): dS^T
    uint32_t* packed;  // the same with two keys in a word, for elements of half a word

    static constexpr int64_t kMatrix = kGradientKeys * kSteps;
    static constexpr int64_t kChannels = kChannelTiles * kRows * kGradientKeys / kPerWord<T>;
    static constexpr int64_t kWeights = kStrips * kGradientKeys * kStripSteps;
    static constexpr int64_t kWords = 2 * kMatrix + kChannels + 2 * kGradientKeys * D +
                                      2 * kWeights + (kPairs ? kWeights : 0) + 8 * kAlignedWords;

    explicit Work(uint32_t* memory) {
      Taker take{memory};
      keys = take.words<T>(kMatrix);
      values = take.words<T>(kMatrix);
      channels = take.words<T>(kChannels);
      dk = take.words<float>(kGradientKeys * D);
      dv = take.words<float>(kGradientKeys * D);
      weights = take.words<T>(kWeights);
      slopes = take.words<T>(kWeights);
      if constexpr (kPairs) {
        packed = take.words<uint32_t>(kWeights);
      } else {
        packed = reinterpret_cast<uint32_t*>(slopes);
      }
    }
  };

  static int64_t packed_words(int64_t padded) { return padded * kSteps; }

  static void pack(const HeadGradientView& head, int64_t block) {
    const int64_t end = std::min((block + 1) * kGradientQueries, head.N);
    for (int64_t first = block * kGradientQueries; first < end; first += kStrip) {
      const int64_t count = std::min(kStrip, end - first);
      const T* q = static_cast<const T*>(head.q) + first * head.stride;
      const T* y = static_cast<const T*>(head.out) + first * head.out_stride;
      const T* u = static_cast<const T*>(head.upstream) + first * head.out_stride;
      for (int64_t i = 0; i < kStrip; ++i) {
        // Queries that do not exist have weights 0.
        head.exponents[first + i] = i < count ? head.statistics[first + i] : 0;
        head.inverses[first + i] = i < count ? head.statistics[head.N + first + i] : 0;
      }
      for (int64_t i = 0; i < count; i += kPanel) {
        uint32_t* upstreams = head.upstreams + (first + i) * kSteps;
        alignas(64) uint32_t outputs[kPanel * kSteps];
        pack_transposed(q + i * head.stride, head.stride, count - i, kSteps,
                        head.queries + (first + i) * kSteps);
        pack_transposed(u + i * head.out_stride, head.out_stride, count - i, kSteps, upstreams);
        pack_transposed(y + i * head.out_stride, head.out_stride, count - i, kSteps, outputs);
        for (int64_t lane = 0; lane < kPanel; lane += kFloats) {
          Floats sum = Floats{};
          for (int64_t step = 0; step < kSteps; ++step) {
            sum = dot<T>(sum, load_words(outputs + step * kPanel + lane),
                         load_words(upstreams + step * kPanel + lane));
          }
          store(head.deltas + first + i + lane, sum);
        }
      }
      for (int64_t column = 0; column < D; column += kColumns) {
        const int64_t to = first * kSteps + column * kStripSteps;
        pack_rows(q + column, head.stride, count, kColumns, kStripSteps, head.query_rows + to);
        pack_rows(u + column, head.out_stride, count, kColumns, kStripSteps,
                  head.upstream_rows + to);
      }
    }
  }

  // Calls f(vectors, column) for panels of `count` columns.
  template <typename Function>
  static void for_panels(int64_t count, Function&& f) {
    for (int64_t column = 0; column < count; column += kPanel) {
      const int64_t left = std::min<int64_t>(count - column, kPanel);
      int64_t vectors = (left + kFloats - 1) / kFloats;
      if (kPairs) vectors += vectors % 2;  // they are stored two at a time
      switch (vectors) {
        case 1:
          f(std::integral_constant<int, kPairs ? 2 : 1>{}, column);
          break;
        case 2:
          f(std::integral_constant<int, 2>{}, column);
          break;
        case 3:
          f(std::integral_constant < int, kVectors == 4 && !kPairs ? 3 : kVectors > {}, column);
          break;
        default:
          f(std::integral_constant<int, kVectors>{}, column);
      }
    }
  }

  // P^T and dS^T of a tile of keys, of which `rows` exist, and of up to a panel of queries.
  template <int Vectors>
  static void __attribute__((noinline)) weigh(const T* keys, const T* values,
                                              const uint32_t* queries, const uint32_t* upstreams,
                                              const float* exponents, const float* inverses,
                                              const float* deltas, float factor, int64_t rows,
                                              T* weights, T* slopes, uint32_t* packed) {
    alignas(64) float kept[kRows][Vectors * kFloats];
    Tile<Vectors> tile;
    clear<Vectors>(tile);
    multiply<T, Vectors>(tile, keys, D, queries, kPanel, kSteps);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        const Floats x = product(tile[r][v], factor) - load(exponents + v * kFloats);
        Floats p = probability<T>(x > kLeast ? x : splat(kLeast)) * load(inverses + v * kFloats);
        // A key that does not exist may be far above all others.
        if (r >= rows) p = Floats{};
        store(kept[r] + v * kFloats, p);
      }
      store_row<Vectors>(kept[r], weights + r * kStrip);
    }
    clear<Vectors>(tile);
    multiply<T, Vectors>(tile, values, D, upstreams, kPanel, kSteps);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        Floats slope = load(kept[r] + v * kFloats) * (tile[r][v] - load(deltas + v * kFloats));
        if (r >= rows) slope = Floats{};
        store(kept[r] + v * kFloats, slope);
      }
      store_row<Vectors>(kept[r], slopes + r * kStrip);
    }
    if constexpr (kPairs) {
      for (int r = 0; r < kRows; r += 2) {
        for (int v = 0; v < Vectors; ++v) {
          const T* even = slopes + r * kStrip + v * kFloats;
          const Words low = load_halves(even), high = load_halves(even + kStrip);
          store_words(packed + r / 2 * kStrip + v * kFloats, low | high << 16);
        }
      }
    }
  }

  template <int Vectors>
  static void store_row(const float* from, T* to) {
    if constexpr (kPairs) {
      for (int v = 0; v < Vectors; v += 2) {
        store_pair(to + v * kFloats, load(from + v * kFloats), load(from + (v + 1) * kFloats));
      }
    } else {
      for (int v = 0; v < Vectors; ++v) store(to + v * kFloats, load(from + v * kFloats));
    }
  }

  // The bits of kFloats values, each in a word.
  static Words load_halves(const T* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof(halves));
    return __builtin_convertvector(halves, Words);
  }

  // sums (keys, D) += weights (keys, queries) times packed rows (queries, D).
  static void __attribute__((noinline)) gather(const T* weights, const uint32_t* rows,
                                               int64_t tiles, int64_t queries, float* sums) {
    for (int64_t column = 0; column < D; column += kColumns) {
      for (int64_t t = 0; t < tiles; ++t) {
        Tile<kWide> tile;
        clear<kWide>(tile);
        for (int64_t strip = 0; strip * kStrip < queries; ++strip) {
          const int64_t left = std::min(queries - strip * kStrip, kStrip);
          multiply<T, kWide>(tile, weights + (strip * kGradientKeys + t * kRows) * kStrip, kStrip,
                             rows + strip * kStripWords + column * kStripSteps, kColumns,
                             (left + kPerWord<T> - 1) / kPerWord<T>);
        }
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) {
          float* to = sums + (t * kRows + r) * D + column;
          for (int v = 0; v < kWide; ++v) {
            store(to + v * kFloats, load(to + v * kFloats) + tile[r][v]);
          }
        }
      }
    }
  }

  // A tile of dq^T: kRows channels, of which `rows` exist, and up to a panel of queries.
  template <int Vectors>
  static void __attribute__((noinline)) spread(const T* channels, const uint32_t* slopes,
                                               int64_t steps, int64_t rows, bool add, float* to,
                                               int64_t stride) {
    Tile<Vectors> tile;
    clear<Vectors>(tile);
    multiply<T, Vectors>(tile, channels, kGradientKeys, slopes, kStrip, steps);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows) continue;
      for (int v = 0; v < Vectors; ++v) {
        float* lanes = to + r * stride + v * kFloats;
        store(lanes, add ? load(lanes) + tile[r][v] : tile[r][v]);
      }
    }
  }

  static void load_keys(const HeadGradientView& head, int64_t first, int64_t count,
                        const Work& work) {
    const int64_t rows = (count + kRows - 1) / kRows * kRows;
    const T* k = static_cast<const T*>(head.k) + first * head.stride;
    const T* v = static_cast<const T*>(head.v) + first * head.stride;
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(work.keys + i * D, k + i * head.stride, D * sizeof(T));
      std::memcpy(work.values + i * D, v + i * head.stride, D * sizeof(T));
    }
    std::memset(work.keys + count * D, 0, (rows - count) * D * sizeof(T));
    std::memset(work.values + count * D, 0, (rows - count) * D * sizeof(T));
    for (int64_t d = 0; d < D; ++d) {
      for (int64_t i = 0; i < rows; ++i)
        work.channels[d * kGradientKeys + i] = work.keys[i * D + d];
    }
    for (int64_t d = D; d < kChannelTiles * kRows; ++d) {
      std::memset(work.channels + d * kGradientKeys, 0, rows * sizeof(T));
    }
    std::memset(work.dk, 0, rows * D * sizeof(float));
    std::memset(work.dv, 0, rows * D * sizeof(float));
  }

  static void pass(const HeadGradientView& head, int64_t first, int64_t count, bool add,
                   float* partial, uint32_t* memory) {
    const Work work(memory);
    const float factor = head.scale * static_cast<float>(kLog2E);
    const int64_t tiles = (count + kRows - 1) / kRows;
    const int64_t key_steps = (count + kPerWord<T> - 1) / kPerWord<T>;
    load_keys(head, first, count, work);
    for (int64_t query = 0; query < head.N; query += kGradientQueries) {
      const int64_t queries = std::min(kGradientQueries, head.N - query);
      for_panels(queries, [&](auto vectors, int64_t column) {
        const int64_t at = query + column;
        const int64_t strip = column / kStrip, within = column % kStrip;
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t key = t * kRows;
          const int64_t to = (strip * kGradientKeys + key) * kStrip + within;
          const int64_t pair = (strip * kGradientKeys + key) / kPerWord<T> * kStrip + within;
          weigh<vectors.value>(work.keys + key * D, work.values + key * D,
                               head.queries + at * kSteps, head.upstreams + at * kSteps,
                               head.exponents + at, head.inverses + at, head.deltas + at, factor,
                               count - key, work.weights + to, work.slopes + to,
                               work.packed + pair);
        }
      });
      gather(work.weights, head.upstream_rows + query * kSteps, tiles, queries, work.dv);
      gather(work.slopes, head.query_rows + query * kSteps, tiles, queries, work.dk);
      for_panels(queries, [&](auto vectors, int64_t column) {
        const int64_t strip = column / kStrip, within = column % kStrip;
        const uint32_t* slopes =
            work.packed + strip * (kGradientKeys / kPerWord<T>)*kStrip + within;
        for (int64_t t = 0; t < kChannelTiles; ++t) {
          const int64_t d = t * kRows;
          spread<vectors.value>(work.channels + d * kGradientKeys, slopes, key_steps, D - d, add,
                                partial + d * head.padded + query + column, head.padded);
        }
      });
    }
    write(work.dk, head.scale, count, static_cast<T*>(head.dk) + first * head.gradient_stride,
          head.gradient_stride);
    write(work.dv, 1.0f, count, static_cast<T*>(head.dv) + first * head.gradient_stride,
          head.gradient_stride);
  }

  static void write(const float* rows, float factor, int64_t count, T* to, int64_t stride) {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t d = 0; d < D; d += 2 * kFloats) {
        const float* from = rows + i * D + d;
        store_pair(to + i * stride + d, load(from) * factor, load(from + kFloats) * factor);
      }
    }
  }

  static void finish(const HeadGradientView& head, int64_t strip, int64_t chunks) {
    const int64_t first = strip * kStrip;
    const int64_t count = std::min(kStrip, head.N - first);
    alignas(64) float rows[kStrip * D];
    for (int64_t d = 0; d < D; ++d) {
      for (int64_t column = 0; column < count; column += kFloats) {
        const float* from = head.partial + d * head.padded + first + column;
        Floats sum = load(from);
        for (int64_t chunk = 1; chunk < chunks; ++chunk) sum += load(from += D * head.padded);
        for (int i = 0; i < kFloats; ++i) rows[(column + i) * D + d] = sum[i];
      }
    }
    write(rows, head.scale, count, static_cast<T*>(head.dq) + first * head.gradient_stride,
          head.gradient_stride);
  }

  static constexpr HeadGradientKernels kernels() {
    return {&packed_words, &pack, Work::kWords, &pass, &finish};
  }
};

}  // namespace

const AttentionGradientKernels attention_gradient_kernels = {
    {{HeadGradient<float, 32>::kernels(), HeadGradient<float, 64>::kernels(),
      HeadGradient<float, 128>::kernels()},
     {HeadGradient<Bfloat16, 32>::kernels(), HeadGradient<Bfloat16, 64>::kernels(),
      HeadGradient<Bfloat16, 128>::kernels()}}};

}  // namespace SEGMENTER_SIMD_LEVEL
}  // namespace segmenter
