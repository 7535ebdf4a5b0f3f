// Confusion counts on a GPU: counts[t, l] = pixels of target t that were given label l.
#pragma once

#include <cstdint>

#include "../cpu/upsampling.h"
#include "queue.h"

namespace segmenter {
namespace cuda {

// Adds to counts (K, K), and to errors the pixels whose target, errors[0], or else whose label,
// errors[1], is out of [0, K). Those are not counted, nor are pixels whose target is ignore_index,
// be it a class or not. All addresses are of the device's memory, arrays contiguous; returns as
// soon as the kernel is in the queue. std::invalid_argument on sizes that make no sense,
// std::runtime_error with CUDA's message when it cannot be launched.
void confusion_matrix(const void* labels, IntegerType labels_type, const void* target,
                      IntegerType target_type, int64_t pixels, int64_t K, int64_t ignore_index,
                      int64_t* counts, int64_t* errors, const Queue& queue);

}  // namespace cuda
}  // namespace segmenter
