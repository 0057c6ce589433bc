// token_stats and token_divergence on CUDA tensors: allocation and launches on the current stream.
#include "torch/token_stats_cuda.h"

#include "cuda/token_divergence/launch.h"

namespace dllm {

TokenStatsTensors launch_token_stats(const char* op, const OnDeviceOf& device, const LogitsRows& logits,
                                     const std::vector<int64_t>& shape, const cuda::MaskedBlocks& blocks,
                                     const int32_t* noise_ids, const CheckedStatsOptions& options,
                                     const TokenFilterOptions& filter) {
  const TokenStatsTensors stats = new_stats(logits.tensor, shape, options.real());
  const auto bytes =
      static_cast<int64_t>(cuda::token_stats_workspace(logits.rows, logits.vocabulary, options.float64));
  Tensor states = new_tensor(logits.tensor, {bytes}, ScalarType::Byte);

  cuda::RowStatsParams p{};
  fill(p, options, logits.vocabulary, stats);
  p.logits = logits.view();
  p.rows = logits.rows;
  p.blocks = blocks;
  p.noise_ids = noise_ids;
  p.suppress = listed_on_cuda(op, "suppress_tokens", options.suppress);
  p.proposal_exclude = listed_on_cuda(op, "proposal_exclude", options.proposal_exclude);
  p.confidence_exclude = listed_on_cuda(op, "confidence_exclude", options.confidence_exclude);
  p.states = states.data_ptr();
  Tensor cuts;
  if (!filter.keeps_all(logits.vocabulary)) {
    cuts =
        new_tensor(logits.tensor, {logits.rows * static_cast<int64_t>(sizeof(TokenCut))}, ScalarType::Byte);
    fill(p, filter, static_cast<TokenCut*>(cuts.data_ptr()));
  }
  check_launch(op, cuda::token_stats(p, device.stream()));
  return stats;
}

namespace {

TokenStatsTensors token_stats(Tensor logits, StatsOptions options, std::optional<Tensor> noise_ids,
                              TokenFilterOptions filter) {
  constexpr const char* op = "token_stats";
  const LogitsRows rows(op, logits);
  const auto ids = checked_noise_ids(op, noise_ids, "logits", logits, rows.rows);
  const OnDeviceOf device(logits);
  const CheckedStatsOptions checked(op, rows.vocabulary, options);
  filter.check_range(op);
  return launch_token_stats(op, device, rows, leading_shape(logits), {}, int32_data(ids), checked, filter);
}

Tensor token_divergence(Tensor logits, Tensor previous, std::vector<int64_t> suppress_tokens,
                        std::vector<int64_t> confidence_exclude, double confidence_temperature,
                        bool float64) {
  constexpr const char* op = "token_stats";
  const TokenDivergenceArguments arguments(op, logits, previous, suppress_tokens, confidence_exclude,
                                           confidence_temperature);
  const OnDeviceOf device(logits);
  Tensor divergence =
      new_tensor(logits, leading_shape(logits), float64 ? ScalarType::Double : ScalarType::Float);
  TokenDivergenceParams<ListedTokenIds> p{};
  arguments.fill(p, float64, divergence);
  p.suppress = listed_on_cuda(op, "suppress_tokens", arguments.suppress);
  p.confidence_exclude = listed_on_cuda(op, "confidence_exclude", arguments.confidence_exclude);
  check_launch(op, cuda::token_divergence(p, device.stream()));
  return divergence;
}

}  // namespace
}  // namespace dllm

DLLM_CUDA_OPERATORS(m) {
  m.impl("token_stats", DLLM_BOX(dllm::token_stats));
  m.impl("token_divergence", TORCH_BOX(&dllm::token_divergence));
}
