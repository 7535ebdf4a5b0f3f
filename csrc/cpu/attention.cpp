#include "attention.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "attention_kernel.h"
#include "parallel.h"
#include "tiles.h"

namespace segmenter {
namespace {

// Blocks of equal size, in whole tiles, so that the last one is not short.
int64_t query_block(int64_t N) {
  return divide_up(divide_up(N, kTileRows), divide_up(N, kQueryBlock)) * kTileRows;
}

}  // namespace

void check_attention(int64_t B, int64_t N, int64_t H, int64_t D) {
  if (B < 0 || N < 0 || H < 0) {
    throw std::invalid_argument("attention: sizes must not be negative");
  }
  if (!attends_to(D)) {
    throw std::invalid_argument("attention: expected 32, 64 or 128 channels per head, got " +
                                std::to_string(D));
  }
}

void attention(const Attention& call, AttentionMemory& memory) {
  check_attention(call.B, call.N, call.H, call.D);
  if (call.B == 0 || call.N == 0 || call.H == 0) return;
  const AttentionKernels& level = SEGMENTER_PRODUCT_KERNELS(call.simd, attention_kernels);
  const HeadKernels& kernels = level.heads[static_cast<int>(call.type)][head_width_index(call.D)];
  const int64_t element = call.type == ElementType::float32 ? 4 : 2;
  const int64_t heads = call.B * call.H;
  const int64_t words = kernels.packed_words(call.N);
  const int64_t key_blocks = divide_up(call.N, kKeyBlock);
  const int64_t block = query_block(call.N);
  const int64_t query_blocks = divide_up(call.N, block);
  const int threads = std::max(call.threads, 1);

  uint32_t* keys = memory.keys.room<uint32_t>(heads * words);
  uint32_t* values = memory.values.room<uint32_t>(heads * words);
  float* squares = memory.squares.room<float>(heads * key_blocks);
  float* sizes = memory.sizes.room<float>(heads * key_blocks);
  if (static_cast<int>(memory.work.size()) < threads) memory.work.resize(threads);

  const auto view = [&](int64_t head) {
    const int64_t b = head / call.H, h = head % call.H;
    const char* qkv =
        static_cast<const char*>(call.qkv) + (b * call.stride_b + h * call.stride_h) * element;
    HeadView view;
    view.q = qkv;
    view.k = qkv + call.stride_part * element;
    view.v = qkv + 2 * call.stride_part * element;
    view.stride = call.stride_n;
    view.N = call.N;
    view.keys = keys + head * words;
    view.values = values + head * words;
    view.squares = squares + head * key_blocks;
    view.sizes = sizes + head * key_blocks;
    view.out = static_cast<char*>(call.out) + (b * call.N * call.H + h) * call.D * element;
    view.out_stride = call.H * call.D;
    view.scale = call.scale;
    view.statistics = call.statistics == nullptr ? nullptr : call.statistics + head * 2 * call.N;
    return view;
  };
  parallel_for(heads * key_blocks, threads, [&](int64_t task, int) {
    kernels.pack(view(task / key_blocks), task % key_blocks);
  });
  parallel_for(heads * query_blocks, threads, [&](int64_t task, int worker) {
    uint32_t* work = memory.work[worker].room<uint32_t>(kernels.work_words);
    const int64_t first = task % query_blocks * block;
    kernels.attend(view(task / query_blocks), first, std::min(block, call.N - first), work);
  });
}

}  // namespace segmenter
