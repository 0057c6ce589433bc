// linear_token_stats on CUDA tensors: our kernels where there are some for the problem, else the library's
// product in chunks of rows.
#include "cuda/linear_token_stats/launch.h"
#include "torch/cuda_launch.h"
#include "torch/token_stats_arguments.h"

namespace dllm {
namespace {

// The operator chunked_linear_token_stats, implemented in Python.
TokenStatsTensors chunked(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
                          const StatsOptions& options, const std::optional<Tensor>& noise_ids) {
  using torch::stable::detail::from;
  std::array stack{from(hidden),
                   from(weight),
                   from(bias),
                   from(options.temperature),
                   from(options.seed),
                   from(options.suppress_tokens),
                   from(options.proposal_exclude),
                   from(options.confidence_exclude),
                   from(options.confidence_temperature),
                   from(options.float64),
                   from(noise_ids)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("dllm_kernels::chunked_linear_token_stats", "", stack.data(), TORCH_ABI_VERSION));
  const auto result = [&](int i) { return torch::stable::detail::to<Tensor>(stack[i]); };
  return {result(0), result(1), result(2), result(3), result(4)};
}

TokenStatsTensors linear_token_stats(Tensor hidden, Tensor weight, std::optional<Tensor> bias,
                                     StatsOptions options, std::optional<Tensor> noise_ids) {
  constexpr const char* op = "linear_token_stats";
  check_product(op, hidden, weight, bias);
  const auto vocabulary = static_cast<int32_t>(weight.size(0));
  const int64_t rows = check_int(op, "the rows of hidden", hidden.numel() / hidden.size(-1));
  const auto ids = checked_noise_ids(op, noise_ids, "hidden", hidden, rows);
  const OnDeviceOf device(hidden);
  const CheckedStatsOptions checked(op, vocabulary, options);
  const Tensor dense_hidden = torch::stable::contiguous(hidden);

  cuda::LinearTokenStatsParams p{};
  p.stats.rows = rows;
  p.stats.noise_ids = int32_data(ids);
  p.stats.suppress = listed_on_cuda(op, "suppress_tokens", checked.suppress);
  p.stats.proposal_exclude = listed_on_cuda(op, "proposal_exclude", checked.proposal_exclude);
  p.stats.confidence_exclude = listed_on_cuda(op, "confidence_exclude", checked.confidence_exclude);
  p.stats.float64 = checked.float64;
  Projection& product = p.projection;
  product.hidden = dense_hidden.data_ptr(), product.hidden_type = storage_type(hidden);
  product.hidden_size = static_cast<int32_t>(hidden.size(-1));
  product.weight = weight.data_ptr(), product.weight_type = storage_type(weight);
  product.weight_stride = weight.stride(1) > 1 ? 0 : vocabulary == 1 ? product.hidden_size : weight.stride(0);
  if (!cuda::serves_linear_token_stats(p)) return chunked(hidden, weight, bias, options, noise_ids);

  const TokenStatsTensors stats = new_stats(hidden, leading_shape(hidden), checked.real());
  fill(p.stats, checked, vocabulary, stats);
  std::optional<Tensor> dense_bias;
  if (bias) {
    dense_bias = torch::stable::contiguous(*bias);
    product.bias = dense_bias->data_ptr(), product.bias_type = storage_type(*bias);
  }
  const Tensor states =
      new_tensor(hidden, {static_cast<int64_t>(cuda::linear_token_states_workspace(rows, vocabulary))},
                 ScalarType::Byte);
  const Tensor proposals =
      new_tensor(hidden, {rows, cuda::VocabularyRanges(vocabulary).count}, ScalarType::Float);
  p.stats.states = states.data_ptr();
  p.proposals = static_cast<float*>(proposals.data_ptr());
  check_launch(op, cuda::launch_linear_token_stats(p, device.stream()));
  return stats;
}

}  // namespace
}  // namespace dllm

DLLM_CUDA_OPERATORS(m) { m.impl("linear_token_stats", DLLM_BOX(dllm::linear_token_stats)); }
