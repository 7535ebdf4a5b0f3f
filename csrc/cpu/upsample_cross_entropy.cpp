#include "upsample_cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "axis_tables.h"
#include "parallel.h"
#include "upsample_cross_entropy_kernel.h"

namespace segmenter {
namespace {

constexpr int64_t kMaxClasses = 65535;
// Longer runs of output rows are split, so that a coarse grid still feeds every thread. What a
// thread does must not depend on how many there are: sums would be rounded in another order.
constexpr int64_t kMaxRunRows = 16;

// Bilinear weights rounded once. PyTorch computes the source coordinate in the logits' precision,
// and with it come errors of up to an ulp of the number of patches. They are its own: the cells are
// PyTorch's, but inside them the true position is as close to the definition as it gets, and it
// grows by the same step from pixel to pixel.
template <typename T>
class Weights {
 public:
  Weights(const AxisTables<T>& axis, int64_t in, int64_t out, int64_t begin, int64_t count)
      : w0_(count + kTablePadding), w1_(count + kTablePadding), clamped_(count) {
    for (const Run& run : axis.runs) {
      for (int64_t i = run.begin; i < run.end; ++i) {
        const double position = (double(begin + i) + 0.5) * double(in) / double(out) - 0.5;
        clamped_[i] = position <= 0 || run.i0 == run.i1;
        w1_[i] = clamped_[i] ? T(0) : static_cast<T>(position - double(run.i0));
        w0_[i] = T(1) - w1_[i];
      }
    }
  }

  // The runs of the axis, split where a clamped stretch ends and into nearly equal parts of at most
  // max_columns.
  std::vector<Chunk<T>> chunks(const std::vector<Run>& runs, T step, int64_t max_columns) const {
    std::vector<Chunk<T>> chunks;
    for (const Run& run : runs) {
      for (int64_t begin = run.begin, end; begin < run.end; begin = end) {
        end = begin + 1;
        while (end < run.end && clamped_[end] == clamped_[begin]) ++end;
        const int64_t parts = (end - begin + max_columns - 1) / max_columns;
        for (int64_t i = 0; i < parts; ++i) {
          const int64_t from = begin + (end - begin) * i / parts;
          const int64_t to = begin + (end - begin) * (i + 1) / parts;
          const T part_step = clamped_[begin] ? T(0) : step;
          chunks.push_back({from, to, run.i0, run.i1, w1_[from], part_step});
        }
      }
    }
    return chunks;
  }

  WeightsView<T> view() const { return {w0_.data(), w1_.data()}; }

 private:
  std::vector<T> w0_, w1_;
  std::vector<char> clamped_;
};

// Memory that is not set to anything: what it is for is written first.
template <typename T>
std::unique_ptr<T[]> raw_memory(int64_t count) {
  return std::unique_ptr<T[]>(new T[count]);
}

template <typename T>
class ScratchMemory {
 public:
  explicit ScratchMemory(int64_t K_padded) : memory_(raw_memory<T>(11 * K_padded)) {
    T* next = memory_.get();
    const auto take = [&next, K_padded](T*& array) {
      array = next;
      next += K_padded;
    };
    take(scratch.first);
    take(scratch.ratio);
    take(scratch.values);
    for (T*& array : scratch.lifted) take(array);
    for (T*& array : scratch.given) take(array);
  }

  CrossEntropyScratch<T> scratch;

