#include "cpu/isa.h"

#include <cstdlib>
#include <string>

namespace dllm::cpu {
namespace {

struct Choice {
  Isa isa = Isa::baseline;
  std::string error;
  bool forced = false;
};

bool vnni_supported() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

Isa best_supported() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return Isa::avx2;
#endif
  return Isa::baseline;
}

Choice choose() {
  const Isa best = best_supported();
  const char* forced = std::getenv("DLLM_ISA");
  if (!forced || !*forced) return {best, ""};
  const std::string name = forced;
  Isa wanted;
  if (name == "baseline") wanted = Isa::baseline;
  else if (name == "avx2") wanted = Isa::avx2;
  else if (name == "avx512") wanted = Isa::avx512;
  else return {best, "DLLM_ISA=" + name + " is unknown; allowed: baseline, avx2, avx512"};
  if (wanted > best) return {best, "DLLM_ISA=" + name + " is not supported by this processor"};
  return {wanted, "", true};
}

const Choice& choice() {
  static const Choice picked = choose();
  return picked;
}

}  // namespace

Isa active_isa() { return choice().isa; }

const char* active_isa_name() {
  constexpr const char* names[] = {"baseline", "avx2", "avx512"};
  return names[static_cast<int>(active_isa())];
}

bool has_vnni() { return active_isa() == Isa::avx512 && !choice().forced && vnni_supported(); }

const char* isa_error() { return choice().error.c_str(); }

}  // namespace dllm::cpu
