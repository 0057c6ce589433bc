// Arguments of operators over logits [..., vocabulary], checked once for CPU and CUDA.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "core/params.h"
#include "torch/storage_type.h"

namespace dllm {

inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::new_empty(like, {shape.data(), shape.size()}, dtype);
}

inline std::vector<int64_t> leading_shape(const Tensor& logits) {
  const auto sizes = logits.sizes();
  return {sizes.begin(), sizes.end() - 1};
}

// Kernels step through ids in 32 bits.
inline int32_t check_vocabulary(const char* op, const char* name, int64_t size) {
  check(size > 0 && size <= 1 << 30, op, ": ", name, " must have a vocabulary of 1 to 2^30 ids, got ", size);
  return static_cast<int32_t>(size);
}

// Rows of logits without a copy where their strides allow it: row r starts at
// (r / inner) · outer_stride + (r % inner) · inner_stride.
struct LogitsRows {
  Tensor tensor;
  int64_t rows, inner, outer_stride, inner_stride;
  int32_t vocabulary;

  LogitsRows(const char* op, const Tensor& logits,
             std::initializer_list<ScalarType> dtypes = {ScalarType::Float, ScalarType::BFloat16,
                                                         ScalarType::Half})
      : tensor(logits) {
    check(logits.dim() >= 1, op, ": logits must be [..., vocabulary], got shape ", shape_text(logits));
    check_dtype(op, "logits", logits, dtypes);
    vocabulary = check_vocabulary(op, "logits", logits.size(-1));
    rows = check_int(op, "the rows of logits", logits.numel() / vocabulary);
    if (logits.dim() > 3 || logits.stride(-1) != 1) tensor = torch::stable::contiguous(logits);
    const int64_t dim = tensor.dim();
    const bool flat = dim > 3 || dim == 1;
    inner = dim == 3 ? std::max<int64_t>(tensor.size(1), 1) : std::max<int64_t>(rows, 1);
    inner_stride = flat ? vocabulary : tensor.stride(dim - 2);
    outer_stride = dim == 3 ? tensor.stride(0) : 0;
  }

  LogitsView view() const {
    return {tensor.data_ptr(), storage_type(tensor), static_cast<int32_t>(inner), outer_stride, inner_stride};
  }
};

// Ascending and distinct, inside the vocabulary.
inline std::vector<int32_t> token_ids(const char* op, const char* name, const std::vector<int64_t>& ids,
                                      int32_t vocabulary) {
  for (const int64_t id : ids)
    check(id >= 0 && id < vocabulary, op, ": ", name, " must lie between 0 and ", vocabulary - 1, ", got ",
          id);
  std::vector<int32_t> sorted(ids.begin(), ids.end());
  std::sort(sorted.begin(), sorted.end());
  sorted.erase(std::unique(sorted.begin(), sorted.end()), sorted.end());
  return sorted;
}

inline TokenIds listed(const std::vector<int32_t>& ids) { return {ids.data(), static_cast<int>(ids.size())}; }

// As kernels on CUDA take them.
inline ListedTokenIds listed_on_cuda(const char* op, const char* name, const std::vector<int32_t>& ids) {
  check(ids.size() <= kMaxListedIds, op, ": ", name, " may list at most ", kMaxListedIds,
        " ids on CUDA, got ", ids.size());
  ListedTokenIds list{};
  list.count = static_cast<int>(ids.size());
  std::copy(ids.begin(), ids.end(), list.ids);
  return list;
}

}  // namespace dllm
