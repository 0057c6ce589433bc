// Arguments of the cross entropy operators, checked once for CPU and CUDA.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "torch/checks.h"
#include "torch/index_checks.h"
#include "torch/logits_arguments.h"
#include "torch/overlap.h"

namespace dllm {

// Shapes and dtypes are checked, contents not. Targets and weights are contiguous, weights in the precision
// of the arithmetic: float, or double for float64 logits.
struct CrossEntropyArguments {
  LogitsRows rows;
  ScalarType real;
  Tensor targets, weights;
  std::vector<int32_t> suppressed;
  std::vector<int64_t> shape;

  CrossEntropyArguments(const char* op, const Tensor& logits, const Tensor& targets, const Tensor& weights,
                        const std::vector<int64_t>& suppress_tokens)
      : rows(op, logits, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double}),
        real(logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float),
        targets(targets),
        weights(weights),
        suppressed(token_ids(op, "suppress_tokens", suppress_tokens, rows.vocabulary)),
        shape(leading_shape(logits)) {
    check_dtype(op, "targets", targets, {ScalarType::Long});
    check_dtype(op, "weights", weights,
                {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double});
    check_per_row(op, "targets", targets, logits);
    check_per_row(op, "weights", weights, logits);
    this->targets = torch::stable::contiguous(targets);
    this->weights = torch::stable::contiguous(torch::stable::to(weights, real));
  }

  Tensor per_row() const { return new_tensor(weights, shape, real); }
  Tensor scalar() const { return new_tensor(weights, {}, real); }

  // Into the parameters of a kernel, on CPU or CUDA; the list of ids is left to the caller.
  template <class Params>
  void fill(Params& p) const {
    p.logits = rows.view();
    p.rows = rows.rows;
    p.vocabulary = rows.vocabulary;
    p.targets = static_cast<const int64_t*>(targets.data_ptr());
    p.weights = weights.data_ptr();
  }

 private:
  static void check_per_row(const char* op, const char* name, const Tensor& tensor, const Tensor& logits) {
    check_same_device(op, name, tensor, "logits", logits);
    const auto sizes = tensor.sizes(), expected = logits.sizes();
    check(tensor.dim() == logits.dim() - 1 && std::equal(sizes.begin(), sizes.end(), expected.begin()), op,
          ": ", name, " must have one entry for each row of logits ", shape_text(logits), ", got shape ",
          shape_text(tensor));
  }
};

// targets, weights: those of the arguments, where the host can read them.
inline void check_targets(const char* op, const CrossEntropyArguments& arguments, const int64_t* targets,
                          const void* weights) {
  const LogitsRows& rows = arguments.rows;
  const auto check_all = [&](const auto* weight) {
    check_targets(op, targets, weight, rows.rows, rows.vocabulary, arguments.suppressed);
  };
  if (arguments.real == ScalarType::Double) check_all(static_cast<const double*>(weights));
  else check_all(static_cast<const float*>(weights));
}

// Of diffusion_cross_entropy_backward: returns logsumexp, contiguous.
inline Tensor checked_logsumexp(const char* op, const CrossEntropyArguments& arguments, const Tensor& logits,
                                const Tensor& grad_loss, const Tensor& logsumexp) {
  check(grad_loss.numel() == 1, op, ": grad_loss must be a scalar, got shape ", shape_text(grad_loss));
  check_same_device(op, "grad_loss", grad_loss, "logits", logits);
  check_dtype(op, "logsumexp", logsumexp, {arguments.real});
  check_same_device(op, "logsumexp", logsumexp, "logits", logits);
  check(logsumexp.numel() == arguments.rows.rows, op,
        ": logsumexp must have one entry for each row of logits ", shape_text(logits), ", got shape ",
        shape_text(logsumexp));
  return torch::stable::contiguous(logsumexp);
}

// Of diffusion_cross_entropy_gradient_, which writes over the logits.
inline void check_writable_logits(const char* op, const Tensor& logits, const Tensor& targets,
                                  const Tensor& weights) {
  check_dims(op, "logits", logits, 2, "[rows, vocabulary]");
  check(logits.stride(1) == 1, op, ": the rows of logits must be contiguous, got stride ", logits.stride(1));
  check_written(op, {{"logits", logits}}, {{"targets", targets}, {"weights", weights}});
}

}  // namespace dllm