 private:
  std::unique_ptr<T[]> memory_;
};

// Rows of patches that any output row reads, in order.
std::vector<int64_t> rows_read(const std::vector<Run>& runs) {
  std::vector<int64_t> rows;
  for (const Run& run : runs) {
    for (int64_t y : {run.i0, run.i1}) {
      if (rows.empty() || y > rows.back()) rows.push_back(y);
    }
  }
  return rows;
}

template <typename T>
CrossEntropyResult run(const Upsampling& u, const CrossEntropy& c,
                       const UpsampleCrossEntropyFunctions<T>& kernel) {
  const AxisTables<T> rows(u.h, u.H, u.top, u.height, kMaxRunRows);
  const AxisTables<T> cols(u.w, u.W, u.left, u.width, std::numeric_limits<int64_t>::max());
  const Weights<T> row_weights(rows, u.h, u.H, u.top, u.height);
  const Weights<T> col_weights(cols, u.w, u.W, u.left, u.width);
  const double step = double(u.w) / double(u.W);
  const std::vector<Chunk<T>> chunks =
      col_weights.chunks(cols.runs, static_cast<T>(step), step <= kMaxStep ? kernel.max_chunk : 1);

  UpsampleCrossEntropyView<T> view{};
  view.logits = static_cast<const T*>(u.logits);
  view.K = u.K;
  view.K_padded = padded_classes(u.K);
  view.h = u.h;
  view.w = u.w;
  view.stride_b = u.stride_b;
  view.stride_k = u.stride_k;
  view.stride_y = u.stride_y;
  view.stride_x = u.stride_x;
  view.height = u.height;
  view.width = u.width;
  view.x_begin = cols.runs.front().i0;
  view.columns = cols.runs.back().i1 + 1 - view.x_begin;
  view.rows = rows.view();
  view.cols = cols.view();
  view.row_weights = row_weights.view();
  view.col_weights = col_weights.view();
  view.chunks = chunks.data();
  view.n_chunks = static_cast<int64_t>(chunks.size());

  view.target = c.target;
  view.upstream = static_cast<const T*>(c.upstream);
  view.ignore_index = c.ignore_index;
  view.losses = static_cast<T*>(c.losses);
  view.gradient = static_cast<T*>(c.gradient);
  view.gradient_stride_b = c.gradient_stride_b;
  view.gradient_stride_k = c.gradient_stride_k;
  view.gradient_stride_y = c.gradient_stride_y;
  view.gradient_stride_x = c.gradient_stride_x;

  std::vector<T> weight(view.K_padded);
  double weight_sum = 0, largest_weight = 0;
  for (int64_t k = 0; k < u.K; ++k) {
    weight[k] = c.weight ? static_cast<const T*>(c.weight)[k] : T(1);
    weight_sum += double(weight[k]);
    largest_weight = std::max(largest_weight, std::abs(double(weight[k])));
  }
  const double spread = c.label_smoothing / double(u.K);
  view.weight = weight.data();
  view.keep = static_cast<T>(1 - c.label_smoothing);
  view.spread = static_cast<T>(spread);
  view.spread_weight = static_cast<T>(spread * weight_sum);
  // Not a number, and then no upstream passes for moderate, when a weight is NaN or infinite.
  const double largest_factor = largest_weight + std::abs(spread * weight_sum);
  view.largest_upstream = static_cast<T>(std::min(kLargestFactor / largest_factor, 1e30));
  view.smallest_upstream = static_cast<T>(kSmallestFactor / std::max(1e-30, largest_factor));

  const int64_t n_patches = u.B * u.h * view.columns;
  const bool smooth = c.label_smoothing != 0;
  const auto values = raw_memory<T>(n_patches * view.K_padded);
  const auto smallest = raw_memory<T>(n_patches);
  const auto weighted = raw_memory<T>(smooth ? n_patches : 0);
  view.patches = {values.get(), smallest.get(), smooth ? weighted.get() : nullptr};

  const int64_t n_row_sums = c.gradient ? u.B * view.rows.n_runs * 2 * view.columns : 0;
  const auto gradients = raw_memory<T>(n_row_sums * view.K_padded);
  const auto smoothing = raw_memory<T>(smooth ? n_row_sums : 0);
  view.sums = {c.gradient ? gradients.get() : nullptr,
               smooth && c.gradient ? smoothing.get() : nullptr};

  const std::vector<int64_t> patch_rows = rows_read(rows.runs);
  const int64_t n_patch_rows = static_cast<int64_t>(patch_rows.size());
  parallel_for(u.B * n_patch_rows, u.threads, [&](int64_t task, int) {
    kernel.pack(view, task / n_patch_rows, patch_rows[task % n_patch_rows]);
  });

  const int64_t tasks = u.B * view.rows.n_runs;
  const int workers = static_cast<int>(std::min<int64_t>(u.threads, tasks));
  std::vector<ScratchMemory<T>> memory;
  memory.reserve(workers);
  for (int i = 0; i < workers; ++i) memory.emplace_back(view.K_padded);
  std::vector<CrossEntropySums> sums(tasks);
  const auto row_of_cells = kernel.row_of_cells[static_cast<int>(c.target_type)];
  parallel_for(tasks, workers, [&](int64_t task, int worker) {
    row_of_cells(view, memory[worker].scratch, task / view.rows.n_runs, task % view.rows.n_runs,
                 sums[task]);
  });

  CrossEntropySums total{};
  for (const CrossEntropySums& part : sums) {
    total.loss += part.loss;
    total.weight += part.weight;
    total.valid_pixels += part.valid_pixels;
    total.wrong_labels += part.wrong_labels;
  }
  if (total.wrong_labels > 0) return {total.loss, total.wrong_labels};
  if (view.gradient) {
    // As in PyTorch, the gradient of a mean over nothing is 0, although the mean itself is NaN.
    const bool divide = c.mean && total.valid_pixels > 0;
    const T scale = divide ? static_cast<T>(1 / total.weight) : T(1);
    parallel_for(u.B * u.h, u.threads,
                 [&](int64_t task, int) { kernel.finish(view, task / u.h, task % u.h, scale); });
  }
  return {c.mean ? total.loss / total.weight : total.loss, 0};
}

}  // namespace

CrossEntropyResult upsample_cross_entropy(const Upsampling& u, const CrossEntropy& c) {
  check(u);
  if (u.K > kMaxClasses) {
    throw std::invalid_argument("expected at most " + std::to_string(kMaxClasses) +
                                " classes, got " + std::to_string(u.K));
  }
  if (u.empty()) {
    return {c.mean ? std::numeric_limits<double>::quiet_NaN() : 0.0, 0};
  }
  if (!c.target) throw std::invalid_argument("expected a pointer to a target, got null");
  const UpsampleCrossEntropyKernels& table =
      SEGMENTER_KERNELS(u.simd, upsample_cross_entropy_kernels);
  return u.type == FloatType::float32 ? run<float>(u, c, table.float32)
                                      : run<double>(u, c, table.float64);
}

}  // namespace segmenter
