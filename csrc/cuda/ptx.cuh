// PTX that CUDA C++ has no name for, for every GPU from Ampere on: matrix products of a warp, asynchronous
// copies, named barriers. Kernels contain no assembly of their own.
//
// Fragments of mma.m16n8k16, for lane = 4·group + pair, two 16-bit values to a register, the lower column
// in the lower half:
//   A [16 rows][16]   a[0] row group,     columns 2·pair, +1      a[2] row group,     columns 2·pair + 8, +9
//                     a[1] row group + 8, columns 2·pair, +1      a[3] row group + 8, columns 2·pair + 8, +9
//   B [16][8 columns] b[0] column group, rows 2·pair, +1          b[1] column group, rows 2·pair + 8, +9
//   D [16 rows][8]    d[0], d[1] row group, columns 2·pair, +1    d[2], d[3] row group + 8, the same columns
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace dllm::cuda {

// The dynamic shared memory of the CTA, aligned to 128 bytes.
template <class T>
__device__ T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char dllm_dynamic_shared[];
  return reinterpret_cast<T*>(dllm_dynamic_shared);
}

__device__ inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// d += a · b, float32 sums of products of bfloat16 or float16.
template <class T>
__device__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 × 8 matrices of 16-bit values from shared memory: lanes 8·i to 8·i + 7 name the rows of matrix i, 16
// aligned bytes each. Lane 4·group + pair gets of matrix i in r[i] row `group`, columns 2·pair and +1; of
// the transposed matrix with ldmatrix_x4_trans.
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// 16 aligned bytes from global to shared memory, zeros where not `valid`; `global` is then not read. They
// are there once cp_async_wait_group() returned to this thread, for others after a barrier beyond that.
__device__ inline void cp_async(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}

// Closes the group of this thread's copies since the last commit.
__device__ inline void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` of the latest groups are not done.
template <int pending>
__device__ void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Barrier `id` (1 to 15; 0 is __syncthreads) for `threads` threads, whole warps.
__device__ inline void bar_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Counts this warp in without waiting.
__device__ inline void bar_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Of a launch that may begin before the kernel before it in the stream has ended (launch_overlapping):
// griddepcontrol_wait() returns once that kernel has ended and what it wrote is there. Until then a thread
// reads and writes nothing that others may write or read. Code for GPUs before Hopper has neither, and such
// launches begin after.
__device__ inline void griddepcontrol_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Once all CTAs have called it or ended, the launch after this one may begin.
__device__ inline void griddepcontrol_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Two floats in one register, `low` in the lower half.
template <class T>
__device__ uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

// 2^x to about two units in the last place; 2^−∞ = 0.
__device__ inline float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace dllm::cuda
