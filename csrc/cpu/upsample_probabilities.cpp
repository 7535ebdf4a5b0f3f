#include "upsample_probabilities.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "axis_tables.h"
#include "parallel.h"
#include "upsample_probabilities_kernel.h"

namespace segmenter {
namespace {

// A worker's two blended patch rows are to stay in its second-level cache.
constexpr int64_t kTileBytes = 768 << 10;
// Wide enough for whole vectors of any level, and for stores that fill pages.
constexpr int64_t kTileColumns = 64;
// Tasks per thread: each begins by blending a patch row that its neighbour has blended too.
constexpr int64_t kTasksPerThread = 4;

// The rows [top, top + height) of an axis in runs along which weights are an arithmetic progression
// of at most kMaxRunRows terms, nearly equal in length.
template <typename T>
std::vector<RowRun<T>> row_runs(const AxisTables<T>& rows, const Upsampling& u) {
  const double scale = double(u.h) / double(u.H);
  // Whether a row's source lies before its i0, and was moved there: the weight is 0 and the
  // progression has not begun. The tolerance is for rounding.
  const auto clamped = [&](const Run& run, int64_t row) {
    return scale * (double(u.top + row) + 0.5) - 0.5 < double(run.i0) - 1e-12;
  };
  std::vector<RowRun<T>> runs;
  for (const Run& run : rows.runs) {
    int64_t end;
    for (int64_t begin = run.begin; begin < run.end; begin = end) {
      const bool constant = clamped(run, begin);
      for (end = begin + 1; end < run.end && clamped(run, end) == constant;) ++end;
      const int64_t length = end - begin, parts = (length + kMaxRunRows - 1) / kMaxRunRows;
      for (int64_t part = 0; part < parts; ++part) {
        runs.push_back({begin + length * part / parts, begin + length * (part + 1) / parts, run.i0,
                        run.i1, constant ? T(0) : T(scale)});
      }
    }
  }
  return runs;
}

// Asks for large pages behind an output of many megabytes that is about to be written whole. Fresh
// memory costs a page fault per page, which with pages of 4 KiB is most of the time of writing it.
void prefer_large_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLargePage = 2 << 20;
  const uintptr_t address = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t begin = (address + kLargePage - 1) / kLargePage * kLargePage;
  const uintptr_t end = (address + bytes) / kLargePage * kLargePage;
  // Advice: where it is not taken, nothing changes.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  static_cast<void>(memory), static_cast<void>(bytes);
#endif
}

template <typename T>
class ScratchMemory {
 public:
  ScratchMemory(int64_t K, int64_t columns, int64_t patch_columns)
      : values_((K + 1) * patch_columns + 2 * K * columns + 3 * kMaxRunRows * columns + columns +
                kTablePadding),
        flags_(patch_columns + 2 * columns) {
    T* next = values_.data();
    const auto take = [&next](int64_t count) {
      T* taken = next;
      next += count;
      return taken;
    };
    scratch.columns = columns;
    for (T*& blended : scratch.blended) blended = take(K * columns);
    scratch.shift = take(kMaxRunRows * columns);
    scratch.inverse = take(kMaxRunRows * columns);
    scratch.result = take(kMaxRunRows * columns);
    scratch.line = take(columns + kTablePadding);
    scratch.patches = take(K * patch_columns);
    scratch.largest = take(patch_columns);
    scratch.narrow = flags_.data();
    for (int i = 0; i < 2; ++i) scratch.steady[i] = flags_.data() + patch_columns + i * columns;
  }

  ProbabilityScratch<T> scratch;

 private:
  std::vector<T> values_;
  std::vector<uint8_t> flags_;
};

template <typename T>
void run(const Upsampling& u, void* out, int64_t out_values,
         UpsampleProbabilitiesKernel<T> kernel) {
  const AxisTables<T> rows(u.h, u.H, u.top, u.height, std::numeric_limits<int64_t>::max());
  const std::vector<RowRun<T>> runs = row_runs(rows, u);

  // Tiles depend on the problem alone, never on the number of threads.
  const int64_t fitting = kTileBytes / (2 * u.K * static_cast<int64_t>(sizeof(T)));
  const int64_t tile_columns = std::max(fitting / kTileColumns, int64_t{1}) * kTileColumns;
  std::vector<AxisTables<T>> tables;
  std::vector<ColumnTile<T>> tiles;
  int64_t patch_columns = 0;
  for (int64_t begin = 0; begin < u.width; begin += tile_columns) {
    const int64_t end = std::min(begin + tile_columns, u.width);
    tables.emplace_back(u.w, u.W, u.left + begin, end - begin, std::numeric_limits<int64_t>::max());
    const AxisView<T> cols = tables.back().view();
    const int64_t patch_begin = cols.runs[0].i0;
    const int64_t patch_count = cols.runs[cols.n_runs - 1].i1 + 1 - patch_begin;
    tiles.push_back({begin, end, patch_begin, patch_count, cols});
    patch_columns = std::max(patch_columns, patch_count);
  }

  UpsampleProbabilitiesView<T> view;
  view.logits = static_cast<const T*>(u.logits);
  view.out = static_cast<T*>(out);
  view.out_bytes = out_values * sizeof(T);
  prefer_large_pages(out, view.out_bytes);
  view.K = u.K;
  view.stride_b = u.stride_b;
  view.stride_k = u.stride_k;
  view.stride_y = u.stride_y;
  view.stride_x = u.stride_x;
  view.height = u.height;
  view.width = u.width;
  view.runs = runs.data();
  view.wy0 = rows.w0.data();
  view.wy1 = rows.w1.data();

  // A task is a few consecutive runs of rows of one tile of one image.
  const int64_t n_runs = runs.size(), n_tiles = tiles.size();
  const int64_t wanted = u.threads == 1 ? 1 : u.threads * kTasksPerThread;
  const int64_t per_task = std::clamp<int64_t>(u.B * n_tiles * n_runs / wanted, 1, n_runs);
  const int64_t tasks_per_tile = (n_runs + per_task - 1) / per_task;
  const int64_t tasks = u.B * n_tiles * tasks_per_tile;

  std::vector<ScratchMemory<T>> memory;
  const int workers = static_cast<int>(std::min<int64_t>(u.threads, tasks));
  memory.reserve(workers);
  const int64_t used = (std::min(tile_columns, u.width) + kTablePadding - 1) / kTablePadding;
  for (int i = 0; i < workers; ++i) memory.emplace_back(u.K, used * kTablePadding, patch_columns);

  parallel_for(tasks, workers, [&](int64_t task, int worker) {
    const int64_t tile = task / tasks_per_tile % n_tiles;
    const int64_t first = task % tasks_per_tile * per_task;
    kernel(view, tiles[tile], memory[worker].scratch, task / (tasks_per_tile * n_tiles), first,
           std::min(first + per_task, n_runs));
  });
}

}  // namespace

void upsample_probabilities(const Upsampling& u, ProbabilityOutput output, void* out) {
  check(u);
  if (u.empty()) return;
  if (!out) throw std::invalid_argument("expected a pointer to probabilities, got null");
  const UpsampleProbabilitiesKernels& table =
      SEGMENTER_KERNELS(u.simd, upsample_probabilities_kernels);
  const int kind = static_cast<int>(output);
  const int64_t channels = output == ProbabilityOutput::all ? u.K : 1;
  const int64_t out_values = u.B * channels * u.height * u.width;
  if (u.type == FloatType::float32) {
    run<float>(u, out, out_values, table.float32[kind]);
  } else {
    run<double>(u, out, out_values, table.float64[kind]);
  }
}

}  // namespace segmenter
