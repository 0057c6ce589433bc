// advance_ on CUDA tensors: the launch on the current stream. What the tensors hold stays on the device; the
// kernel cuts positions to the canvas.
#include "cuda/advance/launch.h"
#include "torch/advance_arguments.h"
#include "torch/cuda_launch.h"
#include "torch/host_copies.h"

namespace dllm {
namespace {

void advance_cuda(Tensor canvas, Tensor rows, int64_t block_size, int64_t queries, int64_t mask_id,
                  int64_t quota_total, std::vector<int64_t> stop_ids) {
  constexpr const char* op = "advance_";
  const AdvanceParams p =
      advance_params(op, canvas, rows, block_size, queries, mask_id, quota_total, stop_ids);
  const OnDeviceOf device(canvas);
  if (debugging()) {
    HostCopies host;
    AdvanceParams copy = p;
    copy.point_into(const_cast<int32_t*>(host.of(rows)), p.batch, block_size, queries);  // to read only
    check_contents(op, copy);
  }
  check_launch(op, cuda::launch_advance(p, device.stream()));
}

}  // namespace
}  // namespace dllm

DLLM_CUDA_OPERATORS(m) { m.impl("advance_", TORCH_BOX(&dllm::advance_cuda)); }
