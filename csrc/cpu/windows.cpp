#include "windows.h"

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>

#include "parallel.h"
#include "windows_kernel.h"

namespace segmenter {
namespace {

// Longer runs of output rows are split, so that a coarse grid still feeds every thread.
constexpr int64_t kMaxRunRows = 32;
// Output rows of one task where every row costs about the same.
constexpr int64_t kRowsPerTask = 8;

[[noreturn]] void reject(const std::string& expected, const std::string& got) {
  throw std::invalid_argument("expected " + expected + ", got " + got);
}

void check_taps(const Taps& taps, int64_t outputs, int64_t grid, const char* axis) {
  if (!taps.start || !taps.index || !taps.weight) reject("tables of taps", "null");
  int32_t last = taps.start[0];
  if (last != 0) reject("start[0] = 0", std::to_string(last));
  for (int64_t i = 1; i <= outputs; ++i) {
    if (taps.start[i] <= last) {
      reject(std::string("at least one tap for every output ") + axis,
             "none at " + std::to_string(i - 1));
    }
    last = taps.start[i];
  }
  for (int32_t t = 0; t < last; ++t) {
    if (taps.index[t] < 0 || taps.index[t] >= grid) {
      reject(std::string("taps in [0, ") + std::to_string(grid) + ") along " + axis,
             std::to_string(taps.index[t]));
    }
  }
}

void check(const Windows& w) {
  if (w.views.empty()) reject("at least one view", "none");
  if (w.K < 1 || w.H < 1 || w.W < 1) {
    reject("(K, H, W) >= 1", shape_text({w.K, w.H, w.W}));
  }
  if (w.threads < 1) reject("threads >= 1", std::to_string(w.threads));
  for (const WindowView& view : w.views) {
    if (view.rows < 1 || view.columns < 1 || view.h < 1 || view.w < 1) {
      reject("windows (rows, columns) of (h, w) patches, all >= 1",
             shape_text({view.rows, view.columns, view.h, view.w}));
    }
    if (!view.logits) reject("a pointer to logits", "null");
    check_taps(view.y, w.H, view.rows * view.h, "y");
    check_taps(view.x, w.W, view.columns * view.w, "x");
  }
}

// A view's windows as one grid, and the memory that holds it.
template <typename T>
struct Grid {
  std::unique_ptr<T[]> patches;
  std::unique_ptr<uint8_t[]> ordinary;
  GridView<T> view;

  Grid(const WindowView& windows, const Windows& w, void (*pack)(const GridRow<T>&)) {
    const int64_t rows = windows.rows * windows.h, columns = windows.columns * windows.w;
    const int64_t K_padded = padded_classes(w.K);
    patches.reset(new T[rows * columns * K_padded]);
    ordinary.reset(new uint8_t[rows * columns]);
    view = {patches.get(), ordinary.get(), rows, columns};
    parallel_for(rows, w.threads, [&](int64_t y, int) {
      GridRow<T> row;
      row.logits = static_cast<const T*>(windows.logits) +
                   y / windows.h * windows.columns * windows.stride_n +
                   y % windows.h * windows.stride_y;
      row.count = windows.columns;
      row.w = windows.w;
      row.stride_n = windows.stride_n;
      row.stride_k = windows.stride_k;
      row.stride_x = windows.stride_x;
      row.K = w.K;
      row.K_padded = K_padded;
      row.patches = patches.get() + y * columns * K_padded;
      row.ordinary = ordinary.get() + y * columns;
      pack(row);
    });
  }
};

// One axis as runs of outputs that read the same patches.
template <typename T>
struct TapRuns {
  std::vector<TapRun<T>> runs;
  int64_t most = 0;  // taps of an output
  std::vector<T> weights;

