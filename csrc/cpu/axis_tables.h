// Makes the tables behind an AxisView. Host side only, see axis.h.
#pragma once

#include <cstdint>
#include <vector>

#include "../cell.h"
#include "axis.h"

namespace segmenter {

template <typename T>
struct AxisTables {
  std::vector<Run> runs;
  std::vector<T> w0, w1;

  // Output coordinates [begin, begin + count) of `out`, counted from `begin`; `in` patches. Runs
  // longer than max_run are split.
  AxisTables(int64_t in, int64_t out, int64_t begin, int64_t count, int64_t max_run)
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

}  // namespace segmenter
