// Kernels that are wrong, each in one way, and what is right beside it: what the emulator has to find and
// what it must not complain about.
#include <exception>
#include <string>
#include <utility>

#include "cuda/launch_kernel.h"
#include "cuda/ptx.cuh"

namespace dllm::cuda {
namespace {

constexpr int kThreads = 64;

// ---- shared memory
__global__ void unwritten_read(float* out) {
  float* x = dynamic_shared<float>();
  if (threadIdx.x < 32) x[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = x[threadIdx.x];
}
__global__ void unwritten_static_read(float* out) {
  __shared__ float x[kThreads];
  if (threadIdx.x > 0) x[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = x[kThreads - 1 - threadIdx.x];
}
__global__ void out_of_range(float*) { dynamic_shared<float>()[threadIdx.x + 1] = 1; }

__global__ void missing_barrier(float* out) {
  float* x = dynamic_shared<float>();
  x[threadIdx.x] = 1;
  __syncthreads();
  x[threadIdx.x] = 2;
  out[threadIdx.x] = x[threadIdx.x ^ 32];
}
__global__ void overwritten_too_early(float* out) {
  float* x = dynamic_shared<float>();
  x[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = x[kThreads - 1 - threadIdx.x];
  x[threadIdx.x] = 2;
}
__global__ void missing_warp_barrier(float* out) {
  float* x = dynamic_shared<float>();
  x[threadIdx.x] = 1;
  __syncwarp();
  x[threadIdx.x] = 2;
  out[threadIdx.x] = __shfl_xor_sync(~0u, x[threadIdx.x ^ 1], 1);
}
__global__ void barrier_of_the_wrong_warps(float* out) {
  float* x = dynamic_shared<float>();
  x[threadIdx.x] = 1;
  bar_sync(1 + threadIdx.x / 32, 32);
  out[threadIdx.x] = x[threadIdx.x ^ 32];
}
__global__ void atomics_and_a_plain_read(float* out) {
  __shared__ int count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  atomicAdd(&count, 1);
  out[threadIdx.x] = count;
}
__global__ void narrow_neighbours(float* out) {  // right: bytes of one word belong to four threads
  unsigned char* x = dynamic_shared<unsigned char>();
  x[threadIdx.x] = threadIdx.x;
  __syncthreads();
  if (threadIdx.x % 4 == 0) out[threadIdx.x] = reinterpret_cast<unsigned*>(x)[threadIdx.x / 4];
}

struct Padded {
  double x;
  int y;
};
__global__ void padding(float* out) {  // right: a structure is copied with bytes that nobody wrote
  __shared__ Padded all[kThreads];
  all[threadIdx.x].x = 1;
  all[threadIdx.x].y = 2;
  __syncthreads();
  const Padded other = all[kThreads - 1 - threadIdx.x];
  *reinterpret_cast<Padded*>(out + threadIdx.x / 16 * 4) = other;
}

// ---- asynchronous copies
__global__ void missing_wait(float* out) {
  float* x = dynamic_shared<float>();
  if (threadIdx.x < 16) cp_async(x + 4 * threadIdx.x, out + 4 * threadIdx.x);
  cp_async_commit_group();
  __syncthreads();
  out[threadIdx.x] = x[threadIdx.x];
}
__global__ void wait_for_the_wrong_group(float* out) {
  float* x = dynamic_shared<float>();
  if (threadIdx.x < 16) cp_async(x + 4 * threadIdx.x, out + 4 * threadIdx.x);
  cp_async_commit_group();
  cp_async_wait_group<1>();
  __syncthreads();
  out[threadIdx.x] = x[threadIdx.x];
}
__global__ void missing_barrier_after_wait(float* out) {
  float* x = dynamic_shared<float>();
  cp_async(x + 4 * (threadIdx.x % 16), out, threadIdx.x < 16);
  cp_async_commit_group();
  cp_async_wait_group<0>();
  out[threadIdx.x] = x[threadIdx.x];
}
__global__ void copied_over_what_is_read(float* out) {
  float* x = dynamic_shared<float>();
  x[threadIdx.x] = 1;
  __syncthreads();
  const float sum = x[threadIdx.x] + x[kThreads - 1 - threadIdx.x];
  if (threadIdx.x < 16) cp_async(x + 4 * threadIdx.x, out + 4 * threadIdx.x);
  cp_async_commit_group();
  cp_async_wait_group<0>();
  __syncthreads();
  out[threadIdx.x] = sum;
}
__global__ void exit_without_wait(float* out) {
  float* x = dynamic_shared<float>();
  if (threadIdx.x < 16) cp_async(x + 4 * threadIdx.x, out + 4 * threadIdx.x);
  cp_async_wait_group<0>();  // which waits for groups that were committed
}
__global__ void pipeline(float* out) {  // right: two stages, waits that leave one group in flight
  float* x = dynamic_shared<float>();
  for (int i = 0; i < 4; i++) {
    if (i > 0) __syncthreads();
    if (threadIdx.x < 8) cp_async(x + i % 2 * 32 + 4 * threadIdx.x, out + 4 * threadIdx.x);
    cp_async_commit_group();
    if (i == 0) continue;
    cp_async_wait_group<1>();
    __syncthreads();
    if (threadIdx.x < 32) out[32 + threadIdx.x] = x[(i - 1) % 2 * 32 + threadIdx.x];
  }
  cp_async_wait_group<0>();
}

// ---- barriers and warps
__global__ void barrier_for_some(float*) {
  if (threadIdx.x < 40) __syncthreads();
}
__global__ void divergent_barriers(float* out) {
  if (threadIdx.x < 32) __syncthreads();
  else __syncthreads(), out[0] = 1;
}
__global__ void crossed_barriers(float*) {
  const int warp = threadIdx.x / 32;
  bar_sync(1 + warp, 64);
  bar_sync(2 - warp, 64);
}
__global__ void half_warp_shuffle(float* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(~0u, 1.0f, 1);
}
__global__ void two_collectives(float* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(~0u, 1.0f, 1);
  else out[threadIdx.x] = __ballot_sync(~0u, 1);
}
__global__ void shuffle_from_outside(float* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(0xFFFFu, 1.0f, 16);
}
__global__ void producer_and_consumer(float* out) {  // right: one warp arrives, the other waits
  float* x = dynamic_shared<float>();
  if (threadIdx.x < 32) {
    x[threadIdx.x] = 1;
    bar_arrive(1, 64);
  } else {
    bar_sync(1, 64);
    out[threadIdx.x] = x[threadIdx.x - 32];
  }
}
__global__ void half_warps(float* out) {  // right: two collectives of one warp, each with its lanes
  const unsigned lanes = threadIdx.x % 32 < 16 ? 0xFFFFu : 0xFFFF0000u;
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(lanes, 1.0f, 1);
  else out[threadIdx.x] = __shfl_xor_sync(lanes, 2.0f, 1);
}

// ---- addresses and indices
__global__ void misaligned_shared(float*) { reinterpret_cast<float4*>(dynamic_shared<float>() + 1)->x = 1; }
__global__ void misaligned_global(float* out) {
  *reinterpret_cast<float2*>(out + 1 + 2 * threadIdx.x % 8) = {1, 2};
}
__global__ void beyond_a_tensor(float* out) { out[kThreads + 4 + threadIdx.x] = 1; }
__global__ void before_a_tensor(float* out) { out[-4 - static_cast<int>(threadIdx.x)] = 1; }
__global__ void beyond_an_array(float* out) {
  float x[4] = {1, 2, 3, 4};
  out[threadIdx.x] = x[threadIdx.x % 8];
}
__global__ void trap(float*) {
  if (threadIdx.x == 5) __trap();
}

// The order of the CTAs: out[0] counts them from 1 on.
__global__ void ctas_come_and_go(float* out) {
  if (threadIdx.x == 0) out[static_cast<int>(atomicAdd(out, 1.0f))] = blockIdx.x;
}

// ---- limits of launches. Each `Asking` has kernels of its own, as a limit once raised stays.
enum class Asking { never, for_this_launch, as_our_launches_do };

template <Asking>
__global__ void no_variables(float*) {}

template <Asking>
__global__ void a_kilobyte(float*) {
  __shared__ volatile unsigned char bytes[1024];
  bytes[threadIdx.x] = 1;
}
template <Asking>
__device__ __attribute__((noinline)) void function_with_a_kilobyte() {
  __shared__ volatile unsigned char bytes[1024];
  bytes[threadIdx.x] = 1;
}
// ---- launches that may begin before the one before them has ended
__global__ void overlapping_without_wait(float* out) { out[threadIdx.x] = 1; }
__global__ void overlapping_copy_before_wait(float* out) {
  float* x = dynamic_shared<float>();
  if (threadIdx.x < 16) cp_async(x + 4 * threadIdx.x, out + 4 * threadIdx.x);
  cp_async_commit_group();
  cp_async_wait_group<0>();
  griddepcontrol_wait();
}
__global__ void overlapping_copy_after_wait(float* out) {  // right
  float* x = dynamic_shared<float>();
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  if (threadIdx.x < 16) cp_async(x + 4 * threadIdx.x, out + 4 * threadIdx.x);
  cp_async_commit_group();
  cp_async_wait_group<0>();
}

template <Asking asking>
__global__ void a_kilobyte_of_a_function(float*) {
  function_with_a_kilobyte<asking>();
}

template <Asking asking>
cudaError_t launch_asking(const std::string& kernel_name, dim3 grid, int threads, int shared_bytes) {
  auto kernel = no_variables<asking>;
  if (kernel_name == "a_kilobyte") kernel = a_kilobyte<asking>;
  if (kernel_name == "a_kilobyte_of_a_function") kernel = a_kilobyte_of_a_function<asking>;
  float* const out = nullptr;
  if (asking == Asking::as_our_launches_do)
    return launch_kernel(kernel, grid, threads, shared_bytes, nullptr, out);
  if (asking == Asking::for_this_launch) {
    const auto status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                             cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (status != cudaSuccess) return status;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = shared_bytes;
  return cudaLaunchKernelEx(&config, kernel, out);
}

}  // namespace
}  // namespace dllm::cuda

// Launches the kernel of this name on a CTA (or a few) of 64 threads with 256 bytes of dynamic shared memory;
// `out` [64]. Returns
// what was diagnosed, else an empty text.
extern "C" __attribute__((visibility("default"))) const char* diagnose(const char* name, float* out) {
  using namespace dllm::cuda;
  static const std::pair<std::string, void (*)(float*)> kKernels[] = {
#define KERNEL(name) {#name, name}
      KERNEL(unwritten_read),
      KERNEL(unwritten_static_read),
      KERNEL(out_of_range),
      KERNEL(missing_barrier),
      KERNEL(overwritten_too_early),
      KERNEL(missing_warp_barrier),
      KERNEL(barrier_of_the_wrong_warps),
      KERNEL(atomics_and_a_plain_read),
      KERNEL(narrow_neighbours),
      KERNEL(padding),
      KERNEL(missing_wait),
      KERNEL(wait_for_the_wrong_group),
      KERNEL(missing_barrier_after_wait),
      KERNEL(copied_over_what_is_read),
      KERNEL(exit_without_wait),
      KERNEL(pipeline),
      KERNEL(barrier_for_some),
      KERNEL(divergent_barriers),
      KERNEL(crossed_barriers),
      KERNEL(half_warp_shuffle),
      KERNEL(two_collectives),
      KERNEL(shuffle_from_outside),
      KERNEL(producer_and_consumer),
      KERNEL(half_warps),
      KERNEL(misaligned_shared),
      KERNEL(misaligned_global),
      KERNEL(beyond_a_tensor),
      KERNEL(before_a_tensor),
      KERNEL(beyond_an_array),
      KERNEL(trap),
      KERNEL(ctas_come_and_go),
      KERNEL(overlapping_without_wait),
      KERNEL(overlapping_copy_before_wait),
      KERNEL(overlapping_copy_after_wait),
#undef KERNEL
  };
  static std::string diagnosis;
  diagnosis = std::string("no kernel is called ") + name;
  for (const auto& [known, kernel] : kKernels) {
    if (known != name) continue;
    try {
      const auto launch =
          known.starts_with("overlapping") ? launch_overlapping<float*> : launch_kernel<float*>;
      const int ctas = known.starts_with("ctas") ? 8 : 1;
      diagnosis = cudaGetErrorString(launch(kernel, ctas, kThreads, 4 * kThreads, nullptr, out));
      if (diagnosis == "cudaSuccess") diagnosis.clear();
    } catch (const std::exception& error) {
      diagnosis = error.what();
    }
  }
  return diagnosis.c_str();
}

// The status of a launch of this shape; asking: see Asking.
extern "C" __attribute__((visibility("default"))) const char* launch_status(const char* kernel, int threads,
                                                                            int blocks_y, int shared_bytes,
                                                                            int asking) {
  using namespace dllm::cuda;
  constexpr decltype(&launch_asking<Asking::never>) kLaunches[] = {launch_asking<Asking::never>,
                                                                   launch_asking<Asking::for_this_launch>,
                                                                   launch_asking<Asking::as_our_launches_do>};
  return cudaGetErrorString(kLaunches[asking](kernel, dim3(1, blocks_y), threads, shared_bytes));
}
