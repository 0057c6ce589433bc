#include "cuda/block_attention/launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/block_attention/config.h"
#include "cuda/block_attention/fp32/config.h"
#include "cuda/block_attention/fp32/launch.h"
#include "cuda/block_attention/sm80/config.h"
#include "cuda/block_attention/sm80/launch.h"
#include "cuda/launch_kernel.h"
#include "cuda/tiles/padded_dim.h"
#ifdef DLLM_CUDA_HAS_SM90A
#include "cuda/block_attention/sm90/dispatch.h"
#include "cuda/block_attention/sm90/launch.h"
#endif

namespace dllm::cuda {
namespace {

// In order; the first that fails ends it.
template <class... Launches>
cudaError_t launch_all(const Launches&... launches) {
  cudaError_t status = cudaSuccess;
  (void)((status = launches(), status == cudaSuccess) && ...);
  return status;
}

template <class T>
cudaError_t launch_preprocess(const BlockAttentionBackwardParams& p, const BackwardWorkspace& workspace,
                              cudaStream_t stream) {
  return launch_all([&] { return launch_query_bounds(p.forward, workspace, stream); },
                    [&] { return launch_backward_preprocess<T>(p, workspace, stream); });
}

template <class T, int kDim>
cudaError_t launch_backward(const BlockAttentionBackwardParams& p, const BackwardWorkspace& workspace,
                            cudaStream_t stream) {
  return launch_all([&] { return launch_preprocess<T>(p, workspace, stream); },
                    [&] { return sm80::launch_backward_dkv<T, kDim>(p, workspace, stream); },
                    [&] { return sm80::launch_backward_dq<T, kDim>(p, workspace, stream); });
}

int64_t span_batches(const BlockAttentionParams& p) {
  return !p.spans.data ? 0 : p.spans.batch_stride ? p.batch : 1;
}

}  // namespace

cudaError_t launch_block_attention(const BlockAttentionParams& p, cudaStream_t stream) {
#ifdef DLLM_CUDA_HAS_SM90A
  if (sm90::serves(p, compute_capability())) return sm90::launch_forward(p, stream);
#endif
  return with_padded_dim(p.head_dim, [&](auto dim) {
    switch (p.dtype) {
      case DType::bfloat16: return sm80::launch_forward<__nv_bfloat16, dim>(p, stream);
      case DType::float16: return sm80::launch_forward<__half, dim>(p, stream);
      case DType::float32: return fp32::launch_forward<dim>(p, stream);
      case DType::float64: break;
    }
    return cudaErrorInvalidValue;
  });
}

BackwardWorkspace backward_workspace(const BlockAttentionBackwardParams& backward) {
  const BlockAttentionParams& p = backward.forward;
  BackwardWorkspace workspace{};
  workspace.padded_queries = (p.q_len + kQueryMultiple - 1) / kQueryMultiple * kQueryMultiple;
  workspace.tile_queries = with_padded_dim(p.head_dim, [&](auto dim) {
    return p.dtype == DType::float32 ? fp32::kPartnerRows<dim> : sm80::BackwardDkvTiles<dim>::kQueries;
  });
#ifdef DLLM_CUDA_HAS_SM90A
  if (sm90::serves(backward, compute_capability())) workspace.tile_queries = sm90::kDkvQueries;
#endif
  return workspace;
}

int64_t workspace_terms(const BlockAttentionParams& p, const BackwardWorkspace& workspace) {
  return static_cast<int64_t>(p.batch) * p.q_heads * workspace.padded_queries;
}

int64_t workspace_bounds(const BlockAttentionParams& p, const BackwardWorkspace& workspace) {
  return span_batches(p) * ((p.q_len + workspace.tile_queries - 1) / workspace.tile_queries) * kMaxSpanBounds;
}

cudaError_t launch_block_attention_backward(const BlockAttentionBackwardParams& p,
                                            const BackwardWorkspace& workspace, cudaStream_t stream) {
#ifdef DLLM_CUDA_HAS_SM90A
  if (sm90::serves(p, compute_capability())) {
    const auto preprocess = [&] {
      return p.forward.dtype == DType::bfloat16 ? launch_preprocess<__nv_bfloat16>(p, workspace, stream)
                                                : launch_preprocess<__half>(p, workspace, stream);
    };
    return launch_all(
        preprocess, [&] { return sm90::launch_backward_dkv(p, workspace, stream); },
        [&] { return sm90::launch_backward_dq(p, workspace, stream); });
  }
#endif
  return with_padded_dim(p.forward.head_dim, [&](auto dim) {
    switch (p.forward.dtype) {
      case DType::bfloat16: return launch_backward<__nv_bfloat16, dim>(p, workspace, stream);
      case DType::float16: return launch_backward<__half, dim>(p, workspace, stream);
      case DType::float32:
        return launch_all([&] { return launch_preprocess<float>(p, workspace, stream); },
                          [&] { return fp32::launch_backward<dim>(p, workspace, stream); });
      case DType::float64: break;
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace dllm::cuda
