// Labels from patch logits on a GPU; what they are is said in ../cpu/upsample_argmax.h.
#pragma once

#include "../cpu/upsample_argmax.h"
#include "queue.h"

namespace segmenter {
namespace cuda {

enum class LogitType { float16, bfloat16, float32, float64 };

// Writes labels (B, height, width), contiguous: those of segmenter::upsample_argmax for the same
// logits, as float32 if they have 16 bits. `upsampling` holds an address of the device's memory;
// its type, threads and simd are not looked at. Returns as soon as the kernel is in the queue.
// std::invalid_argument as there, or for sides of 2^30 and more; std::runtime_error with CUDA's
// message when it cannot be launched.
void upsample_argmax(const Upsampling& upsampling, LogitType type, LabelType label_type,
                     void* labels, const Queue& queue);

}  // namespace cuda
}  // namespace segmenter
