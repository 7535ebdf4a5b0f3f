#include "layer_kernel.h"

#include <cmath>

#include "gelu.h"
#include "products.h"

namespace segmenter {
namespace SEGMENTER_SIMD_LEVEL {
namespace {

// Steps of a panel that a product takes at a time where its result is added up anyway: a longer
// part of a panel would not stay in the second cache from one tile of rows to the next.
constexpr int64_t kMostSteps = 1024;

template <typename T>
void pack(const float* weight, int64_t stride_out, int64_t stride_in, int64_t in, int64_t out,
          int64_t index, uint32_t* panel) {
  T* to = reinterpret_cast<T*>(panel);
  for (int64_t i = 0; i < in; ++i) {
    for (int64_t column = 0; column < kPanel; ++column) {
      const int64_t o = index * kPanel + column;
      to[(i / kPerWord<T> * kPanel + column) * kPerWord<T> + i % kPerWord<T>] =
          from_float<T>(o < out ? weight[o * stride_out + i * stride_in] : 0.0f);
    }
  }
}

template <typename T>
void pack_rows(const T* rows, int64_t count, int64_t in, uint32_t* panel) {
  pack_transposed(rows, in, count, in / kPerWord<T>, panel);
}

// A tile's rows of one panel to where they go. `columns` of the panel exist.
template <typename T, After after>
inline void finish(Tile<kVectors>& sums, int64_t rows, int64_t columns, void* out,
                   int64_t out_stride) {
  using Out = std::conditional_t<after == After::store || after == After::gelu, T, float>;
  if constexpr (after == After::gelu) {
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] = gelu<T>(sums[r][v]);
    }
  }
  const bool whole = columns >= kPanel;
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    if (r >= rows) break;
    Out* to = static_cast<Out*>(out) + r * out_stride;
    if (whole) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; v += 2) {
        if constexpr (after == After::add) {
          for (int i = v; i < v + 2; ++i) sums[r][i] += load(to + i * kFloats);
        }
        store_pair(to + v * kFloats, sums[r][v], sums[r][v + 1]);
      }
    } else {
      alignas(64) Out row[kPanel];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; v += 2) {
        store_pair(row + v * kFloats, sums[r][v], sums[r][v + 1]);
      }
      for (int64_t i = 0; i < columns; ++i) {
        if constexpr (after == After::add) {
          to[i] += row[i];
        } else {
          to[i] = row[i];
        }
      }
    }
  }
}

template <typename T, After after>
void multiply_rows(const T* x, int64_t x_stride, int64_t rows, const Linear& layer, void* out,
                   int64_t out_stride) {
  constexpr int64_t element = after == After::store || after == After::gelu ? sizeof(T) : 4;
  const int64_t steps = layer.in / kPerWord<T>;
  const int64_t most = after == After::add ? kMostSteps : steps;
  for (int64_t begin = 0; begin < steps; begin += most) {
    const int64_t count = begin + most < steps ? most : steps - begin;
    for (int64_t column = 0; column < layer.out; column += kPanel) {
      const uint32_t* panel = layer.panels + column * steps + begin * kPanel;
      for (int64_t row = 0; row < rows; row += kRows) {
        Tile<kVectors> sums;
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const Floats bias = begin ? Floats{} : load(layer.bias + column + v * kFloats);
#pragma GCC unroll 6
          for (int r = 0; r < kRows; ++r) sums[r][v] = bias;
        }
        const T* rows_from = x + row * x_stride + begin * kPerWord<T>;
        // The first tiles fetch the next panel, a line at each step, while they have this one.
        const int64_t tile = row / kRows;
        if (tile < kPanel / kLineWords && column + kPanel < layer.out) {
          const uint32_t* ahead = panel + steps * kPanel + tile * count * kLineWords;
          multiply<T, kVectors, true>(sums, rows_from, x_stride, panel, kPanel, count, ahead);
        } else {
          multiply<T, kVectors>(sums, rows_from, x_stride, panel, kPanel, count);
        }
        finish<T, after>(sums, rows - row, layer.out - column,
                         static_cast<char*>(out) + (row * out_stride + column) * element,
                         out_stride);
      }
    }
  }
}

template <typename T>
void linear(const T* x, int64_t x_stride, int64_t rows, const Linear& layer, After after, void* out,
            int64_t out_stride) {
  switch (after) {
    case After::store:
      return multiply_rows<T, After::store>(x, x_stride, rows, layer, out, out_stride);
    case After::gelu:
      return multiply_rows<T, After::gelu>(x, x_stride, rows, layer, out, out_stride);
    case After::add:
      return multiply_rows<T, After::add>(x, x_stride, rows, layer, out, out_stride);
    case After::copy:
      return multiply_rows<T, After::copy>(x, x_stride, rows, layer, out, out_stride);
  }
}

#if defined(__AVX512VNNI__)

constexpr int kBytesPerWord = 4;

