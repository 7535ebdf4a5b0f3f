// labels[b, y, x] = argmax over k of bilinear(logits[b, k])[top + y, left + x], where bilinear
// resizes (h, w) to (H, W) with half-pixel centres; nothing of size K x H x W is ever stored.
#pragma once

#include "upsampling.h"

namespace segmenter {

enum class LabelType { uint8, int16, int32 };

// std::invalid_argument when the type of label cannot hold K - 1.
void check_label_type(LabelType type, int64_t K);

// Writes labels (B, height, width), contiguous. The first class wins ties and NaN counts as the
// largest value, as in torch.argmax. The labels do not depend on the number of threads or the SIMD
// level. std::invalid_argument as `check`, or when the type of label cannot hold K - 1.
void upsample_argmax(const Upsampling& upsampling, LabelType type, void* labels);

}  // namespace segmenter
