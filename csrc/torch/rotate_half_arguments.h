// Arguments of rotate_half, its gradient, and operators that rotate by the way, checked once for CPU and
// CUDA.
#pragma once

#include "torch/attention_arguments.h"

namespace dllm {

// cos or sin [batch or 1, length, head_dim] for heads [batch, heads, length, head_dim].
inline void check_angles(const char* op, const char* name, const Tensor& angles, const char* heads_name,
                         const Tensor& heads) {
  check_dims(op, name, angles, 3, "[batch or 1, length, head_dim]");
  check_same_dtype(op, name, angles, heads_name, heads);
  check_same_device(op, name, angles, heads_name, heads);
  check(angles.size(0) == 1 || angles.size(0) == heads.size(0), op, ": ", name, ".shape[0] must be 1 or ",
        heads.size(0), " (the batch size), got shape ", shape_text(angles));
  check_size(op, name, angles, 1, heads.size(2), "the number of positions");
  check_size(op, name, angles, 2, heads.size(3), "the head dim");
}

struct RotateHalfTensors {
  Tensor query, key, cos, sin, query_out, key_out;
  RotateHalfParams params;

  // names: of query and key, which are gradients where `transposed`.
  RotateHalfTensors(const char* op, const char* const (&names)[2], const Tensor& query, const Tensor& key,
                    const Tensor& cos, const Tensor& sin, bool transposed)
      : query(with_contiguous_rows((check_heads(op, names[0], query), query))),
        key(with_contiguous_rows((check_heads(op, names[1], key), key))) {
    check_same(op, names[1], key, names[0], query);
    check_size(op, names[1], key, 0, query.size(0), "the batch size");
    check_size(op, names[1], key, 2, query.size(2), "the number of positions");
    check_size(op, names[1], key, 3, query.size(3), "the head dim");
    check(query.size(3) % 2 == 0, op, ": head_dim must be even, got ", query.size(3));
    check_angles(op, "cos", cos, names[0], query);
    check_angles(op, "sin", sin, names[0], query);
    this->cos = with_contiguous_rows(cos), this->sin = with_contiguous_rows(sin);
    query_out = new_heads(query), key_out = new_heads(key);

    params = {};
    params.dtype = storage_type(query), params.transposed = transposed;
    params.batch = static_cast<int32_t>(query.size(0)), params.length = static_cast<int32_t>(query.size(2));
    params.q_heads = static_cast<int32_t>(query.size(1)), params.kv_heads = static_cast<int32_t>(key.size(1));
    params.head_dim = static_cast<int32_t>(query.size(3));
    params.query = this->query.data_ptr(), params.query_layout = heads_layout(this->query);
    params.key = this->key.data_ptr(), params.key_layout = heads_layout(this->key);
    params.cos = this->cos.data_ptr(), params.sin = this->sin.data_ptr();
    params.cos_batch_stride = cos.size(0) == 1 ? 0 : this->cos.stride(0);
    params.sin_batch_stride = sin.size(0) == 1 ? 0 : this->sin.stride(0);
    params.cos_position_stride = this->cos.stride(1), params.sin_position_stride = this->sin.stride(1);
    params.query_out = query_out.data_ptr(), params.query_out_layout = heads_layout(query_out);
    params.key_out = key_out.data_ptr(), params.key_out_layout = heads_layout(key_out);
  }

 private:
  static void check_heads(const char* op, const char* name, const Tensor& heads) {
    check_dims(op, name, heads, 4, "[batch, heads, length, head_dim]");
    check_float(op, name, heads);
    for (int64_t dim = 0; dim < 4; dim++)
      check_int(op, (std::string("every size of ") + name).c_str(), heads.size(dim));
  }
  static void check_same(const char* op, const char* name, const Tensor& tensor, const char* other_name,
                         const Tensor& other) {
    check_same_dtype(op, name, tensor, other_name, other);
    check_same_device(op, name, tensor, other_name, other);
  }
};

}  // namespace dllm
