// What attention.cpp hands to the kernels of each SIMD level, for one image and one head.
#pragma once

#include <cstdint>

#include "simd.h"

namespace segmenter {

// Queries that share a pass over the keys: their sums stay in the second cache. Whole tiles of
// rows.
constexpr int64_t kQueryBlock = 192;
// Keys that queries are multiplied with at a time: packed, they and their values stay in the first
// two caches while all tiles of queries pass over them. Whole panels.
constexpr int64_t kKeyBlock = 128;

struct HeadView {
  const void *q, *k, *v;  // rows of D elements, `stride` elements apart
  int64_t stride, N;
  uint32_t *keys, *values;  // packed
  float *squares, *sizes;   // one for each block of kKeyBlock keys
  void* out;                // rows of D elements, `out_stride` apart
  int64_t out_stride;
  float scale;
  float* statistics;  // (2, N) or null
};

struct HeadKernels {
  // Words of memory that a head's packed keys take, and its values likewise.
  int64_t (*packed_words)(int64_t N);
  // Packs the keys and values of block `block`.
  void (*pack)(const HeadView& head, int64_t block);
  // Words of memory that `attend` works in.
  int64_t work_words;
  // Writes the outputs of queries [first, first + count), at most kQueryBlock; all blocks are
  // packed.
  void (*attend)(const HeadView& head, int64_t first, int64_t count, uint32_t* work);
};

struct AttentionKernels {
  HeadKernels heads[2][3];  // by ElementType; by width 32, 64, 128
};

SEGMENTER_DECLARE_PRODUCT_KERNELS(AttentionKernels, attention_kernels)

}  // namespace segmenter
