// What attention_gradient.cpp hands to the kernels of each SIMD level, for one image and one head.
#pragma once

#include <cstdint>

#include "simd.h"

namespace segmenter {

// Queries whose weights stand side by side: whole panels at every level.
constexpr int64_t kStrip = 64;
// Queries that a block of keys meets at a time: fewer, and the sums over queries are fetched and
// put back more often; more, and the weights leave the second cache.
constexpr int64_t kGradientQueries = 2 * kStrip;
// Most keys of a block: whole tiles of rows, and an even number.
constexpr int64_t kGradientKeys = 192;

struct HeadGradientView {
  const void *q, *k, *v;  // rows of D elements, `stride` elements apart
  int64_t stride, N;
  const void *out, *upstream;  // rows of D elements, `out_stride` apart
  int64_t out_stride;
  const float* statistics;  // (2, N): of attention()
  void *dq, *dk, *dv;       // rows of D elements, `gradient_stride` apart
  int64_t gradient_stride;
  float scale;
  // Memory. `padded` is N in whole strips.
  int64_t padded;
  uint32_t *queries, *upstreams;         // packed: columns are queries
  uint32_t *query_rows, *upstream_rows;  // packed: columns are channels
  float *exponents, *inverses, *deltas;  // (padded,): m, i and delta
  float* partial;                        // (chunks, D, padded): each chunk's share of dq
};

struct HeadGradientKernels {
  // Words of memory that each of the four packed matrices takes.
  int64_t (*packed_words)(int64_t padded);
  // Packs block `block` of kGradientQueries queries and their upstream gradients.
  void (*pack)(const HeadGradientView& head, int64_t block);
  // Words of memory that `pass` works in.
  int64_t work_words;
  // Writes dk and dv of keys [first, first + count), at most kGradientKeys, and sets `partial`
  // (D, padded) to their share of dq, or adds it. All blocks are packed.
  void (*pass)(const HeadGradientView& head, int64_t first, int64_t count, bool add, float* partial,
               uint32_t* work);
  // Writes dq of strip `strip`: the chunks' shares, added up in their order.
  void (*finish)(const HeadGradientView& head, int64_t strip, int64_t chunks);
};

struct AttentionGradientKernels {
  HeadGradientKernels heads[2][3];  // by ElementType; by width 32, 64, 128
};

SEGMENTER_DECLARE_PRODUCT_KERNELS(AttentionGradientKernels, attention_gradient_kernels)

}  // namespace segmenter
