// Warp intrinsics: a rendezvous of the lanes that the mask names, then one of them works out every lane's
// result.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "simt/device.h"

namespace simt {

enum class ShuffleKind { index, up, down, exclusive_or };

struct Shuffle {
  uint64_t bits;  // in: the lane's value, out: what it gets
  int operand, width;
};
void shuffle(ShuffleKind kind, unsigned mask, Shuffle& exchange, Site site);

template <class T>
T shuffled(ShuffleKind kind, unsigned mask, T value, int operand, int width, Site site) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  Shuffle exchange{0, operand, width};
  memcpy(&exchange.bits, &value, sizeof value);
  shuffle(kind, mask, exchange, site);
  memcpy(&value, &exchange.bits, sizeof value);
  return value;
}

// Every lane of `mask` gets fold(values of the lanes of `mask`, in lane order).
template <class T, class Fold>
T reduced(const char* what, unsigned mask, T value, Fold, Site site) {
  rendezvous(
      what, mask, &value,
      [](void* const* exchanges, unsigned mask) {
        T result{};
        bool first = true;
        for (int lane = 0; lane < 32; lane++)
          if (mask >> lane & 1) {
            const T other = *static_cast<T*>(exchanges[lane]);
            result = first ? other : Fold()(result, other);
            first = false;
          }
        for (int lane = 0; lane < 32; lane++)
          if (mask >> lane & 1) *static_cast<T*>(exchanges[lane]) = result;
      },
      false, site);
  return value;
}

unsigned ballot(const char* what, unsigned mask, bool predicate, Site site);
unsigned matching_lanes(const char* what, unsigned mask, uint64_t bits, Site site);

}  // namespace simt

#define SIMT_SITE simt::Site site = simt::Site::current()

inline void __syncwarp(unsigned mask = ~0u, SIMT_SITE) {
  simt::rendezvous("__syncwarp", mask, nullptr, [](void* const*, unsigned) {}, true, site);
}
unsigned __activemask();

// ---- shuffles
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, SIMT_SITE) {
  return simt::shuffled(simt::ShuffleKind::index, mask, value, lane, width, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
  return simt::shuffled(simt::ShuffleKind::up, mask, value, delta, width, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
  return simt::shuffled(simt::ShuffleKind::down, mask, value, delta, width, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, SIMT_SITE) {
  return simt::shuffled(simt::ShuffleKind::exclusive_or, mask, value, bits, width, site);
}

// ---- reductions
#define SIMT_REDUCE(name, T, expression)                                                 \
  inline T name(unsigned mask, T value, SIMT_SITE) {                                     \
    return simt::reduced(#name, mask, value, [](T a, T b) { return expression; }, site); \
  }
SIMT_REDUCE(__reduce_add_sync, unsigned, a + b)
SIMT_REDUCE(__reduce_add_sync, int, static_cast<int>(static_cast<unsigned>(a) + static_cast<unsigned>(b)))
SIMT_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
SIMT_REDUCE(__reduce_min_sync, int, a < b ? a : b)
SIMT_REDUCE(__reduce_max_sync, unsigned, a > b ? a : b)
SIMT_REDUCE(__reduce_max_sync, int, a > b ? a : b)
SIMT_REDUCE(__reduce_and_sync, unsigned, a& b)
SIMT_REDUCE(__reduce_or_sync, unsigned, a | b)
SIMT_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
#undef SIMT_REDUCE

// ---- votes
inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_SITE) {
  return simt::ballot("__ballot_sync", mask, predicate, site);
}
inline int __any_sync(unsigned mask, int predicate, SIMT_SITE) {
  return simt::ballot("__any_sync", mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SIMT_SITE) {
  return simt::ballot("__all_sync", mask, !predicate, site) == 0;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, SIMT_SITE) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return simt::matching_lanes("__match_any_sync", mask, bits, site);
}
template <class T>
unsigned __match_all_sync(unsigned mask, T value, int* all, SIMT_SITE) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  *all = simt::matching_lanes("__match_all_sync", mask, bits, site) == mask;
  return *all ? mask : 0;
}
#undef SIMT_SITE
