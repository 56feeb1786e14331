// Loops on ATen's thread pool, through torch's stable interface.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace mtu {

// Calls work(thread, begin, end) for parts of [0, n) of at most `part` items. A thread that has finished a part takes
// the next, so that no thread waits long for one that the operating system has paused. Results must not depend on which
// thread computes which part.
template <class Work>
void parallel_for_parts(int64_t n, int64_t part, int64_t threads, const Work& work) {
  threads = std::max<int64_t>(1, std::min(threads, (n + part - 1) / part));
  std::atomic<int64_t> next{0};
  auto run = [&](int64_t thread) {
    for (int64_t begin; (begin = next.fetch_add(part, std::memory_order_relaxed)) < n;)
      work(thread, begin, std::min(begin + part, n));
  };
  if (threads == 1) return run(0);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) run(thread);
  });
}

// The same for work(begin, end), with eight parts for each thread.
template <class Work>
void parallel_for_parts(int64_t n, const Work& work) {
  constexpr int64_t kParts = 8;
  const int64_t threads = torch::stable::get_num_threads();
  parallel_for_parts(n, std::max<int64_t>(1, n / (threads * kParts)), threads,
                     [&](int64_t, int64_t begin, int64_t end) { work(begin, end); });
}

}  // namespace mtu
