// A small pool of threads for the CPU kernels.
//
// PyTorch's wheels carry their own OpenMP runtime; a second one in the same process competes for
// the cores and crashes on some platforms. So the kernels bring plain threads, which sleep when
// idle.
#pragma once

#include <cstdint>
#include <functional>

namespace segmenter {

// Runs body(task, worker) for every task in [0, tasks), on at most `threads` threads of which the
// calling one is the first. `worker` is in [0, threads) and never used by two threads at once, so
// it may index scratch memory. Tasks are handed out in order, one at a time. The first exception
// thrown by a task is rethrown here, after every running task has ended; tasks not yet begun are
// dropped. Safe to call from several threads at once, from inside a task, and in a forked child.
void parallel_for(int64_t tasks, int threads,
                  const std::function<void(int64_t task, int worker)>& body);

}  // namespace segmenter
