// Each block counts a contiguous range of the pixels. While the K x K counters fit in a block's
// shared memory they are 32-bit numbers there, and what is not zero is added to the result at the
// end; a range is a part of few pictures, so most of its counters are zero. Beyond, every warp adds
// straight to the result, its equal pixels in one addition. Sums of integers are the same in any
// order, so the counts do not depend on the schedule.
#include "confusion.h"

#include <algorithm>

#include "launch.h"

namespace segmenter {
namespace cuda {
namespace {

constexpr const char* kName = "confusion_matrix";
constexpr int kThreads = 512;
constexpr int kBatch = 8;  // loads in flight per thread
constexpr int64_t kMostPixelsPerBlock = int64_t{1} << 30;  // so that 32 bits count them

using Counter = unsigned long long;
static_assert(sizeof(Counter) == sizeof(int64_t), "counters are added to as unsigned");

struct Pixels {
  const void *labels, *target;  // (pixels,)
  IntegerType labels_type, target_type;
  int64_t pixels, per_block;
  int64_t K, ignore_index;
};

template <typename Integer>
__device__ void load_batch(const void* values, int64_t first, int64_t end, int64_t* batch) {
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    const int64_t at = first + i * kThreads;
    batch[i] = at < end ? static_cast<const Integer*>(values)[at] : Integer{0};
  }
}

// values[first + i * kThreads] for each i; neighbouring threads load neighbouring pixels.
__device__ void load_batch(IntegerType type, const void* values, int64_t first, int64_t end,
                           int64_t* batch) {
  switch (type) {
    case IntegerType::uint8:
      return load_batch<uint8_t>(values, first, end, batch);
    case IntegerType::int16:
      return load_batch<int16_t>(values, first, end, batch);
    case IntegerType::int32:
      return load_batch<int32_t>(values, first, end, batch);
    default:
      return load_batch<int64_t>(values, first, end, batch);
  }
}

template <bool kInSharedMemory>
__global__ void __launch_bounds__(kThreads) count(Pixels p, Counter* counts,  // (K, K)
                                                  Counter* errors) {          // (2,)
  extern __shared__ uint32_t block_counts[];  // (K, K) or nothing
  const int lane = threadIdx.x % warpSize;
  if (kInSharedMemory) {
    const int counters = static_cast<int>(p.K * p.K);
    for (int i = threadIdx.x; i < counters; i += kThreads) block_counts[i] = 0;
    __syncthreads();
  }

  uint32_t wrong_targets = 0, wrong_labels = 0;
  const int64_t begin = blockIdx.x * p.per_block;
  const int64_t end = min(begin + p.per_block, p.pixels);
  for (int64_t base = begin; base < end; base += kBatch * kThreads) {
    const int64_t first = base + threadIdx.x;
    int64_t labels[kBatch], target[kBatch];
    load_batch(p.labels_type, p.labels, first, end, labels);
    load_batch(p.target_type, p.target, first, end, target);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t t = target[i], l = labels[i];
      const bool asked = first + i * kThreads < end && t != p.ignore_index;
      const bool target_fits = t >= 0 && t < p.K, label_fits = l >= 0 && l < p.K;
      wrong_targets += asked && !target_fits;
      wrong_labels += asked && target_fits && !label_fits;
      const bool counted = asked && target_fits && label_fits;
      if (kInSharedMemory) {
        // The constant 1 lets the hardware add up the lanes that meet in a counter.
        if (counted) {
          const auto K = static_cast<uint32_t>(p.K);
          atomicAdd(&block_counts[static_cast<uint32_t>(t) * K + static_cast<uint32_t>(l)], 1u);
        }
      } else {
        const unsigned counting = __ballot_sync(~0u, counted);
        if (counted) {
          const auto at = static_cast<unsigned long long>(t * p.K + l);
          const unsigned equal = __match_any_sync(counting, at);
          if (lane == __ffs(equal) - 1) atomicAdd(&counts[at], static_cast<Counter>(__popc(equal)));
        }
      }
    }
  }
  if (wrong_targets) atomicAdd(&errors[0], static_cast<Counter>(wrong_targets));
  if (wrong_labels) atomicAdd(&errors[1], static_cast<Counter>(wrong_labels));

  if (kInSharedMemory) {
    __syncthreads();
    const int counters = static_cast<int>(p.K * p.K);
    for (int i = threadIdx.x; i < counters; i += kThreads) {
      if (block_counts[i]) atomicAdd(&counts[i], static_cast<Counter>(block_counts[i]));
    }
  }
}

template <bool kInSharedMemory>
void launch(Pixels p, int64_t bytes, int64_t* counts, int64_t* errors, const Queue& queue) {
  allow_shared_memory(count<kInSharedMemory>, bytes, kName);
  int resident = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, count<kInSharedMemory>, kThreads,
                                                      static_cast<size_t>(bytes)),
        kName);
  const int64_t processors =
      device_attribute(cudaDevAttrMultiProcessorCount, queue.device, kName);
  const auto parts = [&p](int64_t size) { return (p.pixels + size - 1) / size; };
  // One wave of blocks, fewer if they had less than two batches, more if 32 bits could overflow.
  const int64_t wanted = std::min(processors * std::max(resident, 1), parts(2 * kBatch * kThreads));
  const int64_t blocks = std::max(wanted, parts(kMostPixelsPerBlock));
  p.per_block = parts(blocks);
  count<kInSharedMemory><<<static_cast<unsigned>(blocks), kThreads, bytes, stream_of(queue)>>>(
      p, reinterpret_cast<Counter*>(counts), reinterpret_cast<Counter*>(errors));
  check(cudaGetLastError(), kName);
}

}  // namespace

void confusion_matrix(const void* labels, IntegerType labels_type, const void* target,
                      IntegerType target_type, int64_t pixels, int64_t K, int64_t ignore_index,
                      int64_t* counts, int64_t* errors, const Queue& queue) {
  constexpr int64_t kMostClasses = int64_t{1} << 31;
  if (pixels < 0 || K < 1 || K > kMostClasses) {
    throw std::invalid_argument("expected pixels >= 0 and 1 <= K <= 2^31, got " +
                                std::to_string(pixels) + " and " + std::to_string(K));
  }
  if (pixels == 0) return;
  if (!labels || !target || !counts || !errors) {
    throw std::invalid_argument("expected pointers to labels, target, counts and errors, got null");
  }
  const OnDevice on_device(queue.device, kName);
  const Pixels p = {labels, target, labels_type, target_type, pixels, 0, K, ignore_index};
  const int64_t most =
      device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, queue.device, kName);
  const int64_t words = most / static_cast<int64_t>(sizeof(uint32_t));
  if (K <= words / K) {
    launch<true>(p, K * K * static_cast<int64_t>(sizeof(uint32_t)), counts, errors, queue);
  } else {
    launch<false>(p, 0, counts, errors, queue);
  }
}

}  // namespace cuda
}  // namespace segmenter
