// advance_: schema and CPU implementation, which checks what the tensors hold.
#include "torch/advance_arguments.h"

#include <torch/csrc/stable/library.h>

#include "cpu/advance.h"
#include "torch/contents.h"

namespace dllm {
namespace {

void advance_cpu(Tensor canvas, Tensor given, Tensor stop, Tensor canvas_end, Tensor steps,
                 Tensor block_start, Tensor cached, Tensor q_lengths, Tensor block_masks, Tensor step,
                 Tensor block_step, Tensor quota, Tensor candidates, Tensor query_positions,
                 Tensor write_positions, Tensor cache_spans, Tensor fresh_spans, int64_t mask_id,
                 int64_t quota_total, std::vector<int64_t> stop_ids) {
  const AdvanceTensors rows{
      given, stop,       canvas_end, steps,      block_start,     cached,          q_lengths,   block_masks,
      step,  block_step, quota,      candidates, query_positions, write_positions, cache_spans, fresh_spans};
  const char* op = "advance_";
  const AdvanceParams p = advance_params(op, canvas, rows, mask_id, quota_total, stop_ids);
  check_contents(op, p);
  const std::vector<BlockRow> moved = cpu::advanced_rows(p);
  check_cached(op, p, moved);
  cpu::store_rows(p, moved);
}

}  // namespace
}  // namespace dllm

STABLE_TORCH_LIBRARY_FRAGMENT(dllm_kernels, m) {
  m.def(
      "advance_(Tensor canvas, Tensor given, Tensor stop, Tensor canvas_end, Tensor steps, "
      "Tensor(a!) block_start, Tensor(b!) cached, Tensor(c!) q_lengths, Tensor(d!) block_masks, "
      "Tensor(e!) step, Tensor(f!) block_step, Tensor(g!) quota, Tensor(h!) candidates, "
      "Tensor(i!) query_positions, Tensor(j!) write_positions, Tensor(k!) cache_spans, "
      "Tensor(l!) fresh_spans, int mask_id, int quota_total=0, int[] stop_ids=[]) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dllm_kernels, CPU, m) { m.impl("advance_", TORCH_BOX(&dllm::advance_cpu)); }
