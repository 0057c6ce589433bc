// Arguments of token_stats, commit_ and unmask_, checked once for CPU and CUDA.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "core/acceptance.h"
#include "torch/logits_arguments.h"

namespace dllm {

using TokenStatsTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// The lowest id that may be proposed.
inline int32_t lowest_allowed(const char* op, const std::vector<int32_t>& suppress,
                              const std::vector<int32_t>& exclude, int32_t vocabulary) {
  int32_t id = 0;
  while (std::binary_search(suppress.begin(), suppress.end(), id) ||
         std::binary_search(exclude.begin(), exclude.end(), id))
    id++;
  check(id < vocabulary, op, ": suppress_tokens and proposal_exclude leave no token to propose (vocabulary ",
        vocabulary, ")");
  return id;
}

inline void check_temperatures(const char* op, double temperature, double confidence_temperature) {
  check(std::isfinite(temperature) && temperature >= 0, op,
        ": temperature must be a finite number >= 0, got ", temperature);
  check(std::isfinite(confidence_temperature) && confidence_temperature > 0, op,
        ": confidence_temperature must be a finite number > 0, got ", confidence_temperature);
}

template <size_t n>
int name_index(const char* op, const char* argument, const std::string& name, const char* const (&names)[n]) {
  std::string allowed;
  for (size_t i = 0; i < n; i++) {
    if (name == names[i]) return static_cast<int>(i);
    allowed += std::string(i ? ", " : "") + names[i];
  }
  check(false, op, ": ", argument, " is '", name, "'; allowed: ", allowed);
  return 0;
}

inline Rule make_rule(const char* op, const std::string& name, double parameter, bool strict,
                      const std::string& confidence, double alg_temp) {
  const Rule rule{static_cast<RuleName>(name_index(op, "rule", name, kRuleNames)), parameter, strict,
                  static_cast<Confidence>(name_index(op, "confidence", confidence, kConfidenceNames)),
                  alg_temp};
  check(std::isfinite(parameter), op, ": the rule's parameter must be finite, got ", parameter);
  check(std::isfinite(alg_temp) && alg_temp >= 0, op, ": alg_temp must be a finite number >= 0, got ",
        alg_temp);
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

inline const int32_t* int32_data(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const int32_t*>(tensor->data_ptr()) : nullptr;
}

// int32 [..., 3] for every row of logits: sequence, position, step.
inline std::optional<Tensor> checked_noise_ids(const char* op, const std::optional<Tensor>& noise_ids,
                                               const Tensor& logits, int64_t rows) {
  if (!noise_ids) return std::nullopt;
  check_dtype(op, "noise_ids", *noise_ids, {ScalarType::Int});
  check_same_device(op, "noise_ids", *noise_ids, "logits", logits);
  check(noise_ids->dim() >= 1 && noise_ids->size(-1) == 3 && noise_ids->numel() == 3 * rows, op,
        ": noise_ids must be [", rows, ", 3] (sequence, position, step of each row of logits), got shape ",
        shape_text(*noise_ids));
  return torch::stable::contiguous(*noise_ids);
}

// The statistics as commit kernels read them: contiguous, one entry for each listed position.
inline TokenStatsTensors checked_stats(const char* op, const Tensor& canvas, const Tensor& positions,
                                       const Tensor& token, const Tensor& prob, const Tensor& margin,
                                       const Tensor& entropy) {
  check_dims(op, "positions", positions, 2, "[batch, candidates]");
  check_dtype(op, "positions", positions, {ScalarType::Int});
  check_same_device(op, "positions", positions, "canvas", canvas);
  check_size(op, "positions", positions, 0, canvas.size(0), "rows of canvas");
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
  return {contiguous("stats.token", token), contiguous("stats.prob", prob),
          contiguous("stats.margin", margin), contiguous("stats.entropy", entropy), prob};
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
inline void bar_mask(const char* op, int64_t mask_id, int32_t vocabulary,
                     std::vector<int64_t>& suppress_tokens, const std::vector<int64_t>& proposal_exclude) {
  check(mask_id < vocabulary, op, ": mask_id must lie between 0 and ", vocabulary - 1, ", got ", mask_id);
  if (std::find(proposal_exclude.begin(), proposal_exclude.end(), mask_id) == proposal_exclude.end())
    suppress_tokens.push_back(mask_id);
}

// What commit_ and unmask_ share.
struct CommitArguments {
  Rule rule;
  int64_t mask_id;
  uint64_t seed;
  std::optional<Tensor> quota, step, sequence_ids, progress;

  CommitArguments(const char* op, const Tensor& canvas, const Rule& rule, int64_t mask_id,
                  const std::optional<Tensor>& quota, const std::optional<Tensor>& step,
                  const std::optional<Tensor>& sequence_ids, int64_t seed,
                  const std::optional<Tensor>& progress)
      : rule(rule), mask_id(mask_id), seed(static_cast<uint64_t>(seed)), progress(progress) {
    check_dims(op, "canvas", canvas, 2, "[batch, length]");
    check_dtype(op, "canvas", canvas, {ScalarType::Long, ScalarType::Int});
    check_int(op, "the length of canvas", canvas.size(1));
    check(canvas.size(1) <= 1 || canvas.stride(1) == 1, op, ": canvas must be contiguous along its length");
    check(canvas.size(0) <= 1 || canvas.stride(0) >= canvas.size(1), op, ": rows of canvas must not overlap");
    check_int(op, "mask_id", mask_id);
    this->quota = per_row(op, "quota", quota, canvas);
    this->step = per_row(op, "step", step, canvas);
    this->sequence_ids = per_row(op, "sequence_ids", sequence_ids, canvas);
    const bool needs_quota = rule.name == RuleName::quota || rule.name == RuleName::quota_or_threshold;
    check(quota.has_value() == needs_quota, op, ": rule '", kRuleNames[static_cast<int>(rule.name)],
          needs_quota ? "' needs quota, int32 [batch]" : "' takes no quota");
    if (!progress) return;
    check_dtype(op, "progress", *progress, {ScalarType::Int});
    check_same_device(op, "progress", *progress, "canvas", canvas);
    check(progress->dim() == 2 && progress->size(0) == canvas.size(0) && progress->size(1) == 2 &&
              progress->is_contiguous(),
          op, ": progress must be contiguous [", canvas.size(0), ", 2], got shape ", shape_text(*progress));
  }
};

}  // namespace dllm
