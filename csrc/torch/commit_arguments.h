// Arguments of commit_ and unmask_, checked once for CPU and CUDA.
#pragma once

#include <functional>
#include <iterator>
#include <optional>
#include <string>
#include <vector>

#include "core/params.h"
#include "torch/overlap.h"
#include "torch/token_stats_arguments.h"

namespace dllm {

// What a commit reads of token statistics.
struct CommitStats {
  Tensor token, prob, margin, entropy;
  std::optional<Tensor> divergence;
};

// Strings in a schema are never freed by torch's stable ABI, so that rules and confidences are numbers
// there: places in their tables.
template <class Table, class Name>
int checked_place(const char* op, const char* argument, int64_t place, const Table& table, Name name_of) {
  if (place >= 0 && place < static_cast<int64_t>(std::size(table))) return static_cast<int>(place);
  std::string allowed;
  for (const auto& entry : table)
    allowed += (allowed.empty() ? "" : ", ") + std::to_string(&entry - table) + " (" + name_of(entry) + ")";
  check(false, op, ": ", argument, " is ", place, "; allowed: ", allowed);
  return 0;
}

inline const RuleSignature& signature(const Rule& rule) { return kRules[static_cast<int>(rule.name)]; }

// What commit_ and unmask_ have in common, as callers give it.
struct CommitOptions {
  int64_t rule;
  std::vector<double> parameters;
  bool strict;
  int64_t confidence;
  double alg_temp;
  int64_t mask_id;
  std::optional<Tensor> quota, step, sequence_ids, progress;

