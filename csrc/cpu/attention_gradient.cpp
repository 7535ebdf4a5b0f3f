#include "attention_gradient.h"

#include <algorithm>
#include <memory>
#include <stdexcept>

#include "attention_gradient_kernel.h"
#include "parallel.h"
#include "tiles.h"

namespace segmenter {
namespace {

// A head's keys are divided into chunks where there are fewer heads than this: enough for the
// threads of most machines, and for two to end at about the same time. The number must not depend
// on that of the threads, or results would.
constexpr int64_t kTasks = 32;
// Each chunk has its own sums for dq, as large as three matrices of a head and a bit.
constexpr int64_t kMostChunks = 16;

// Memory without a value, which a std::vector would write first.
template <typename T>
class Uninitialized {
 public:
  explicit Uninitialized(int64_t size) : memory_(new T[size + 64 / sizeof(T)]) {}
  T* get() const {
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) / 64 * 64);
  }

 private:
  std::unique_ptr<T[]> memory_;
};

}  // namespace

void attention_gradient(const AttentionGradient& call) {
  check_attention(call.B, call.N, call.H, call.D);
  if (call.B == 0 || call.N == 0 || call.H == 0) return;
  const AttentionGradientKernels& level =
      SEGMENTER_PRODUCT_KERNELS(call.simd, attention_gradient_kernels);
  const HeadGradientKernels& kernels =
      level.heads[static_cast<int>(call.type)][head_width_index(call.D)];
  const int64_t element = call.type == ElementType::float32 ? 4 : 2;
  const int64_t heads = call.B * call.H;
  const int64_t strips = divide_up(call.N, kStrip);
  const int64_t padded = strips * kStrip;
  const int64_t words = kernels.packed_words(padded);

  // Blocks of keys of equal size, in whole tiles, and chunks of whole blocks.
  const int64_t most_blocks = divide_up(call.N, kGradientKeys);
  const int64_t block = divide_up(divide_up(call.N, kTileRows), most_blocks) * kTileRows;
  const int64_t blocks = divide_up(call.N, block);
  const int64_t chunks = std::min({blocks, divide_up(kTasks, heads), kMostChunks});

  const int threads = static_cast<int>(
      std::clamp<int64_t>(call.threads, 1, std::max(heads * chunks, heads * strips)));
  const int64_t work_words = (kernels.work_words + 15) / 16 * 16;
  const Uninitialized<uint32_t> packed(heads * words * 4);
  const Uninitialized<float> statistics(heads * padded * 3);
  const Uninitialized<float> partial(heads * chunks * call.D * padded);
  const Uninitialized<uint32_t> work(threads * work_words);

  const auto view = [&](int64_t head) {
    const int64_t b = head / call.H, h = head % call.H;
    const char* qkv =
        static_cast<const char*>(call.qkv) + (b * call.stride_b + h * call.stride_h) * element;
    const int64_t out = (b * call.N * call.H + h) * call.D * element;
    const int64_t part = call.H * call.D * element;
    char* gradient =
        static_cast<char*>(call.gradient) + b * call.N * 3 * part + h * call.D * element;
    HeadGradientView view;
    view.q = qkv;
    view.k = qkv + call.stride_part * element;
    view.v = qkv + 2 * call.stride_part * element;
    view.stride = call.stride_n;
    view.N = call.N;
    view.out = static_cast<const char*>(call.out) + out;
    view.upstream = static_cast<const char*>(call.upstream) + out;
    view.out_stride = call.H * call.D;
    view.statistics = call.statistics + head * 2 * call.N;
    view.dq = gradient;
    view.dk = gradient + part;
    view.dv = gradient + 2 * part;
    view.gradient_stride = 3 * call.H * call.D;
    view.scale = call.scale;
    view.padded = padded;
    view.queries = packed.get() + head * 4 * words;
    view.upstreams = view.queries + words;
    view.query_rows = view.upstreams + words;
    view.upstream_rows = view.query_rows + words;
    view.exponents = statistics.get() + head * 3 * padded;
    view.inverses = view.exponents + padded;
    view.deltas = view.inverses + padded;
    view.partial = partial.get() + head * chunks * call.D * padded;
    return view;
  };
  const int64_t query_blocks = divide_up(call.N, kGradientQueries);
  parallel_for(heads * query_blocks, threads, [&](int64_t task, int) {
    kernels.pack(view(task / query_blocks), task % query_blocks);
  });
  parallel_for(heads * chunks, threads, [&](int64_t task, int worker) {
    const HeadGradientView head = view(task / chunks);
    const int64_t chunk = task % chunks;
    const int64_t begin = chunk * blocks / chunks, end = (chunk + 1) * blocks / chunks;
    for (int64_t i = begin; i < end; ++i) {
      kernels.pass(head, i * block, std::min(block, call.N - i * block), i > begin,
                   head.partial + chunk * call.D * padded, work.get() + worker * work_words);
    }
  });
  parallel_for(heads * strips, threads, [&](int64_t task, int) {
    kernels.finish(view(task / strips), task % strips, chunks);
  });
}

}  // namespace segmenter
