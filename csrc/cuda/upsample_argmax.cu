// Upsample + argmax: a warp labels one cell of the patch grid, the pixels that read the same four
// patches.
//
// 1. A block takes a few cells of one row. Its warps bring the cells' patches to shared memory,
//    class-last; neighbouring cells share patches.
// 2. Lanes are classes. Every upsampled logit is a convex combination of the cell's corners, so the
//    class with the best smallest corner sets a bound, and a class whose largest corner is below it
//    wins nowhere in the cell. cell.h says why that stays exact under rounding. The classes that
//    are left, often one, are put into a list in order.
// 3. Lanes are pixels, and keep the first of the list's largest values.
//
// A cell with NaN, infinity or numbers so large that a blend could overflow is labelled by the rule
// of torch.argmax among all classes, read from global memory; so is every cell when there are so
// many classes that not even one cell's patches fit in shared memory.
//
// This file is compiled without fused multiply-adds, except those that are written out: labels are
// then the CPU's, bit by bit.
#include "upsample_argmax.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <limits>

#include "../cell.h"
#include "launch.h"

namespace segmenter {
namespace cuda {
namespace {

constexpr const char* kName = "upsample_argmax";
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = ~0u;
// Cells of a block, a warp each: one less than a power of two, so that their patches, one more in a
// row, are a power of two.
constexpr int kMostCells = 7;
constexpr int kRowsAtOnce = 4;  // rows of pixels that a lane labels together
constexpr int64_t kLargestSide = int64_t{1} << 30;

struct View {
  const void* logits;  // (B, K, h, w)
  void* labels;        // (B, height, width)
  LabelType label_type;
  int64_t stride_b, stride_k, stride_y, stride_x;
  int K, h, w, H, W;
  int top, left, bottom, right;  // the crop
  int first_y, first_x;          // its first cell
  int cells_y, tiles;            // its rows of cells, and how many blocks share one
  int columns;                   // patches of a row that a block holds; 0: too many classes
  int K_padded;
};

// Constants of a type, which device code may not ask std::numeric_limits for.
template <typename T>
struct Limits {
  static constexpr T infinity = std::numeric_limits<T>::infinity();
  static constexpr T largest_ordinary = std::numeric_limits<T>::max() / 4;
  static constexpr T epsilon = std::numeric_limits<T>::epsilon();
  static constexpr T tiny = std::numeric_limits<T>::min();
};

// What logits are converted to as they are read.
template <typename In>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};

__device__ float convert(float x) { return x; }
__device__ double convert(double x) { return x; }
__device__ float convert(__half x) { return __half2float(x); }
__device__ float convert(__nv_bfloat16 x) { return __bfloat162float(x); }

// The first output coordinate that reads sample `cell` or a later one first; `out` if none does.
template <typename T>
__device__ int first_pixel(int cell, int in, int out) {
  if (cell <= 0) return 0;
  if (cell >= in) return out;
  const float guess = ceilf((cell + 0.5f) * (static_cast<float>(out) / in) - 0.5f);
  int pixel = static_cast<int>(fminf(fmaxf(guess, 0.0f), static_cast<float>(out)));
  if (pixel > out) pixel = out;  // as a float, `out` may have been rounded up
  while (pixel > 0 && source_index<T>(pixel - 1, in, out).i0 >= cell) --pixel;
  while (pixel < out && source_index<T>(pixel, in, out).i0 < cell) ++pixel;
  return pixel;
}

// Output coordinates of a cell.
struct Rectangle {
  int top, left, bottom, right;
};

__device__ void store_label(const View& view, int64_t at, int label) {
  switch (view.label_type) {
    case LabelType::uint8:
      static_cast<uint8_t*>(view.labels)[at] = static_cast<uint8_t>(label);
      break;
    case LabelType::int16:
      static_cast<int16_t*>(view.labels)[at] = static_cast<int16_t>(label);
      break;
    default:
      static_cast<int32_t*>(view.labels)[at] = label;
  }
}

// Copies two rows of patches to shared memory, (2, columns, K_padded). In global memory either a
// patch's classes are neighbours or its columns are, and so are a warp's loads.
template <typename In, typename T>
__device__ void stage(const View& view, const In* image, int y0, int y1, int x, T* patches) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  const int columns = view.columns, last = view.w - 1;
  if (view.stride_k <= view.stride_x) {
    for (int patch = warp; patch < 2 * columns; patch += warps) {
      const int row = patch / columns, column = patch % columns;
      const In* source = image + (row ? y1 : y0) * view.stride_y +
                         lesser(x + column, last) * view.stride_x;
      for (int k = lane; k < view.K; k += kWarp) {
        patches[patch * view.K_padded + k] = convert(source[k * view.stride_k]);
      }
    }
  } else {
    const int patch = threadIdx.x % (2 * columns);
    const int row = patch / columns, column = patch % columns;
    const In* source = image + (row ? y1 : y0) * view.stride_y +
                       lesser(x + column, last) * view.stride_x;
    const int step = blockDim.x / (2 * columns);
    for (int k = threadIdx.x / (2 * columns); k < view.K; k += step) {
      patches[patch * view.K_padded + k] = convert(source[k * view.stride_k]);
    }
  }
}

// Writes the classes that no other beats in the whole cell to `kept`, in order, and returns their
// number; 0 if some corner is not an ordinary number. For whole warps.
template <typename T>
__device__ int prune_cell(const Corners<const T*>& corners, int K, uint16_t* kept) {
  constexpr T kLimit = Limits<T>::largest_ordinary;
  const int lane = threadIdx.x % kWarp;
  T best = -Limits<T>::infinity;
  bool ordinary = true;
  for (int k = lane; k < K; k += kWarp) {
    const T a = corners.a[k], b = corners.b[k], c = corners.c[k], d = corners.d[k];
    for (const T corner : {a, b, c, d}) ordinary &= corner <= kLimit && corner >= -kLimit;
    best = greater(best, lesser(lesser(a, b), lesser(c, d)));
  }
  if (!__all_sync(kAllLanes, ordinary)) return 0;
  for (int i = kWarp / 2; i > 0; i /= 2) best = greater(best, __shfl_xor_sync(kAllLanes, best, i));
  const T bound = keep_ties(best, 4, Limits<T>::epsilon, Limits<T>::tiny);
  int n = 0;
  for (int k0 = 0; k0 < K; k0 += kWarp) {
    const int k = k0 + lane;
    const bool keeps = k < K && greater(greater(corners.a[k], corners.b[k]),
                                        greater(corners.c[k], corners.d[k])) >= bound;
    const unsigned keeping = __ballot_sync(kAllLanes, keeps);
    if (keeps) kept[n + __popc(keeping & ((1u << lane) - 1))] = static_cast<uint16_t>(k);
    n += __popc(keeping);
  }
  __syncwarp();
  return n;
}

// Labels the cell's pixels, a few rows of one column per lane: choose(wy0, wy1, wx0, wx1, labels)
// finds their labels from the weights of the rows and of the column.
template <typename T, int kRows, typename Choose>
__device__ void label_pixels(const View& view, const Rectangle& cell, int64_t image,
                             Choose choose) {
  int lanes_x = kWarp;
  while (lanes_x / 2 >= cell.right - cell.left) lanes_x /= 2;
  const int lane = threadIdx.x % kWarp, lanes_y = kWarp / lanes_x;
  const int64_t width = view.right - view.left, height = view.bottom - view.top;
  for (int x = cell.left + lane % lanes_x; x < cell.right; x += lanes_x) {
    const Source<T> source_x = source_index<T>(x, view.w, view.W);
    for (int y = cell.top + lane / lanes_x; y < cell.bottom; y += kRows * lanes_y) {
      T wy0[kRows], wy1[kRows];
      int labels[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const Source<T> source_y =
            source_index<T>(lesser(y + i * lanes_y, cell.bottom - 1), view.h, view.H);
        wy0[i] = source_y.w0;
        wy1[i] = source_y.w1;
      }
      choose(wy0, wy1, source_x.w0, source_x.w1, labels);
      const int64_t at = (image * height + (y - view.top)) * width + (x - view.left);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (y + i * lanes_y < cell.bottom) store_label(view, at + i * lanes_y * width, labels[i]);
      }
    }
  }
}

