#include "upsample_argmax.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "axis_tables.h"
#include "parallel.h"
#include "upsample_argmax_kernel.h"

namespace segmenter {
namespace {

// Longer runs of output rows are split, so that a coarse grid still feeds every thread.
constexpr int64_t kMaxRunRows = 32;
// Tasks per thread: enough to even out cells that cost more than others.
constexpr int64_t kTasksPerThread = 8;

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

template <typename T>
void run(const Upsampling& u, void* labels, UpsampleArgmaxKernel<T> kernel) {
  const AxisTables<T> rows(u.h, u.H, u.top, u.height, kMaxRunRows);
  const AxisTables<T> cols(u.w, u.W, u.left, u.width, std::numeric_limits<int64_t>::max());

  UpsampleArgmaxView<T> view;
  view.logits = static_cast<const T*>(u.logits);
  view.labels = labels;
  view.K = u.K;
  view.K_padded = padded_classes(u.K);
  view.stride_b = u.stride_b;
  view.stride_k = u.stride_k;
  view.stride_y = u.stride_y;
  view.stride_x = u.stride_x;
  view.height = u.height;
  view.width = u.width;
  view.x_begin = cols.runs.front().i0;
  view.x_end = cols.runs.back().i1 + 1;
  view.rows = rows.view();
  view.cols = cols.view();

  // A task is a few consecutive runs of rows of one image; neighbours share a row of patches.
  const int64_t n_runs = view.rows.n_runs;
  const int64_t wanted = u.threads == 1 ? u.B : u.threads * kTasksPerThread;
  const int64_t per_task = std::clamp<int64_t>(u.B * n_runs / wanted, 1, n_runs);
  const int64_t tasks_per_image = (n_runs + per_task - 1) / per_task;
  const int64_t tasks = u.B * tasks_per_image;

  std::vector<ScratchMemory<T>> memory;
  const int workers = static_cast<int>(std::min<int64_t>(u.threads, tasks));
  memory.reserve(workers);
  for (int i = 0; i < workers; ++i) memory.emplace_back(view.x_end - view.x_begin, view.K_padded);

  parallel_for(tasks, workers, [&](int64_t task, int worker) {
    const int64_t first = task % tasks_per_image * per_task;
    kernel(view, memory[worker].scratch, task / tasks_per_image, first,
           std::min(first + per_task, n_runs));
  });
}

}  // namespace

void check_label_type(LabelType type, int64_t K) {
  if (K > max_classes(type)) {
    throw std::invalid_argument("expected at most " + std::to_string(max_classes(type)) +
                                " classes for this type of label, got " + std::to_string(K));
  }
}

void upsample_argmax(const Upsampling& u, LabelType type, void* labels) {
  check(u);
  check_label_type(type, u.K);
  if (u.empty()) return;
  if (!labels) throw std::invalid_argument("expected a pointer to labels, got null");
  const UpsampleArgmaxKernels& table = SEGMENTER_KERNELS(u.simd, upsample_argmax_kernels);
  const int label = static_cast<int>(type);
  if (u.type == FloatType::float32) {
    run<float>(u, labels, table.float32[label]);
  } else {
    run<double>(u, labels, table.float64[label]);
  }
}

}  // namespace segmenter