  static CommitOptions from(ArgumentStack& stack) {
    return {.rule = stack.take<int64_t>(),
            .parameters = stack.take<std::vector<double>>(),
            .strict = stack.take<bool>(),
            .confidence = stack.take<int64_t>(),
            .alg_temp = stack.take<double>(),
            .mask_id = stack.take<int64_t>(),
            .quota = stack.take<std::optional<Tensor>>(),
            .step = stack.take<std::optional<Tensor>>(),
            .sequence_ids = stack.take<std::optional<Tensor>>(),
            .progress = stack.take<std::optional<Tensor>>()};
  }
};
#define DLLM_COMMIT_OPTIONS                                              \
  "int rule, float[] parameters, bool strict, int confidence, "          \
  "float alg_temp, int mask_id, Tensor? quota=None, Tensor? step=None, " \
  "Tensor? sequence_ids=None, Tensor(b!)? progress=None"

inline Rule make_rule(const char* op, const CommitOptions& options) {
  const std::vector<double>& parameters = options.parameters;
  const double alg_temp = options.alg_temp;
  const int rule_place =
      checked_place(op, "rule", options.rule, kRules, [](const RuleSignature& r) { return r.name; });
  const int kind = checked_place(op, "confidence", options.confidence, kConfidenceNames, std::identity());
  Rule rule{static_cast<RuleName>(rule_place), {}, options.strict, static_cast<Confidence>(kind), alg_temp};
  const char* name = signature(rule).name;

  const RuleParameter* expected = signature(rule).parameters;
  size_t count = 0;
  std::string names;
  for (; count < std::size(rule.parameters) && expected[count].name; count++)
    names += std::string(count ? ", " : "") + expected[count].name;
  check(parameters.size() == count, op, ": rule '", name, "' takes ", count, " numbers",
        count ? " (" + names + ")" : "", ", got ", parameters.size());
  for (size_t i = 0; i < count; i++) {
    const double value = rule.parameters[i] = parameters[i];
    const auto& [parameter, least, most, whole] = expected[i];
    check(std::isfinite(value), op, ": ", parameter, " is ", value, "; it must be a finite number");
    check(least <= value && value <= most && (!whole || value == std::floor(value)), op, ": ", parameter,
          " is ", value, "; it must be ", whole ? "an integer " : "", "from ", least, " to ", most);
  }
  check(std::isfinite(alg_temp) && alg_temp >= 0, op, ": alg_temp is ", alg_temp,
        "; it must be a finite number >= 0");
  check(alg_temp == 0 || rule.name == RuleName::quota, op,
        ": alg_temp draws the positions of a quota; rule '", name, "' has none");
  return rule;
}

// An optional int32 tensor with one number for each row; its contiguous form, or nothing.
inline std::optional<Tensor> per_row(const char* op, const char* name, const std::optional<Tensor>& tensor,
                                     const Tensor& canvas) {
  if (!tensor) return std::nullopt;
  check_dtype(op, name, *tensor, {ScalarType::Int});
  check_same_device(op, name, *tensor, "canvas", canvas);
  check(tensor->dim() == 1 && tensor->size(0) == canvas.size(0), op, ": ", name, " must be [", canvas.size(0),
        "] (rows of canvas), got shape ", shape_text(*tensor));
  return torch::stable::contiguous(*tensor);
}

// The statistics as commit kernels read them: contiguous, one entry for each listed position.
inline CommitStats checked_stats(const char* op, const Rule& rule, const Tensor& canvas,
                                 const Tensor& positions, const Tensor& token, const Tensor& prob,
                                 const Tensor& margin, const Tensor& entropy,
                                 const std::optional<Tensor>& divergence) {
  check_dims(op, "positions", positions, 2, "[batch, candidates]");
  check_dtype(op, "positions", positions, {ScalarType::Int});
  check_same_device(op, "positions", positions, "canvas", canvas);
  check_size(op, "positions", positions, 0, canvas.size(0), "rows of canvas");
  check_int(op, "the positions of a row", positions.size(1));
  check_dtype(op, "stats.token", token, {ScalarType::Long});
  check_dtype(op, "stats.prob", prob, {ScalarType::Float, ScalarType::Double});
  check_same_dtype(op, "stats.margin", margin, "stats.prob", prob);
  check_same_dtype(op, "stats.entropy", entropy, "stats.prob", prob);
  const auto contiguous = [&](const char* name, const Tensor& tensor) {
    check_same_device(op, name, tensor, "canvas", canvas);
    check(tensor.numel() == positions.numel(), op, ": ", name, " must have one entry for each of the ",
          positions.numel(), " positions, got shape ", shape_text(tensor));
    return torch::stable::contiguous(tensor);
  };
  CommitStats stats{contiguous("stats.token", token), contiguous("stats.prob", prob),
                    contiguous("stats.margin", margin), contiguous("stats.entropy", entropy), std::nullopt};
  const bool needs_divergence = signature(rule).needs == Needs::stability;
  check(divergence.has_value() == needs_divergence, op, ": rule '", signature(rule).name,
        needs_divergence ? "' needs stats.divergence, which token_stats(previous=...) gives"
                         : "' takes no stats.divergence");
  if (divergence) {
    check_same_dtype(op, "stats.divergence", *divergence, "stats.prob", prob);
    stats.divergence = contiguous("stats.divergence", *divergence);
  }
  return stats;
}

// Shapes of unmask_; returns block_start, contiguous.
inline Tensor checked_starts(const char* op, const Tensor& canvas, const Tensor& logits,
                             const Tensor& block_start) {
  check_dims(op, "logits", logits, 3, "[batch, block_size, vocabulary]");
  check_same_device(op, "logits", logits, "canvas", canvas);
  check_size(op, "logits", logits, 0, canvas.size(0), "rows of canvas");
  check(logits.size(1) <= canvas.size(1), op, ": the block of logits (", logits.size(1),
        ") must not be longer than canvas (", canvas.size(1), ")");
  return *per_row(op, "block_start", block_start, canvas);
}

// The mask token is never a candidate: out of argmax and softmax, or, if a caller bars it from the
// proposal himself (parity with references that leave it in the softmax), out of the argmax only.
inline void bar_mask(const char* op, int64_t mask_id, int32_t vocabulary, StatsOptions& options) {
  const std::vector<int64_t>& barred = options.proposal_exclude;
  check(mask_id < vocabulary, op, ": mask_id must lie between 0 and ", vocabulary - 1, ", got ", mask_id);
  if (std::find(barred.begin(), barred.end(), mask_id) == barred.end())
    options.suppress_tokens.push_back(mask_id);
}

// Rows of a canvas, or of what lies beside it.
inline void check_contiguous_rows(const char* op, const char* name, const Tensor& tensor) {
  check(tensor.size(1) <= 1 || tensor.stride(1) == 1, op, ": ", name, " must be contiguous along its length");
}

// Rules that judge more than one step's logits of masked positions.
inline void check_block_rule(const char* op, const Rule& rule) {
  check(rule.name != RuleName::edit, op, ": rule 'edit' must not list the prompt, and a block may hold some ",
        "of it; use token_stats and commit_");
  check(signature(rule).needs != Needs::stability, op, ": rule '", signature(rule).name,
        "' compares with the logits of the step before; use token_stats(previous=...) and commit_");
}

// What commit_ and unmask_ share.
struct CommitArguments {
  Rule rule;
  int64_t mask_id;
  uint64_t seed;
  std::optional<Tensor> quota, step, sequence_ids, progress, state;