template <typename T>
__device__ T value_at(T a, T b, T c, T d, T wy0, T wy1, T wx0, T wx1) {
  return blend(blend(a, c, wy0, wy1), blend(b, d, wy0, wy1), wx0, wx1);
}

// Labels a cell among the n classes of a list, whose logits are all ordinary numbers.
template <typename T>
__device__ void label_cell(const View& view, const Rectangle& cell, int64_t image,
                           const Corners<const T*>& corners, const uint16_t* kept, int n) {
  label_pixels<T, kRowsAtOnce>(view, cell, image, [&](const T* wy0, const T* wy1, T wx0, T wx1, int* labels) {
    T best[kRowsAtOnce];
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      best[i] = -Limits<T>::infinity;
      labels[i] = kept[0];
    }
    for (int j = 0; n > 1 && j < n; ++j) {
      const int k = kept[j];
      const T a = corners.a[k], b = corners.b[k], c = corners.c[k], d = corners.d[k];
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        const T value = value_at(a, b, c, d, wy0[i], wy1[i], wx0, wx1);
        const bool better = value > best[i];
        best[i] = better ? value : best[i];
        labels[i] = better ? k : labels[i];
      }
    }
  });
}

// Labels a cell among all classes, whatever their logits. That is rare, and one row at a time takes
// fewer registers, of which the other way then has more.
template <typename In, typename T>
__device__ void label_any_cell(const View& view, const Rectangle& cell, int64_t image,
                               const Corners<const In*>& corners) {
  label_pixels<T, 1>(view, cell, image, [&](const T* wy0, const T* wy1, T wx0, T wx1, int* label) {
    T best = -Limits<T>::infinity;
    *label = 0;
    for (int k = 0; k < view.K; ++k) {
      const int64_t at = k * view.stride_k;
      const T value = value_at<T>(convert(corners.a[at]), convert(corners.b[at]),
                                  convert(corners.c[at]), convert(corners.d[at]), *wy0, *wy1, wx0,
                                  wx1);
      // As in torch.argmax: the first of the largest values, and NaN is larger than any.
      const bool better = value > best || (value != value && best == best);
      best = better ? value : best;
      *label = better ? k : *label;
    }
  });
}

