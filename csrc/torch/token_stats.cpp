// token_stats, token_divergence and linear_token_stats: schemas, and the CPU kernels behind them.
#include "torch/token_stats_arguments.h"

#include <torch/csrc/stable/library.h>

#include "cpu/linear_token_stats.h"
#include "cpu/token_divergence.h"
#include "cpu/token_stats.h"
#include "torch/parallel.h"

namespace dllm {
namespace {

// Per logit, for the decision how many threads are worth waking.
constexpr double kOperations = 16, kNoiseOperations = 128;

void fill_lists(cpu::PartedStatsParams& p, const CheckedStatsOptions& options) {
  p.suppress = listed(options.suppress);
  p.proposal_exclude = listed(options.proposal_exclude);
  p.confidence_exclude = listed(options.confidence_exclude);
}

// The workspace behind p.states, for this many visited rows.
Tensor new_states(cpu::PartedStatsParams& p, int64_t visited, const Tensor& like) {
  const int64_t size = p.float64 ? sizeof(cpu::PartState<double>) : sizeof(cpu::PartState<float>);
  Tensor states = new_tensor(like, {visited * p.parts * size}, ScalarType::Byte);
  p.states = states.data_ptr();
  return states;
}

void fill_states(const cpu::PartedStatsParams& p, int64_t visited) {
  const double operations = p.temperature > 0 ? kNoiseOperations : kOperations;
  run_items(visited * p.parts, operations * visited * p.vocabulary,
            [&](int64_t begin, int64_t end) { cpu::token_states(p, begin, end); });
}

// Fills p.cuts. The filters look at what the confidence is made of, before anything is left out of it.
void find_cuts(const cpu::PartedStatsParams& p, int64_t visited) {
  cpu::PartedStatsParams unfiltered = p;
  unfiltered.temperature = 0;
  unfiltered.confidence_exclude = {};
  unfiltered.cuts = nullptr;
  fill_states(unfiltered, visited);
  run_items(visited, kOperations * visited * p.vocabulary,
            [&](int64_t begin, int64_t end) { cpu::token_cuts(p, begin, end); });
}

}  // namespace

TokenStatsTensors row_stats(const LogitsRows& logits, const std::vector<int64_t>& shape,
                            const std::vector<int64_t>* visited, const int32_t* noise_ids,
                            const CheckedStatsOptions& options, const TokenFilterOptions& filter) {
  const TokenStatsTensors stats = new_stats(logits.tensor, shape, options.real());
  const int64_t rows = visited ? static_cast<int64_t>(visited->size()) : logits.rows;
  cpu::PartedStatsParams p{};
  fill(p, options, logits.vocabulary, stats);
  fill_lists(p, options);
  p.logits = logits.view();
  p.rows = logits.rows;
  p.visited = visited ? visited->data() : nullptr;
  p.noise_ids = noise_ids;
  p.parts = (logits.vocabulary - 1) / cpu::kLogitsPart + 1;
  const Tensor states = new_states(p, rows, logits.tensor);
  std::vector<TokenCut> cuts;
  if (!filter.keeps_all(logits.vocabulary)) {
    cuts.resize(rows);
    fill(p, filter, cuts.data());
    find_cuts(p, rows);
  }
  fill_states(p, rows);
  cpu::token_results(p, 0, rows);
  return stats;
}

namespace {

TokenStatsTensors token_stats(Tensor logits, StatsOptions options, std::optional<Tensor> noise_ids,
                              TokenFilterOptions filter) {
  constexpr const char* op = "token_stats";
  const LogitsRows rows(op, logits);
  const auto ids = checked_noise_ids(op, noise_ids, "logits", logits, rows.rows);
  const CheckedStatsOptions checked(op, rows.vocabulary, options);
  filter.check_range(op);
  return row_stats(rows, leading_shape(logits), nullptr, int32_data(ids), checked, filter);
}

Tensor token_divergence(Tensor logits, Tensor previous, std::vector<int64_t> suppress_tokens,
                        std::vector<int64_t> confidence_exclude, double confidence_temperature,
                        bool float64) {
  constexpr const char* op = "token_stats";
  const TokenDivergenceArguments arguments(op, logits, previous, suppress_tokens, confidence_exclude,
                                           confidence_temperature);
  const LogitsRows& rows = arguments.rows;
  Tensor divergence =
      new_tensor(logits, leading_shape(logits), float64 ? ScalarType::Double : ScalarType::Float);
  TokenDivergenceParams<TokenIds> p{};
  arguments.fill(p, float64, divergence);
  p.suppress = listed(arguments.suppress);
  p.confidence_exclude = listed(arguments.confidence_exclude);
  run_items(rows.rows, 2 * kOperations * rows.rows * rows.vocabulary,
            [&](int64_t begin, int64_t end) { cpu::token_divergence(p, begin, end); });
  return divergence;
}

TokenStatsTensors linear_token_stats(Tensor hidden, Tensor weight, std::optional<Tensor> bias,
                                     StatsOptions options, std::optional<Tensor> noise_ids) {
  constexpr const char* op = "linear_token_stats";
  check_product(op, hidden, weight, bias);
  const auto vocabulary = static_cast<int32_t>(weight.size(0));
  const int64_t rows = hidden.numel() / hidden.size(-1);
  const auto ids = checked_noise_ids(op, noise_ids, "hidden", hidden, rows);
  const CheckedStatsOptions checked(op, vocabulary, options);
  const TokenStatsTensors stats = new_stats(hidden, leading_shape(hidden), checked.real());
  const Tensor dense_hidden = torch::stable::contiguous(hidden);
  const Tensor dense_weight = weight.stride(1) == 1 ? weight : torch::stable::contiguous(weight);

  cpu::LinearStatsParams p{};
  fill(p, checked, vocabulary, stats);
  fill_lists(p, checked);
  p.noise_ids = int32_data(ids);
  p.parts = (vocabulary - 1) / cpu::LinearStatsParams::kPart + 1;
  const Tensor states = new_states(p, rows, hidden);
  p.rows = rows;
  p.hidden_size = static_cast<int32_t>(hidden.size(-1));
  p.hidden = dense_hidden.data_ptr(), p.hidden_type = storage_type(hidden);
  p.weight = dense_weight.data_ptr(), p.weight_type = storage_type(weight);
  p.weight_stride = dense_weight.stride(0);
  Tensor dense_bias;
  if (bias) {
    dense_bias = torch::stable::contiguous(*bias);
    p.bias = dense_bias.data_ptr(), p.bias_type = storage_type(dense_bias);
  }
  const Tensor packed = new_tensor(hidden, {p.packed_size()}, ScalarType::Float);
  p.packed = static_cast<float*>(packed.data_ptr());

  run_items(p.row_groups(), static_cast<double>(p.packed_size()),
            [&](int64_t begin, int64_t end) { cpu::pack_hidden(p, begin, end); });
  run_items(p.parts * p.row_groups(), 2.0 * rows * weight.numel(),
            [&](int64_t begin, int64_t end) { cpu::linear_token_states(p, begin, end); });
  cpu::token_results(p, 0, rows);
  return stats;
}

}  // namespace
}  // namespace dllm

