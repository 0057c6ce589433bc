// As diagnostics.cu, with the asynchronous copies and products of Hopper. One warpgroup; the tensor holds a
// panel of ones, [64][64].
#include <exception>
#include <string>

#include "cuda/launch_kernel.h"
#include "cuda/sm90/ptx.cuh"

namespace dllm::cuda {
namespace {

constexpr int kPanel = panel_bytes(64);

__device__ inline void start_barrier(Mbarrier& barrier) {
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
  }
  __syncthreads();
}
__device__ inline void fetch(unsigned char* panel, const TensorMap& map, Mbarrier& barrier) {
  if (threadIdx.x > 0) return;
  mbarrier_arrive_expect_tx(barrier, kPanel);
  cp_async_bulk_tensor(panel, map, barrier, 0, 0);
}
__device__ inline float first_of_row(const unsigned char* panel) {
  return __bfloat162float(*reinterpret_cast<const __nv_bfloat16*>(panel + threadIdx.x % 64 * kPanelRowBytes));
}
// The product of the panel and itself, one step deep.
__device__ inline void square(float (&d)[8][4], const unsigned char* panel, int step = 0, bool add = false) {
  const uint64_t operand = k_major_step(k_major_descriptor(shared_address(panel)), step, kPanel);
  wgmma_mma_async<__nv_bfloat16, Major::k, Major::k>(d, operand, operand, add);
}

// ---- copies and their barriers
__global__ void missing_wait(const __grid_constant__ TensorMap map, float* out) {
  __shared__ Mbarrier landed;
  start_barrier(landed);
  fetch(panel_shared(), map, landed);
  __syncthreads();
  out[threadIdx.x] = first_of_row(panel_shared());
}
__global__ void too_few_bytes_expected(const __grid_constant__ TensorMap map, float* out) {
  __shared__ Mbarrier landed;
  start_barrier(landed);
  if (threadIdx.x == 0) {
    mbarrier_arrive(landed);
    cp_async_bulk_tensor(panel_shared(), map, landed, 0, 0);
  }
  mbarrier_wait_parity(landed, 0);
  out[threadIdx.x] = first_of_row(panel_shared());
}
__global__ void too_many_bytes_expected(const __grid_constant__ TensorMap map, float*) {
  __shared__ Mbarrier landed;
  start_barrier(landed);
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(landed, kPanel + 8);
    cp_async_bulk_tensor(panel_shared(), map, landed, 0, 0);
  }
  mbarrier_wait_parity(landed, 0);
}
__global__ void wait_for_the_wrong_phase(const __grid_constant__ TensorMap map, float*) {
  __shared__ Mbarrier landed;
  start_barrier(landed);
  fetch(panel_shared(), map, landed);
  mbarrier_wait_parity(landed, 0);
  mbarrier_wait_parity(landed, 1);
}
__global__ void missing_publication(const __grid_constant__ TensorMap map, float*) {
  __shared__ Mbarrier landed;
  if (threadIdx.x == 0) mbarrier_init(landed, 1);
  __syncthreads();
  fetch(panel_shared(), map, landed);
  mbarrier_wait_parity(landed, 0);
}
__global__ void missing_initialisation(const __grid_constant__ TensorMap map, float*) {
  __shared__ Mbarrier landed;
  fetch(panel_shared(), map, landed);
  mbarrier_wait_parity(landed, 0);
}
__global__ void barrier_used_before_all_may(const __grid_constant__ TensorMap map, float*) {
  __shared__ Mbarrier landed;
  if (threadIdx.x == 0) {
    mbarrier_init(landed, 1);
    fence_mbarrier_init();
  }
  fetch(panel_shared(), map, landed);
  mbarrier_wait_parity(landed, 0);
}
__global__ void misaligned_box(const __grid_constant__ TensorMap map, float*) {
  __shared__ Mbarrier landed;
  start_barrier(landed);
  fetch(dynamic_shared<unsigned char>(), map, landed);
  mbarrier_wait_parity(landed, 0);
}

