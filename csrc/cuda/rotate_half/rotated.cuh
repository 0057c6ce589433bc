// One value of a rotated head, rounded as a chain of torch's operators rounds.
#pragma once

#include "cuda/vectors.cuh"

namespace dllm::cuda {

// x · cos + other · sin, where `other` is the value in the other half of the head, negated for the first
// half.
template <class T>
__device__ float rotated(float x, float other, float cos, float sin) {
  return rounded<T>(__fmul_rn(x, cos)) + rounded<T>(__fmul_rn(other, sin));
}

}  // namespace dllm::cuda
