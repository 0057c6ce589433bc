// Work items shared out to torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <vector>

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

// The same for items that lie beside each other in memory: every thread takes those of a range of its own in
// order, so that a kernel may fetch what the next item reads, and then what is left of other ranges.
template <typename Kernel>
void run_adjacent_items(int64_t items, double operations, const Kernel& kernel) {
  const int64_t useful = 1 + static_cast<int64_t>(operations / kOperationsPerWorker);
  const int64_t workers = std::min<int64_t>({items, useful, torch::stable::get_num_threads()});
  if (workers <= 1) {
    if (items > 0) kernel(0, items);
    return;
  }
  struct alignas(64) Next {  // a line of memory for each range
    std::atomic<int64_t> item;
  };
  std::vector<Next> next(workers);
  const auto start = [&](int64_t range) { return range * items / workers; };
  for (int64_t range = 0; range < workers; range++) next[range].item = start(range);
  std::atomic<int64_t> arrived{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    const int64_t own = arrived.fetch_add(1);
    for (int64_t i = 0; i < workers; i++) {
      const int64_t range = (own + i) % workers, end = start(range + 1);
      std::atomic<int64_t>& item = next[range].item;
      for (int64_t taken = item.fetch_add(1); taken < end; taken = item.fetch_add(1))
        kernel(taken, taken + 1);
    }
  });
}

}  // namespace dllm
