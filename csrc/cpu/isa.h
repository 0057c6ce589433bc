// Instruction sets that the CPU kernels are compiled for, and the one picked when the library loads.
#pragma once

namespace dllm::cpu {

enum class Isa { baseline, avx2, avx512 };

// The best instruction set that this processor runs, or what the environment variable DLLM_ISA
// (baseline, avx2, avx512) forces. An unknown or unsupported value is reported by isa_error().
Isa active_isa();
const char* active_isa_name();
const char* isa_error();  // empty when DLLM_ISA is unset or valid
// Whether kernels may use VNNI: the processor has it, and DLLM_ISA forces no less.
bool has_vnni();

}  // namespace dllm::cpu

// Declares a kernel that every instruction set compiles in its own namespace, and the function that
// picks one. The first argument of a kernel is its parameter block; [begin, end) are work items.
#if defined(__x86_64__)
#define DLLM_CPU_KERNEL(name, Params)                                      \
  namespace dllm::cpu {                                                    \
  namespace baseline { void name(const Params& p, long begin, long end); } \
  namespace avx2 { void name(const Params& p, long begin, long end); }     \
  namespace avx512 { void name(const Params& p, long begin, long end); }   \
  inline void name(const Params& p, long begin, long end) {                \
    switch (active_isa()) {                                                \
      case Isa::avx512: return avx512::name(p, begin, end);                \
      case Isa::avx2: return avx2::name(p, begin, end);                    \
      default: return baseline::name(p, begin, end);                       \
    }                                                                      \
  }                                                                        \
  }
#else
#define DLLM_CPU_KERNEL(name, Params)                                                        \
  namespace dllm::cpu {                                                                      \
  namespace baseline { void name(const Params& p, long begin, long end); }                   \
  inline void name(const Params& p, long begin, long end) { baseline::name(p, begin, end); } \
  }
#endif
