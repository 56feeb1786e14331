// ATen's thread pool, by the part of torch's interface that stays the same from version to version.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace mtu {

// How many threads are worth waking for n pieces of work.
inline int64_t threads_for(int64_t n) {
  return std::max<int64_t>(1, std::min<int64_t>(n, torch::stable::get_num_threads()));
}

// Calls work(t) for t in [0, threads), each by one thread.
template <class Work>
void run_on_threads(int64_t threads, const Work& work) {
  if (threads == 1) return work(0);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) work(t);
  });
}

// Calls work(begin, end) on contiguous shares of [0, n).
template <class Work>
void share(int64_t n, const Work& work) {
  if (n == 0) return;
  const int64_t threads = threads_for(n);
  run_on_threads(threads, [&](int64_t t) { work(t * n / threads, (t + 1) * n / threads); });
}

}  // namespace mtu
