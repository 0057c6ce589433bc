// Launch of the kv_write_ kernel on a stream. Tokens with a position outside their sequence's table, or on a
// page that does not exist, are skipped.
#pragma once

#include <cuda_runtime_api.h>

#include "core/params.h"

namespace dllm::cuda {

cudaError_t launch_kv_write(const KvWriteParams& p, cudaStream_t stream);

}  // namespace dllm::cuda
