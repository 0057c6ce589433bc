// commit_ and unmask_ on CUDA tensors: allocation and launches on the current stream. Contents of index
// tensors stay on the device; the kernels treat what is out of range as absent.
#include "cuda/commit/launch.h"
#include "torch/commit_arguments.h"
#include "torch/host_copies.h"
#include "torch/token_stats_cuda.h"

namespace dllm {
namespace {

// `positions` or `block_start` is null.
Tensor commit_rows(const char* op, const OnDeviceOf& device, const CommitArguments& arguments,
                   const Tensor& canvas, const int32_t* positions, const int32_t* block_start,
                   int64_t candidates, const CommitStats& stats) {
  check(candidates <= cuda::kMaxCandidates, op, ": a row may list at most ", cuda::kMaxCandidates,
        " candidates on CUDA, got ", candidates);
  Tensor accepted = new_tensor(canvas, {canvas.size(0), candidates}, ScalarType::Bool);
  CommitParams p = commit_params(arguments, canvas, candidates, stats, accepted);
  p.positions = positions;
  p.block_start = block_start;
  check_launch(op, cuda::commit(p, device.stream()));
  return accepted;
}

Tensor commit_(Tensor canvas, Tensor positions, Tensor token, Tensor prob, Tensor margin, Tensor entropy,
               CommitOptions options, int64_t seed, std::optional<Tensor> divergence,
               std::optional<Tensor> state) {
  constexpr const char* op = "commit_";
  const CommitArguments arguments(op, canvas, make_rule(op, options), options, seed, state);
  const CommitStats stats =
      checked_stats(op, arguments.rule, canvas, positions, token, prob, margin, entropy, divergence);
  const OnDeviceOf device(canvas);
  check_commit_memory(op, canvas, options, state,
                      {{"positions", positions},
                       {"stats.token", token},
                       {"stats.prob", prob},
                       {"stats.margin", margin},
                       {"stats.entropy", entropy},
                       {"stats.divergence", divergence}});
  const Tensor listed = torch::stable::contiguous(positions);
  if (debugging()) {
    HostCopies host;
    check_candidates(op, host.of(listed), canvas.size(0), positions.size(1), canvas.size(1));
    check_quotas(op, host.of(arguments.quota), canvas.size(0));
  }
  return commit_rows(op, device, arguments, canvas, static_cast<const int32_t*>(listed.data_ptr()), nullptr,
                     positions.size(1), stats);
}

Tensor unmask_(Tensor canvas, Tensor logits, Tensor block_start, CommitOptions options,
               StatsOptions stats_options, TokenFilterOptions filter) {
  constexpr const char* op = "unmask_";
  const Rule rule = make_rule(op, options);
  check_block_rule(op, rule);
  const CommitArguments arguments(op, canvas, rule, options, stats_options.seed, std::nullopt);
  const Tensor starts = checked_starts(op, canvas, logits, block_start);
  const OnDeviceOf device(canvas);
  check_commit_memory(op, canvas, options, std::nullopt, {{"logits", logits}, {"block_start", block_start}});
  const LogitsRows rows(op, logits);
  bar_mask(op, arguments.mask_id, rows.vocabulary, stats_options);
  const CheckedStatsOptions checked(op, rows.vocabulary, stats_options);
  filter.check_range(op);
  const int64_t batch = canvas.size(0), block = logits.size(1);
  const auto* start = static_cast<const int32_t*>(starts.data_ptr());
  if (debugging()) {
    HostCopies host;
    check_block_starts(op, host.of(starts), batch, block, canvas.size(1));
    check_quotas(op, host.of(arguments.quota), batch);
  }
  const cuda::MaskedBlocks blocks{canvas.data_ptr(),
                                  canvas.scalar_type() == ScalarType::Long,
                                  canvas.stride(0),
                                  canvas.size(1),
                                  arguments.mask_id,
                                  start,
                                  static_cast<int32_t>(block),
                                  int32_data(arguments.step),
                                  int32_data(arguments.sequence_ids)};
  const auto [token, prob, margin, entropy, logsumexp] =
      launch_token_stats(op, device, rows, {batch, block}, blocks, nullptr, checked, filter);
  return commit_rows(op, device, arguments, canvas, nullptr, start, block,
                     {token, prob, margin, entropy, {}});
}

}  // namespace
}  // namespace dllm

DLLM_CUDA_OPERATORS(m) {
  m.impl("commit_", DLLM_BOX(dllm::commit_));
  m.impl("unmask_", DLLM_BOX(dllm::unmask_));
}
