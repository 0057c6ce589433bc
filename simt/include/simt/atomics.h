// Atomics. One thread runs at a time, so only the checker has to know that they are atomic.
#pragma once

#include "simt/device.h"

namespace simt {

template <class T, class Update>
[[gnu::no_sanitize("thread")]] T update_atomically(T* address, Site site, Update update) {
  check_atomic(address, sizeof(T), site);
  const T old = *address;
  *address = update(old);
  return old;
}

}  // namespace simt

#define SIMT_ATOMIC(name, expression)                                                          \
  template <class T>                                                                           \
  T name(T* address, std::type_identity_t<T> value, simt::Site site = simt::Site::current()) { \
    return simt::update_atomically(address, site, [&](T old) -> T { return expression; });     \
  }
SIMT_ATOMIC(atomicAdd, old + value)
SIMT_ATOMIC(atomicSub, old - value)
SIMT_ATOMIC(atomicMin, value < old ? value : old)
SIMT_ATOMIC(atomicMax, value > old ? value : old)
SIMT_ATOMIC(atomicAnd, old& value)
SIMT_ATOMIC(atomicOr, old | value)
SIMT_ATOMIC(atomicXor, old ^ value)
SIMT_ATOMIC(atomicExch, value)
SIMT_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
SIMT_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1)
#undef SIMT_ATOMIC
template <class T>
T atomicCAS(T* address, std::type_identity_t<T> compare, std::type_identity_t<T> value,
            simt::Site site = simt::Site::current()) {
  return simt::update_atomically(address, site, [&](T old) { return old == compare ? value : old; });
}
