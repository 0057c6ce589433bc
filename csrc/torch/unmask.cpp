// token_stats, commit_ and unmask_: schemas, and the CPU kernels behind them.
#include "torch/unmask.h"

#include <torch/csrc/stable/library.h>

#include <numeric>

#include "cpu/commit.h"
#include "cpu/token_stats.h"

namespace dllm {
namespace {

cpu::LogitType logit_type(ScalarType type) {
  return type == ScalarType::Float      ? cpu::LogitType::float32
         : type == ScalarType::BFloat16 ? cpu::LogitType::bfloat16
                                        : cpu::LogitType::float16;
}

// Statistics of the rows listed in `visited`; the outputs of other rows stay unwritten.
TokenStatsTensors row_stats(const char* op, const LogitsRows& logits, const std::vector<int64_t>& shape,
                            const std::vector<int64_t>& visited, double temperature, int64_t seed,
                            const int32_t* noise_ids, const std::vector<int64_t>& suppress_tokens,
                            const std::vector<int64_t>& proposal_exclude,
                            const std::vector<int64_t>& confidence_exclude, double confidence_temperature,
                            bool float64) {
  check_temperatures(op, temperature, confidence_temperature);
  const auto suppress = token_ids(op, "suppress_tokens", suppress_tokens, logits.vocabulary);
  const auto unproposed = token_ids(op, "proposal_exclude", proposal_exclude, logits.vocabulary);
  const auto uncounted = token_ids(op, "confidence_exclude", confidence_exclude, logits.vocabulary);
  const ScalarType real = float64 ? ScalarType::Double : ScalarType::Float;
  Tensor token = new_tensor(logits.tensor, shape, ScalarType::Long);
  Tensor prob = new_tensor(logits.tensor, shape, real), margin = new_tensor(logits.tensor, shape, real);
  Tensor entropy = new_tensor(logits.tensor, shape, real), logsumexp = new_tensor(logits.tensor, shape, real);

  cpu::TokenStatsParams p{};
  p.logits = logits.tensor.data_ptr();
  p.type = logit_type(logits.tensor.scalar_type());
  p.inner = logits.inner, p.outer_stride = logits.outer_stride, p.inner_stride = logits.inner_stride;
  p.vocabulary = logits.vocabulary;
  p.rows = visited.data();
  p.float64 = float64;
  p.temperature = static_cast<float>(temperature);
  p.seed = static_cast<uint64_t>(seed);
  p.noise_ids = noise_ids;
  p.confidence_scale = static_cast<float>(1 / confidence_temperature);
  p.suppress = {suppress.data(), static_cast<int>(suppress.size())};
  p.proposal_exclude = {unproposed.data(), static_cast<int>(unproposed.size())};
  p.confidence_exclude = {uncounted.data(), static_cast<int>(uncounted.size())};
  p.fallback = lowest_allowed(op, suppress, unproposed, logits.vocabulary);
  const int64_t items = static_cast<int64_t>(visited.size()) * p.ranges();
  std::vector<char> states(items * (float64 ? sizeof(TokenState<double>) : sizeof(TokenState<float>)));
  p.states = states.data();
  p.token = static_cast<int64_t*>(token.data_ptr());
  p.prob = prob.data_ptr(), p.margin = margin.data_ptr();
  p.entropy = entropy.data_ptr(), p.logsumexp = logsumexp.data_ptr();

  torch::stable::parallel_for(0, items, 1,
                              [&](int64_t begin, int64_t end) { cpu::token_states(p, begin, end); });
  cpu::token_results(p, 0, visited.size());
  return {token, prob, margin, entropy, logsumexp};
}

TokenStatsTensors token_stats(Tensor logits, double temperature, int64_t seed,
                              std::optional<Tensor> noise_ids, std::vector<int64_t> suppress_tokens,
                              std::vector<int64_t> proposal_exclude, std::vector<int64_t> confidence_exclude,
                              double confidence_temperature, bool float64) {
  constexpr const char* op = "token_stats";
  const LogitsRows rows(op, logits);
  const auto given_ids = checked_noise_ids(op, noise_ids, logits, rows.rows);
  std::vector<int64_t> all(rows.rows);
  std::iota(all.begin(), all.end(), 0);
  std::vector<int32_t> row_ids(given_ids || temperature == 0 ? 0 : 3 * rows.rows);  // (0, row, 0)
  for (size_t row = 0; row < row_ids.size() / 3; row++) row_ids[3 * row + 1] = static_cast<int32_t>(row);
  return row_stats(op, rows, leading_shape(logits), all, temperature, seed,
                   given_ids ? int32_data(given_ids) : row_ids.data(), suppress_tokens, proposal_exclude,
                   confidence_exclude, confidence_temperature, float64);
}

// Writes `accepted` [batch, candidates]; positions are checked.
Tensor commit_rows(const CommitArguments& arguments, const Tensor& canvas, const int32_t* positions,
                   int64_t candidates, const CommitStats& stats) {
  const int64_t batch = canvas.size(0);
  Tensor accepted = new_tensor(canvas, {batch, candidates}, ScalarType::Bool);
  cpu::CommitParams p{};
  p.rule = arguments.rule;
  p.mask_id = arguments.mask_id;
  p.batch = static_cast<int>(batch);
  p.candidates = static_cast<int>(candidates);
  p.canvas_stride = canvas.stride(0);
  p.canvas = canvas.data_ptr();
  p.canvas_is_int64 = canvas.scalar_type() == ScalarType::Long;
  p.positions = positions;
  p.token = static_cast<const int64_t*>(stats.token.data_ptr());
  p.prob = stats.prob.data_ptr(), p.margin = stats.margin.data_ptr(), p.entropy = stats.entropy.data_ptr();
  p.divergence = stats.divergence ? stats.divergence->data_ptr() : nullptr;
  p.float64 = stats.prob.scalar_type() == ScalarType::Double;
  p.quota = int32_data(arguments.quota);
  p.step = int32_data(arguments.step);
  p.sequence_ids = int32_data(arguments.sequence_ids);
  p.seed = arguments.seed;
  if (arguments.state) {
    p.state = static_cast<int32_t*>(arguments.state->data_ptr());
    p.state_stride = arguments.state->stride(0);
  }
  p.accepted = static_cast<bool*>(accepted.data_ptr());
  p.progress = arguments.progress ? static_cast<int32_t*>(arguments.progress->data_ptr()) : nullptr;
  torch::stable::parallel_for(0, batch, 16, [&](int64_t begin, int64_t end) { cpu::commit(p, begin, end); });
  return accepted;
}

void check_position_contents(const char* op, const int32_t* positions, int64_t batch, int64_t candidates,
                             int64_t length) {
  std::vector<bool> seen(length);
  for (int64_t b = 0; b < batch; b++) {
    seen.assign(length, false);
    for (int64_t c = 0; c < candidates; c++) {
      const int32_t position = positions[b * candidates + c];
      check(position >= -1 && position < length, op, ": positions[", b, ", ", c, "] must lie between -1 and ",
            length - 1, ", got ", position);
      if (position < 0) continue;
      check(!seen[position], op, ": positions[", b, "] lists ", position, " twice");
      seen[position] = true;
    }
  }
}

void check_quota_contents(const char* op, const CommitArguments& arguments) {
  if (!arguments.quota) return;
  for (int64_t b = 0; b < arguments.quota->size(0); b++)
    check(int32_data(arguments.quota)[b] >= 0, op, ": quota[", b, "] must be >= 0, got ",
          int32_data(arguments.quota)[b]);
}

Tensor commit_(Tensor canvas, Tensor positions, Tensor token, Tensor prob, Tensor margin, Tensor entropy,
               std::string rule, std::vector<double> parameters, bool strict, std::string confidence,
               double alg_temp, int64_t mask_id, std::optional<Tensor> quota, std::optional<Tensor> step,
               std::optional<Tensor> sequence_ids, int64_t seed, std::optional<Tensor> progress,
               std::optional<Tensor> divergence, std::optional<Tensor> state) {
  constexpr const char* op = "commit_";
  const CommitArguments arguments(op, canvas, make_rule(op, rule, parameters, strict, confidence, alg_temp),
                                  mask_id, quota, step, sequence_ids, seed, progress, state);
  const CommitStats stats =
      checked_stats(op, arguments.rule, canvas, positions, token, prob, margin, entropy, divergence);
  const Tensor listed = torch::stable::contiguous(positions);
  const auto* data = static_cast<const int32_t*>(listed.data_ptr());
  check_position_contents(op, data, canvas.size(0), positions.size(1), canvas.size(1));
  check_quota_contents(op, arguments);
  const auto* tokens = static_cast<const int64_t*>(stats.token.data_ptr());
  const int64_t largest = canvas.scalar_type() == ScalarType::Long ? INT64_MAX : INT32_MAX;
  for (int64_t i = 0; i < positions.numel(); i++)
    check(data[i] < 0 || (tokens[i] >= 0 && tokens[i] <= largest), op,
          ": stats.token must be a token id, got ", tokens[i]);
  return commit_rows(arguments, canvas, data, positions.size(1), stats);
}

Tensor unmask_(Tensor canvas, Tensor logits, Tensor block_start, std::string rule,
               std::vector<double> parameters, bool strict, std::string confidence, double alg_temp,
               int64_t mask_id, std::optional<Tensor> quota, std::optional<Tensor> step,
               std::optional<Tensor> sequence_ids, int64_t seed, std::optional<Tensor> progress,
               double temperature, std::vector<int64_t> suppress_tokens,
               std::vector<int64_t> proposal_exclude, std::vector<int64_t> confidence_exclude,
               double confidence_temperature, bool float64) {
  constexpr const char* op = "unmask_";
  const Rule acceptance = make_rule(op, rule, parameters, strict, confidence, alg_temp);
  check_block_rule(op, acceptance);
  const CommitArguments arguments(op, canvas, acceptance, mask_id, quota, step, sequence_ids, seed, progress,
                                  std::nullopt);
  const auto starts = checked_starts(op, canvas, logits, block_start);
  check_quota_contents(op, arguments);
  const LogitsRows rows(op, logits);
  bar_mask(op, mask_id, rows.vocabulary, suppress_tokens, proposal_exclude);
  const int64_t batch = canvas.size(0), block = logits.size(1), length = canvas.size(1);
  const bool wide = canvas.scalar_type() == ScalarType::Long;
  const auto* start = static_cast<const int32_t*>(starts.data_ptr());
  std::vector<int32_t> positions(batch * block), noise_ids(3 * batch * block);
  std::vector<int64_t> masked;  // only these rows of logits are read
  for (int64_t b = 0; b < batch; b++) {
    check(start[b] >= 0 && start[b] + block <= length, op, ": block_start[", b, "] must lie between 0 and ",
          length - block, ", got ", start[b]);
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
      row_stats(op, rows, {batch, block}, masked, temperature, seed, noise_ids.data(), suppress_tokens,
                proposal_exclude, confidence_exclude, confidence_temperature, float64);
  return commit_rows(arguments, canvas, positions.data(), block, {token, prob, margin, entropy, {}});
}

}  // namespace
}  // namespace dllm

STABLE_TORCH_LIBRARY_FRAGMENT(dllm_kernels, m) {
  m.def(
      "token_stats(Tensor logits, float temperature=0.0, int seed=0, Tensor? noise_ids=None, "
      "int[] suppress_tokens=[], int[] proposal_exclude=[], int[] confidence_exclude=[], "
      "float confidence_temperature=1.0, bool float64=False) -> "
      "(Tensor token, Tensor prob, Tensor margin, Tensor entropy, Tensor logsumexp)");
  m.def(
      "commit_(Tensor(a!) canvas, Tensor positions, Tensor token, Tensor prob, Tensor margin, Tensor "
      "entropy, "
      "str rule, float[] parameters, bool strict, str confidence, float alg_temp, int mask_id, "
      "Tensor? quota=None, Tensor? step=None, Tensor? sequence_ids=None, int seed=0, "
      "Tensor(b!)? progress=None, Tensor? divergence=None, Tensor(c!)? state=None) -> Tensor accepted");
  m.def(
      "unmask_(Tensor(a!) canvas, Tensor logits, Tensor block_start, "
      "str rule, float[] parameters, bool strict, str confidence, float alg_temp, int mask_id, "
      "Tensor? quota=None, Tensor? step=None, Tensor? sequence_ids=None, int seed=0, "
      "Tensor(b!)? progress=None, float temperature=0.0, int[] suppress_tokens=[], int[] "
      "proposal_exclude=[], "
      "int[] confidence_exclude=[], float confidence_temperature=1.0, bool float64=False) -> Tensor "
      "accepted");
}

STABLE_TORCH_LIBRARY_IMPL(dllm_kernels, CPU, m) {
  m.impl("token_stats", TORCH_BOX(&dllm::token_stats));
  m.impl("commit_", TORCH_BOX(&dllm::commit_));
  m.impl("unmask_", TORCH_BOX(&dllm::unmask_));
}
