// From the tensors of an attention operator to its parameter block; shared by CPU and CUDA.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "core/params.h"
#include "torch/storage_type.h"

namespace dllm {

inline HeadsLayout heads_layout(const Tensor& tensor) {
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// Kernels read rows of head_dim neighbouring elements.
inline Tensor with_contiguous_rows(const Tensor& tensor) {
  return tensor.stride(tensor.dim() - 1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

// CUDA kernels besides want every row to start at a multiple of 16 bytes.
inline Tensor with_aligned_rows(const Tensor& tensor) {
  if (tensor.stride(tensor.dim() - 1) != 1) return torch::stable::contiguous(tensor);
  const auto bytes = static_cast<int64_t>(tensor.element_size());
  bool aligned = reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0;
  for (int64_t dim = 0; dim + 1 < tensor.dim(); dim++) aligned &= tensor.stride(dim) * bytes % 16 == 0;
  return aligned ? tensor : torch::stable::clone(tensor);
}

constexpr SpanTable kSeesAll = {nullptr, 0, 0, 1};

inline SpanTable span_table(const Tensor& spans) {
  return {spans.const_data_ptr<int32_t>(), spans.size(0) == 1 ? 0 : spans.stride(0),
          spans.size(1) == 1 ? 0 : spans.stride(1), static_cast<int32_t>(spans.size(2))};
}

inline void check_span_tensor(const char* op, const char* name, const Tensor& spans, const Tensor& q,
                              bool one_batch_allowed, bool one_row_allowed) {
  check_dtype(op, name, spans, {ScalarType::Int});
  check_same_device(op, name, spans, "q", q);
  const int64_t batch = q.size(0), rows = q.size(2);
  const bool batch_fits =
      spans.dim() == 4 && (spans.size(0) == batch || (one_batch_allowed && spans.size(0) == 1));
  const bool rows_fit =
      spans.dim() == 4 && (spans.size(1) == rows || (one_row_allowed && spans.size(1) == 1));
  check(batch_fits && rows_fit && spans.size(2) >= 1 && spans.size(3) == 2, op, ": ", name, " must be [",
        one_batch_allowed ? "1 or " : "", batch, ", ", one_row_allowed ? "1 or " : "", rows,
        ", at least 1, 2], got shape ", shape_text(spans));
  check_int(op, (std::string(name) + ".shape[2]").c_str(), spans.size(2));
}

inline void check_lengths(const char* op, const char* name, const Tensor& lengths, const Tensor& q) {
  check_dims(op, name, lengths, 1, "[batch]");
  check_dtype(op, name, lengths, {ScalarType::Int});
  check_same_device(op, name, lengths, "q", q);
  check_size(op, name, lengths, 0, q.size(0), "the batch size of q");
}

// q [B, Hq, Sq, D] against k and v [B, Hkv, Sk, D].
inline void check_heads(const char* op, const Tensor& q, const Tensor& k, const Tensor& v) {
  check_dims(op, "q", q, 4, "[batch, heads, queries, head_dim]");
  check_dims(op, "k", k, 4, "[batch, kv_heads, keys, head_dim]");
  check_dims(op, "v", v, 4, "[batch, kv_heads, keys, head_dim]");
  check_float(op, "q", q);
  check_same_dtype(op, "k", k, "q", q);
  check_same_dtype(op, "v", v, "q", q);
  check_same_device(op, "k", k, "q", q);
  check_same_device(op, "v", v, "q", q);
  check_size(op, "k", k, 0, q.size(0), "the batch size of q");
  check_size(op, "k", k, 3, q.size(3), "the head dim of q");
  for (int64_t dim = 0; dim < 4; dim++) check_size(op, "v", v, dim, k.size(dim), "as in k");
  check(k.size(1) > 0 && q.size(1) % k.size(1) == 0, op, ": q must have a multiple of k's heads (", k.size(1),
        "), got ", q.size(1));
  check(q.size(1) > 0, op, ": q must have at least one head, got shape ", shape_text(q));
  check(q.size(3) % 8 == 0 && 8 <= q.size(3) && q.size(3) <= 256, op,
        ": head_dim must be a multiple of 8 from 8 to 256, got ", q.size(3));
  for (int64_t dim = 0; dim < 4; dim++) check_int(op, "every size of q", q.size(dim));
  check_int(op, "every size of k", k.size(2));
  check_int(op, "queries times heads of q", q.size(1) * q.size(2));
}

inline void check_lse(const char* op, const char* name, const Tensor& lse, const Tensor& q) {
  check_dims(op, name, lse, 3, "[batch, heads, queries]");
  check_dtype(op, name, lse, {ScalarType::Float});
  check_same_device(op, name, lse, "q", q);
  for (int64_t dim = 0; dim < 3; dim++) check_size(op, name, lse, dim, q.size(dim), "as in q");
}

inline void check_like_q(const char* op, const char* name, const Tensor& tensor, const Tensor& q) {
  check_dims(op, name, tensor, 4, "[batch, heads, queries, head_dim]");
  check_same_dtype(op, name, tensor, "q", q);
  check_same_device(op, name, tensor, "q", q);
  for (int64_t dim = 0; dim < 4; dim++) check_size(op, name, tensor, dim, q.size(dim), "as in q");
}

inline float checked_scale(const char* op, double scale) {
  check(std::isfinite(static_cast<float>(scale)), op, ": scale must be finite, got ", scale);
  return static_cast<float>(scale);
}

// Empty, of the shape and dtype of `like`, stored as [batch, positions, heads, head_dim]: merging the heads
// afterwards is a view.
inline Tensor new_heads(const Tensor& like) {
  const auto stored = {like.size(0), like.size(2), like.size(1), like.size(3)};
  return torch::stable::transpose(torch::stable::new_empty(like, stored), 1, 2);
}

// What both kinds of attention parameters say about q, k and v, whose rows are contiguous.
template <typename Params>
void fill_inputs(Params& p, const Tensor& q, const Tensor& k, const Tensor& v, float scale) {
  p.dtype = storage_type(q);
  p.batch = static_cast<int32_t>(q.size(0));
  p.q_heads = static_cast<int32_t>(q.size(1));
  p.kv_heads = static_cast<int32_t>(k.size(1));
  p.q_len = static_cast<int32_t>(q.size(2));
  p.head_dim = static_cast<int32_t>(q.size(3));
  p.scale = scale;
  p.q = q.const_data_ptr();
  p.k = k.const_data_ptr();
  p.v = v.const_data_ptr();
  p.q_layout = heads_layout(q);
  p.k_layout = heads_layout(k);
  p.v_layout = heads_layout(v);
}

// Inputs with contiguous rows, and the outputs.
struct AttentionTensors {
  Tensor q, k, v, out, lse;
  float scale;

  AttentionTensors(const char* op, const Tensor& query, const Tensor& key, const Tensor& value, double factor)
      : q(with_contiguous_rows(query)),
        k(with_contiguous_rows(key)),
        v(with_contiguous_rows(value)),
        out(new_heads(q)),
        lse(torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float)),
        scale(checked_scale(op, factor)) {}

  template <typename Params>
  void fill(Params& p) const {
    fill_inputs(p, q, k, v, scale);
    p.out = out.mutable_data_ptr();
    p.lse = lse.mutable_data_ptr<float>();
    p.out_layout = heads_layout(out);
  }
};

// The same for block_attention_backward; `prepared` makes the rows of a tensor fit for the kernels.
struct BackwardTensors {
  Tensor grad_out, q, k, v, out, lse, grad_q, grad_k, grad_v;
  std::optional<Tensor> grad_lse, spans;
  float scale;

  BackwardTensors(const char* op, Tensor (*prepared)(const Tensor&), const Tensor& grad_output,
                  const std::optional<Tensor>& grad_logsumexp, const Tensor& query, const Tensor& key,
                  const Tensor& value, const Tensor& output, const Tensor& logsumexp,
                  const std::optional<Tensor>& span_tensor, double factor) {
    check_heads(op, query, key, value);
    if (span_tensor) check_span_tensor(op, "spans", *span_tensor, query, true, false);
    check_like_q(op, "grad_out", grad_output, query);
    check_like_q(op, "out", output, query);
    check_lse(op, "lse", logsumexp, query);
    if (grad_logsumexp) check_lse(op, "grad_lse", *grad_logsumexp, query);
    scale = checked_scale(op, factor);
    grad_out = prepared(grad_output);
    q = prepared(query);
    k = prepared(key);
    v = prepared(value);
    out = prepared(output);
    lse = torch::stable::contiguous(logsumexp);
    if (span_tensor) spans = torch::stable::contiguous(*span_tensor);
    if (grad_logsumexp) grad_lse = torch::stable::contiguous(*grad_logsumexp);
    grad_q = new_heads(q);
    grad_k = new_heads(k);
    grad_v = new_heads(k);
  }

  void fill(BlockAttentionBackwardParams& p) const {
    fill_inputs(p.forward, q, k, v, scale);
    p.forward.kv_len = static_cast<int32_t>(k.size(2));
    p.forward.spans = spans ? span_table(*spans) : kSeesAll;
    p.forward.out = const_cast<void*>(out.const_data_ptr());
    p.forward.out_layout = heads_layout(out);
    p.forward.lse = const_cast<float*>(lse.const_data_ptr<float>());
    p.grad_out = grad_out.const_data_ptr();
    p.grad_out_layout = heads_layout(grad_out);
    p.grad_lse = grad_lse ? grad_lse->const_data_ptr<float>() : nullptr;
    p.grad_q = grad_q.mutable_data_ptr();
    p.grad_k = grad_k.mutable_data_ptr();
    p.grad_v = grad_v.mutable_data_ptr();
    p.grad_q_layout = heads_layout(grad_q);
    p.grad_kv_layout = heads_layout(grad_k);
  }
};

}  // namespace dllm
