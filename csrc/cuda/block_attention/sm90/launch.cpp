#include "cuda/block_attention/sm90/launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

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
       {bytes(tensor.layout.position_stride, tensor.positions),
        bytes(tensor.layout.head_stride, tensor.heads), bytes(tensor.layout.batch_stride, p.batch)},
       {kPanelColumns, static_cast<uint32_t>(rows), 1, 1}});
}

Heads queries(const BlockAttentionParams& p) { return {p.q, p.q_layout, p.q_heads, p.q_len}; }
Heads keys(const BlockAttentionParams& p) { return {p.k, p.k_layout, p.kv_heads, p.kv_len}; }
Heads values(const BlockAttentionParams& p) { return {p.v, p.v_layout, p.kv_heads, p.kv_len}; }
Heads out_gradients(const BlockAttentionBackwardParams& p) {
  return {p.grad_out, p.grad_out_layout, p.forward.q_heads, p.forward.q_len};
}

cudaError_t first_error(std::initializer_list<cudaError_t> results) {
  for (const cudaError_t status : results)
    if (status != cudaSuccess) return status;
  return cudaSuccess;
}

cudaError_t multiprocessors(int& count) {
  int device = 0;
  const cudaError_t status = cudaGetDevice(&device);
  return status == cudaSuccess ? cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device)
                               : status;
}

// launch(T(), dim) with the element type and the head dim as constants.
template <class Launch>
cudaError_t with_constants(const BlockAttentionParams& p, const Launch& launch) {
  const auto with_dim = [&](auto type) {
    return p.head_dim == 64 ? launch(type, std::integral_constant<int, 64>())
                            : launch(type, std::integral_constant<int, 128>());
  };
  return p.dtype == DType::bfloat16 ? with_dim(__nv_bfloat16()) : with_dim(__half());
}

cudaError_t map_gradients(GradientParams& params, int query_rows, int key_rows) {
  const BlockAttentionParams& p = params.attention();
  return first_error({
      map_heads(params.q, p, queries(p), query_rows),
      map_heads(params.grad_out, p, out_gradients(params.backward), query_rows),
      map_heads(params.k, p, keys(p), key_rows),
      map_heads(params.v, p, values(p), key_rows),
  });
}

}  // namespace

cudaError_t launch_forward(const BlockAttentionParams& p, cudaStream_t stream) {
  return with_constants(p, [&](auto type, auto dim) {
    using Tiles = ForwardTiles<dim>;
    ForwardParams params{p, query_order(p, Tiles::kQueries), {}, {}, {}};
    if (!params.order.is_countable()) return cudaErrorInvalidConfiguration;
    int ctas = 0;
    const cudaError_t status = first_error({
        map_heads(params.q, p, queries(p), Tiles::kQueries),
        map_heads(params.k, p, keys(p), Tiles::kKeys),
        map_heads(params.v, p, values(p), Tiles::kKeys),
        multiprocessors(ctas),
    });
    if (status != cudaSuccess) return status;
    return launch_forward_kernel<decltype(type), dim>(params, std::min(params.order.items(), ctas), stream);
  });
}

cudaError_t launch_backward_dkv(const BlockAttentionBackwardParams& p, const BackwardWorkspace& workspace,
                                cudaStream_t stream) {
  return with_constants(p.forward, [&](auto type, auto dim) {
    using Tiles = BackwardDkvTiles<dim>;
    GradientParams params{p, workspace, key_order(p.forward, Tiles::kKeys), {}, {}, {}, {}};
    if (!params.order.is_countable()) return cudaErrorInvalidConfiguration;
    const cudaError_t status = map_gradients(params, Tiles::kQueries, Tiles::kKeys);
    if (status != cudaSuccess) return status;
    return launch_backward_dkv_kernel<decltype(type), dim>(params, stream);
  });
}

cudaError_t launch_backward_dq(const BlockAttentionBackwardParams& p, const BackwardWorkspace& workspace,
                               cudaStream_t stream) {
  return with_constants(p.forward, [&](auto type, auto dim) {
    using Tiles = BackwardDqTiles<dim>;
    GradientParams params{p, workspace, query_order(p.forward, Tiles::kQueries), {}, {}, {}, {}};
    if (!params.order.is_countable()) return cudaErrorInvalidConfiguration;
    const cudaError_t status = map_gradients(params, Tiles::kQueries, Tiles::kKeys);
    if (status != cudaSuccess) return status;
    return launch_backward_dq_kernel<decltype(type), dim>(params, stream);
  });
}

}  // namespace dllm::cuda::sm90
