// One kernel for each wrapper and intrinsic that kernels build on: arguments in, results out. This file is
// compiled for the emulator and by nvcc for a GPU, and both have to give the same.
#include <exception>
#include <string>

#include "cuda/launch_kernel.h"
#include "cuda/ptx.cuh"

namespace dllm::cuda {
namespace {

constexpr unsigned kAll = ~0u;

// ---- matrices: one warp
// in: A [16][16], B [16][8] row by row; out: 1 + A·B, [16][8].
template <class T>
__global__ void matrix_product(const uint16_t* in, float* out) {
  const int group = threadIdx.x / 4, pair = threadIdx.x % 4 * 2;
  const auto two = [](uint16_t low, uint16_t high) { return static_cast<uint32_t>(high) << 16 | low; };
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; i++) {
    const uint16_t* from = in + (group + i % 2 * 8) * 16 + pair + i / 2 * 8;
    a[i] = two(from[0], from[1]);
  }
  for (int i = 0; i < 2; i++) {
    const uint16_t* from = in + 256 + (pair + 8 * i) * 8 + group;
    b[i] = two(from[0], from[8]);
  }
  float d[4] = {1, 1, 1, 1};
  mma_m16n8k16<T>(d, a, b);
  for (int i = 0; i < 4; i++) out[(group + i / 2 * 8) * 8 + pair + i % 2] = d[i];
}

// in: 32 rows of 8; out: the four registers of each lane.
template <bool transposed>
__global__ void matrix_load(const uint4* in, uint4* out) {
  uint4* rows = dynamic_shared<uint4>();
  rows[31 - threadIdx.x] = in[threadIdx.x];
  __syncwarp();
  uint32_t r[4];
  if (transposed) ldmatrix_x4_trans(r, rows + 31 - threadIdx.x);
  else ldmatrix_x4(r, rows + 31 - threadIdx.x);
  out[threadIdx.x] = {r[0], r[1], r[2], r[3]};
}

// ---- copies: 32 threads, two groups of 16 bytes each, every third one zeros
__global__ void asynchronous_copy(const uint4* in, uint4* out) {
  uint4* x = dynamic_shared<uint4>();
  const int i = threadIdx.x;
  cp_async(x + i, in + i, i % 3 != 0);
  cp_async_commit_group();
  cp_async(x + 32 + i, in + 32 + i, i % 3 != 1);
  cp_async_commit_group();
  cp_async_wait_group<1>();
  __syncthreads();
  out[i] = x[31 - i];
  cp_async_wait_group<0>();
  __syncthreads();
  out[32 + i] = x[32 + (i + 1) % 32];
}

// ---- warps. in: [32]; out: [result][32]
__global__ void shuffles(const int* in, int* out) {
  const int lane = threadIdx.x, x = in[lane];
  int row = 0;
  const auto put = [&](int value) { out[row++ * 32 + lane] = value; };
  for (const int width : {32, 16, 4}) {
    put(__shfl_sync(kAll, x, lane * 7 + 3, width));
    put(__shfl_up_sync(kAll, x, 3, width));
    put(__shfl_down_sync(kAll, x, 3, width));
    put(__shfl_xor_sync(kAll, x, 5, width));
  }
  const double wide = __shfl_xor_sync(kAll, x + 0.5, 1);
  put(static_cast<int>(wide * 2));
}
__global__ void votes_and_reductions(const int* in, int* out) {
  const int lane = threadIdx.x, x = in[lane];
  const unsigned bits = static_cast<unsigned>(x), mask = lane < 20 ? 0xFFFFFu : 0xFFF00000u;
  int row = 0;
  const auto put = [&](int value) { out[row++ * 32 + lane] = value; };
  put(__reduce_add_sync(kAll, x));
  put(__reduce_min_sync(kAll, x));
  put(__reduce_max_sync(kAll, x));
  put(__reduce_add_sync(kAll, bits));
  put(__reduce_min_sync(kAll, bits));
  put(__reduce_max_sync(kAll, bits));
  put(__reduce_and_sync(kAll, bits));
  put(__reduce_or_sync(kAll, bits));
  put(__reduce_xor_sync(kAll, bits));
  put(__ballot_sync(kAll, x > 0));
  put(__any_sync(kAll, x > 0));
  put(__all_sync(kAll, x > 0));
  put(__match_any_sync(kAll, x % 3));
  int all;
  put(__match_all_sync(kAll, x, &all));
  put(all);
  put(__match_all_sync(kAll, 5, &all));
  put(all);
  if (lane < 20)  // each part of the warp by itself
    put(__reduce_max_sync(mask, x));
  else put(__ballot_sync(mask, x > 0));
}

// ---- CTAs of 128 threads. out: [result][128]
__global__ void barriers(const int* in, int* out) {
  __shared__ int left[64];
  const int i = threadIdx.x, x = in[i];
  int row = 0;
  const auto put = [&](int value) { out[row++ * 128 + i] = value; };
  put(__syncthreads_count(x > 0));
  put(__syncthreads_and(x > 0));
  put(__syncthreads_or(x > 0));
  for (int round = 0; round < 3; round++) {  // warps 0 and 1 produce, 2 and 3 consume
    if (i < 64) {
      if (round > 0) bar_sync(2, 128);
      left[i] = x + round;
      bar_arrive(1, 128);
      put(0);
    } else {
      bar_sync(1, 128);
      put(left[127 - i]);
      if (round < 2) bar_arrive(2, 128);
    }
  }
}
__global__ void atomics(const int* in, int* out) {
  __shared__ int x[8];
  __shared__ unsigned long long wide;
  const int i = threadIdx.x, value = in[i];
  if (i < 8) x[i] = 0;
  if (i == 0) wide = 0;
  __syncthreads();
  atomicAdd(&x[0], value);
  atomicMin(&x[1], value);
  atomicMax(&x[2], value);
  atomicOr(&x[3], value);
  atomicXor(&x[4], value);
  atomicSub(&x[5], value);
  int seen = 0;
  for (int old; (old = atomicCAS(&x[6], seen, seen + 1)) != seen;) seen = old;
  atomicAdd(&wide, static_cast<unsigned long long>(value));
  __syncthreads();
  out[i] = i < 8 ? x[i] : i == 8 ? static_cast<int>(wide) : 0;
}

// ---- arithmetic, 32 × 32 threads' worth of values. in: [1024]
__global__ void powers_of_two(const float* in, float* out) { out[threadIdx.x] = fast_exp2(in[threadIdx.x]); }

// out: bits of bfloat16 and float16 pairs, then both widened again
__global__ void half_floats(const float* in, uint32_t* out) {
  const int i = threadIdx.x;
  const uint32_t b = pack<__nv_bfloat16>(in[i], in[1023 - i]), h = pack<__half>(in[i], in[1023 - i]);
  __nv_bfloat162 b_pair;
  __half2 h_pair;
  memcpy(&b_pair, &b, 4);
  memcpy(&h_pair, &h, 4);
  const float2 from_b = __bfloat1622float2(b_pair), from_h = __half22float2(h_pair);
  out[i] = b;
  out[1024 + i] = h;
  out[2048 + i] = __float_as_uint(from_b.x);
  out[3072 + i] = __float_as_uint(from_h.y);
  out[4096 + i] = __float_as_uint(__bfloat162float(__float2bfloat16(in[i])));
  out[5120 + i] = __float_as_uint(__half2float(__float2half(in[i])));
}
__global__ void bit_operations(const unsigned* in, unsigned* out) {
  const int i = threadIdx.x;
  const unsigned x = in[i], y = in[1023 - i];
  int row = 0;
  const auto put = [&](unsigned value) { out[row++ * 1024 + i] = value; };
  put(__popc(x));
  put(__clz(static_cast<int>(x)));
  put(__ffs(static_cast<int>(x)));
  put(__brev(x));
  put(__umulhi(x, y));
  put(__mulhi(static_cast<int>(x), static_cast<int>(y)));
  put(__byte_perm(x, y, 0x1053));
  put(__byte_perm(x, y, 0x4f8e));
  put(__funnelshift_l(x, y, i % 40));
  put(__funnelshift_r(x, y, i % 40));
}
__global__ void extremes_and_roundings(const float* in, float* out) {
  const int i = threadIdx.x;
  const float x = in[i], y = in[1023 - i];
  int row = 0;
  const auto put = [&](float value) { out[row++ * 1024 + i] = value; };
  put(fmaxf(x, y));
  put(fminf(x, y));
  put(max(x, y));
  put(min(x, y));
  put(__fmul_rn(x, y));
  put(__fadd_rn(x, y));
  put(fmaf(x, y, x));
  put(__saturatef(x));
  const float small = fabsf(x) < 1e6f ? x : 0.0f;
  put(static_cast<float>(__float2int_rn(small)));
  put(static_cast<float>(__float2int_rd(small)));
  put(static_cast<float>(__float2int_rz(small)));
}

template <class In, class Out>
struct Wrapper {
  const char* name;
  void (*kernel)(const In*, Out*);
  int threads;

