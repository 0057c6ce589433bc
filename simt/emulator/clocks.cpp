#include "clocks.h"

#include <algorithm>

#include "cta.h"
#include "simt/hopper.h"

namespace simt {

uint32_t epoch = 1;
std::vector<Clock> clocks;

namespace {

std::vector<uint32_t> seen;        // [thread][thread]: ticks of the second that the first knows to be over
std::vector<uint32_t> seen_epoch;  // [thread]: the row is of this epoch, else nothing was seen yet
std::vector<Clock> fences;         // when each thread last called fence_proxy_async
int clock_count;                   // threads and engine

uint32_t* seen_by(int i) {
  uint32_t* row = &seen[static_cast<size_t>(i) * clock_count];
  if (seen_epoch[i] != epoch) {
    seen_epoch[i] = epoch;
    std::fill_n(row, clock_count, 0);
  }
  return row;
}

}  // namespace

void reserve_clocks(int threads) {
  clock_count = threads + 1;
  clocks.assign(clock_count, {0, 0});
  fences.assign(clock_count, {0, 0});
  seen.resize(static_cast<size_t>(clock_count) * clock_count);
  seen_epoch.assign(clock_count, 0);
}

Stamp this_moment() { return stamp(cta.current); }

bool is_ordered(Stamp past, int i) {
  if (past.epoch < epoch || static_cast<int>(past.thread) == i) return true;
  return seen_by(i)[past.thread] > past.clock;
}

bool has_seen(Stamp moment) { return is_ordered(moment, cta.current); }

std::vector<uint32_t> no_clocks() { return std::vector<uint32_t>(clock_count, 0); }

void release_clock(int i, std::vector<uint32_t>& into) {
  const uint32_t* known = seen_by(i);
  for (int k = 0; k < clock_count; k++) into[k] = std::max(into[k], known[k]);
  into[i] = now(i) + 1;
  clocks[i].now++;
}

void acquire_clock(int i, const std::vector<uint32_t>& from) {
  uint32_t* known = seen_by(i);
  for (int k = 0; k < clock_count; k++) known[k] = std::max(known[k], from[k]);
}

void fence_proxy_async() {
  const int thread = cta.current;
  fences[thread] = {epoch, now(thread) + 1};
  clocks[thread].now++;
}

bool is_fenced(Stamp write) {
  const Clock& fence = fences[write.thread];
  return fence.epoch > write.epoch || (fence.epoch == write.epoch && fence.now > write.clock);
}

}  // namespace simt