template <typename In>
__global__ void __launch_bounds__(kMostCells* kWarp) label_cells(View view) {
  using T = typename Arithmetic<In>::type;
  // (2, columns, K_padded) patches, then per warp (K,) candidates.
  extern __shared__ double memory[];
  __shared__ int first_columns[kMostCells + 1], first_rows[2];
  T* patches = reinterpret_cast<T*>(memory);
  const int thread = threadIdx.x, warp = thread / kWarp, cells = blockDim.x / kWarp;

  const int tile = blockIdx.x % view.tiles;
  const int row = blockIdx.x / view.tiles;
  const int64_t image = row / view.cells_y;
  const int y = view.first_y + row % view.cells_y, x = view.first_x + tile * cells;
  if (thread <= cells) {
    const int pixel = first_pixel<T>(x + thread, view.w, view.W);
    first_columns[thread] = lesser(greater(pixel, view.left), view.right);
  } else if (thread <= cells + 2) {
    const int i = thread - cells - 1;
    const int pixel = first_pixel<T>(y + i, view.h, view.H);
    first_rows[i] = lesser(greater(pixel, view.top), view.bottom);
  }
  // A side of the grid that is not resized reads one patch per pixel; the last one has no next.
  const int y1 = view.h == view.H ? y : lesser(y + 1, view.h - 1);
  const In* logits = static_cast<const In*>(view.logits) + image * view.stride_b;
  if (view.columns) stage(view, logits, y, y1, x, patches);
  __syncthreads();

  const Rectangle cell = {first_rows[0], first_columns[warp], first_rows[1],
                          first_columns[warp + 1]};
  if (cell.top >= cell.bottom || cell.left >= cell.right) return;
  if (view.columns) {
    const int next = view.w == view.W ? warp : warp + 1;
    const T* upper = patches;
    const Corners<const T*> corners = corners_at(
        upper, upper + view.columns * view.K_padded, warp, next, view.K_padded);
    auto* kept = reinterpret_cast<uint16_t*>(patches + 2 * view.columns * view.K_padded);
    kept += warp * view.K;
    const int n = prune_cell(corners, view.K, kept);
    if (n > 0) return label_cell(view, cell, image, corners, kept, n);
  }
  const int x0 = x + warp, x1 = view.w == view.W ? x0 : lesser(x0 + 1, view.w - 1);
  label_any_cell<In, T>(view, cell, image,
                        corners_at(logits + y * view.stride_y, logits + y1 * view.stride_y, x0, x1,
                                   view.stride_x));
}

