// p[b, k, y, x] = softmax over k of bilinear(logits[b, k])[top + y, left + x], where bilinear
// resizes (h, w) to (H, W) with half-pixel centres; the upsampled logits are never stored.
#pragma once

#include "upsampling.h"

namespace segmenter {

enum class ProbabilityOutput { top1, all };

// Writes the largest probability of each pixel (B, height, width), or all of them
// (B, K, height, width), contiguous and of the logits' type. Where a pixel reads a NaN or +inf, or
// -inf with weight 0, or only -inf, its result is NaN; -inf otherwise has probability 0: as
// PyTorch's interpolate and softmax. Does not depend on the number of threads.
// std::invalid_argument as `check`.
void upsample_probabilities(const Upsampling& upsampling, ProbabilityOutput output, void* out);

}  // namespace segmenter
