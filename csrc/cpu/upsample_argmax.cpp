#include "upsample_argmax.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cell.h"
#include "parallel.h"
#include "upsample_argmax_kernel.h"

namespace segmenter {
namespace {

// Longer runs of output rows are split, so that a coarse grid still feeds every thread.
constexpr int64_t kMaxRunRows = 32;
// Tasks per thread: enough to even out cells that cost more than others.
constexpr int64_t kTasksPerThread = 8;

[[noreturn]] void reject(const std::string& expected, const std::string& got) {
  throw std::invalid_argument("upsample_argmax: expected " + expected + ", got " + got);
}

std::string shape(std::initializer_list<int64_t> sizes) {
  std::string text = "(";
  for (int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + ")";
}

int64_t max_classes(LabelType type) {
  switch (type) {
    case LabelType::uint8:
      return int64_t{1} << 8;
    case LabelType::int16:
      return int64_t{1} << 15;
    default:
      return int64_t{1} << 31;
  }
}

void check(const UpsampleArgmax& a) {
  if (a.B < 0 || a.K < 1 || a.h < 1 || a.w < 1) {
    reject("logits (B, K, h, w) with B >= 0 and K, h, w >= 1", shape({a.B, a.K, a.h, a.w}));
  }
  if (a.H < 1 || a.W < 1) reject("size (H, W) with H, W >= 1", shape({a.H, a.W}));
  if (a.top < 0 || a.left < 0 || a.height < 0 || a.width < 0 || a.height > a.H - a.top ||
      a.width > a.W - a.left) {
    reject("crop (top, left, height, width) inside size " + shape({a.H, a.W}),
           shape({a.top, a.left, a.height, a.width}));
  }
  if (a.K > max_classes(a.labels_type)) {
    reject(
        "at most " + std::to_string(max_classes(a.labels_type)) + " classes for this type of label",
        std::to_string(a.K));
  }
  if (a.threads < 1) reject("threads >= 1", std::to_string(a.threads));
  const bool empty = a.B == 0 || a.height == 0 || a.width == 0;
  if (!empty && (!a.logits || !a.labels)) reject("pointers to logits and labels", "null");
}

template <typename T>
struct Axis {
  std::vector<Run> runs;
  std::vector<T> w0, w1;

  // Output coordinates [begin, begin + count) of `out`, counted from `begin`.
  Axis(int64_t in, int64_t out, int64_t begin, int64_t count, int64_t max_run)
      : w0(count + kTablePadding), w1(count + kTablePadding) {
    for (int64_t i = 0; i < count; ++i) {
      const Source<T> source = source_index<T>(begin + i, in, out);
      w0[i] = source.w0;
      w1[i] = source.w1;
      if (runs.empty() || runs.back().i0 != source.i0 || i - runs.back().begin == max_run) {
        runs.push_back({i, i, source.i0, source.i1});
      }
      runs.back().end = i + 1;
    }
  }

  AxisView<T> view() const {
    return {runs.data(), static_cast<int64_t>(runs.size()), w0.data(), w1.data()};
  }
};

template <typename T>
class ScratchMemory {
 public:
  ScratchMemory(int64_t columns, int64_t K_padded)
      : values_(2 * columns * K_padded + 6 * K_padded),
        flags_(2 * columns),
        classes_(2 * K_padded) {
    T* next = values_.data();
    const auto take = [&next](int64_t count) {
      T* taken = next;
      next += count;
      return taken;
    };
    for (int i = 0; i < 2; ++i) {
      scratch.patches[i] = take(columns * K_padded);
      scratch.ordinary[i] = flags_.data() + i * columns;
    }
    for (T*& corner : scratch.corners) corner = take(K_padded);
    scratch.left = take(K_padded);
    scratch.right = take(K_padded);
    scratch.kept = classes_.data();
    scratch.row_kept = classes_.data() + K_padded;
  }

  Scratch<T> scratch;

 private:
  std::vector<T> values_;
  std::vector<uint8_t> flags_;
  std::vector<int32_t> classes_;
};

const UpsampleArgmaxKernels& kernels(SimdLevel level) {
#if defined(SEGMENTER_X86_LEVELS)
  if (level == SimdLevel::avx512) return avx512::upsample_argmax_kernels;
  if (level == SimdLevel::avx2) return avx2::upsample_argmax_kernels;
#endif
  static_cast<void>(level);
  return generic::upsample_argmax_kernels;
}

template <typename T>
void run(const UpsampleArgmax& a, UpsampleArgmaxKernel<T> kernel) {
  const Axis<T> rows(a.h, a.H, a.top, a.height, kMaxRunRows);
  const Axis<T> cols(a.w, a.W, a.left, a.width, std::numeric_limits<int64_t>::max());

  UpsampleArgmaxView<T> view;
  view.logits = static_cast<const T*>(a.logits);
  view.labels = a.labels;
  view.K = a.K;
  view.K_padded = (a.K + kClassPadding - 1) / kClassPadding * kClassPadding;
  view.stride_b = a.stride_b;
  view.stride_k = a.stride_k;
  view.stride_y = a.stride_y;
  view.stride_x = a.stride_x;
  view.height = a.height;
  view.width = a.width;
  view.x_begin = cols.runs.front().i0;
  view.x_end = cols.runs.back().i1 + 1;
  view.rows = rows.view();
  view.cols = cols.view();

  // A task is a few consecutive runs of rows of one image; neighbours share a row of patches.
  const int64_t n_runs = view.rows.n_runs;
  const int64_t wanted = a.threads == 1 ? a.B : a.threads * kTasksPerThread;
  const int64_t per_task = std::clamp<int64_t>(a.B * n_runs / wanted, 1, n_runs);
  const int64_t tasks_per_image = (n_runs + per_task - 1) / per_task;
  const int64_t tasks = a.B * tasks_per_image;

  std::vector<ScratchMemory<T>> memory;
  const int workers = static_cast<int>(std::min<int64_t>(a.threads, tasks));
  memory.reserve(workers);
  for (int i = 0; i < workers; ++i) memory.emplace_back(view.x_end - view.x_begin, view.K_padded);

  parallel_for(tasks, workers, [&](int64_t task, int worker) {
    const int64_t first = task % tasks_per_image * per_task;
    kernel(view, memory[worker].scratch, task / tasks_per_image, first,
           std::min(first + per_task, n_runs));
  });
}

}  // namespace

void upsample_argmax(const UpsampleArgmax& a) {
  check(a);
  if (a.B == 0 || a.height == 0 || a.width == 0) return;
  const UpsampleArgmaxKernels& table = kernels(a.simd);
  const int label = static_cast<int>(a.labels_type);
  if (a.logits_type == FloatType::float32) {
    run<float>(a, table.float32[label]);
  } else {
    run<double>(a, table.float64[label]);
  }
}

}  // namespace segmenter