  bool run(const std::string& wanted, const void* in, void* out, cudaError_t& status) const {
    if (wanted != name) return false;
    status =
        launch_kernel(kernel, 1, threads, 4096, nullptr, static_cast<const In*>(in), static_cast<Out*>(out));
    if (status == cudaSuccess) status = cudaDeviceSynchronize();
    return true;
  }
};

}  // namespace
}  // namespace dllm::cuda

// Runs the kernel of this name. Returns what went wrong, else an empty text.
extern "C" __attribute__((visibility("default"))) const char* run_wrapper(const char* name, const void* in,
                                                                          void* out) {
  using namespace dllm::cuda;
  static std::string problem;
  const auto run_one_of = [&](auto... wrappers) {
    cudaError_t status = cudaSuccess;
    if (!(wrappers.run(name, in, out, status) || ...)) return std::string("there is no kernel ") + name;
    return std::string(status == cudaSuccess ? "" : cudaGetErrorString(status));
  };
  try {
    problem = run_one_of(
        Wrapper{"matrix_product_bfloat16", matrix_product<__nv_bfloat16>, 32},
        Wrapper{"matrix_product_float16", matrix_product<__half>, 32},
        Wrapper{"matrix_load", matrix_load<false>, 32},
        Wrapper{"matrix_load_transposed", matrix_load<true>, 32},
        Wrapper{"asynchronous_copy", asynchronous_copy, 32}, Wrapper{"shuffles", shuffles, 32},
        Wrapper{"votes_and_reductions", votes_and_reductions, 32}, Wrapper{"barriers", barriers, 128},
        Wrapper{"atomics", atomics, 128}, Wrapper{"powers_of_two", powers_of_two, 1024},
        Wrapper{"half_floats", half_floats, 1024}, Wrapper{"bit_operations", bit_operations, 1024},
        Wrapper{"extremes_and_roundings", extremes_and_roundings, 1024});
  } catch (const std::exception& error) {
    problem = error.what();
  }
  return problem.c_str();
}
