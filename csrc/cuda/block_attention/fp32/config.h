// Tiles and shared memory of the block_attention kernels in float32 on the CUDA cores; host and device read
// the same numbers.
#pragma once

#include "cuda/block_attention/config.h"

namespace dllm::cuda::fp32 {

// 128 threads as 8 x 16: a thread owns 4 rows of the CTA's tile and, of what is multiplied with it, every
// 16th row and every 16th group of 4 dims. The 16 threads that share rows are half a warp.
constexpr int kThreads = 128;
constexpr int kTileRows = 32;
constexpr int kRowThreads = 16;
constexpr int kThreadRows = kTileRows / (kThreads / kRowThreads);

// float32 words of a row in shared memory: the padding spreads 8 rows over all banks.
template <int kDim>
constexpr int kRowWords = kDim + 4;

// Queries, one tile for keys and then values, weights.
template <int kDim>
constexpr size_t kForwardBytes = sizeof(float) * kTileRows * (2 * kRowWords<kDim> + kRowWords<kTileRows>);
static_assert(kForwardBytes<256> + kSmallStatics <= kSmallestSharedMemory);

// Rows of the other side that a backward kernel takes at a time.
template <int kDim>
constexpr int kPartnerRows = kDim <= 128 ? 32 : 16;

// Two tiles of the CTA's own rows, one of the other side's, P and dS.
template <int kDim>
constexpr size_t kBackwardBytes = sizeof(float) * ((2 * kTileRows + kPartnerRows<kDim>)*kRowWords<kDim> +
                                                   2 * kTileRows * kRowWords<kPartnerRows<kDim>>);
static_assert(kBackwardBytes<256> + kSmallStatics <= kSmallestSharedMemory);

}  // namespace dllm::cuda::fp32
