// Diffusion losses: schemas, and the CPU kernels over logits. linear_diffusion_cross_entropy is put together
// from them and library products in dllm_kernels/ops/loss.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/cross_entropy.h"
#include "torch/cross_entropy_arguments.h"
#include "torch/parallel.h"

namespace dllm {
namespace {

constexpr double kOperationsPerLogit = 32;

// What the kernels work on: checked, contents too.
struct CrossEntropyTensors : CrossEntropyArguments {
  CrossEntropyTensors(const char* op, const Tensor& logits, const Tensor& targets, const Tensor& weights,
                      const std::vector<int64_t>& suppress_tokens)
      : CrossEntropyArguments(op, logits, targets, weights, suppress_tokens) {
    check_targets(op, *this, static_cast<const int64_t*>(this->targets.data_ptr()), this->weights.data_ptr());
  }

  CrossEntropyParams<TokenIds> params() const {
    CrossEntropyParams<TokenIds> p{};
    fill(p);
    p.suppress = listed(suppressed);
    return p;
  }

  template <class Kernel>
  void run(const Kernel& kernel) const {
    run_items(rows.rows, kOperationsPerLogit * rows.rows * rows.vocabulary, kernel);
  }

  // Scalar Σ weight · ce, summed in one order.
  Tensor weighted_sum(const Tensor& ce) const {
    Tensor loss = scalar();
    real == ScalarType::Double ? add_up<double>(ce, loss) : add_up<float>(ce, loss);
    return loss;
  }

 private:
  template <class Real>
  void add_up(const Tensor& ce, Tensor& loss) const {
    const auto* weight = static_cast<const Real*>(weights.data_ptr());
    const auto* value = static_cast<const Real*>(ce.data_ptr());
    double sum = 0;
    for (int64_t row = 0; row < rows.rows; row++)
      if (weight[row] != 0) sum += double(weight[row]) * value[row];
    *static_cast<Real*>(loss.data_ptr()) = static_cast<Real>(sum);
  }
};

std::tuple<Tensor, Tensor, Tensor> diffusion_cross_entropy(const Tensor& logits, const Tensor& targets,
                                                           const Tensor& weights,
                                                           const std::vector<int64_t>& suppress_tokens) {
  const CrossEntropyTensors tensors("diffusion_cross_entropy", logits, targets, weights, suppress_tokens);
  Tensor ce = tensors.per_row(), logsumexp = tensors.per_row();
  CrossEntropyParams<TokenIds> p = tensors.params();
  p.ce = ce.data_ptr(), p.logsumexp = logsumexp.data_ptr();
  tensors.run([&](int64_t begin, int64_t end) { cpu::cross_entropy(p, begin, end); });
  return {tensors.weighted_sum(ce), ce, logsumexp};
}

Tensor diffusion_cross_entropy_backward(const Tensor& grad_loss, const Tensor& logits, const Tensor& targets,
                                        const Tensor& weights, const Tensor& logsumexp,
                                        const std::vector<int64_t>& suppress_tokens) {
  const char* op = "diffusion_cross_entropy_backward";
  const CrossEntropyTensors tensors(op, logits, targets, weights, suppress_tokens);
  const Tensor lse = checked_logsumexp(op, tensors, logits, grad_loss, logsumexp);
  const Tensor factor = torch::stable::to(grad_loss, ScalarType::Double);
  const auto sizes = logits.sizes();
  Tensor grad = new_tensor(logits, {sizes.begin(), sizes.end()}, logits.scalar_type());
  CrossEntropyParams<TokenIds> p = tensors.params();
  p.logsumexp = lse.data_ptr(), p.grad = grad.data_ptr();
  p.grad_loss = factor.data_ptr();
  tensors.run([&](int64_t begin, int64_t end) { cpu::cross_entropy_backward(p, begin, end); });
  return grad;
}

std::tuple<Tensor, Tensor> diffusion_cross_entropy_gradient_(const Tensor& logits, const Tensor& targets,
                                                             const Tensor& weights,
                                                             const std::vector<int64_t>& suppress_tokens) {
  const char* op = "diffusion_cross_entropy_gradient_";
  check_dtype(op, "logits", logits, {ScalarType::Float, ScalarType::Double});
  const CrossEntropyTensors tensors(op, logits, targets, weights, suppress_tokens);
  check_writable_logits(op, logits, targets, weights);
  Tensor ce = tensors.per_row();
  CrossEntropyParams<TokenIds> p = tensors.params();
  const Tensor chunk_max =
      new_tensor(logits, {tensors.rows.rows, cpu::cross_entropy_chunks(p.vocabulary)}, tensors.real);
  p.ce = ce.data_ptr(), p.chunk_max = chunk_max.data_ptr();
  tensors.run([&](int64_t begin, int64_t end) { cpu::cross_entropy_in_place(p, begin, end); });
  return {tensors.weighted_sum(ce), ce};
}

}  // namespace
}  // namespace dllm

STABLE_TORCH_LIBRARY_FRAGMENT(dllm_kernels, m) {
  m.def(
      "diffusion_cross_entropy(Tensor logits, Tensor targets, Tensor weights, int[] suppress_tokens) -> "
      "(Tensor loss, Tensor ce, Tensor logsumexp)");
  m.def(
      "diffusion_cross_entropy_backward(Tensor grad_loss, Tensor logits, Tensor targets, Tensor weights, "
      "Tensor logsumexp, int[] suppress_tokens) -> Tensor grad_logits");
  m.def(
      "diffusion_cross_entropy_gradient_(Tensor(a!) logits, Tensor targets, Tensor weights, "
      "int[] suppress_tokens) -> (Tensor loss, Tensor ce)");
  m.def(
      "linear_diffusion_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, Tensor weights, "
      "Tensor? bias, int[] suppress_tokens, bool[] needs_grad) -> "
      "(Tensor loss, Tensor ce, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(dllm_kernels, CPU, m) {
  m.impl("diffusion_cross_entropy", TORCH_BOX(&dllm::diffusion_cross_entropy));
  m.impl("diffusion_cross_entropy_backward", TORCH_BOX(&dllm::diffusion_cross_entropy_backward));
  m.impl("diffusion_cross_entropy_gradient_", TORCH_BOX(&dllm::diffusion_cross_entropy_gradient_));
}