  CommitArguments(const char* op, const Tensor& canvas, const Rule& rule, const CommitOptions& options,
                  int64_t seed, const std::optional<Tensor>& state)
      : rule(rule),
        mask_id(options.mask_id),
        seed(static_cast<uint64_t>(seed)),
        progress(options.progress),
        state(state) {
    check_dims(op, "canvas", canvas, 2, "[batch, length]");
    check_dtype(op, "canvas", canvas, {ScalarType::Long, ScalarType::Int});
    check_int(op, "the rows of canvas", canvas.size(0));
    check_int(op, "the length of canvas", canvas.size(1));
    check_contiguous_rows(op, "canvas", canvas);
    check_int(op, "mask_id", mask_id);
    quota = per_row(op, "quota", options.quota, canvas);
    step = per_row(op, "step", options.step, canvas);
    sequence_ids = per_row(op, "sequence_ids", options.sequence_ids, canvas);
    const auto& [name, needs, parameters] = signature(rule);
    const bool needs_quota = needs == Needs::quota, needs_state = needs == Needs::stability;
    check(quota.has_value() == needs_quota, op, ": rule '", name,
          needs_quota ? "' needs quota, int32 [batch]" : "' takes no quota");
    check(step || needs != Needs::step, op, ": rule '", name, "' needs step, int32 [batch]");
    check(state.has_value() == needs_state, op, ": rule '", name,
          needs_state ? "' needs state, int32 [batch, length]" : "' keeps no state; leave state None");
    if (progress) {
      check_dtype(op, "progress", *progress, {ScalarType::Int});
      check_same_device(op, "progress", *progress, "canvas", canvas);
      check(progress->dim() == 2 && progress->size(0) == canvas.size(0) && progress->size(1) == 2 &&
                progress->is_contiguous(),
            op, ": progress must be contiguous [", canvas.size(0), ", 2], got shape ", shape_text(*progress),
            progress->is_contiguous() ? "" : ", not contiguous");
    }
    if (state) {
      check_dtype(op, "state", *state, {ScalarType::Int});
      check_same_device(op, "state", *state, "canvas", canvas);
      check(state->dim() == 2 && state->size(0) == canvas.size(0) && state->size(1) == canvas.size(1), op,
            ": state must have the shape of canvas (", shape_text(canvas), "), got ", shape_text(*state));
      check_contiguous_rows(op, "state", *state);
    }
  }
};

// Of commit_ and unmask_; `others` is what one of them reads besides.
inline void check_commit_memory(const char* op, const Tensor& canvas, const CommitOptions& options,
                                const std::optional<Tensor>& state, std::vector<Argument> others) {
  others.insert(others.end(),
                {{"quota", options.quota}, {"step", options.step}, {"sequence_ids", options.sequence_ids}});
  check_written(op, {{"canvas", canvas}, {"progress", options.progress}, {"state", state}}, others);
}

// For the kernels of either device; the caller adds where the candidates are.
inline CommitParams commit_params(const CommitArguments& arguments, const Tensor& canvas, int64_t candidates,
                                  const CommitStats& stats, const Tensor& accepted) {
  CommitParams p{};
  p.rule = arguments.rule;
  p.mask_id = arguments.mask_id;
  p.batch = static_cast<int>(canvas.size(0));
  p.candidates = static_cast<int>(candidates);
  p.canvas_stride = canvas.stride(0);
  p.length = canvas.size(1);
  p.canvas = canvas.data_ptr();
  p.canvas_is_int64 = canvas.scalar_type() == ScalarType::Long;
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
  return p;
}

}  // namespace dllm