STABLE_TORCH_LIBRARY_FRAGMENT(dllm_kernels, m) {
#define DLLM_STATS_RESULTS "(Tensor token, Tensor prob, Tensor margin, Tensor entropy, Tensor logsumexp)"
  m.def("token_stats(Tensor logits, " DLLM_STATS_OPTIONS
        ", Tensor? noise_ids=None, " DLLM_TOKEN_FILTER_OPTIONS ") -> " DLLM_STATS_RESULTS);
  m.def(
      "token_divergence(Tensor logits, Tensor previous, int[] suppress_tokens=[], int[] "
      "confidence_exclude=[], "
      "float confidence_temperature=1.0, bool float64=False) -> Tensor divergence");
  m.def("linear_token_stats(Tensor hidden, Tensor weight, Tensor? bias=None, " DLLM_STATS_OPTIONS
        ", Tensor? noise_ids=None) -> " DLLM_STATS_RESULTS);
  // The same through a library's product, for what no kernel of ours takes; implemented in Python.
  m.def("chunked_linear_token_stats(Tensor hidden, Tensor weight, Tensor? bias, " DLLM_STATS_OPTIONS
        ", Tensor? noise_ids=None) -> " DLLM_STATS_RESULTS);
}

STABLE_TORCH_LIBRARY_IMPL(dllm_kernels, CPU, m) {
  m.impl("token_stats", DLLM_BOX(dllm::token_stats));
  m.impl("token_divergence", TORCH_BOX(&dllm::token_divergence));
  m.impl("linear_token_stats", DLLM_BOX(dllm::linear_token_stats));
}