template <typename In>
void launch(const Upsampling& u, LabelType label_type, void* labels, const Queue& queue) {
  using T = typename Arithmetic<In>::type;
  const auto first = [](int64_t pixel, int64_t in, int64_t out) {
    return source_index<T>(pixel, in, out).i0;
  };
  const int64_t first_y = first(u.top, u.h, u.H), first_x = first(u.left, u.w, u.W);
  const int64_t cells_y = first(u.top + u.height - 1, u.h, u.H) - first_y + 1;
  const int64_t cells_x = first(u.left + u.width - 1, u.w, u.W) - first_x + 1;

  // As many cells as shared memory has room for.
  const int64_t most =
      device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, queue.device, kName) - 1024;
  const int64_t K_padded = u.K | 1;  // odd, so that neighbouring columns are in different banks
  const auto bytes_for = [&](int64_t cells) {
    return static_cast<int64_t>(2 * (cells + 1) * K_padded * sizeof(T) +
                                cells * u.K * sizeof(uint16_t));
  };
  int cells = kMostCells;
  while (cells > 0 && bytes_for(cells) > most) cells /= 2;
  const bool staged = cells > 0;
  if (!staged) cells = kMostCells;
  const int64_t bytes = staged ? bytes_for(cells) : 0;
  const int64_t tiles = (cells_x + cells - 1) / cells;
  const int64_t blocks = u.B * cells_y * tiles;
  if (blocks > std::numeric_limits<int>::max()) {
    throw std::invalid_argument("expected at most 2^31 - 1 groups of patches, got " +
                                std::to_string(blocks));
  }
  const auto narrow = [](int64_t value) { return static_cast<int>(value); };
  const View view = {u.logits, labels, label_type,
                     u.stride_b, u.stride_k, u.stride_y, u.stride_x,
                     narrow(u.K), narrow(u.h), narrow(u.w), narrow(u.H), narrow(u.W),
                     narrow(u.top), narrow(u.left), narrow(u.top + u.height),
                     narrow(u.left + u.width),
                     narrow(first_y), narrow(first_x), narrow(cells_y), narrow(tiles),
                     staged ? cells + 1 : 0, narrow(K_padded)};
  allow_shared_memory(label_cells<In>, bytes, kName);
  label_cells<In><<<static_cast<unsigned>(blocks), cells * kWarp, bytes, stream_of(queue)>>>(view);
  check(cudaGetLastError(), kName);
}

}  // namespace

void upsample_argmax(const Upsampling& u, LogitType type, LabelType label_type, void* labels,
                     const Queue& queue) {
  segmenter::check(u);
  check_label_type(label_type, u.K);
  for (int64_t side : {u.h, u.w, u.H, u.W}) {
    if (side >= kLargestSide) {
      throw std::invalid_argument("expected sides below 2^30, got " +
                                  shape_text({u.h, u.w, u.H, u.W}));
    }
  }
  if (u.empty()) return;
  if (!labels) throw std::invalid_argument("expected a pointer to labels, got null");
  const OnDevice on_device(queue.device, kName);
  switch (type) {
    case LogitType::float16:
      return launch<__half>(u, label_type, labels, queue);
    case LogitType::bfloat16:
      return launch<__nv_bfloat16>(u, label_type, labels, queue);
    case LogitType::float32:
      return launch<float>(u, label_type, labels, queue);
    case LogitType::float64:
      return launch<double>(u, label_type, labels, queue);
  }
}

}  // namespace cuda
}  // namespace segmenter
