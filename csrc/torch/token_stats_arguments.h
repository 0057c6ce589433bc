// Arguments of token_stats and its relatives, checked once for CPU and CUDA.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "torch/boxing.h"
#include "torch/logits_arguments.h"

namespace dllm {

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

// 1 / confidence_temperature; float kernels round it.
inline double confidence_scale(const char* op, double confidence_temperature) {
  check(std::isfinite(confidence_temperature) && confidence_temperature > 0, op,
        ": confidence_temperature must be a finite number > 0, got ", confidence_temperature);
  const auto scale = static_cast<float>(1 / confidence_temperature);
  check(std::isfinite(scale) && scale > 0, op,
        ": confidence_temperature and its inverse must lie within the ", "range of float32, got ",
        confidence_temperature);
  return 1 / confidence_temperature;
}

// The options that token_stats, linear_token_stats and unmask_ have in common, as callers give them.
struct StatsOptions {
  double temperature;
  int64_t seed;
  std::vector<int64_t> suppress_tokens, proposal_exclude, confidence_exclude;
  double confidence_temperature;
  bool float64;

  static StatsOptions from(ArgumentStack& stack) {
    return {.temperature = stack.take<double>(),
            .seed = stack.take<int64_t>(),
            .suppress_tokens = stack.take<std::vector<int64_t>>(),
            .proposal_exclude = stack.take<std::vector<int64_t>>(),
            .confidence_exclude = stack.take<std::vector<int64_t>>(),
            .confidence_temperature = stack.take<double>(),
            .float64 = stack.take<bool>()};
  }
};
#define DLLM_STATS_OPTIONS                                        \
  "float temperature=0.0, int seed=0, int[] suppress_tokens=[], " \
  "int[] proposal_exclude=[], int[] confidence_exclude=[], "      \
  "float confidence_temperature=1.0, bool float64=False"

// The same, checked for a vocabulary; lists of ids are ascending and distinct.
struct CheckedStatsOptions {
  float temperature;
  double confidence_scale;
  uint64_t seed;
  std::vector<int32_t> suppress, proposal_exclude, confidence_exclude;
  int32_t fallback;
  bool float64;

  CheckedStatsOptions(const char* op, int32_t vocabulary, const StatsOptions& options)
      : temperature(static_cast<float>(options.temperature)),
        confidence_scale(dllm::confidence_scale(op, options.confidence_temperature)),
        seed(static_cast<uint64_t>(options.seed)),
        suppress(token_ids(op, "suppress_tokens", options.suppress_tokens, vocabulary)),
        proposal_exclude(token_ids(op, "proposal_exclude", options.proposal_exclude, vocabulary)),
        confidence_exclude(token_ids(op, "confidence_exclude", options.confidence_exclude, vocabulary)),
        fallback(lowest_allowed(op, suppress, proposal_exclude, vocabulary)),
        float64(options.float64) {
    check(std::isfinite(temperature) && options.temperature >= 0, op,
          ": temperature must be a finite number >= 0, got ", options.temperature);
  }

  ScalarType real() const { return float64 ? ScalarType::Double : ScalarType::Float; }
};

// token, prob, margin, entropy, logsumexp
using TokenStatsTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

inline TokenStatsTensors new_stats(const Tensor& like, const std::vector<int64_t>& shape, ScalarType real) {
  return {new_tensor(like, shape, ScalarType::Long), new_tensor(like, shape, real),
          new_tensor(like, shape, real), new_tensor(like, shape, real), new_tensor(like, shape, real)};
}

// Into the parameters of a kernel, on CPU or CUDA; the lists of ids are left to the caller.
template <class Params>
void fill(Params& p, const CheckedStatsOptions& options, int32_t vocabulary, const TokenStatsTensors& stats) {
  const auto& [token, prob, margin, entropy, logsumexp] = stats;
  p.vocabulary = vocabulary;
  p.float64 = options.float64;
  p.temperature = options.temperature;
  p.seed = options.seed;
  p.confidence_scale = static_cast<float>(options.confidence_scale);
  p.confidence_scale64 = options.confidence_scale;
  p.fallback = options.fallback;
  p.token = static_cast<int64_t*>(token.data_ptr());
  p.prob = prob.data_ptr(), p.margin = margin.data_ptr();
  p.entropy = entropy.data_ptr(), p.logsumexp = logsumexp.data_ptr();
}

inline const int32_t* int32_data(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const int32_t*>(tensor->data_ptr()) : nullptr;
}

// int32 [..., 3] for every row: sequence, position, step.
inline std::optional<Tensor> checked_noise_ids(const char* op, const std::optional<Tensor>& noise_ids,
                                               const char* rows_name, const Tensor& rows_of, int64_t rows) {
  if (!noise_ids) return std::nullopt;
  check_dtype(op, "noise_ids", *noise_ids, {ScalarType::Int});
  check_same_device(op, "noise_ids", *noise_ids, rows_name, rows_of);
  check(noise_ids->dim() >= 1 && noise_ids->size(-1) == 3 && noise_ids->numel() == 3 * rows, op,
        ": noise_ids must be [", rows, ", 3] (sequence, position, step of each row of ", rows_name,
        "), got shape ", shape_text(*noise_ids));
  return torch::stable::contiguous(*noise_ids);
}

// Of linear_token_stats: hidden · weightᵀ + bias.
inline void check_product(const char* op, const Tensor& hidden, const Tensor& weight,
                          const std::optional<Tensor>& bias) {
  check(hidden.dim() >= 1, op, ": hidden must be [..., hidden_size], got shape ", shape_text(hidden));
  check_float(op, "hidden", hidden);
  check_dims(op, "weight", weight, 2, "[vocabulary, hidden_size]");
  check_float(op, "weight", weight);
  check_same_device(op, "weight", weight, "hidden", hidden);
  check_size(op, "weight", weight, 1, hidden.size(-1), "the hidden size of hidden");
  check_int(op, "the hidden size", hidden.size(-1));
  check_vocabulary(op, "weight", weight.size(0));
  check(hidden.size(-1) > 0, op, ": the hidden size must be positive, got shape ", shape_text(hidden));
  if (!bias) return;
  check_dims(op, "bias", *bias, 1, "[vocabulary]");
  check_float(op, "bias", *bias);
  check_same_device(op, "bias", *bias, "hidden", hidden);
  check_size(op, "bias", *bias, 0, weight.size(0), "the vocabulary of weight");
}

// The filters top_p and top_k; absent: nothing is filtered.
struct TokenFilterOptions {
  std::optional<double> top_p;
  std::optional<int64_t> top_k;