// ---- products
__global__ void missing_fence(const __grid_constant__ TensorMap, float*) {
  unsigned char* panel = panel_shared();
  for (int i = threadIdx.x; i < kPanel / 4; i += 128) reinterpret_cast<uint32_t*>(panel)[i] = 0;
  __syncthreads();
  float d[8][4];
  wgmma_fence();
  square(d, panel);
  wgmma_commit_group();
  wgmma_wait_group<0>(d);
}
template <class Use>
__device__ void with_landed_panel(const TensorMap& map, const Use& use) {
  __shared__ Mbarrier landed;
  start_barrier(landed);
  fetch(panel_shared(), map, landed);
  mbarrier_wait_parity(landed, 0);
  use(panel_shared(), landed);
}
__global__ void missing_beginning(const __grid_constant__ TensorMap map, float*) {
  with_landed_panel(map, [](unsigned char* panel, Mbarrier&) {
    float d[8][4];
    square(d, panel);
    wgmma_commit_group();
    wgmma_wait_group<0>(d);
  });
}
__global__ void missing_wait_for_products(const __grid_constant__ TensorMap map, float*) {
  with_landed_panel(map, [](unsigned char* panel, Mbarrier&) {
    float d[8][4];
    wgmma_fence();
    square(d, panel);
    wgmma_commit_group();
  });
}
__global__ void product_of_some_warps(const __grid_constant__ TensorMap map, float*) {
  with_landed_panel(map, [](unsigned char* panel, Mbarrier&) {
    float d[8][4];
    wgmma_fence();
    square(d, panel);
    if (threadIdx.x < 96) square(d, panel, 1, true);
    wgmma_commit_group();
    wgmma_wait_group<0>(d);
  });
}
__global__ void buffer_released_too_early(const __grid_constant__ TensorMap map, float*) {
  __shared__ Mbarrier empty;
  if (threadIdx.x == 0) mbarrier_init(empty, 128);
  with_landed_panel(map, [&](unsigned char* panel, Mbarrier& landed) {
    float d[8][4];
    wgmma_fence();
    square(d, panel);
    wgmma_commit_group();
    mbarrier_arrive(empty);  // belongs behind the wait
    if (threadIdx.x == 0) mbarrier_wait_parity(empty, 0);
    fetch(panel, map, landed);
    wgmma_wait_group<0>(d);
    mbarrier_wait_parity(landed, 1);
  });
}
__global__ void sums_before_and_after_the_wait(const __grid_constant__ TensorMap map, float* out) {  // right
  with_landed_panel(map, [&](unsigned char* panel, Mbarrier&) {
    float d[8][4] = {};
    wgmma_fence(d);
    for (int step = 0; step < 4; step++) square(d, panel, step, true);
    wgmma_commit_group();
    out[threadIdx.x] = d[5][2];
    wgmma_wait_group<0>(d);
    out[128 + threadIdx.x] = d[5][2];
  });
}
// A in registers times the panel. write_a(0, A), (1, A) and (2, A) stand before the product, the wait and the
// end.
template <class WriteA>
__device__ void product_of_registers(unsigned char* panel, WriteA write_a) {
  float d[8][4] = {};
  uint32_t a[1][4] = {};
  wgmma_fence(d, a);
  write_a(0, a[0]);
  wgmma_mma_async<__nv_bfloat16, Major::mn>(d, a[0], mn_major_descriptor(shared_address(panel), kPanel),
                                            true);
  wgmma_commit_group();
  write_a(1, a[0]);
  wgmma_wait_group<0>(d);
  write_a(2, a[0]);
}
template <int kWhen>
__device__ void write_registers(const TensorMap& map) {
  with_landed_panel(map, [](unsigned char* panel, Mbarrier&) {
    product_of_registers(panel, [](int when, uint32_t (&a)[4]) {
      if (when == kWhen) a[0] = 1;
    });
  });
}
__global__ void registers_written_before_the_product(const __grid_constant__ TensorMap map, float*) {
  write_registers<0>(map);
}
__global__ void registers_written_before_the_wait(const __grid_constant__ TensorMap map, float*) {
  write_registers<1>(map);
}
__global__ void registers_written_after_the_wait(const __grid_constant__ TensorMap map, float*) {  // right
  write_registers<2>(map);
}

template <int kConsumer>
__device__ void divide_registers() {
  if (threadIdx.x < 128) setmaxnreg_dec<72>();
  else setmaxnreg_inc<kConsumer>();
}
__global__ void registers_that_are_there(const __grid_constant__ TensorMap, float*) {  // right
  divide_registers<216>();
}
__global__ void registers_that_nobody_gave(const __grid_constant__ TensorMap, float*) {
  divide_registers<224>();
}
__global__ void registers_given_by_taking(const __grid_constant__ TensorMap, float*) {
  setmaxnreg_inc<160>();
}

}  // namespace
}  // namespace dllm::cuda

// As `diagnose`; `out` [64][64].
extern "C" __attribute__((visibility("default"))) const char* diagnose_sm90(const char* name, float* out) {
  using namespace dllm::cuda;
  struct Known {
    std::string name;
    void (*kernel)(TensorMap, float*);
    int threads = 128;
  };
  static const Known kKernels[] = {
#define KERNEL(name) {#name, name}
      KERNEL(missing_wait),
      KERNEL(too_few_bytes_expected),
      KERNEL(too_many_bytes_expected),
      KERNEL(wait_for_the_wrong_phase),
      KERNEL(missing_publication),
      KERNEL(missing_initialisation),
      KERNEL(barrier_used_before_all_may),
      KERNEL(misaligned_box),
      KERNEL(missing_fence),
      KERNEL(missing_beginning),
      KERNEL(missing_wait_for_products),
      KERNEL(product_of_some_warps),
      KERNEL(buffer_released_too_early),
      KERNEL(sums_before_and_after_the_wait),
      KERNEL(registers_written_before_the_product),
      KERNEL(registers_written_before_the_wait),
      KERNEL(registers_written_after_the_wait),
#undef KERNEL
#define KERNEL_OF_THREE_WARPGROUPS(name) {#name, name, 384}
      KERNEL_OF_THREE_WARPGROUPS(registers_that_are_there),
      KERNEL_OF_THREE_WARPGROUPS(registers_that_nobody_gave),
      KERNEL_OF_THREE_WARPGROUPS(registers_given_by_taking),
#undef KERNEL_OF_THREE_WARPGROUPS
  };
  static std::string diagnosis;
  diagnosis = std::string("no kernel is called ") + name;
  alignas(16) static __nv_bfloat16 ones[64 * 64];
  for (__nv_bfloat16& x : ones) x = __nv_bfloat16(1.0f);
  for (const Known& known : kKernels) {
    if (known.name != name) continue;
    TensorMap map;
    encode_tensor_map(map, dllm::DType::bfloat16, ones, TensorShape<2>{{64, 64}, {128}, {64, 64}});
    try {
      diagnosis =
          cudaGetErrorString(launch_kernel(known.kernel, 1, known.threads, 2 * kPanel, nullptr, map, out));
      if (diagnosis == "cudaSuccess") diagnosis.clear();
    } catch (const std::exception& error) {
      diagnosis = error.what();
    }
  }
  return diagnosis.c_str();
}
