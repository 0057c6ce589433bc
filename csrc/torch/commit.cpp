// commit_ and unmask_: schemas, and the CPU kernels behind them.
#include "torch/commit_arguments.h"

#include <torch/csrc/stable/library.h>

#include "cpu/commit.h"
#include "torch/index_checks.h"

namespace dllm {
namespace {

// Writes `accepted` [batch, candidates]; positions are checked.
Tensor commit_rows(const CommitArguments& arguments, const Tensor& canvas, const int32_t* positions,
                   int64_t candidates, const CommitStats& stats) {
  Tensor accepted = new_tensor(canvas, {canvas.size(0), candidates}, ScalarType::Bool);
  CommitParams p = commit_params(arguments, canvas, candidates, stats, accepted);
  p.positions = positions;
  torch::stable::parallel_for(0, p.batch, 16,
                              [&](int64_t begin, int64_t end) { cpu::commit(p, begin, end); });
  return accepted;
}

Tensor commit_(Tensor canvas, Tensor positions, Tensor token, Tensor prob, Tensor margin, Tensor entropy,
               CommitOptions options, int64_t seed, std::optional<Tensor> divergence,
               std::optional<Tensor> state) {
  constexpr const char* op = "commit_";
  const CommitArguments arguments(op, canvas, make_rule(op, options), options, seed, state);
  const CommitStats stats =
      checked_stats(op, arguments.rule, canvas, positions, token, prob, margin, entropy, divergence);
  check_commit_memory(op, canvas, options, state,
                      {{"positions", positions},
                       {"stats.token", token},
                       {"stats.prob", prob},
                       {"stats.margin", margin},
                       {"stats.entropy", entropy},
                       {"stats.divergence", divergence}});
  const Tensor listed = torch::stable::contiguous(positions);
  const auto* data = static_cast<const int32_t*>(listed.data_ptr());
  check_candidates(op, data, canvas.size(0), positions.size(1), canvas.size(1));
  check_quotas(op, int32_data(arguments.quota), canvas.size(0));
  const auto* tokens = static_cast<const int64_t*>(stats.token.data_ptr());
  const int64_t largest = canvas.scalar_type() == ScalarType::Long ? INT64_MAX : INT32_MAX;
  for (int64_t i = 0; i < positions.numel(); i++)
    check(data[i] < 0 || (tokens[i] >= 0 && tokens[i] <= largest), op,
          ": stats.token must be a token id, got ", tokens[i]);
  return commit_rows(arguments, canvas, data, positions.size(1), stats);
}

Tensor unmask_(Tensor canvas, Tensor logits, Tensor block_start, CommitOptions options,
               StatsOptions stats_options, TokenFilterOptions filter) {
  constexpr const char* op = "unmask_";
  const Rule rule = make_rule(op, options);
  check_block_rule(op, rule);
  const CommitArguments arguments(op, canvas, rule, options, stats_options.seed, std::nullopt);
  const auto starts = checked_starts(op, canvas, logits, block_start);
  check_commit_memory(op, canvas, options, std::nullopt, {{"logits", logits}, {"block_start", block_start}});
  check_quotas(op, int32_data(arguments.quota), canvas.size(0));
  const LogitsRows rows(op, logits);
  bar_mask(op, arguments.mask_id, rows.vocabulary, stats_options);
  const CheckedStatsOptions checked(op, rows.vocabulary, stats_options);
  filter.check_range(op);
  const int64_t batch = canvas.size(0), block = logits.size(1), length = canvas.size(1);
  const bool wide = canvas.scalar_type() == ScalarType::Long;
  const auto* start = static_cast<const int32_t*>(starts.data_ptr());
  check_block_starts(op, start, batch, block, length);
  std::vector<int32_t> positions(batch * block), noise_ids(3 * batch * block);
  std::vector<int64_t> masked;  // only these rows of logits are read
  for (int64_t b = 0; b < batch; b++) {
    for (int64_t i = 0; i < block; i++) {
      const int64_t row = b * block + i, position = start[b] + i, at = b * canvas.stride(0) + position;
      const int64_t id = wide ? static_cast<const int64_t*>(canvas.data_ptr())[at]
                              : static_cast<const int32_t*>(canvas.data_ptr())[at];
      positions[row] = static_cast<int32_t>(position);
      noise_ids[3 * row] =
          arguments.sequence_ids ? int32_data(arguments.sequence_ids)[b] : static_cast<int32_t>(b);
      noise_ids[3 * row + 1] = static_cast<int32_t>(position);
      noise_ids[3 * row + 2] = arguments.step ? int32_data(arguments.step)[b] : 0;
      if (id == arguments.mask_id) masked.push_back(row);
    }
  }
  const auto [token, prob, margin, entropy, logsumexp] =
      row_stats(rows, {batch, block}, &masked, noise_ids.data(), checked, filter);
  return commit_rows(arguments, canvas, positions.data(), block, {token, prob, margin, entropy, {}});
}

// A line for each rule: its name and those of its numbers.
std::string rules() {
  std::string text;
  for (const RuleSignature& rule : kRules) {
    text += rule.name;
    for (const RuleParameter& parameter : rule.parameters)
      if (parameter.name) text += std::string(" ") + parameter.name;
    text += "\n";
  }
  return text;
}

std::string confidences() {
  std::string text;
  for (const char* name : kConfidenceNames) text += std::string(name) + "\n";
  return text;
}

}  // namespace
}  // namespace dllm

STABLE_TORCH_LIBRARY_FRAGMENT(dllm_kernels, m) {
  // What the numbers `rule` and `confidence` stand for, in their order.
  m.def("rules() -> str");
  m.def("confidences() -> str");
  m.def(
      "commit_(Tensor(a!) canvas, Tensor positions, Tensor token, Tensor prob, Tensor margin, Tensor "
      "entropy, " DLLM_COMMIT_OPTIONS
      ", int seed=0, Tensor? divergence=None, Tensor(c!)? state=None) -> Tensor accepted");
  m.def("unmask_(Tensor(a!) canvas, Tensor logits, Tensor block_start, " DLLM_COMMIT_OPTIONS
        ", " DLLM_STATS_OPTIONS ", " DLLM_TOKEN_FILTER_OPTIONS ") -> Tensor accepted");
}

STABLE_TORCH_LIBRARY_IMPL(dllm_kernels, CompositeExplicitAutograd, m) {
  m.impl("rules", TORCH_BOX(&dllm::rules));
  m.impl("confidences", TORCH_BOX(&dllm::confidences));
}

STABLE_TORCH_LIBRARY_IMPL(dllm_kernels, CPU, m) {
  m.impl("commit_", DLLM_BOX(dllm::commit_));
  m.impl("unmask_", DLLM_BOX(dllm::unmask_));
}
