// rotate_half and its gradient: schemas, and the CPU kernel behind both.
#include "cpu/rotate_half.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "torch/parallel.h"
#include "torch/rotate_half_arguments.h"

namespace dllm {
namespace {

constexpr double kOperationsPerElement = 4;

std::tuple<Tensor, Tensor> rotated(const RotateHalfTensors& tensors) {
  const RotateHalfParams& p = tensors.params;
  const int64_t elements = tensors.query.numel() + tensors.key.numel();
  run_items(static_cast<int64_t>(p.batch) * p.length, kOperationsPerElement * elements,
            [&](int64_t begin, int64_t end) { cpu::rotate_half(p, begin, end); });
  return {tensors.query_out, tensors.key_out};
}

std::tuple<Tensor, Tensor> rotate_half(const Tensor& query, const Tensor& key, const Tensor& cos,
                                       const Tensor& sin) {
  return rotated({"rotate_half", {"query", "key"}, query, key, cos, sin, false});
}

std::tuple<Tensor, Tensor> rotate_half_backward(const Tensor& grad_query, const Tensor& grad_key,
                                                const Tensor& cos, const Tensor& sin) {
  return rotated({"rotate_half_backward", {"grad_query", "grad_key"}, grad_query, grad_key, cos, sin, true});
}

}  // namespace
}  // namespace dllm

STABLE_TORCH_LIBRARY_FRAGMENT(dllm_kernels, m) {
  m.def(
      "rotate_half(Tensor query, Tensor key, Tensor cos, Tensor sin) -> (Tensor rotated_query, Tensor "
      "rotated_key)");
  m.def(
      "rotate_half_backward(Tensor grad_query, Tensor grad_key, Tensor cos, Tensor sin) -> "
      "(Tensor query_gradient, Tensor key_gradient)");
}

STABLE_TORCH_LIBRARY_IMPL(dllm_kernels, CPU, m) {
  m.impl("rotate_half", TORCH_BOX(&dllm::rotate_half));
  m.impl("rotate_half_backward", TORCH_BOX(&dllm::rotate_half_backward));
}