// Weights to [-127, 127], each output with its own scale.
void pack_int8(const float* weight, int64_t in, int64_t out, int64_t index, uint32_t* panel,
               float* scales, float* sums) {
  int8_t* to = reinterpret_cast<int8_t*>(panel);
  for (int64_t column = 0; column < kPanel; ++column) {
    const int64_t o = index * kPanel + column;
    const float* row = weight + o * in;
    float largest = 0;
    for (int64_t i = 0; o < out && i < in; ++i) {
      largest = larger(largest, std::fabs(row[i]));
    }
    // Not a number: every output of this column is none, either.
    const float scale = largest / 127;
    int64_t sum = 0;
    for (int64_t i = 0; i < in; ++i) {
      const bool zero = o >= out || !(largest > 0 && largest < INFINITY);
      const int8_t q = zero ? 0 : static_cast<int8_t>(std::lrint(row[i] / scale));
      sum += q;
      to[(i / kBytesPerWord * kPanel + column) * kBytesPerWord + i % kBytesPerWord] = q;
    }
    scales[o] = scale;
    sums[o] = sum * scale;
  }
}

template <typename T>
void to_bytes(const T* x, int64_t x_stride, int64_t rows, int64_t in, const ByteRows& to) {
  for (int64_t row = 0; row < rows; ++row, x += x_stride) {
    Floats least = load_floats(x), most = least, poison = Floats{};
    for (int64_t i = 0; i < in; i += kFloats) {
      const Floats value = load_floats(x + i);
      least = value < least ? value : least;
      most = value > most ? value : most;
      poison += value - value;  // 0, or NaN where a value is not finite
    }
    float low = least[0], high = most[0];
    for (int i = 1; i < kFloats; ++i) {
      low = least[i] < low ? least[i] : low;
      high = most[i] > high ? most[i] : high;
    }
    const float scale = (high - low) / 255;
    const float inverse = scale > 0 ? 1 / scale : 0;
    to.scales[row] = scale;
    to.lows[row] = low + sum_of_lanes<float>(poison);
    uint8_t* bytes = to.bytes + row * in;
    for (int64_t i = 0; i < in; i += kFloats) {
      const Floats value = (load_floats(x + i) - low) * inverse + 0.5f;
      typedef uint8_t Bytes __attribute__((vector_size(kFloats)));
      const Bytes q = __builtin_convertvector(__builtin_convertvector(value, Words), Bytes);
      std::memcpy(bytes + i, &q, sizeof(q));
    }
  }
}

template <typename T, After after>
void multiply_bytes(const ByteRows& x, int64_t rows, const Linear& layer, void* out,
                    int64_t out_stride) {
  constexpr int64_t element = after == After::store || after == After::gelu ? sizeof(T) : 4;
  const int64_t steps = layer.in / kBytesPerWord;
  for (int64_t column = 0; column < layer.out; column += kPanel) {
    for (int64_t row = 0; row < rows; row += kRows) {
      Words counts[kRows][kVectors];
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) counts[r][v] = Words{};
      }
      const uint32_t* b = layer.panels + column * steps;
      const uint8_t* a = x.bytes + row * layer.in;
      for (int64_t step = 0; step < steps; ++step, b += kPanel, a += kBytesPerWord) {
        Words columns[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) columns[v] = load_words(b + v * kFloats);
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) {
          const Words byte = spread_word(a + r * layer.in);
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) {
            // The intrinsic makes GCC 12 copy and spill the sums.
            asm("vpdpbusd %2, %1, %0" : "+v"(counts[r][v]) : "v"(byte), "v"(columns[v]));
          }
        }
      }
      Tile<kVectors> sums;
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const int64_t o = column + v * kFloats;
          sums[r][v] = __builtin_convertvector(counts[r][v], Floats) * x.scales[row + r] *
                           load(layer.scales + o) +
                       (load(layer.sums + o) * x.lows[row + r] + load(layer.bias + o));
        }
      }
      finish<T, after>(sums, rows - row, layer.out - column,
                       static_cast<char*>(out) + (row * out_stride + column) * element, out_stride);
    }
  }
}

template <typename T>
void linear_int8(const ByteRows& x, int64_t rows, const Linear& layer, After after, void* out,
                 int64_t out_stride) {
  switch (after) {
    case After::store:
      return multiply_bytes<T, After::store>(x, rows, layer, out, out_stride);
    case After::gelu:
      return multiply_bytes<T, After::gelu>(x, rows, layer, out, out_stride);
    case After::add:
      return multiply_bytes<T, After::add>(x, rows, layer, out, out_stride);
    case After::copy:
      return multiply_bytes<T, After::copy>(x, rows, layer, out, out_stride);
  }
}

int64_t spin_int8(int64_t rounds) {
  Words sums[kRows][kVectors] = {}, a = Words{} + 1, b = Words{} + 1;
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        asm volatile("vpdpbusd %2, %1, %0" : "+v"(sums[r][v]) : "v"(a), "v"(b));
      }
    }
  }
  return rounds * kRows * kVectors * kFloats * kBytesPerWord * 2;
}

#endif

// 1 / sqrt(variance + eps); NaN if the squares overflowed, which would pass for a large variance.
inline float inverse_deviation(float squares, int64_t D, float eps) {
  return 1 / std::sqrt(squares / D + eps) + (squares - squares);
}

