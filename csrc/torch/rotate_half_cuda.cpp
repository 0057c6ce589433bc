// rotate_half and its gradient on CUDA tensors.
#include <tuple>

#include "cuda/rotate_half/launch.h"
#include "torch/cuda_launch.h"
#include "torch/rotate_half_arguments.h"

namespace dllm {
namespace {

std::tuple<Tensor, Tensor> rotated(const char* op, const char* const (&names)[2], const Tensor& query,
                                   const Tensor& key, const Tensor& cos, const Tensor& sin, bool transposed) {
  const RotateHalfTensors tensors(op, names, query, key, cos, sin, transposed);
  const OnDeviceOf device(query);
  check_launch(op, cuda::launch_rotate_half(tensors.params, device.stream()));
  return {tensors.query_out, tensors.key_out};
}

std::tuple<Tensor, Tensor> rotate_half(const Tensor& query, const Tensor& key, const Tensor& cos,
                                       const Tensor& sin) {
  return rotated("rotate_half", {"query", "key"}, query, key, cos, sin, false);
}

std::tuple<Tensor, Tensor> rotate_half_backward(const Tensor& grad_query, const Tensor& grad_key,
                                                const Tensor& cos, const Tensor& sin) {
  return rotated("rotate_half_backward", {"grad_query", "grad_key"}, grad_query, grad_key, cos, sin, true);
}

}  // namespace
}  // namespace dllm

DLLM_CUDA_OPERATORS(m) {
  m.impl("rotate_half", TORCH_BOX(&dllm::rotate_half));
  m.impl("rotate_half_backward", TORCH_BOX(&dllm::rotate_half_backward));
}
