// Argmax over classes, a vector of classes at a time. For kernels only. As torch.argmax has it: the
// first class wins ties, and NaN counts as the largest value.
#pragma once

#include <cstdint>
#include <limits>

#include "vector.h"

namespace segmenter {
namespace {

template <typename T>
class Argmax {
 public:
  Argmax() : best_(splat(-std::numeric_limits<T>::infinity())), best_k_{}, next_{} {
    for (int i = 0; i < kLanes<T>; ++i) next_[i] = i;
  }

  // The values of the next kLanes classes.
  void add(Values<T> value) {
    const Integers<T> better = (value > best_) | ((value != value) & (best_ == best_));
    best_ = better ? value : best_;
    best_k_ = better ? next_ : best_k_;
    next_ += kLanes<T>;
  }

  int32_t winner() const {
    T winner = best_[0];
    Integer k = best_k_[0];
    for (int i = 1; i < kLanes<T>; ++i) {
      if (beats(best_[i], best_k_[i], winner, k)) {
        winner = best_[i];
        k = best_k_[i];
      }
    }
    return static_cast<int32_t>(k);
  }

 private:
  using Integer = typename LaneInteger<T>::type;

  // Whether `value` of class k is preferred to `best` of class best_k.
  static bool beats(T value, Integer k, T best, Integer best_k) {
    const bool value_is_nan = value != value, best_is_nan = best != best;
    if (value_is_nan || best_is_nan) return value_is_nan && (!best_is_nan || k < best_k);
    return value > best || (value == best && k < best_k);
  }

  Values<T> best_;
  Integers<T> best_k_, next_;
};

}  // namespace
}  // namespace segmenter
