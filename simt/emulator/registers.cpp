// setmaxnreg: the registers that the threads of a CTA divide among themselves. Taking more than the others
// have given waits for ever, on a GPU too.
#include <vector>

#include "cta.h"
#include "hopper.h"
#include "report.h"
#include "simt/hopper.h"

namespace simt {
namespace {

constexpr int kRegisters = 64 * 1024;  // of a multiprocessor; here a CTA is alone on it

std::vector<int> held;  // by each thread
int given = 0;          // by those that hold fewer than they began with
std::vector<int> waiting;

}  // namespace

void reset_registers() {
  held.assign(cta.threads, kRegisters / cta.threads / 8 * 8);
  given = 0;
  waiting.clear();
}

void setmaxnreg_dec(int count, Site site) {
  int& mine = held[cta.current];
  if (count > mine)
    fail_at("setmaxnreg_dec: a thread that holds " + std::to_string(mine) + " cannot keep " +
                std::to_string(count),
            Where(site));
  given += mine - count;
  mine = count;
  cta.wake(waiting);
}

void setmaxnreg_inc(int count, Site site) {
  int& mine = held[cta.current];
  if (count < mine)
    fail_at("setmaxnreg_inc: a thread that holds " + std::to_string(mine) + " cannot take " +
                std::to_string(count) + " in all",
            Where(site));
  while (given < count - mine) {
    waiting.push_back(cta.current);
    cta.wait("setmaxnreg_inc", site);
  }
  given -= count - mine;
  mine = count;
}

}  // namespace simt