  TapRuns(const Taps& taps, int64_t outputs, int64_t max_run) {
    const T* weight = static_cast<const T*>(taps.weight);
    const auto same = [&](int64_t a, int64_t b) {
      return std::equal(taps.index + taps.start[a], taps.index + taps.start[a + 1],
                        taps.index + taps.start[b], taps.index + taps.start[b + 1]);
    };
    std::vector<int64_t> offsets;
    int64_t size = 0;
    for (int64_t begin = 0; begin < outputs;) {
      int64_t end = begin + 1;
      while (end < outputs && end - begin < max_run && same(begin, end)) ++end;
      const int64_t n = taps.start[begin + 1] - taps.start[begin];
      runs.push_back({begin, end, n, taps.index + taps.start[begin], nullptr, end - begin});
      offsets.push_back(size);
      size += n * (end - begin);
      most = std::max(most, n);
      begin = end;
    }
    weights.resize(size + kTablePadding);
    for (size_t r = 0; r < runs.size(); ++r) {
      TapRun<T>& run = runs[r];
      run.weight = weights.data() + offsets[r];
      for (int64_t y = run.begin; y < run.end; ++y) {
        for (int64_t i = 0; i < run.n; ++i) {
          weights[offsets[r] + i * run.stride + y - run.begin] = weight[taps.start[y] + i];
        }
      }
    }
  }
};

template <typename T>
void run_labels(const Windows& w, void* labels, void (*pack)(const GridRow<T>&),
                void (*kernel)(const WindowLabelsView<T>&, const WindowLabelsScratch<T>&,
                               int64_t)) {
  const WindowView& only = w.views.front();
  const Grid<T> grid(only, w, pack);
  const TapRuns<T> rows(only.y, w.H, kMaxRunRows);
  const TapRuns<T> columns(only.x, w.W, w.W);

  WindowLabelsView<T> view;
  view.grid = grid.view;
  view.K = w.K;
  view.K_padded = padded_classes(w.K);
  view.width = w.W;
  view.row_runs = rows.runs.data();
  view.column_runs = columns.runs.data();
  view.n_column_runs = static_cast<int64_t>(columns.runs.size());
  view.labels = labels;

  struct Memory {
    std::vector<T> values;
    std::vector<int32_t> classes;
    WindowLabelsScratch<T> scratch;
  };
  const auto tasks = static_cast<int64_t>(rows.runs.size());
  std::vector<Memory> memory(std::min<int64_t>(w.threads, tasks));
  for (Memory& own : memory) {
    own.values.resize((1 + (rows.most + 1) * columns.most) * view.K_padded);
    own.classes.resize(2 * view.K_padded);
    T* const values = own.values.data();
    own.scratch = {values, values + view.K_padded,
                   values + (1 + rows.most * columns.most) * view.K_padded, own.classes.data(),
                   own.classes.data() + view.K_padded};
  }
  parallel_for(tasks, static_cast<int>(memory.size()), [&](int64_t task, int worker) {
    kernel(view, memory[worker].scratch, task);
  });
}

int label_bytes(LabelType type) {
  switch (type) {
    case LabelType::uint8:
      return 1;
    case LabelType::int16:
      return 2;
    default:
      return 4;
  }
}

template <typename T>
void run_probabilities(const Windows& w, const WindowOutputs& outputs,
                       void (*pack)(const GridRow<T>&),
                       void (*kernel)(const WindowProbabilitiesView<T>&,
                                      const WindowProbabilitiesScratch<T>&, int64_t)) {
  std::vector<Grid<T>> grids;
  std::vector<GridView<T>> views;
  std::vector<TapsView<T>> rows, columns;
  int64_t grid_columns = 0;
  for (const WindowView& view : w.views) {
    grids.emplace_back(view, w, pack);
    views.push_back(grids.back().view);
    rows.push_back({view.y.start, view.y.index, static_cast<const T*>(view.y.weight)});
    columns.push_back({view.x.start, view.x.index, static_cast<const T*>(view.x.weight)});
    grid_columns += views.back().columns;
  }

  WindowProbabilitiesView<T> view;
  view.grids = views.data();
  view.rows = rows.data();
  view.columns = columns.data();
  view.n_views = static_cast<int64_t>(views.size());
  view.K = w.K;
  view.K_padded = padded_classes(w.K);
  view.height = w.H;
  view.width = w.W;
  view.label_bytes = outputs.labels ? label_bytes(outputs.labels_type) : 0;
  view.labels = outputs.labels;
  view.top1 = static_cast<T*>(outputs.top1);
  view.all = static_cast<T*>(outputs.all);

  struct Memory {
    std::vector<T> values;
    std::vector<uint8_t> flags;
    std::vector<T*> rows;
    std::vector<uint8_t*> ordinary;
    WindowProbabilitiesScratch<T> scratch;
  };
  const int64_t tasks = (w.H + kRowsPerTask - 1) / kRowsPerTask;
  std::vector<Memory> memory(std::min<int64_t>(w.threads, tasks));
  for (Memory& own : memory) {
    own.values.resize((grid_columns + view.n_views + kPixelTile) * view.K_padded + view.n_views);
    own.flags.resize(grid_columns);
    T* values = own.values.data();
    uint8_t* flags = own.flags.data();
    for (const GridView<T>& grid : views) {
      own.rows.push_back(values);
      own.ordinary.push_back(flags);
      values += grid.columns * view.K_padded;
      flags += grid.columns;
    }
    T* const mean = values + view.n_views * view.K_padded;
    own.scratch = {own.rows.data(), own.ordinary.data(), values,
                   mean + kPixelTile * view.K_padded, mean};
  }
  parallel_for(tasks, static_cast<int>(memory.size()), [&](int64_t task, int worker) {
    const int64_t end = std::min((task + 1) * kRowsPerTask, w.H);
    for (int64_t y = task * kRowsPerTask; y < end; ++y) kernel(view, memory[worker].scratch, y);
  });
}

}  // namespace

void window_labels(const Windows& w, LabelType type, void* labels) {
  check(w);
  if (w.views.size() != 1) reject("one view", std::to_string(w.views.size()));
  check_label_type(type, w.K);
  if (!labels) reject("a pointer to labels", "null");
  const WindowLabelsKernels& table = SEGMENTER_KERNELS(w.simd, window_labels_kernels);
  const int label = static_cast<int>(type);
  if (w.type == FloatType::float32) {
    run_labels<float>(w, labels, table.pack_float32, table.float32[label]);
  } else {
    run_labels<double>(w, labels, table.pack_float64, table.float64[label]);
  }
}

void window_probabilities(const Windows& w, const WindowOutputs& outputs) {
  check(w);
  if (outputs.labels) check_label_type(outputs.labels_type, w.K);
  const WindowProbabilitiesKernels& table = SEGMENTER_KERNELS(w.simd, window_probabilities_kernels);
  if (w.type == FloatType::float32) {
    run_probabilities<float>(w, outputs, table.pack_float32, table.float32);
  } else {
    run_probabilities<double>(w, outputs, table.pack_float64, table.float64);
  }
}

}  // namespace segmenter
