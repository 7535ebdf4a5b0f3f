// Labels of a single view, once per SIMD level. The structure is that of
// upsample_argmax_kernel.cpp, since all that pruning asks of a pixel's logits is that they are
// convex combinations: where outputs form a block that reads the same few patches, a class whose
// largest patch is below another's smallest wins nowhere in it. The survivors are blended along y
// for one output row, pruned again, and blended along x.
#include <limits>

#include "../cell.h"
#include "argmax.h"
#include "pack.h"
#include "vector.h"
#include "windows_kernel.h"

namespace segmenter {
namespace {

// Blocks of this many pixels or fewer are not worth a bound.
constexpr int64_t kFewPixels = 2;

// Classes are padded with copies of the last one: a copy never wins over the original.
template <typename T>
void pack_grid_row(const GridRow<T>& row) {
  const Values<T> limit = splat(std::numeric_limits<T>::max() / 8);
  for (int64_t n = 0; n < row.count; ++n) {
    T* patches = row.patches + n * row.w * row.K_padded;
    pack_class_last(row.logits + n * row.stride_n, row.stride_k, row.stride_x, row.K, row.w,
                    row.K_padded, patches);
    for (int64_t x = 0; x < row.w; ++x) {
      T* patch = patches + x * row.K_padded;
      for (int64_t k = row.K; k < row.K_padded; ++k) patch[k] = patch[row.K - 1];
      Integers<T> outside{};
      for (int64_t k = 0; k < row.K_padded; k += kLanes<T>) {
        const Values<T> v = load(patch + k);
        outside |= ~((v <= limit) & (v >= -limit));
      }
      row.ordinary[n * row.w + x] = !any_lane<T>(outside);
    }
  }
}

template <typename T, typename Label>
class Block {
 public:
  Block(const WindowLabelsView<T>& view, const WindowLabelsScratch<T>& scratch,
        const TapRun<T>& ys, const TapRun<T>& xs)
      : view_(view), scratch_(scratch), ys_(ys), xs_(xs) {}

  void label() {
    if (!ordinary() || (ys_.end - ys_.begin) * (xs_.end - xs_.begin) <= kFewPixels) {
      pixel_by_pixel();
      return;
    }
    const int64_t n = prune();
    if (n == 1) {
      for (int64_t y = ys_.begin; y < ys_.end; ++y) fill(y, scratch_.kept[0]);
      return;
    }
    gather(n);
    for (int64_t y = ys_.begin; y < ys_.end; ++y) {
      const int64_t m = blend_row(n, y - ys_.begin);
      if (m == 1) {
        fill(y, scratch_.row_kept[0]);
      } else {
        label_row(m, y);
      }
    }
  }

 private:
  const T* patch(int64_t i, int64_t j) const {
    return view_.grid.patches +
           (ys_.index[i] * view_.grid.columns + xs_.index[j]) * view_.K_padded;
  }

  T* values(int64_t i, int64_t j) const {
    return scratch_.values + (i * xs_.n + j) * view_.K_padded;
  }

  T* edge(int64_t j) const { return scratch_.edges + j * view_.K_padded; }

  Label* row(int64_t y) const { return static_cast<Label*>(view_.labels) + y * view_.width; }

  T bound(Values<T> best) const {
    return keep_ties(largest_lane<T>(best), ys_.n + xs_.n, std::numeric_limits<T>::epsilon(),
                     std::numeric_limits<T>::min());
  }

  bool ordinary() const {
    bool ordinary = true;
    for (int64_t i = 0; i < ys_.n; ++i) {
      for (int64_t j = 0; j < xs_.n; ++j) {
        ordinary &= view_.grid.ordinary[ys_.index[i] * view_.grid.columns + xs_.index[j]] != 0;
      }
    }
    return ordinary;
  }

  void fill(int64_t y, int32_t label) const {
    for (int64_t x = xs_.begin; x < xs_.end; ++x) row(y)[x] = static_cast<Label>(label);
  }

  // The argmax over all classes, whatever their values. Blends in the order of the other path.
  void pixel_by_pixel() const {
    for (int64_t y = 0; y < ys_.end - ys_.begin; ++y) {
      for (int64_t x = 0; x < xs_.end - xs_.begin; ++x) {
        Argmax<T> argmax;
        for (int64_t k = 0; k < view_.K_padded; k += kLanes<T>) {
          Values<T> value{};
          for (int64_t j = 0; j < xs_.n; ++j) {
            Values<T> column{};
            for (int64_t i = 0; i < ys_.n; ++i) {
              const Values<T> term = load(patch(i, j) + k) * ys_.weight[i * ys_.stride + y];
              column = i == 0 ? term : column + term;
            }
            column *= xs_.weight[j * xs_.stride + x];
            value = j == 0 ? column : value + column;
          }
          argmax.add(value);
        }
        row(ys_.begin + y)[xs_.begin + x] = static_cast<Label>(argmax.winner());
      }
    }
  }

