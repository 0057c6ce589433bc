// advance_: schema and CPU implementation, which checks what the tensors hold.
#include "torch/advance_arguments.h"

#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/advance.h"
#include "torch/index_checks.h"

namespace dllm {
namespace {

void advance_cpu(Tensor canvas, Tensor rows, int64_t block_size, int64_t queries, int64_t mask_id,
                 int64_t quota_total, std::vector<int64_t> stop_ids) {
  constexpr const char* op = "advance_";
  const AdvanceParams p =
      advance_params(op, canvas, rows, block_size, queries, mask_id, quota_total, stop_ids);
  check_contents(op, p);
  const std::vector<BlockRow> moved = cpu::advanced_rows(p);
  check_cached(op, p, moved);
  cpu::store_rows(p, moved);
}

std::string block_row_layout() { return kBlockRowLayout; }

}  // namespace
}  // namespace dllm

STABLE_TORCH_LIBRARY_FRAGMENT(dllm_kernels, m) {
  m.def(
      "advance_(Tensor canvas, Tensor(a!) rows, int block_size, int queries, int mask_id, int quota_total=0, "
      "int[] stop_ids=[]) -> ()");
  // Names and shapes of what lies in `rows`.
  m.def("block_row_layout() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(dllm_kernels, CompositeExplicitAutograd, m) {
  m.impl("block_row_layout", TORCH_BOX(&dllm::block_row_layout));
}

STABLE_TORCH_LIBRARY_IMPL(dllm_kernels, CPU, m) { m.impl("advance_", TORCH_BOX(&dllm::advance_cpu)); }
