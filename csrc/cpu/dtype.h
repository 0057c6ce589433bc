// From the dtype of a parameter block to the type that its tensors are stored in.
#pragma once

#include "core/params.h"
#include "cpu/simd.h"

namespace dllm::cpu::DLLM_ISA {

// visit(T{}) with T the storage type of `dtype`, one that kernels widen to float.
template <class Visit>
DLLM_SIMD auto with_storage_type(DType dtype, const Visit& visit) {
  switch (dtype) {
    case DType::bfloat16: return visit(BFloat16{});
    case DType::float16: return visit(Float16{});
    default: return visit(float{});
  }
}

// `count` elements from `offset` on, as floats.
inline void widen_any(const void* data, DType type, int64_t offset, int count, float* to) {
  with_storage_type(type, [&]<class T>(T) { widen_row(static_cast<const T*>(data) + offset, to, count); });
}

}  // namespace dllm::cpu::DLLM_ISA
