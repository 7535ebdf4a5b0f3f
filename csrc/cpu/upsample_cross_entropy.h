// Cross-entropy of bilinearly upsampled patch logits with a label map, forward and backward;
// nothing of size K x H x W is ever stored. With z the upsampled logits of a pixel, t its label, w
// the class weights, W their sum, s the label smoothing and lse = log sum_c exp(z_c):
//
//   loss = (1 - s) w_t (lse - z_t) + s/K sum_c w_c (lse - z_c)
//        = A lse - B z_t - C sum_c w_c z_c            B = (1 - s) w_t, C = s/K, A = B + C W
//   dloss/dz_c = A p_c - B [c = t] - C w_c            p = softmax(z)
//
// and the gradient of a patch is the sum of its pixels' gradients times their bilinear weights.
#pragma once

#include "upsampling.h"

namespace segmenter {

// Pointers to numbers are to the type of the logits. Those that may be null say so.
struct CrossEntropy {
  const void* target;  // (B, height, width), contiguous
  IntegerType target_type;
  const void* weight;  // (K), one factor per class; null: 1
  double label_smoothing;
  int64_t ignore_index;  // pixels of this label count for nothing, be it a class or not
  bool mean;             // divide loss and gradient by the sum of w_t over the pixels that count
  const void* upstream;  // (B, height, width), gradient of each pixel's loss; null: 1
  void* losses;          // written, (B, height, width), 0 at ignored pixels; null: not wanted
  void* gradient;        // written, (B, K, h, w); null: not wanted
  int64_t gradient_stride_b, gradient_stride_k, gradient_stride_y, gradient_stride_x;
};

struct CrossEntropyResult {
  double loss;           // sum over the pixels of upstream times loss; see also `mean`
  int64_t wrong_labels;  // pixels whose label is neither in [0, K) nor ignore_index
};

// The mean is NaN where the weights sum to zero. Wrong labels are counted and left out; what is
// returned and written is then of no use. Nothing depends on the number of threads, bit for bit.
// std::invalid_argument as `check`, on more than 65,535 classes or on missing pointers.
CrossEntropyResult upsample_cross_entropy(const Upsampling& upsampling,
                                          const CrossEntropy& cross_entropy);

}  // namespace segmenter