  // Writes the classes that no other beats in the whole block to `kept`, in order; returns their
  // number.
  int64_t prune() const {
    Values<T> best = splat(-std::numeric_limits<T>::infinity());
    for (int64_t k = 0; k < view_.K_padded; k += kLanes<T>) {
      Values<T> smallest = load(patch(0, 0) + k), largest = smallest;
      for (int64_t i = 0; i < ys_.n; ++i) {
        for (int64_t j = 0; j < xs_.n; ++j) {
          const Values<T> value = load(patch(i, j) + k);
          smallest = lesser(smallest, value);
          largest = greater(largest, value);
        }
      }
      best = greater(best, smallest);
      store(scratch_.largest + k, largest);
    }
    const T least = bound(best);
    int64_t n = 0;
    for (int64_t k = 0; k < view_.K; ++k) {
      scratch_.kept[n] = static_cast<int32_t>(k);
      n += scratch_.largest[k] >= least;
    }
    return n;
  }

  // Copies the survivors' patches side by side, up to a whole number of lanes with copies of the
  // last.
  void gather(int64_t n) const {
    for (int64_t i = 0; i < ys_.n; ++i) {
      for (int64_t j = 0; j < xs_.n; ++j) {
        const T* from = patch(i, j);
        T* to = values(i, j);
        for (int64_t s = 0; s < n || s % kLanes<T> != 0; ++s) {
          to[s] = from[scratch_.kept[lesser(s, n - 1)]];
        }
      }
    }
  }

  // Blends the n survivors along y, prunes again, and moves who is left to the front of the edges
  // and row_kept; returns their number.
  int64_t blend_row(int64_t n, int64_t y) const {
    Values<T> best = splat(-std::numeric_limits<T>::infinity());
    for (int64_t s = 0; s < n; s += kLanes<T>) {
      Values<T> smallest{}, largest{};
      for (int64_t j = 0; j < xs_.n; ++j) {
        Values<T> value{};
        for (int64_t i = 0; i < ys_.n; ++i) {
          const Values<T> term = load(values(i, j) + s) * ys_.weight[i * ys_.stride + y];
          value = i == 0 ? term : value + term;
        }
        store(edge(j) + s, value);
        smallest = j == 0 ? value : lesser(smallest, value);
        largest = j == 0 ? value : greater(largest, value);
      }
      best = greater(best, smallest);
      store(scratch_.largest + s, largest);
    }
    const T least = bound(best);
    int64_t m = 0;
    for (int64_t s = 0; s < n; ++s) {
      for (int64_t j = 0; j < xs_.n; ++j) edge(j)[m] = edge(j)[s];
      scratch_.row_kept[m] = scratch_.kept[s];
      m += scratch_.largest[s] >= least;
    }
    return m;
  }

  // Labels one output row among the m classes that survive there.
  void label_row(int64_t m, int64_t y) const {
    typedef Label Labels __attribute__((vector_size(sizeof(Label) * kLanes<T>)));
    using Integer = typename LaneInteger<T>::type;
    Label* out = row(y);
    for (int64_t x = xs_.begin; x < xs_.end; x += kLanes<T>) {
      const T* weight = xs_.weight + (x - xs_.begin);
      Values<T> best = splat(-std::numeric_limits<T>::infinity());
      Integers<T> best_k{};
      for (int64_t s = 0; s < m; ++s) {
        Values<T> value{};
        for (int64_t j = 0; j < xs_.n; ++j) {
          const Values<T> term = load(weight + j * xs_.stride) * edge(j)[s];
          value = j == 0 ? term : value + term;
        }
        const Integers<T> better = value > best;
        best = better ? value : best;
        best_k = better ? static_cast<Integer>(scratch_.row_kept[s]) - Integers<T>{} : best_k;
      }
      const Labels labels = __builtin_convertvector(best_k, Labels);
      // Lanes past the block's end are written too where the row has room: the next block, to the
      // right, writes those pixels afterwards.
      if (x + kLanes<T> <= view_.width) {
        std::memcpy(out + x, &labels, sizeof(labels));
      } else {
        for (int i = 0; x + i < xs_.end; ++i) out[x + i] = labels[i];
      }
    }
  }

  const WindowLabelsView<T>& view_;
  const WindowLabelsScratch<T>& scratch_;
  const TapRun<T>& ys_;
  const TapRun<T>& xs_;
};

template <typename T, typename Label>
void label_run(const WindowLabelsView<T>& view, const WindowLabelsScratch<T>& scratch,
               int64_t run) {
  for (int64_t i = 0; i < view.n_column_runs; ++i) {
    Block<T, Label>(view, scratch, view.row_runs[run], view.column_runs[i]).label();
  }
}

}  // namespace

namespace SEGMENTER_SIMD_LEVEL {

const WindowLabelsKernels window_labels_kernels = {
    pack_grid_row<float>,
    pack_grid_row<double>,
    {label_run<float, uint8_t>, label_run<float, int16_t>, label_run<float, int32_t>},
    {label_run<double, uint8_t>, label_run<double, int16_t>, label_run<double, int32_t>},
};

}  // namespace SEGMENTER_SIMD_LEVEL
}  // namespace segmenter
