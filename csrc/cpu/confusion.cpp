#include "confusion.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "parallel.h"

namespace segmenter {
namespace {

constexpr int64_t kPixelsPerTask = 1 << 15;
// Counters that all threads may have together; beyond, fewer threads count.
constexpr int64_t kMostCounters = 1 << 22;

struct Pixels {
  const void *labels, *target;
  int64_t begin, end;
  int64_t K, ignore_index;
};

// Label maps are made of runs, and a run is one addition. Sums of integers are the same in any
// order, so nothing depends on which thread counted what.
template <typename Label, typename Target>
void count(const Pixels& pixels, int64_t* counts, ConfusionErrors* errors) {
  const Label* labels = static_cast<const Label*>(pixels.labels);
  const Target* target = static_cast<const Target*>(pixels.target);
  for (int64_t begin = pixels.begin; begin < pixels.end;) {
    const Label label = labels[begin];
    const Target truth = target[begin];
    int64_t end = begin + 1;
    while (end < pixels.end && labels[end] == label && target[end] == truth) ++end;
    const auto t = static_cast<int64_t>(truth), l = static_cast<int64_t>(label);
    if (t == pixels.ignore_index) {
      // Not counted, and whatever its label is does not matter.
    } else if (t < 0 || t >= pixels.K) {
      errors->targets += end - begin;
    } else if (l < 0 || l >= pixels.K) {
      errors->labels += end - begin;
    } else {
      counts[t * pixels.K + l] += end - begin;
    }
    begin = end;
  }
}

using Count = void (*)(const Pixels&, int64_t*, ConfusionErrors*);

template <typename Label>
Count choose_target(IntegerType target) {
  switch (target) {
    case IntegerType::uint8:
      return count<Label, uint8_t>;
    case IntegerType::int16:
      return count<Label, int16_t>;
    case IntegerType::int32:
      return count<Label, int32_t>;
    default:
      return count<Label, int64_t>;
  }
}

Count choose_count(IntegerType labels, IntegerType target) {
  switch (labels) {
    case IntegerType::uint8:
      return choose_target<uint8_t>(target);
    case IntegerType::int16:
      return choose_target<int16_t>(target);
    case IntegerType::int32:
      return choose_target<int32_t>(target);
    default:
      return choose_target<int64_t>(target);
  }
}

}  // namespace

ConfusionErrors confusion_matrix(const void* labels, IntegerType labels_type, const void* target,
                                 IntegerType target_type, int64_t pixels, int64_t K,
                                 int64_t ignore_index, int threads, int64_t* counts) {
  constexpr int64_t kMostClasses = int64_t{1} << 31;
  if (pixels < 0 || K < 1 || K > kMostClasses || threads < 1) {
    throw std::invalid_argument("expected pixels >= 0, 1 <= K <= 2^31 and threads >= 1, got " +
                                std::to_string(pixels) + ", " + std::to_string(K) + " and " +
                                std::to_string(threads));
  }
  if (pixels == 0) return {0, 0};
  if (!labels || !target || !counts) {
    throw std::invalid_argument("expected pointers to labels, target and counts, got null");
  }
  const Count count = choose_count(labels_type, target_type);
  const int64_t tasks = (pixels + kPixelsPerTask - 1) / kPixelsPerTask;
  const int64_t affordable = std::max<int64_t>(1, kMostCounters / K / K);
  const int workers = static_cast<int>(std::min({int64_t{threads}, tasks, affordable}));

  // The first worker counts in place.
  std::vector<std::vector<int64_t>> tables(workers - 1, std::vector<int64_t>(K * K));
  std::vector<ConfusionErrors> errors(workers, {0, 0});
  parallel_for(tasks, workers, [&](int64_t task, int worker) {
    const int64_t begin = task * kPixelsPerTask;
    count({labels, target, begin, std::min(begin + kPixelsPerTask, pixels), K, ignore_index},
          worker == 0 ? counts : tables[worker - 1].data(), &errors[worker]);
  });
  ConfusionErrors all{0, 0};
  for (const ConfusionErrors& own : errors) {
    all.targets += own.targets;
    all.labels += own.labels;
  }
  for (const std::vector<int64_t>& table : tables) {
    for (int64_t i = 0; i < K * K; ++i) counts[i] += table[i];
  }
  return all;
}

}  // namespace segmenter
