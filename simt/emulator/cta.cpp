#include "cta.h"
#include "clocks.h"

#include <map>
#include <stdexcept>

#include "clocks.h"
#include "hopper.h"
#include "report.h"
#include "shared_memory.h"

dim3 gridDim, blockDim;

namespace simt {

Cta cta;
uint64_t switches = 0;

uint3 thread_index() { return cta.index[cta.current]; }
uint3 block_index() { return cta.block; }
int lane_index() { return cta.current % kLanes; }

// ---- life of a CTA -----------------------------------------------------------------------------
void Cta::start(const void* the_kernel, dim3 grid, dim3 block_dim, bool may_overlap,
                const std::function<void()>& the_body) {
  kernel = the_kernel, body = &the_body, overlapping = may_overlap;
  gridDim = grid, blockDim = block_dim;
  threads = block_dim.x * block_dim.y * block_dim.z;
  order.random.seed(order.seed);
  thread.resize(threads);
  index.clear();
  for (unsigned z = 0; z < block_dim.z; z++)
    for (unsigned y = 0; y < block_dim.y; y++)
      for (unsigned x = 0; x < block_dim.x; x++) index.push_back({x, y, z});
}

void Cta::finish() { kernel = nullptr; }

void Cta::run(uint3 which) {
  block = which;
  for (Barrier& barrier : barriers) barrier.arrived = 0, barrier.waiting.clear();
  for (auto& pending : rendezvous) pending.clear();
  queue.clear();
  for (int i = 0; i < threads; i++) {
    thread[i] = {
        new_fiber(i, [] { (*cta.body)(), cta.exit(); }), Thread::ready, nullptr, {}, 0, !overlapping};
    queue.push_back(i);
  }
  order.arrange(queue);
  next = 0;
  failure.clear();
  alive = threads;
  waited = !overlapping;
  poison_shared_memory();
  reset_asynchronous();
  current = queue[next++];
  switches++;
  simt_switch(&scheduler, thread[current].context);
  if (!failure.empty()) throw std::runtime_error(failure);
}

// Leaves the running thread for the next that is ready.
void Cta::go_on() {
  Thread& left = thread[current];
  while (alive > 0 && next == queue.size() && progress_asynchronous()) {
  }
  if (next < queue.size()) {
    current = queue[next++];
    if (&thread[current] == &left) return;
    switches++;
    simt_switch(&left.context, thread[current].context);
    return;
  }
  std::string unfinished = alive > 0 ? deadlock() : unfinished_asynchronous();
  if (unfinished.empty()) unfinished = unfinished_copies_of_threads();
  if (unfinished.empty() && !waited)
    unfinished = "an overlapping launch, which ends without griddepcontrol_wait()";
  if (!unfinished.empty()) failure = kernel_text() + ": " + unfinished;
  switches++;
  simt_switch(&left.context, scheduler);
}

void Cta::wait(const char* what, Site site) {
  Thread& self = thread[current];
  self.state = Thread::waiting, self.what = what, self.site = site;
  go_on();
}

void Cta::wake(std::vector<int>& waiting) {
  if (order.seed > 1) order.arrange(waiting);
  if (next > 4096) queue.erase(queue.begin(), queue.begin() + next), next = 0;
  for (const int i : waiting) {
    thread[i].state = Thread::ready;
    queue.push_back(i);
  }
  waiting.clear();
}

void Cta::exit() {
  thread[current].state = Thread::exited;
  alive--;
  go_on();
  __builtin_unreachable();
}

void Cta::check_waited(const char* what, Site site) const {
  if (!thread[current].after)
    fail_at(
        what + std::string(": griddepcontrol_wait() is missing before it, the launch before may still run"),
        Where(site));
}

void griddepcontrol_wait() { cta.waited = cta.thread[cta.current].after = true; }

void fail(const char* text, Site site) { fail_at(text, Where(site)); }

void fail_at(const std::string& text, const std::string& where) {
  cta.failure = position_text() + text + (where.empty() ? "" : ", at " + where);
  Context abandoned;
  simt_switch(&abandoned, cta.scheduler);
  __builtin_unreachable();
}

std::string Cta::deadlock() const {
  std::map<std::string, std::vector<int>> groups;
  for (int i = 0; i < threads; i++) {
    const Thread& t = thread[i];
    groups[t.state == Thread::exited ? "have exited"
                                     : "wait at " + std::string(t.what) + " (" + site_text(t.site) + ")"]
        .push_back(i);
  }
  std::string text = "nothing can go on:";
  for (const auto& [what, members] : groups) text += " " + threads_text(members) + " " + what + ";";
  text.back() = '.';
  return text + mbarriers_text();
}

// ---- barriers ----------------------------------------------------------------------------------
int barrier(const char* what, int id, int threads, bool wait, bool predicate, Site site) {
  if (id < 0 || id >= kBarriers) fail_at(what + (": there is no barrier " + std::to_string(id)), Where(site));
  if (threads % kLanes || threads < 0 || threads > cta.threads)
    fail_at(std::string(what) + " for " + std::to_string(threads) +
                " threads: they must be whole warps of this CTA of " + std::to_string(cta.threads),
            Where(site));
  Barrier& barrier = cta.barriers[id];
  const bool whole_cta = threads == 0;
  const int expected = whole_cta ? cta.threads : threads;
  if (barrier.arrived == 0) {
    barrier.what = what, barrier.site = site;
    barrier.expected = expected, barrier.predicates = 0;
    barrier.lanes.fill(0);
    barrier.clocks = no_clocks();
  } else if (barrier.expected != expected) {
    fail_at(std::string(what) + " for " + std::to_string(expected) + " threads meets barrier " +
                std::to_string(id) + " for " + std::to_string(barrier.expected) + " (" +
                site_text(barrier.site) + ")",
            Where(site));
  } else if (whole_cta && !same_site(barrier.site, site)) {
    fail_at("divergent barriers: this thread is at " + std::string(what) + ", " +
                std::to_string(barrier.arrived) + " others at " + barrier.what + " (" +
                site_text(barrier.site) + ")",
            Where(site));
  }
  barrier.arrived++;
  barrier.predicates += predicate;
  barrier.lanes[cta.current / kLanes]++;
  if (!whole_cta) release_clock(cta.current, barrier.clocks);
  if (barrier.arrived < barrier.expected) {
    if (!wait) return 0;
    barrier.waiting.push_back(cta.current);
    cta.wait(what, site);
    return cta.thread[cta.current].predicates;
  }
  for (const int lanes : barrier.lanes)
    if (lanes % kLanes && !whole_cta)
      fail_at(std::string(what) + " counts whole warps, but " + std::to_string(lanes) + " lanes of one came",
              Where(site));
  barrier.arrived = 0;
  if (wait) barrier.waiting.push_back(cta.current);
  if (barrier.waiting.size() == static_cast<size_t>(cta.threads)) begin_epoch();
  else
    for (const int i : barrier.waiting) acquire_clock(i, barrier.clocks);
  for (const int i : barrier.waiting) cta.thread[i].predicates = barrier.predicates;
  if (wait) barrier.waiting.pop_back();
  cta.wake(barrier.waiting);
  return barrier.predicates;
}

}  // namespace simt