template <typename T>
void layer_norm(const float* x, int64_t rows, int64_t D, const float* weight, const float* bias,
                float eps, T* out) {
  for (int64_t row = 0; row < rows; ++row, x += D, out += D) {
    Floats sum = Floats{};
    for (int64_t i = 0; i < D; i += kFloats) sum += load(x + i);
    const float mean = sum_of_lanes<float>(sum) / D;
    Floats squares = Floats{};
    for (int64_t i = 0; i < D; i += kFloats) {
      const Floats centred = load(x + i) - mean;
      squares = squares + centred * centred;
    }
    const float scale = inverse_deviation(sum_of_lanes<float>(squares), D, eps);
    const auto normed = [&](int64_t i) {
      return (load(x + i) - mean) * scale * load(weight + i) + load(bias + i);
    };
    for (int64_t i = 0; i < D; i += 2 * kFloats) {
      store_pair(out + i, normed(i), normed(i + kFloats));
    }
  }
}

template <typename T>
void unit_length(const float* x, int64_t rows, int64_t D, T* out) {
  for (int64_t row = 0; row < rows; ++row, x += D, out += D) {
    Floats squares = Floats{};
    for (int64_t i = 0; i < D; i += kFloats) squares = squares + load(x + i) * load(x + i);
    const Floats length = splat(std::sqrt(sum_of_lanes<float>(squares)));
    for (int64_t i = 0; i < D; i += 2 * kFloats) {
      store_pair(out + i, load(x + i) / length, load(x + i + kFloats) / length);
    }
  }
}

void norm_of_classes(const float* x, int64_t rows, int64_t K, const float* weight,
                     const float* bias, float eps, float* out) {
  const int64_t whole = K / kFloats * kFloats;
  // `of` is called for whole vectors and then for what is left, one by one.
  const auto total = [&](const auto& of) {
    Floats sums = Floats{};
    for (int64_t k = 0; k < whole; k += kFloats) sums += of(load(x + k));
    float sum = sum_of_lanes<float>(sums);
    for (int64_t k = whole; k < K; ++k) sum += of(x[k]);
    return sum;
  };
  for (int64_t row = 0; row < rows; ++row, out += K) {
    const float mean = total([](auto value) { return value; }) / K;
    const auto square = [mean](auto value) { return (value - mean) * (value - mean); };
    const float scale = inverse_deviation(total(square), K, eps);
    for (int64_t k = 0; k < K; ++k) out[k] = (x[k] - mean) * scale * weight[k] + bias[k];
    x += (K + kPanel - 1) / kPanel * kPanel;
  }
}

template <typename T>
void read_patch(const float* image, int64_t channels, int64_t H, int64_t W, int64_t patch,
                int64_t y, int64_t x, T* out) {
  const int64_t rows = y + patch <= H ? patch : H - y;
  const int64_t columns = x + patch <= W ? patch : W - x;
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t row = 0; row < patch; ++row, out += patch) {
      const float* from = image + (c * H + y + row) * W + x;
      int64_t i = 0;
      if (row < rows) {
        for (; i + kFloats <= columns; i += kFloats) store_one(out + i, load(from + i));
        for (; i < columns; ++i) out[i] = from_float<T>(from[i]);
      }
      for (; i < patch; ++i) out[i] = from_float<T>(0.0f);
    }
  }
}

template <typename T>
int64_t spin(int64_t rounds) {
  // Different sums and a changing factor, or the compiler would see that the products are alike.
  Tile<kVectors> sums;
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) sums[r][v] = splat(1.0f * (r * kVectors + v));
  }
  const Words ones = (Words)splat(1.0f);
  for (int64_t i = 0; i < rounds; ++i) {
    const Words factor = ones + static_cast<int32_t>(i & 1);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] = dot<T>(sums[r][v], factor, ones);
    }
  }
  Floats sum = Floats{};
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) sum += sums[r][v];
  }
  volatile float wanted = sum_of_lanes<float>(sum);
  static_cast<void>(wanted);
  return rounds * kRows * kVectors * kFloats * kPerWord<T> * 2;
}

template <typename T>
constexpr LayerKernels<T> kernels() {
  LayerKernels<T> table = {};
  table.panel = kPanel;
  table.per_word = kPerWord<T>;
  table.pack = &pack<T>;
  table.pack_rows = &pack_rows<T>;
  table.linear = &linear<T>;
#if defined(__AVX512VNNI__)
  table.pack_int8 = &pack_int8;
  table.to_bytes = &to_bytes<T>;
  table.linear_int8 = &linear_int8<T>;
#endif
  table.layer_norm = &layer_norm<T>;
  table.unit_length = &unit_length<T>;
  table.norm_of_classes = &norm_of_classes;
  table.read_patch = &read_patch<T>;
  table.spin = &spin<T>;
  return table;
}

}  // namespace

const NetworkKernels network_kernels = {kernels<float>(), kernels<Bfloat16>(),
#if defined(__AVX512VNNI__)
                                        &spin_int8
#else
                                        nullptr
#endif
};

}  // namespace SEGMENTER_SIMD_LEVEL
}  // namespace segmenter
