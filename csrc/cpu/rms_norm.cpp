// A row is read twice: for its mean square, and to be scaled. Both passes go by chunks that stay in L1.
#include "cpu/rms_norm.h"

#include <math.h>

#include <algorithm>

#include "cpu/row_chunks.h"

namespace dllm::cpu::DLLM_ISA {
namespace {

// visit(first, count) for the chunks of a row.
template <class Visit>
DLLM_SIMD void each_chunk(int width, const Visit& visit) {
  for (int first = 0; first < width; first += kRowChunk) visit(first, std::min(kRowChunk, width - first));
}

DLLM_SIMD float inverse_root(double squares, int width, float eps) {
  return 1.0f / sqrtf(static_cast<float>(squares / width) + eps);
}

template <class T>
struct NormRow {
  const RmsNormParams& p;
  alignas(64) float a[kRowChunk], b[kRowChunk];
  ResultChunk<T> result;

  explicit NormRow(const RmsNormParams& p) : p(p) {}

  void normalize(int64_t row) {
    const T* x = static_cast<const T*>(p.x) + p.x_layout.offset(row);
    if (p.residual) x = add(x, row);
    double squares = 0;
    each_chunk(p.width, [&](int first, int count) {
      const float* v = chunk_of(x + first, count, a);
      LaneSums sums;
      for (int i = 0; i < padded_chunk(count); i += kRowLanes)
        for (int j = 0; j < kRowParts; j++) {
          const Floats part = load(v + i + j * kLanes);
          sums.part[j] += part * part;
        }
      squares += sums.total();
    });
    const float scale = inverse_root(squares, p.width, p.eps);
    const T* weight = static_cast<const T*>(p.weight);
    T* out = static_cast<T*>(p.out) + row * p.width;
    each_chunk(p.width, [&](int first, int count) {
      const float *v = chunk_of(x + first, count, a), *w = chunk_of(weight + first, count, b);
      float* y = result.at(out + first, count);
      for (int i = 0; i < padded_chunk(count); i += kLanes) store(y + i, load(v + i) * scale);
      round_chunk<T>(y, count);
      for (int i = 0; i < padded_chunk(count); i += kLanes) store(y + i, load(y + i) * load(w + i));
      result.put(y, out + first, count);
    });
  }

 private:
  // Returns the row of the sum.
  const T* add(const T* x, int64_t row) {
    const T* residual = static_cast<const T*>(p.residual) + p.residual_layout.offset(row);
    T* sum = static_cast<T*>(p.sum) + row * p.width;
    each_chunk(p.width, [&](int first, int count) {
      const float *v = chunk_of(x + first, count, a), *r = chunk_of(residual + first, count, b);
      float* s = result.at(sum + first, count);
      for (int i = 0; i < padded_chunk(count); i += kLanes) store(s + i, load(v + i) + load(r + i));
      result.put(s, sum + first, count);
    });
    return sum;
  }
};

// With y = x · s, s = rsqrt(mean x² + eps) and h = grad · weight: grad_x = s · (h − y · mean(h · y)).
template <class T>
struct NormGradient {
  const RmsNormBackwardParams& p;
  alignas(64) float a[kRowChunk], b[kRowChunk], c[kRowChunk], d[kRowChunk];
  ResultChunk<T> result;

  explicit NormGradient(const RmsNormBackwardParams& p) : p(p) {}

  // sums: to which the row's gradient of weight is added, or null.
  void write(int64_t row, float* sums) {
    const T* x = static_cast<const T*>(p.x) + p.x_layout.offset(row);
    const T* grad = static_cast<const T*>(p.grad) + p.grad_layout.offset(row);
    const T* weight = static_cast<const T*>(p.weight);
    const T* grad_sum = nullptr;
    if (p.grad_sum) grad_sum = static_cast<const T*>(p.grad_sum) + p.grad_sum_layout.offset(row);
    double squares = 0, products = 0;
    each_chunk(p.width, [&](int first, int count) {
      const float *v = chunk_of(x + first, count, a), *g = chunk_of(grad + first, count, b);
      const float* w = chunk_of(weight + first, count, c);
      LaneSums square, product;
      for (int i = 0; i < padded_chunk(count); i += kRowLanes)
        for (int j = 0; j < kRowParts; j++) {
          const int at = i + j * kLanes;
          const Floats part = load(v + at);
          square.part[j] += part * part;
          product.part[j] += part * (load(g + at) * load(w + at));
        }
      squares += square.total(), products += product.total();
    });
    const float scale = inverse_root(squares, p.width, p.eps);
    const float mean = static_cast<float>(scale * products / p.width);
    T* grad_x = static_cast<T*>(p.grad_x) + row * p.width;
    each_chunk(p.width, [&](int first, int count) {
      const float *v = chunk_of(x + first, count, a), *g = chunk_of(grad + first, count, b);
      const float* w = chunk_of(weight + first, count, c);
      float* to = result.at(grad_x + first, count);
      for (int i = 0; i < padded_chunk(count); i += kLanes)
        store(to + i, scale * (load(g + i) * load(w + i) - load(v + i) * scale * mean));
      if (grad_sum) {
        const float* more = chunk_of(grad_sum + first, count, d);
        for (int i = 0; i < padded_chunk(count); i += kLanes) store(to + i, load(to + i) + load(more + i));
      }
      result.put(to, grad_x + first, count);
      if (sums) add_weight_gradient(v, g, scale, count, sums + first);
    });
  }

 private:
  void add_weight_gradient(const float* v, const float* g, float scale, int count, float* sums) {
    for (int i = 0; i < padded_chunk(count); i += kLanes) store(d + i, load(v + i) * scale);
    round_chunk<T>(d, count);
    for (int i = 0; i < count; i++) sums[i] += g[i] * d[i];
  }
};

}  // namespace

void rms_norm(const RmsNormParams& p, long begin, long end) {
  const int64_t rows = rows_per_item(p.width);
  with_storage_type(p.dtype, [&]<class T>(T) {
    NormRow<T> row(p);
    for (int64_t r = begin * rows; r < std::min(end * rows, p.rows); r++) row.normalize(r);
  });
}

void rms_norm_backward(const RmsNormBackwardParams& p, long begin, long end) {
  with_storage_type(p.dtype, [&]<class T>(T) {
    NormGradient<T> gradient(p);
    for (long item = begin; item < end; item++) {
      float* sums = p.weight_sums ? p.weight_sums + item * p.width : nullptr;
      if (sums) std::fill(sums, sums + p.width, 0.0f);
      const int64_t last = std::min((item + 1) * p.rows_per_sum, p.rows);
      for (int64_t r = item * p.rows_per_sum; r < last; r++) gradient.write(r, sums);
    }
  });
}

void rms_norm_weight_gradient(const RmsNormBackwardParams& p, long begin, long end) {
  const int64_t items = (p.rows + p.rows_per_sum - 1) / p.rows_per_sum;
  with_storage_type(p.dtype, [&]<class T>(T) {
    const int64_t last = std::min<int64_t>(end * kNormColumns, p.width);
    for (int64_t column = begin * kNormColumns; column < last; column++) {
      float sum = 0;
      for (int64_t item = 0; item < items; item++) sum += p.weight_sums[item * p.width + column];
      narrow(sum, static_cast<T*>(p.grad_weight)[column]);
    }
  });
}

}  // namespace dllm::cpu::DLLM_ISA
