// advance_ on CUDA tensors: the launch on the current stream. What the tensors hold stays on the device; the
// kernel cuts positions to the canvas.
#include "cuda/advance/launch.h"
#include "torch/advance_arguments.h"
#include "torch/cuda_contents.h"
#include "torch/cuda_launch.h"

namespace dllm {
namespace {

void advance_cuda(Tensor canvas, Tensor given, Tensor stop, Tensor canvas_end, Tensor steps,
                  Tensor block_start, Tensor cached, Tensor q_lengths, Tensor block_masks, Tensor step,
                  Tensor block_step, Tensor quota, Tensor candidates, Tensor query_positions,
                  Tensor write_positions, Tensor cache_spans, Tensor fresh_spans, int64_t mask_id,
                  int64_t quota_total, std::vector<int64_t> stop_ids) {
  const AdvanceTensors rows{
      given, stop,       canvas_end, steps,      block_start,     cached,          q_lengths,   block_masks,
      step,  block_step, quota,      candidates, query_positions, write_positions, cache_spans, fresh_spans};
  const AdvanceParams p = advance_params("advance_", canvas, rows, mask_id, quota_total, stop_ids);
  const OnDeviceOf device(canvas);
  if (debugging()) {
    HostCopies host;
    AdvanceParams copy = p;
    copy.given = host.of(given), copy.stop = host.of(stop), copy.canvas_end = host.of(canvas_end);
    // Copies, which nothing is written to.
    copy.block_start = const_cast<int32_t*>(host.of(block_start));
    copy.cached = const_cast<int32_t*>(host.of(cached));
    copy.q_lengths = const_cast<int32_t*>(host.of(q_lengths));
    copy.steps = host.of(steps);
    copy.block_masks = const_cast<int32_t*>(host.of(block_masks));
    copy.step = const_cast<int32_t*>(host.of(step));
    copy.block_step = const_cast<int32_t*>(host.of(block_step));
    check_contents("advance_", copy);
  }
  check_launch("advance_", cuda::launch_advance(p, device.stream()));
}

}  // namespace
}  // namespace dllm

DLLM_CUDA_OPERATORS(m) { m.impl("advance_", TORCH_BOX(&dllm::advance_cuda)); }
