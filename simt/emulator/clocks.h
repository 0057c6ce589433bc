// Time: barriers of the whole CTA cut a launch into epochs; whatever happened in an earlier epoch is seen by
// all. Within an epoch every thread has a clock, and knows of the others' clocks what narrower barriers told
// it. Behind the threads comes the engine that makes bulk copies.
#pragma once

#include <cstdint>
#include <vector>

namespace simt {

// A tick of a thread's clock.
struct Stamp {
  uint32_t epoch, thread : 11, clock : 21;
  bool operator==(const Stamp&) const = default;
};

struct Clock {
  uint32_t epoch, now;
};

extern uint32_t epoch;
extern std::vector<Clock> clocks;

void reserve_clocks(int threads);  // a launch begins
inline void begin_epoch() { epoch++; }

// Ticks of thread `i` that were over before the present one.
inline uint32_t now(int i) {
  if (clocks[i].epoch != epoch) clocks[i] = {epoch, 0};
  return clocks[i].now;
}
inline Stamp stamp(int i) { return {epoch, static_cast<uint32_t>(i), now(i)}; }
Stamp this_moment();  // of the running thread

// Did what `past` stands for happen before what thread `i` does now?
bool is_ordered(Stamp past, int i);
bool has_seen(Stamp moment);  // the same of the running thread

std::vector<uint32_t> no_clocks();
// Adds what thread `i` has done and seen to `into`, and starts its next tick.
void release_clock(int i, std::vector<uint32_t>& into);
void acquire_clock(int i, const std::vector<uint32_t>& from);

// Did its thread call fence_proxy_async after what `write` stands for?
bool is_fenced(Stamp write);

}  // namespace simt
