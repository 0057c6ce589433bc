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
               int64_t rule, std::vector<double> parameters, bool strict, int64_t confidence, double alg_temp,
               int64_t mask_id, std::optional<Tensor> quota, std::optional<Tensor> step,
               std::optional<Tensor> sequence_ids, int64_t seed, std::optional<Tensor> progress,
               std::optional<Tensor> divergence, std::optional<Tensor> state) {
  constexpr const char* op = "commit_";
  const CommitArguments arguments(op, canvas, make_rule(op, rule, parameters, strict, confidence, alg_temp),
                                  mask_id, quota, step, sequence_ids, seed, progress, state);
  const CommitStats stats =
      checked_stats(op, arguments.rule, canvas, positions, token, prob, margin, entropy, divergence);
  check_commit_memory(op, canvas, progress, state, quota, step, sequence_ids,
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

Tensor unmask_(Tensor canvas, Tensor logits, Tensor block_start, int64_t rule, std::vector<double> parameters,
               bool strict, int64_t confidence, double alg_temp, int64_t mask_id, std::optional<Tensor> quota,
               std::optional<Tensor> step, std::optional<Tensor> sequence_ids, int64_t seed,
               std::optional<Tensor> progress, double temperature, std::vector<int64_t> suppress_tokens,
               std::vector<int64_t> proposal_exclude, std::vector<int64_t> confidence_exclude,
               double confidence_temperature, bool float64, std::optional<double> top_p,
               std::optional<int64_t> top_k) {
  constexpr const char* op = "unmask_";
  const Rule acceptance = make_rule(op, rule, parameters, strict, confidence, alg_temp);
  check_block_rule(op, acceptance);
  const CommitArguments arguments(op, canvas, acceptance, mask_id, quota, step, sequence_ids, seed, progress,
                                  std::nullopt);
  const auto starts = checked_starts(op, canvas, logits, block_start);
  check_commit_memory(op, canvas, progress, std::nullopt, quota, step, sequence_ids,
                      {{"logits", logits}, {"block_start", block_start}});
  check_quotas(op, int32_data(arguments.quota), canvas.size(0));
  const LogitsRows rows(op, logits);
  bar_mask(op, mask_id, rows.vocabulary, suppress_tokens, proposal_exclude);
  const TokenStatsOptions options(op, rows.vocabulary, temperature, seed, suppress_tokens, proposal_exclude,
                                  confidence_exclude, confidence_temperature, float64);
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
      if (id == mask_id) masked.push_back(row);
    }
  }
  const auto [token, prob, margin, entropy, logsumexp] =
      row_stats(rows, {batch, block}, &masked, noise_ids.data(), options, {op, top_p, top_k});
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
      "entropy, "
      "int rule, float[] parameters, bool strict, int confidence, float alg_temp, int mask_id, "
      "Tensor? quota=None, Tensor? step=None, Tensor? sequence_ids=None, int seed=0, "
      "Tensor(b!)? progress=None, Tensor? divergence=None, Tensor(c!)? state=None) -> Tensor accepted");
  m.def(
      "unmask_(Tensor(a!) canvas, Tensor logits, Tensor block_start, "
      "int rule, float[] parameters, bool strict, int confidence, float alg_temp, int mask_id, "
      "Tensor? quota=None, Tensor? step=None, Tensor? sequence_ids=None, int seed=0, "
      "Tensor(b!)? progress=None, float temperature=0.0, int[] suppress_tokens=[], int[] "
      "proposal_exclude=[], "
      "int[] confidence_exclude=[], float confidence_temperature=1.0, bool float64=False, "
      "float? top_p=None, int? top_k=None) -> Tensor accepted");
}

STABLE_TORCH_LIBRARY_IMPL(dllm_kernels, CompositeExplicitAutograd, m) {
  m.impl("rules", TORCH_BOX(&dllm::rules));
  m.impl("confidences", TORCH_BOX(&dllm::confidences));
}

STABLE_TORCH_LIBRARY_IMPL(dllm_kernels, CPU, m) {
  m.impl("commit_", TORCH_BOX(&dllm::commit_));
  m.impl("unmask_", TORCH_BOX(&dllm::unmask_));
}
