// Hopper kernels of block_attention: TMA, wgmma, specialised warpgroups; head dims 64 and 128, 16-bit types.
#pragma once

#include <cuda_runtime_api.h>

#include "core/params.h"
#include "cuda/block_attention/launch.h"
#include "cuda/block_attention/sm90/config.h"
#include "cuda/sm90/tensor_map.h"

namespace dllm::cuda::sm90 {

struct ForwardParams {
  BlockAttentionParams attention;
  WorkOrder order;
  TensorMap q, k, v;  // [batch, heads, positions, head_dim], boxes of one tile's rows and 64 dims
};

cudaError_t launch_forward(const BlockAttentionParams& p, cudaStream_t stream);

template <class T, int kDim>
cudaError_t launch_forward_kernel(const ForwardParams& p, int ctas,
                                  cudaStream_t stream);  // instantiations/*.cu

struct GradientParams {
  BlockAttentionBackwardParams backward;
  BackwardWorkspace workspace;  // its bounds are of tiles of kDkvQueries
  WorkOrder order;
  TensorMap q, k, v, grad_out;

  DLLM_HOST_DEVICE const BlockAttentionParams& attention() const { return backward.forward; }
};

// To follow the launches of query terms and query bounds.
cudaError_t launch_backward_dkv(const BlockAttentionBackwardParams& p, const BackwardWorkspace& workspace,
                                cudaStream_t stream);
cudaError_t launch_backward_dq(const BlockAttentionBackwardParams& p, const BackwardWorkspace& workspace,
                               cudaStream_t stream);

template <class T, int kDim>
cudaError_t launch_backward_dkv_kernel(const GradientParams& p, cudaStream_t stream);
template <class T, int kDim>
cudaError_t launch_backward_dq_kernel(const GradientParams& p, cudaStream_t stream);

}  // namespace dllm::cuda::sm90
