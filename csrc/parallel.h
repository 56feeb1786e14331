// ATen's thread pool, by the part of torch's interface that stays the same from version to version.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace mtu {

// Calls work(thread, begin, end) on parts of [0, n) of at most `part`. Threads take the next part when they are done with
// one, so that none waits long for another that the machine has kept from running. Which thread makes what must not matter.
template <class Work>
void share(int64_t n, int64_t part, int64_t threads, const Work& work) {
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

// Calls work(begin, end) on parts of [0, n).
template <class Work>
void share(int64_t n, const Work& work) {
  constexpr int64_t kParts = 8;  // for each thread
  const int64_t threads = torch::stable::get_num_threads();
  share(n, std::max<int64_t>(1, n / (threads * kParts)), threads,
        [&](int64_t, int64_t begin, int64_t end) { work(begin, end); });
}

}  // namespace mtu
