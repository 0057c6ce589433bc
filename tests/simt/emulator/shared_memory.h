// Shared memory of the running CTA, and what is known about each of its bytes: who wrote and read it last,
// and whether an asynchronous copy into it is under way.
//
// Time: barriers of the whole CTA cut a launch into epochs; whatever happened in an earlier epoch is seen by
// all. Within an epoch every thread has a clock, and knows of the others' clocks what narrower barriers told
// it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "report.h"

namespace simt {

constexpr size_t kMaxSharedBytes = 227 * 1024;

void reserve_shared_memory(size_t dynamic_bytes, int threads);
void poison_shared_memory();  // a CTA begins

// A tick of a thread's clock.
struct Stamp {
  uint32_t epoch, thread : 11, clock : 21;
  bool operator==(const Stamp&) const = default;
};
Stamp this_moment();          // of the running thread
bool has_seen(Stamp moment);  // does a barrier lie between it and the running thread?

void begin_epoch();
// Clocks of all threads and, behind them, of the engine that makes bulk copies.
std::vector<uint32_t> no_clocks();
// Adds what thread `i` has done and seen to `clocks`, and starts its next tick.
void release_clock(int i, std::vector<uint32_t>& clocks);
void acquire_clock(int i, const std::vector<uint32_t>& clocks);

enum class Access { read, write, atomic };
void check_access(Access access, const void* address, size_t bytes, const Where& where);
// A matrix product reads: what ordinary stores wrote needs a fence.
void check_asynchronous_read(const void* address, size_t bytes, const Where& where);

// From the one to the other nobody may touch these bytes, which a copy overwrites; it is the engine that
// writes.
void start_copy(void* address, size_t bytes);
void land_copy(void* address, size_t bytes);

}  // namespace simt
