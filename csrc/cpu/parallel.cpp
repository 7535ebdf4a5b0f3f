#include "parallel.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>

namespace segmenter {
namespace {

using Body = std::function<void(int64_t, int)>;

// A network is some fifty calls of a millisecond or less, and a sleeping thread takes tens of
// microseconds to wake: for so long it pays to look again before going to sleep.
constexpr std::chrono::microseconds kPatience{50};

template <typename Condition>
void wait_briefly(const Condition& met) {
  const auto stop = std::chrono::steady_clock::now() + kPatience;
  while (!met() && std::chrono::steady_clock::now() < stop) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
}

// One call of parallel_for, shared by the threads that help with it.
struct Job {
  Job(int64_t tasks, const Body& body) : tasks(tasks), body(body) {}

  const int64_t tasks;
  const Body& body;
  std::atomic<int64_t> next_task{0};

  // Changed under the pool's mutex.
  std::atomic<int> helping{0};
  int next_worker = 1;
  std::exception_ptr error;
};

class ThreadPool {
 public:
  void run(int64_t tasks, int threads, const Body& body) {
    auto job = std::make_shared<Job>(tasks, body);
    const int helpers = static_cast<int>(std::min<int64_t>(threads, tasks)) - 1;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (size_ < helpers) {
        std::thread([this] { work(); }).detach();
        ++size_;
      }
      for (int i = 0; i < helpers; ++i) queue_.push_back(job);
      invitations_.store(static_cast<int>(queue_.size()));
    }
    if (helpers == 1) {
      work_available_.notify_one();
    } else {
      work_available_.notify_all();
    }

    drain(*job, 0);

    std::unique_lock<std::mutex> lock(mutex_);
    // Invitations that nobody took up are withdrawn: a busy pool never delays a finished call.
    queue_.erase(std::remove(queue_.begin(), queue_.end(), job), queue_.end());
    invitations_.store(static_cast<int>(queue_.size()));
    lock.unlock();
    wait_briefly([&] { return job->helping.load() == 0; });
    lock.lock();
    helper_left_.wait(lock, [&] { return job->helping == 0; });
    if (job->error) std::rethrow_exception(job->error);
  }

 private:
  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      if (queue_.empty()) {
        lock.unlock();
        wait_briefly([this] { return invitations_.load() > 0; });
        lock.lock();
      }
      work_available_.wait(lock, [this] { return !queue_.empty(); });
      std::shared_ptr<Job> job = std::move(queue_.front());
      queue_.pop_front();
      invitations_.store(static_cast<int>(queue_.size()));
      const int worker = job->next_worker++;
      ++job->helping;
      lock.unlock();
      drain(*job, worker);
      lock.lock();
      if (--job->helping == 0) helper_left_.notify_all();
    }
  }

  void drain(Job& job, int worker) {
    try {
      for (int64_t task; (task = job.next_task.fetch_add(1)) < job.tasks;) job.body(task, worker);
    } catch (...) {
      job.next_task.store(job.tasks);
      std::lock_guard<std::mutex> lock(mutex_);
      if (!job.error) job.error = std::current_exception();
    }
  }

  std::mutex mutex_;
  std::condition_variable work_available_;
  std::condition_variable helper_left_;
  std::deque<std::shared_ptr<Job>> queue_;
  std::atomic<int> invitations_{0};  // the queue's size, for those who look without the mutex
  int size_ = 0;
};

// The pool is never destroyed: its threads sleep in it until the process ends. A forked child (a
// data loader's worker, say) has none of them, and may have inherited a locked mutex, so it forgets
// the parent's pool and makes its own when it first needs one.
std::atomic<ThreadPool*> current_pool{nullptr};

void forget_pool() { current_pool.store(nullptr); }

ThreadPool& pool() {
  static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
  static_cast<void>(registered);
  ThreadPool* existing = current_pool.load();
  if (existing) return *existing;
  auto* created = new ThreadPool;
  if (current_pool.compare_exchange_strong(existing, created)) return *created;
  delete created;
  return *existing;
}

}  // namespace

void parallel_for(int64_t tasks, int threads, const Body& body) {
  if (threads <= 1 || tasks <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task, 0);
    return;
  }
  pool().run(tasks, threads, body);
}

}  // namespace segmenter
