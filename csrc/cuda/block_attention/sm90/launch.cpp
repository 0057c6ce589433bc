#include "cuda/block_attention/sm90/launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

namespace dllm::cuda::sm90 {
namespace {

struct Heads {
  const void* data;
  const HeadsLayout& layout;
  int heads, positions;
};

cudaError_t map_heads(TensorMap& map, const BlockAttentionParams& p, const Heads& tensor, int rows) {
  const auto bytes = [&](int64_t stride, int size) -> uint64_t {
    return size == 1 ? 2 * p.head_dim : 2 * stride;  // the stride of a single item means nothing
  };
  return encode_tensor_map(
      map, p.dtype, tensor.data,
      {{static_cast<uint64_t>(p.head_dim), static_cast<uint64_t>(tensor.positions),
        static_cast<uint64_t>(tensor.heads), static_cast<uint64_t>(p.batch)},
       {bytes(tensor.layout.position_stride, tensor.positions), bytes(tensor.layout.head_stride, tensor.heads),
        bytes(tensor.layout.batch_stride, p.batch)},
       {kPanelColumns, static_cast<uint32_t>(rows), 1, 1}});
}

template <class T, int kDim>
cudaError_t launch_for_type(const BlockAttentionParams& p, cudaStream_t stream) {
  using Tiles = ForwardTiles<kDim>;
  const int64_t tiles = (p.q_len + Tiles::kQueries - 1) / Tiles::kQueries;
  if (tiles * p.batch * p.q_heads > INT32_MAX / 2) return cudaErrorInvalidConfiguration;
  ForwardParams params{p, work_order(p, Tiles::kQueries), {}, {}, {}};
  const cudaError_t mapped[] = {
      map_heads(params.q, p, {p.q, p.q_layout, p.q_heads, p.q_len}, Tiles::kQueries),
      map_heads(params.k, p, {p.k, p.k_layout, p.kv_heads, p.kv_len}, Tiles::kKeys),
      map_heads(params.v, p, {p.v, p.v_layout, p.kv_heads, p.kv_len}, Tiles::kKeys),
  };
  for (const cudaError_t status : mapped)
    if (status != cudaSuccess) return status;
  int device = 0, multiprocessors = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  return launch_forward_kernel<T, kDim>(params, std::min(params.order.items(), multiprocessors), stream);
}

template <class T>
cudaError_t launch_for_dim(const BlockAttentionParams& p, cudaStream_t stream) {
  return p.head_dim == 64 ? launch_for_type<T, 64>(p, stream) : launch_for_type<T, 128>(p, stream);
}

}  // namespace

cudaError_t launch_forward(const BlockAttentionParams& p, cudaStream_t stream) {
  return p.dtype == DType::bfloat16 ? launch_for_dim<__nv_bfloat16>(p, stream)
                                    : launch_for_dim<__half>(p, stream);
}

}  // namespace dllm::cuda::sm90
