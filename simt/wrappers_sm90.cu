// Kernels for the wrappers of cuda/sm90/ptx.cuh, as wrappers.cu: for the emulator and, by nvcc, for sm_90a.
#include <exception>
#include <string>

#include "cuda/launch_kernel.h"
#include "cuda/sm90/ptx.cuh"

namespace dllm::cuda {
namespace {

constexpr int kRows = 64;  // of A

// How A [64][kDepth] and B [kDepth][kColumns] lie in memory and in panels: an operand whose rows run along
// the sum has as many panels as the sum has 64s, the others one for 64 of their columns.
template <Major major, int kIndex, int kDepth>
struct OperandPanels {
  static constexpr bool k_major = major == Major::k;
  static constexpr int kMemoryRows = k_major ? kIndex : kDepth, kMemoryColumns = k_major ? kDepth : kIndex;
  static constexpr int kPanel = panel_bytes(kMemoryRows);
  static constexpr int kBytes = (kMemoryColumns + kPanelColumns - 1) / kPanelColumns * kPanel;

  __device__ static void load(unsigned char* panels, const TensorMap& map, Mbarrier& landed) {
    for (int x = 0; x < kMemoryColumns; x += kPanelColumns)
      cp_async_bulk_tensor(panels + x / kPanelColumns * kPanel, map, landed, x, 0);
  }
  __device__ static uint64_t descriptor(const unsigned char* panels, int step) {
    const uint32_t address = shared_address(panels);
    return k_major ? k_major_step(k_major_descriptor(address), step, kPanel)
                   : mn_major_step(mn_major_descriptor(address, kPanel), step);
  }
  static cudaError_t encode(TensorMap& map, DType type, const uint16_t* values) {
    constexpr uint64_t kColumns = kMemoryColumns, kRowsOfMemory = kMemoryRows;
    return encode_tensor_map(
        map, type, values,
        TensorShape<2>{{kColumns, kRowsOfMemory}, {2 * kColumns}, {kPanelColumns, kMemoryRows}});
  }
};

template <class T>
constexpr DType kType = std::is_same_v<T, __half> ? DType::float16 : DType::bfloat16;

// out: [64][8·kTiles] from a warpgroup's fragments.
template <int kTiles>
__device__ void store_product(const float (&d)[kTiles][4], float* out) {
  const int thread = threadIdx.x % 128, row = thread / 32 * 16 + thread % 32 / 4, pair = thread % 4 * 2;
#pragma unroll
  for (int n = 0; n < kTiles; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) out[(row + i / 2 * 8) * 8 * kTiles + 8 * n + pair + i % 2] = d[n][i];
}

// One warpgroup. a: [64][kDepth] for Major::k, else transposed; b: [8·kTiles][kDepth] for Major::k, else
// transposed; out: [64][8·kTiles], the product of what their majors make of them.
template <class T, Major a_major, Major b_major, int kTiles, bool a_in_registers, int kDepth>
__global__ void product(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map,
                        const uint16_t* a_values, float* out) {
  using A = OperandPanels<a_major, kRows, kDepth>;
  using B = OperandPanels<b_major, 8 * kTiles, kDepth>;
  unsigned char *a_panels = panel_shared(), *b_panels = a_panels + A::kBytes;
  __shared__ Mbarrier landed;
  if (threadIdx.x == 0) {
    mbarrier_init(landed, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(landed, A::kBytes + B::kBytes);
    A::load(a_panels, a_map, landed);
    B::load(b_panels, b_map, landed);
  }
  __syncthreads();
  mbarrier_wait_parity(landed, 0);

  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, pair = threadIdx.x % 4 * 2;
  constexpr int kSteps = kDepth / kWgmmaDepth;
  float d[kTiles][4];
  uint32_t fragments[kSteps][4];
#pragma unroll
  for (int step = 0; step < kSteps; step++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint16_t* from = a_values + (row + i % 2 * 8) * kDepth + step * 16 + pair + i / 2 * 8;
      fragments[step][i] = static_cast<uint32_t>(from[1]) << 16 | from[0];
    }
  wgmma_fence(d, fragments);
#pragma unroll
  for (int step = 0; step < kSteps; step++) {
    const uint64_t b = B::descriptor(b_panels, step);
    if constexpr (a_in_registers) wgmma_mma_async<T, b_major>(d, fragments[step], b, step > 0);
    else wgmma_mma_async<T, a_major, b_major>(d, A::descriptor(a_panels, step), b, step > 0);
  }
  wgmma_commit_group();
  wgmma_wait_group<0>(d);
  store_product(d, out);
}

template <class T, Major a_major, Major b_major, int kTiles, bool a_in_registers = false, int kDepth = 64>
cudaError_t launch_product(const void* in, void* out) {
  using A = OperandPanels<a_major, kRows, kDepth>;
  using B = OperandPanels<b_major, 8 * kTiles, kDepth>;
  const auto* a = static_cast<const uint16_t*>(in);
  TensorMap a_map, b_map;
  cudaError_t status = A::encode(a_map, kType<T>, a);
  if (status == cudaSuccess) status = B::encode(b_map, kType<T>, a + kRows * kDepth);
  if (status != cudaSuccess) return status;
  return launch_kernel(product<T, a_major, b_major, kTiles, a_in_registers, kDepth>, 1, 128,
                       kPanelAlignment + A::kBytes + B::kBytes, nullptr, a_map, b_map, a,
                       static_cast<float*>(out));
}

// Two groups of products under way, each read once it is done: of one tile A [64][64] with the two halves of
// B [128][64]. out: [2][64][64]. Sums of the first are stored while the second may still run.
__global__ void pending_group(const __grid_constant__ TensorMap a_map,
                              const __grid_constant__ TensorMap b_map, float* out) {
  using A = OperandPanels<Major::k, kRows, 64>;
  using B = OperandPanels<Major::k, 128, 64>;
  unsigned char *a_panel = panel_shared(), *b_panel = a_panel + A::kBytes;
  __shared__ Mbarrier landed;
  if (threadIdx.x == 0) {
    mbarrier_init(landed, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(landed, A::kBytes + B::kBytes);
    A::load(a_panel, a_map, landed);
    B::load(b_panel, b_map, landed);
  }
  __syncthreads();
  mbarrier_wait_parity(landed, 0);
  float first[8][4], second[8][4];
  const auto begin = [&](float (&d)[8][4], const unsigned char* b) {
    wgmma_fence(d);
#pragma unroll
    for (int step = 0; step < 4; step++)
      wgmma_mma_async<__nv_bfloat16, Major::k, Major::k>(d, A::descriptor(a_panel, step),
                                                         B::descriptor(b, step), step > 0);
    wgmma_commit_group();
  };
  begin(first, b_panel);
  begin(second, b_panel + panel_bytes(64));
  wgmma_wait_group<1>(first);
  store_product(first, out);
  wgmma_wait_group<0>(second);
  store_product(second, out + kRows * 64);
}
cudaError_t launch_pending_group(const void* in, void* out) {
  const auto* a = static_cast<const uint16_t*>(in);
  TensorMap a_map, b_map;
  cudaError_t status = OperandPanels<Major::k, kRows, 64>::encode(a_map, DType::bfloat16, a);
  if (status == cudaSuccess)
    status = OperandPanels<Major::k, 128, 64>::encode(b_map, DType::bfloat16, a + kRows * 64);
  if (status != cudaSuccess) return status;
  return launch_kernel(pending_group, 1, 128, kPanelAlignment + panel_bytes(kRows + 128), nullptr, a_map,
                       b_map, static_cast<float*>(out));
}

// Three warpgroups divide their registers as attention does: the first gives some away and fetches, each
// thread of the others takes some and holds 160 sums. in: [128·64] float32; out: [256], the weighted total of
// each thread's sums.
template <int kProducer, int kConsumer>
__global__ void __launch_bounds__(384, 1) divided_registers(const float* in, float* out) {
  float* values = dynamic_shared<float>();
  constexpr int kHeld = 160, kValues = 128 * 64;
  __shared__ Mbarrier full;
  if (threadIdx.x == 0) {
    mbarrier_init(full, 128);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    setmaxnreg_dec<kProducer>();
    for (int i = threadIdx.x; i < kValues; i += 128) values[i] = in[i];
    mbarrier_arrive(full);
  } else {
    setmaxnreg_inc<kConsumer>();
    const int thread = threadIdx.x - 128;
    float sums[kHeld] = {};
    mbarrier_wait_parity(full, 0);
    for (int round = 0; round < 4; round++)
#pragma unroll
      for (int i = 0; i < kHeld; i++) sums[i] += values[(thread + 256 * round + 7 * i) % kValues];
    float total = 0;
#pragma unroll
    for (int i = 0; i < kHeld; i++) total += sums[i] * static_cast<float>(1 + i % 3);
    out[thread] = total;
  }
}
template <int kProducer, int kConsumer>
cudaError_t launch_divided_registers(const void* in, void* out) {
  return launch_kernel(divided_registers<kProducer, kConsumer>, 1, 384, sizeof(float) * 128 * 64, nullptr,
                       static_cast<const float*>(in), static_cast<float*>(out));
}

// in: a tensor [2][3][10][72]; out: the panels of three boxes of 64 × 8 × 1 × 1 that leave it, as they lie.
__global__ void boxes(const __grid_constant__ TensorMap map, uint4* out) {
  constexpr int kBytes = panel_bytes(8);
  unsigned char* panels = panel_shared();
  __shared__ Mbarrier landed;
  if (threadIdx.x == 0) {
    mbarrier_init(landed, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(landed, 3 * kBytes);
    cp_async_bulk_tensor(panels, map, landed, 0, 1, 2, 1);
    cp_async_bulk_tensor(panels + kBytes, map, landed, 16, 5, 0, 0);
    cp_async_bulk_tensor(panels + 2 * kBytes, map, landed, -8, -3, 1, 1);
  }
  __syncthreads();
  mbarrier_wait_parity(landed, 0);
  for (int i = threadIdx.x; i < 3 * kBytes / 16; i += 32) out[i] = reinterpret_cast<uint4*>(panels)[i];
}
cudaError_t launch_boxes(const void* in, void* out) {
  TensorMap map;
  const cudaError_t status = encode_tensor_map(
      map, DType::bfloat16, in, TensorShape<4>{{72, 10, 3, 2}, {2 * 72, 2 * 720, 2 * 2160}, {64, 8, 1, 1}});
  if (status != cudaSuccess) return status;
  return launch_kernel(boxes, 1, 32, 8192, nullptr, map, static_cast<uint4*>(out));
}

// A ring of two buffers: one warp fetches 8 boxes [8][64] of a tensor [64][64], another adds what it finds.
// out: [64] sums of columns.
__global__ void ring(const __grid_constant__ TensorMap map, float* out) {
  constexpr int kBytes = panel_bytes(8);
  unsigned char* panels = panel_shared();
  __shared__ Mbarrier full[2], empty[2];
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < 2; stage++) {
      mbarrier_init(full[stage], 1);
      mbarrier_init(empty[stage], 32);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 0; i < 8; i++) {
      mbarrier_wait_parity(empty[i % 2], (i / 2 & 1) ^ 1);
      mbarrier_arrive_expect_tx(full[i % 2], kBytes);
      cp_async_bulk_tensor(panels + i % 2 * kBytes, map, full[i % 2], 0, 8 * i);
    }
  } else if (threadIdx.x >= 32) {
    const int column = threadIdx.x % 32 * 2;
    float sums[2] = {};
    for (int i = 0; i < 8; i++) {
      mbarrier_wait_parity(full[i % 2], i / 2 & 1);
      for (int row = 0; row < 8; row++)
        for (int j = 0; j < 2; j++)
          sums[j] += __bfloat162float(*reinterpret_cast<__nv_bfloat16*>(
              panels + i % 2 * kBytes + swizzled_offset(row, 2 * (column + j))));
      mbarrier_arrive(empty[i % 2]);
    }
    out[column] = sums[0], out[column + 1] = sums[1];
  }
}
cudaError_t launch_ring(const void* in, void* out) {
  TensorMap map;
  const cudaError_t status =
      encode_tensor_map(map, DType::bfloat16, in, TensorShape<2>{{64, 64}, {128}, {64, 8}});
  if (status != cudaSuccess) return status;
  return launch_kernel(ring, 1, 64, 8192, nullptr, map, static_cast<float*>(out));
}

}  // namespace
}  // namespace dllm::cuda

// Runs the kernel of this name. Returns what went wrong, else an empty text.
extern "C" __attribute__((visibility("default"))) const char* run_wrapper_sm90(const char* name,
                                                                               const void* in, void* out) {
  using namespace dllm::cuda;
  constexpr auto k = Major::k, mn = Major::mn;
  using b16 = __nv_bfloat16;
  struct Known {
    std::string name;
    cudaError_t (*launch)(const void*, void*);
  };
  static const Known kKernels[] = {
      {"product_k_k_128", launch_product<b16, k, k, 16>},
      {"product_k_k_32", launch_product<b16, k, k, 4>},
      {"product_k_k_32_float16", launch_product<__half, k, k, 4>},
      {"product_k_k_16", launch_product<b16, k, k, 2>},
      {"product_k_k_16_float16", launch_product<__half, k, k, 2>},
      {"product_k_k_8", launch_product<b16, k, k, 1>},
      {"product_mn_k_64", launch_product<b16, mn, k, 8>},
      {"product_k_mn_128", launch_product<b16, k, mn, 16>},
      {"product_mn_mn_64", launch_product<__half, mn, mn, 8>},
      {"product_registers_mn_128", launch_product<b16, k, mn, 16, true>},
      {"product_registers_k_8", launch_product<b16, k, k, 1, true>},
      {"product_registers_k_16", launch_product<__half, k, k, 2, true>},
      {"product_registers_k_32", launch_product<b16, k, k, 4, true>},
      {"product_registers_k_64", launch_product<__half, k, k, 8, true>},
      {"product_two_panels_k_k_128", launch_product<b16, k, k, 16, false, 128>},
      {"product_two_panels_k_mn_64", launch_product<__half, k, mn, 8, false, 128>},
      {"product_two_panels_mn_k_32", launch_product<b16, mn, k, 4, false, 128>},
      {"product_two_panels_registers_mn_128", launch_product<b16, k, mn, 16, true, 128>},
      {"pending_group", launch_pending_group},
      {"divided_registers_56_224", launch_divided_registers<56, 224>},
      {"divided_registers_72_216", launch_divided_registers<72, 216>},
      {"boxes", launch_boxes},
      {"ring", launch_ring},
  };
  static std::string problem;
  problem = std::string("there is no kernel ") + name;
  for (const Known& known : kKernels) {
    if (known.name != name) continue;
    try {
      cudaError_t status = known.launch(in, out);
      if (status == cudaSuccess) status = cudaDeviceSynchronize();
      problem = status == cudaSuccess ? "" : cudaGetErrorString(status);
    } catch (const std::exception& error) {
      problem = error.what();
    }
  }
  return problem.c_str();
}
