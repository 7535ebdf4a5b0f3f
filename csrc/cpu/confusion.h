// Confusion counts: counts[t, l] = pixels of target t that were given label l.
#pragma once

#include <cstdint>

#include "upsampling.h"

namespace segmenter {

struct ConfusionErrors {
  int64_t targets, labels;  // pixels out of [0, K), which are not counted
};

// Adds to counts (K, K), contiguous. Pixels whose target is ignore_index are not counted, be it a
// class or not. The counts do not depend on the number of threads. std::invalid_argument on sizes
// that make no sense.
ConfusionErrors confusion_matrix(const void* labels, IntegerType labels_type, const void* target,
                                 IntegerType target_type, int64_t pixels, int64_t K,
                                 int64_t ignore_index, int threads, int64_t* counts);

}  // namespace segmenter
