// PTX of Hopper (sm_90a) that CUDA C++ has no name for, each instruction under its own name: mbarrier, TMA
// (cp.async.bulk.tensor), setmaxnreg, wgmma. Kernels contain no assembly of their own.
//
// Which lane of a warpgroup holds what of the accumulator D [64][8·kTiles] of wgmma.m64nNk16, by PTX's table
// "WGMMA .m64nNk16 register fragment layout for accumulator matrix D". Warp w of the four has rows 16w to
// 16w + 15. Of the columns 8n to 8n + 7 each lane (T0 to T31) has two neighbours of two rows, in d[n]:
//
//                        columns 8n, +1 | +2, +3 | +4, +5 | +6, +7
//     d[n][0], d[n][1]
//       row 16w               T0        |   T1   |   T2   |   T3
//       row 16w + 1           T4        |   T5   |   T6   |   T7
//         ...
//       row 16w + 7           T28       |   T29  |   T30  |   T31
//     d[n][2], d[n][3]
//       row 16w + 8           T0        |   T1   |   T2   |   T3
//         ...
//       row 16w + 15          T28       |   T29  |   T30  |   T31
//
// With lane = 4·group + pair: rows 16w + group and 16w + group + 8, columns 8n + 2·pair and +1. The operand A
// [64][16] in registers is two such tiles side by side, its 16-bit values packed in twos:
//     a[0]  row 16w + group,      columns 2·pair, +1     a[2]  columns 2·pair + 8, +9
//     a[1]  row 16w + group + 8,  columns 2·pair, +1     a[3]  columns 2·pair + 8, +9
// So columns 16j to 16j + 15 of one product's D are, rounded and packed, the A of the next, without a
// shuffle: a[0] and a[1] from d[2j], a[2] and a[3] from d[2j + 1].
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cuda/ptx.cuh"
#include "cuda/sm90/matrix_descriptor.h"
#include "cuda/sm90/tensor_map.h"

namespace dllm::cuda {

// The dynamic shared memory of the CTA from its first multiple of 1024 bytes on: up to kPanelAlignment bytes
// are lost.
__device__ inline unsigned char* panel_shared() {
  unsigned char* base = dynamic_shared<unsigned char>();
  return base + (0u - shared_address(base)) % kPanelAlignment;
}

// ---- mbarrier ------------------------------------------------------------------------------------
// A phase ends when `arrivals` threads have arrived and all bytes announced in it are there. Phases are
// numbered from 0; the parity of a phase is its number's lowest bit.
struct alignas(8) Mbarrier {
  uint64_t state;
};

__device__ inline void mbarrier_init(Mbarrier& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals)
               : "memory");
}

// fence.mbarrier_init, and fence.proxy.async for TMA, which completes on the barriers: after mbarrier_init,
// by the thread that called it, before the __syncthreads that lets others use the barriers.
__device__ inline void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ inline void mbarrier_arrive(Mbarrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}
// Arrives, and announces `bytes` of copies that complete on the barrier in this phase.
__device__ inline void mbarrier_arrive_expect_tx(Mbarrier& barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)),
               "r"(bytes)
               : "memory");
}

// Loops over mbarrier.try_wait.parity. Returns once the phase of this parity is over: at once where the
// running phase has the other parity.
__device__ inline void mbarrier_wait_parity(Mbarrier& barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred over;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@over bra done;\n"
      "bra again;\n"
      "done:\n"
      "}" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}

// What this thread wrote to shared memory by ordinary stores is seen by TMA and wgmma, which read it through
// the async proxy, after a barrier beyond this.
__device__ inline void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- TMA -----------------------------------------------------------------------------------------
// cp.async.bulk.tensor: one box of the tensor, its first element at these coordinates (innermost first), into
// shared memory at a multiple of 1024 bytes, as a panel of matrix_descriptor.h; zeros where the box leaves
// the tensor. Called by one thread. All of the box's bytes count towards what `barrier` expects. `map` is a
// kernel parameter.
__device__ inline void cp_async_bulk_tensor(void* shared, const TensorMap& map, Mbarrier& barrier, int x,
                                            int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
      "%4}], "
      "[%2];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(x), "r"(y)
      : "memory");
}
__device__ inline void cp_async_bulk_tensor(void* shared, const TensorMap& map, Mbarrier& barrier, int x,
                                            int y, int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}
