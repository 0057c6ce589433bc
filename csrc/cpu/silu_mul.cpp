#include "cpu/silu_mul.h"

#include "cpu/row_chunks.h"
#include "cpu/sigmoid.h"

namespace dllm::cpu::DLLM_ISA {
namespace {

template <class T>
struct SiluRow {
  const SiluMulParams& p;
  alignas(64) float a[kRowChunk], b[kRowChunk], c[kRowChunk], act[kRowChunk];
  ResultChunk<T> first_result, second_result;

  explicit SiluRow(const SiluMulParams& p) : p(p) {}

  template <class Visit>
  void each_chunk(const Visit& visit) {
    for (int first = 0; first < p.width; first += kRowChunk)
      visit(first, std::min(kRowChunk, p.width - first));
  }
  const T* gate(int64_t row) const { return static_cast<const T*>(p.gate) + p.gate_layout.offset(row); }
  const T* up(int64_t row) const { return static_cast<const T*>(p.up) + p.up_layout.offset(row); }

  void multiply(int64_t row) {
    const T *gate_row = gate(row), *up_row = up(row);
    T* out = static_cast<T*>(p.out) + row * p.width;
    each_chunk([&](int first, int count) {
      const float *g = chunk_of(gate_row + first, count, a), *u = chunk_of(up_row + first, count, b);
      float* y = first_result.at(out + first, count);
      for (int i = 0; i < padded_chunk(count); i += kLanes) {
        const Floats x = load(g + i);
        store(y + i, x * sigmoid(x).value);
      }
      round_chunk<T>(y, count);
      for (int i = 0; i < padded_chunk(count); i += kLanes) store(y + i, load(y + i) * load(u + i));
      first_result.put(y, out + first, count);
    });
  }

  void differentiate(int64_t row) {
    const T *gate_row = gate(row), *up_row = up(row);
    const T* grad_row = static_cast<const T*>(p.grad) + p.grad_layout.offset(row);
    T* grad_gate = static_cast<T*>(p.grad_gate) + row * p.width;
    T* grad_up = static_cast<T*>(p.grad_up) + row * p.width;
    each_chunk([&](int first, int count) {
      const float *g = chunk_of(gate_row + first, count, a), *u = chunk_of(up_row + first, count, b);
      const float* d = chunk_of(grad_row + first, count, c);
      float* to_gate = first_result.at(grad_gate + first, count);
      float* to_up = second_result.at(grad_up + first, count);
      for (int i = 0; i < padded_chunk(count); i += kLanes) {
        const Floats x = load(g + i), grad = load(d + i);
        const Sigmoid s = sigmoid(x);
        store(act + i, x * s.value);
        store(to_gate + i, grad * load(u + i) * (s.value * (1.0f + x * s.rest)));
      }
      round_chunk<T>(act, count);
      for (int i = 0; i < padded_chunk(count); i += kLanes) store(to_up + i, load(d + i) * load(act + i));
      first_result.put(to_gate, grad_gate + first, count);
      second_result.put(to_up, grad_up + first, count);
    });
  }
};

}  // namespace

void silu_mul(const SiluMulParams& p, long begin, long end) {
  const int64_t rows = rows_per_item(p.width);
  with_storage_type(p.dtype, [&]<class T>(T) {
    SiluRow<T> row(p);
    for (int64_t r = begin * rows; r < std::min(end * rows, p.rows); r++) row.multiply(r);
  });
}

void silu_mul_backward(const SiluMulParams& p, long begin, long end) {
  const int64_t rows = rows_per_item(p.width);
  with_storage_type(p.dtype, [&]<class T>(T) {
    SiluRow<T> row(p);
    for (int64_t r = begin * rows; r < std::min(end * rows, p.rows); r++) row.differentiate(r);
  });
}

}  // namespace dllm::cpu::DLLM_ISA
