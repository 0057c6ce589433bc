// The launch that token_stats and unmask_ share on CUDA.
#pragma once

#include "cuda/token_stats/launch.h"
#include "torch/cuda_launch.h"
#include "torch/token_stats_arguments.h"

namespace dllm {

// Statistics of the rows of logits; with a canvas in `blocks`, of those whose position holds a mask.
TokenStatsTensors launch_token_stats(const char* op, const OnDeviceOf& device, const LogitsRows& logits,
                                     const std::vector<int64_t>& shape, const cuda::MaskedBlocks& blocks,
                                     const int32_t* noise_ids, const CheckedStatsOptions& options,
                                     const TokenFilterOptions& filter);

}  // namespace dllm