  static TokenFilterOptions from(ArgumentStack& stack) {
    return {.top_p = stack.take<std::optional<double>>(), .top_k = stack.take<std::optional<int64_t>>()};
  }
  void check_range(const char* op) const {
    check(!top_p || (*top_p >= 0 && *top_p <= 1), op, ": top_p must be None or lie between 0 and 1, got ",
          top_p.value_or(0));
    check(!top_k || *top_k >= 1, op, ": top_k must be None or >= 1, got ", top_k.value_or(0));
  }
  bool keeps_all(int32_t vocabulary) const {
    return top_p.value_or(1) == 1 && top_k.value_or(vocabulary) >= vocabulary;
  }
};
#define DLLM_TOKEN_FILTER_OPTIONS "float? top_p=None, int? top_k=None"

// cuts: the workspace that the filters need.
template <class Params>
void fill(Params& p, const TokenFilterOptions& filter, TokenCut* cuts) {
  p.top_p = filter.top_p.value_or(1);
  p.top_k = static_cast<int32_t>(std::min<int64_t>(filter.top_k.value_or(INT32_MAX), INT32_MAX));
  p.cuts = cuts;
}

// Of token_divergence, whose texts speak of token_stats: what its callers call.
struct TokenDivergenceArguments {
  LogitsRows rows, previous;
  std::vector<int32_t> suppress, confidence_exclude;
  double scale;

  TokenDivergenceArguments(const char* op, const Tensor& logits, const Tensor& previous,
                           const std::vector<int64_t>& suppress_tokens,
                           const std::vector<int64_t>& confidence_exclude, double confidence_temperature)
      : rows(op, logits),
        previous(op, checked(op, logits, previous)),
        suppress(token_ids(op, "suppress_tokens", suppress_tokens, rows.vocabulary)),
        confidence_exclude(token_ids(op, "confidence_exclude", confidence_exclude, rows.vocabulary)),
        scale(confidence_scale(op, confidence_temperature)) {}

  // Into the parameters of a kernel, on CPU or CUDA; the lists of ids are left to the caller.
  template <class Params>
  void fill(Params& p, bool float64, const Tensor& divergence) const {
    p.logits = rows.view(), p.previous = previous.view();
    p.rows = rows.rows, p.vocabulary = rows.vocabulary;
    p.confidence_scale = static_cast<float>(scale), p.confidence_scale64 = scale;
    p.float64 = float64;
    p.divergence = divergence.data_ptr();
  }

 private:
  static const Tensor& checked(const char* op, const Tensor& logits, const Tensor& previous) {
    check_same_dtype(op, "previous", previous, "logits", logits);
    check_same_device(op, "previous", previous, "logits", logits);
    check(shape_text(previous) == shape_text(logits), op, ": previous must have the shape of logits (",
          shape_text(logits), "), got shape ", shape_text(previous));
    return previous;
  }
};

// Statistics on the CPU of the rows listed in `visited` (null: of all); the outputs of others stay unwritten.
TokenStatsTensors row_stats(const LogitsRows& logits, const std::vector<int64_t>& shape,
                            const std::vector<int64_t>* visited, const int32_t* noise_ids,
                            const CheckedStatsOptions& options, const TokenFilterOptions& filter);

}  // namespace dllm
