// One CTA: its threads as fibers, their barriers and warp collectives. One CTA runs at a time; a thread runs
// until it waits, exits or fails.
#pragma once

#include <algorithm>
#include <array>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "fiber.h"
#include "simt/device.h"

namespace simt {

constexpr int kLanes = 32, kBarriers = 16, kMaxThreads = kMaxFibers, kMaxWarps = kMaxThreads / kLanes;

// Order of the CTAs of a launch, and of threads that could run: 0 forward, 1 backward, else shuffled with
// this seed.
struct Order {
  unsigned seed = 0;
  std::minstd_rand random;

  template <class Index>
  void arrange(std::vector<Index>& all) {
    if (seed == 1) std::reverse(all.begin(), all.end());
    if (seed > 1) std::shuffle(all.begin(), all.end(), random);
  }
};

struct Thread {
  Context context;
  enum { ready, waiting, exited } state;
  const char* what;  // it waits at
  Site site;
  int predicates;  // of the barrier it waited at
  bool after;      // griddepcontrol_wait(): the launch before has ended
};

struct Barrier {
  const char* what;
  Site site;
  int expected, arrived, predicates;
  std::vector<int> waiting;
  std::vector<uint32_t> clocks;  // what those who came have seen of each thread
  std::array<int, kMaxWarps> lanes;
};

// Lanes of a warp on their way to one collective.
struct Rendezvous {
  const char* what;
  Site site;
  unsigned mask, arrived;
  void* exchanges[kLanes];
};

struct Cta {
  // ---- of the launch
  const void* kernel = nullptr;  // null: nothing runs
  const std::function<void()>* body;
  int threads;
  bool overlapping;  // the launch before may still run
  Order order;

  // ---- of this CTA
  uint3 block;
  int current;  // the running thread
  int alive;    // threads that have not exited
  bool waited;  // for the launch before: any thread
  std::vector<Thread> thread;
  std::vector<uint3> index;  // of each thread
  std::vector<int> queue;    // ready threads from `next` on
  size_t next;
  std::array<Barrier, kBarriers> barriers;
  std::array<std::vector<Rendezvous>, kMaxWarps> rendezvous;
  Context scheduler;
  std::string failure;

  void start(const void* kernel, dim3 grid, dim3 block_dim, bool overlapping,
             const std::function<void()>& body);
  void run(uint3 block);  // throws the diagnosis of what went wrong
  void finish();

  void wait(const char* what, Site site);
  void wake(std::vector<int>& waiting);
  [[noreturn]] void exit();
  void check_waited(const char* what, Site site) const;

 private:
  void go_on();
  std::string deadlock() const;
};
extern Cta cta;

extern uint64_t switches;  // of fibers, since the library was loaded

}  // namespace simt
