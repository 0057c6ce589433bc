// Warp collectives.
#include "simt/warp.h"

#include <algorithm>

#include "clocks.h"
#include "cta.h"
#include "report.h"

namespace simt {
namespace {

std::string lanes_text(unsigned mask) {
  char text[16];
  snprintf(text, sizeof text, "0x%08x", mask);
  return text;
}

// The lanes of one warp tell each other what they know.
void synchronise_clocks(int warp, unsigned mask) {
  std::vector<uint32_t> clocks = no_clocks();
  for (int lane = 0; lane < kLanes; lane++)
    if (mask >> lane & 1) release_clock(warp * kLanes + lane, clocks);
  for (int lane = 0; lane < kLanes; lane++)
    if (mask >> lane & 1) acquire_clock(warp * kLanes + lane, clocks);
}

}  // namespace

void rendezvous(const char* what, unsigned mask, void* exchange, Work work, bool orders_memory, Site site) {
  const int warp = cta.current / kLanes, lane = cta.current % kLanes;
  const unsigned self = 1u << lane;
  const int lanes = std::min(cta.threads - warp * kLanes, kLanes);
  if (!(mask & self))
    fail_at(std::string(what) + " names lanes " + lanes_text(mask) + " without this one", Where(site));
  if (lanes < kLanes && mask >> lanes)
    fail_at(std::string(what) + " names lanes " + lanes_text(mask) + ", but this warp has " +
                std::to_string(lanes),
            Where(site));

  auto& pending = cta.rendezvous[warp];
  auto mine = std::ranges::find_if(pending, [&](const Rendezvous& other) { return other.mask & mask; });
  if (mine == pending.end()) {
    pending.push_back({what, site, mask, 0, {}});
    mine = pending.end() - 1;
  } else if (mine->mask != mask || !same_site(mine->site, site) || mine->what != what) {
    fail_at("divergent warp: this lane is at " + std::string(what) + " of lanes " + lanes_text(mask) +
                ", others wait at " + mine->what + " of lanes " + lanes_text(mine->mask) + " (" +
                site_text(mine->site) + ")",
            Where(site));
  }
  mine->arrived |= self;
  mine->exchanges[lane] = exchange;
  if (mine->arrived != mask) {
    cta.wait(what, site);
    return;
  }
  work(mine->exchanges, mask);
  if (orders_memory) synchronise_clocks(warp, mask);
  pending.erase(mine);
  static std::vector<int> others;
  others.clear();
  for (int i = 0; i < kLanes; i++)
    if ((mask ^ self) >> i & 1) others.push_back(warp * kLanes + i);
  if (cta.order.seed == 1) std::ranges::reverse(others);
  cta.wake(others);
}

// ---- shuffles: which lane is read, and where there is none, the lane's own value stays
void shuffle(ShuffleKind kind, unsigned mask, Shuffle& exchange, Site site) {
  static constexpr const char* kNames[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync",
                                           "__shfl_xor_sync"};
  const int lane = lane_index(), width = exchange.width, operand = exchange.operand;
  const int first = lane & ~(width - 1), last = first + width - 1;
  int source = kind == ShuffleKind::index  ? first | (operand & (width - 1))
               : kind == ShuffleKind::up   ? lane - operand
               : kind == ShuffleKind::down ? lane + operand
                                           : lane ^ operand;
  if (kind == ShuffleKind::up ? source < first : source > last) source = lane;
  const char* what = kNames[static_cast<int>(kind)];
  if (width <= 0 || width > kLanes || width & (width - 1))
    fail_at(std::string(what) + " of width " + std::to_string(width), Where(site));
  if (!(mask >> source & 1))
    fail_at(std::string(what) + " reads lane " + std::to_string(source) + ", which is not among lanes " +
                lanes_text(mask),
            Where(site));
  exchange.operand = source;
  rendezvous(
      what, mask, &exchange,
      [](void* const* exchanges, unsigned mask) {
        uint64_t bits[kLanes];
        for (int i = 0; i < kLanes; i++)
          if (mask >> i & 1) bits[i] = static_cast<Shuffle*>(exchanges[i])->bits;
        for (int i = 0; i < kLanes; i++)
          if (mask >> i & 1) {
            Shuffle& each = *static_cast<Shuffle*>(exchanges[i]);
            each.bits = bits[each.operand];
          }
      },
      false, site);
}

// ---- votes
unsigned ballot(const char* what, unsigned mask, bool predicate, Site site) {
  unsigned exchange = predicate;
  rendezvous(
      what, mask, &exchange,
      [](void* const* exchanges, unsigned mask) {
        unsigned voted = 0;
        for (int i = 0; i < kLanes; i++)
          if (mask >> i & 1) voted |= *static_cast<unsigned*>(exchanges[i]) << i;
        for (int i = 0; i < kLanes; i++)
          if (mask >> i & 1) *static_cast<unsigned*>(exchanges[i]) = voted;
      },
      false, site);
  return exchange;
}

unsigned matching_lanes(const char* what, unsigned mask, uint64_t bits, Site site) {
  rendezvous(
      what, mask, &bits,
      [](void* const* exchanges, unsigned mask) {
        uint64_t values[kLanes];
        for (int i = 0; i < kLanes; i++)
          if (mask >> i & 1) values[i] = *static_cast<uint64_t*>(exchanges[i]);
        for (int i = 0; i < kLanes; i++) {
          if (!(mask >> i & 1)) continue;
          unsigned equal = 0;
          for (int k = 0; k < kLanes; k++)
            if (mask >> k & 1 && values[k] == values[i]) equal |= 1u << k;
          *static_cast<uint64_t*>(exchanges[i]) = equal;
        }
      },
      false, site);
  return static_cast<unsigned>(bits);
}

}  // namespace simt
