// Diffusion losses on CUDA tensors: allocation and launches on the current stream. Targets stay on the
// device; one outside the vocabulary, or among suppress_tokens, shows as a loss that is not finite.
#include <tuple>

#include "cuda/cross_entropy/launch.h"
#include "torch/cross_entropy_arguments.h"
#include "torch/cuda_launch.h"
#include "torch/host_copies.h"

namespace dllm {
namespace {

CrossEntropyParams<ListedTokenIds> params(const char* op, const CrossEntropyArguments& arguments) {
  if (debugging()) {
    HostCopies host;
    check_targets(op, arguments, host.of<int64_t>(arguments.targets), host.of<char>(arguments.weights));
  }
  CrossEntropyParams<ListedTokenIds> p{};
  arguments.fill(p);
  p.suppress = listed_on_cuda(op, "suppress_tokens", arguments.suppressed);
  return p;
}

std::tuple<Tensor, Tensor, Tensor> diffusion_cross_entropy(Tensor logits, Tensor targets, Tensor weights,
                                                           std::vector<int64_t> suppress_tokens) {
  constexpr const char* op = "diffusion_cross_entropy";
  const CrossEntropyArguments arguments(op, logits, targets, weights, suppress_tokens);
  const OnDeviceOf device(logits);
  CrossEntropyParams<ListedTokenIds> p = params(op, arguments);
  Tensor loss = arguments.scalar(), ce = arguments.per_row(), logsumexp = arguments.per_row();
  p.loss = loss.data_ptr(), p.ce = ce.data_ptr(), p.logsumexp = logsumexp.data_ptr();
  check_launch(op, cuda::cross_entropy(p, device.stream()));
  return {loss, ce, logsumexp};
}

Tensor diffusion_cross_entropy_backward(Tensor grad_loss, Tensor logits, Tensor targets, Tensor weights,
                                        Tensor logsumexp, std::vector<int64_t> suppress_tokens) {
  constexpr const char* op = "diffusion_cross_entropy_backward";
  const CrossEntropyArguments arguments(op, logits, targets, weights, suppress_tokens);
  const OnDeviceOf device(logits);
  const Tensor lse = checked_logsumexp(op, arguments, logits, grad_loss, logsumexp);
  const Tensor factor = torch::stable::to(grad_loss, arguments.real);
  const auto sizes = logits.sizes();
  Tensor grad = new_tensor(logits, {sizes.begin(), sizes.end()}, logits.scalar_type());
  CrossEntropyParams<ListedTokenIds> p = params(op, arguments);
  p.logsumexp = lse.data_ptr(), p.grad_loss = factor.data_ptr(), p.grad = grad.data_ptr();
  check_launch(op, cuda::cross_entropy_backward(p, device.stream()));
  return grad;
}

std::tuple<Tensor, Tensor> diffusion_cross_entropy_gradient_(Tensor logits, Tensor targets, Tensor weights,
                                                             std::vector<int64_t> suppress_tokens) {
  constexpr const char* op = "diffusion_cross_entropy_gradient_";
  // float16 has no room for gradients that loss scaling has not reached.
  check_dtype(op, "logits", logits, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Double});
  const CrossEntropyArguments arguments(op, logits, targets, weights, suppress_tokens);
  const OnDeviceOf device(logits);
  check_writable_logits(op, logits, targets, weights);
  CrossEntropyParams<ListedTokenIds> p = params(op, arguments);
  Tensor loss = arguments.scalar(), ce = arguments.per_row();
  p.loss = loss.data_ptr(), p.ce = ce.data_ptr();
  check_launch(op, cuda::cross_entropy_in_place(p, device.stream()));
  return {loss, ce};
}

}  // namespace
}  // namespace dllm

DLLM_CUDA_OPERATORS(m) {
  m.impl("diffusion_cross_entropy", TORCH_BOX(&dllm::diffusion_cross_entropy));
  m.impl("diffusion_cross_entropy_backward", TORCH_BOX(&dllm::diffusion_cross_entropy_backward));
  m.impl("diffusion_cross_entropy_gradient_", TORCH_BOX(&dllm::diffusion_cross_entropy_gradient_));
}