// cp.async.bulk.prefetch.tensor: the box as above into the L2 cache. A hint, which changes no value that
// anyone reads.
__device__ inline void cp_async_bulk_prefetch_tensor(const TensorMap& map, int x, int y) {
  asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%0, {%1, %2}];" ::"l"(&map), "r"(x), "r"(y)
               : "memory");
}

// ---- setmaxnreg ----------------------------------------------------------------------------------
// The registers of each thread of a warpgroup, all of whose threads call it: a multiple of 8 from 24 to 240.
template <int kRegisters>
__device__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- wgmma ---------------------------------------------------------------------------------------
// Asynchronous: wgmma_fence, some wgmma_mma_async, wgmma_commit_group, then wgmma_wait_group before registers
// that the products name are used again. All 128 threads of a warpgroup call each of them.

// No instruction: keeps the compiler from moving other uses of these registers across this point.
template <int kTiles>
__device__ void pin(float (&registers)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) asm volatile("" : "+f"(registers[n][i])::"memory");
}
template <int kTiles>
__device__ void pin(uint32_t (&registers)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) asm volatile("" : "+r"(registers[n][i])::"memory");
}

// wgmma.fence, before the first of some products; `operands`: the registers they use that other instructions
// wrote.
template <class... Operands>
__device__ void wgmma_fence(Operands&... operands) {
  (pin(operands), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// Closes the group (wgmma-group) of the products since the last commit.
__device__ inline void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most `pending` of the latest groups are not done; `done`: the sums that are then there.
template <int pending, class... Sums>
__device__ void wgmma_wait_group(Sums&... done) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
  (pin(done), ...);
}

// d = a · bᵀ, or d += a · bᵀ where `add`: float32 sums over 16 products of bfloat16 or float16. `a`, a
// descriptor: [64][16]; `b`, a descriptor: [8·kTiles][16]; each stored as its Major says. kTiles is 1, 2, 4,
// 8 or 16.
template <class T, Major a_major, Major b_major, int kTiles>
__device__ void wgmma_mma_async(float (&d)[kTiles][4], uint64_t a, uint64_t b, bool add);
// The same with `a` in registers.
template <class T, Major b_major, int kTiles>
__device__ void wgmma_mma_async(float (&d)[kTiles][4], const uint32_t (&a)[4], uint64_t b, bool add);

#define DLLM_D(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define DLLM_D1 DLLM_D(0)
#define DLLM_D2 DLLM_D1, DLLM_D(1)
#define DLLM_D4 DLLM_D2, DLLM_D(2), DLLM_D(3)
#define DLLM_D8 DLLM_D4, DLLM_D(4), DLLM_D(5), DLLM_D(6), DLLM_D(7)
#define DLLM_D16 \
  DLLM_D8, DLLM_D(8), DLLM_D(9), DLLM_D(10), DLLM_D(11), DLLM_D(12), DLLM_D(13), DLLM_D(14), DLLM_D(15)
#define DLLM_R1 "%0,%1,%2,%3"
#define DLLM_R2 \
  DLLM_R1       \
  ","           \
  "%4,%5,%6,%7"
#define DLLM_R4 \
  DLLM_R2       \
  ","           \
  "%8,%9,%10,%11,%12,%13,%14,%15"
#define DLLM_R8 \
  DLLM_R4       \
  ","           \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define DLLM_R16                                                    \
  DLLM_R8                                                           \
  ","                                                               \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47" \
  ","                                                               \
  "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

// SS: both operands in shared memory; RS: A in registers. TYPE: bf16 or f16. The operands behind the sums are
// numbered by hand: the list's length differs.
#define DLLM_WGMMA_SS_TYPED(TILES, COLUMNS, TYPE, A, B, ADD, A_MAJOR, B_MAJOR)                             \
  asm volatile(                                                                                            \
      "{.reg .pred add; setp.ne.b32 add, " ADD ", 0; wgmma.mma_async.sync.aligned.m64n" COLUMNS            \
      "k16.f32." TYPE "." TYPE " {" DLLM_R##TILES "}, " A ", " B ", add, 1, 1, " A_MAJOR ", " B_MAJOR ";}" \
      : DLLM_D##TILES                                                                                      \
      : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(a_major == Major::mn), "n"(b_major == Major::mn))
#define DLLM_WGMMA_RS_TYPED(TILES, COLUMNS, TYPE, A0, A1, A2, A3, B, ADD, B_MAJOR)                       \
  asm volatile("{.reg .pred add; setp.ne.b32 add, " ADD ", 0; wgmma.mma_async.sync.aligned.m64n" COLUMNS \
               "k16.f32." TYPE "." TYPE " {" DLLM_R##TILES "}, {" A0 "," A1 "," A2 "," A3 "}, " B        \
                                                           ", add, 1, 1, " B_MAJOR ";}"                  \
               : DLLM_D##TILES                                                                           \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)),         \
                 "n"(b_major == Major::mn))
#define DLLM_WGMMA_SS(TILES, COLUMNS, ...)                                                                  \
  if constexpr (std::is_same_v<T, __nv_bfloat16>) DLLM_WGMMA_SS_TYPED(TILES, COLUMNS, "bf16", __VA_ARGS__); \
  else DLLM_WGMMA_SS_TYPED(TILES, COLUMNS, "f16", __VA_ARGS__)
#define DLLM_WGMMA_RS(TILES, COLUMNS, ...)                                                                  \
  if constexpr (std::is_same_v<T, __nv_bfloat16>) DLLM_WGMMA_RS_TYPED(TILES, COLUMNS, "bf16", __VA_ARGS__); \
  else DLLM_WGMMA_RS_TYPED(TILES, COLUMNS, "f16", __VA_ARGS__)

template <class T, Major a_major, Major b_major, int kTiles>
__device__ void wgmma_mma_async(float (&d)[kTiles][4], uint64_t a, uint64_t b, bool add) {
  static_assert(kTiles == 1 || kTiles == 2 || kTiles == 4 || kTiles == 8 || kTiles == 16);
  // clang-format off
  if constexpr (kTiles == 1) { DLLM_WGMMA_SS(1, "8", "%4", "%5", "%6", "%7", "%8"); }
  else if constexpr (kTiles == 2) { DLLM_WGMMA_SS(2, "16", "%8", "%9", "%10", "%11", "%12"); }
  else if constexpr (kTiles == 4) { DLLM_WGMMA_SS(4, "32", "%16", "%17", "%18", "%19", "%20"); }
  else if constexpr (kTiles == 8) { DLLM_WGMMA_SS(8, "64", "%32", "%33", "%34", "%35", "%36"); }
  else if constexpr (kTiles == 16) { DLLM_WGMMA_SS(16, "128", "%64", "%65", "%66", "%67", "%68"); }
  // clang-format on
}

template <class T, Major b_major, int kTiles>
__device__ void wgmma_mma_async(float (&d)[kTiles][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  static_assert(kTiles == 1 || kTiles == 2 || kTiles == 4 || kTiles == 8 || kTiles == 16);
  // clang-format off
  if constexpr (kTiles == 1) { DLLM_WGMMA_RS(1, "8", "%4", "%5", "%6", "%7", "%8", "%9", "%10"); }
  else if constexpr (kTiles == 2) { DLLM_WGMMA_RS(2, "16", "%8", "%9", "%10", "%11", "%12", "%13", "%14"); }
  else if constexpr (kTiles == 4) { DLLM_WGMMA_RS(4, "32", "%16", "%17", "%18", "%19", "%20", "%21", "%22"); }
  else if constexpr (kTiles == 8) { DLLM_WGMMA_RS(8, "64", "%32", "%33", "%34", "%35", "%36", "%37", "%38"); }
  else if constexpr (kTiles == 16) { DLLM_WGMMA_RS(16, "128", "%64", "%65", "%66", "%67", "%68", "%69", "%70"); }
  // clang-format on
}

#undef DLLM_D
#undef DLLM_D1
#undef DLLM_D2
#undef DLLM_D4
#undef DLLM_D8
#undef DLLM_D16
#undef DLLM_R1
#undef DLLM_R2
#undef DLLM_R4
#undef DLLM_R8
#undef DLLM_R16
#undef DLLM_WGMMA_SS_TYPED
#undef DLLM_WGMMA_RS_TYPED
#undef DLLM_WGMMA_SS
#undef DLLM_WGMMA_RS

}  // namespace dllm::cuda
