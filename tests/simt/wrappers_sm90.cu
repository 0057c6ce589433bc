// Kernels for the wrappers of cuda/sm90/ptx.cuh, as wrappers.cu: for the emulator and, by nvcc, for sm_90a.
#include <exception>
#include <string>

#include "cuda/launch_kernel.h"
#include "cuda/sm90/ptx.cuh"

namespace dllm::cuda {
namespace {

constexpr int kSide = 64;  // rows of A, and what its products sum over

// One warpgroup. a: [64][64]; b: [8·kTiles][64] for Major::k, else [64][8·kTiles], in boxes of 64 columns;
// out: [64][8·kTiles], the product of what their majors make of them.
template <class T, Major a_major, Major b_major, int kTiles, bool a_in_registers>
__global__ void product(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map,
                        const uint16_t* a_values, float* out) {
  constexpr int kColumns = 8 * kTiles, kPanel = panel_bytes(kSide);
  constexpr int kBytes = b_major == Major::k ? panel_bytes(kColumns) : (kColumns + 63) / 64 * kPanel;
  unsigned char *a_panel = panel_shared(), *b_panels = a_panel + kPanel;
  __shared__ TransactionBarrier landed;
  if (threadIdx.x == 0) {
    init_barrier(landed, 1);
    publish_barriers();
    arrive_expecting(landed, kPanel + kBytes);
    load_box(a_panel, a_map, landed, 0, 0);
    if (b_major == Major::k) load_box(b_panels, b_map, landed, 0, 0);
    else
      for (int x = 0; x < kColumns; x += 64) load_box(b_panels + x / 64 * kPanel, b_map, landed, x, 0);
  }
  __syncthreads();
  wait(landed, 0);

  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, pair = threadIdx.x % 4 * 2;
  const uint64_t a = a_major == Major::k ? k_major_descriptor(shared_address(a_panel))
                                         : mn_major_descriptor(shared_address(a_panel), kPanel);
  const uint64_t b = b_major == Major::k ? k_major_descriptor(shared_address(b_panels))
                                         : mn_major_descriptor(shared_address(b_panels), kPanel);
  float d[kTiles][4];
  uint32_t fragments[kSide / kMatrixDepth][4];
#pragma unroll
  for (int step = 0; step < kSide / kMatrixDepth; step++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint16_t* from = a_values + (row + i % 2 * 8) * kSide + step * 16 + pair + i / 2 * 8;
      fragments[step][i] = static_cast<uint32_t>(from[1]) << 16 | from[0];
    }
  begin_products(d, fragments);
#pragma unroll
  for (int step = 0; step < kSide / kMatrixDepth; step++) {
    const uint64_t b_step =
        b_major == Major::k ? k_major_step(b, step, panel_bytes(kColumns)) : mn_major_step(b, step);
    if constexpr (a_in_registers) multiply<T, b_major>(d, fragments[step], b_step, step > 0);
    else
      multiply<T, a_major, b_major>(
          d, a_major == Major::k ? k_major_step(a, step, kPanel) : mn_major_step(a, step), b_step, step > 0);
  }
  commit_products();
  wait_products<0>(d);
#pragma unroll
  for (int n = 0; n < kTiles; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) out[(row + i / 2 * 8) * kColumns + 8 * n + pair + i % 2] = d[n][i];
}

template <class T, Major a_major, Major b_major, int kTiles, bool a_in_registers>
cudaError_t launch_product(const void* in, void* out) {
  constexpr int kColumns = 8 * kTiles;
  const auto* a = static_cast<const uint16_t*>(in);
  const DType type = std::is_same_v<T, __half> ? DType::float16 : DType::bfloat16;
  const uint32_t box_rows = b_major == Major::k ? kColumns : kSide;
  const uint64_t b_columns = b_major == Major::k ? kSide : kColumns;
  TensorMap a_map, b_map;
  cudaError_t status =
      encode_tensor_map(a_map, type, a, TensorShape<2>{{kSide, kSide}, {2 * kSide}, {64, kSide}});
  if (status == cudaSuccess)
    status = encode_tensor_map(b_map, type, a + kSide * kSide,
                               TensorShape<2>{{b_columns, box_rows}, {2 * b_columns}, {64, box_rows}});
  if (status != cudaSuccess) return status;
  return launch_kernel(product<T, a_major, b_major, kTiles, a_in_registers>, 1, 128, 40 * 1024, nullptr,
                       a_map, b_map, a, static_cast<float*>(out));
}

// in: a tensor [2][3][10][72]; out: the panels of three boxes of 64 × 8 × 1 × 1 that leave it, as they lie.
__global__ void boxes(const __grid_constant__ TensorMap map, uint4* out) {
  constexpr int kBytes = panel_bytes(8);
  unsigned char* panels = panel_shared();
  __shared__ TransactionBarrier landed;
  if (threadIdx.x == 0) {
    init_barrier(landed, 1);
    publish_barriers();
    arrive_expecting(landed, 3 * kBytes);
    load_box(panels, map, landed, 0, 1, 2, 1);
    load_box(panels + kBytes, map, landed, 16, 5, 0, 0);
    load_box(panels + 2 * kBytes, map, landed, -8, -3, 1, 1);
  }
  __syncthreads();
  wait(landed, 0);
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
  __shared__ TransactionBarrier full[2], empty[2];
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < 2; stage++) {
      init_barrier(full[stage], 1);
      init_barrier(empty[stage], 32);
    }
    publish_barriers();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 0; i < 8; i++) {
      wait(empty[i % 2], (i / 2 & 1) ^ 1);
      arrive_expecting(full[i % 2], kBytes);
      load_box(panels + i % 2 * kBytes, map, full[i % 2], 0, 8 * i);
    }
  } else if (threadIdx.x >= 32) {
    const int column = threadIdx.x % 32 * 2;
    float sums[2] = {};
    for (int i = 0; i < 8; i++) {
      wait(full[i % 2], i / 2 & 1);
      for (int row = 0; row < 8; row++)
        for (int j = 0; j < 2; j++)
          sums[j] += __bfloat162float(*reinterpret_cast<__nv_bfloat16*>(
              panels + i % 2 * kBytes + swizzled_offset(row, 2 * (column + j))));
      arrive(empty[i % 2]);
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
      {"product_k_k_128", launch_product<b16, k, k, 16, false>},
      {"product_k_k_8", launch_product<b16, k, k, 1, false>},
      {"product_mn_k_64", launch_product<b16, mn, k, 8, false>},
      {"product_k_mn_128", launch_product<b16, k, mn, 16, false>},
      {"product_mn_mn_64", launch_product<__half, mn, mn, 8, false>},
      {"product_registers_mn_128", launch_product<b16, k, mn, 16, true>},
      {"product_registers_k_64", launch_product<__half, k, k, 8, true>},
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
