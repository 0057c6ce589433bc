// Work items shared out to torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

namespace dllm {

// Fewer operations than this are done before another thread has woken up.
constexpr int64_t kOperationsPerWorker = 1 << 18;

// Calls kernel(begin, end) until all items are done; `operations` estimates all of them together. Threads
// take items one after another, so that long and short ones even out; what an item computes does not
// depend on which thread takes it.
template <typename Kernel>
void run_items(int64_t items, double operations, const Kernel& kernel) {
  const int64_t useful = 1 + static_cast<int64_t>(operations / kOperationsPerWorker);
  const int64_t workers = std::min<int64_t>({items, useful, torch::stable::get_num_threads()});
  if (workers <= 1) {
    if (items > 0) kernel(0, items);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    for (int64_t item = next.fetch_add(1); item < items; item = next.fetch_add(1)) kernel(item, item + 1);
  });
}

}  // namespace dllm
