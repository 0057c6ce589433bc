// One pass over both rows: with e = exp(x − max x), x of p and y of q,
// KL = Σ e·(x − y) / Σ e − logsumexp x + logsumexp y.
#include "cpu/token_divergence.h"

#include <cmath>

#include "cpu/load_logits.h"

namespace dllm::cpu::DLLM_ISA {
namespace {

struct Softmax {
  double max = -HUGE_VAL, sum = 0;

  // Returns by how much the exponentials so far shrink.
  double raise_max(const float* x, int count, double factor) {
    Floats highest = broadcast(-kInfinity);
    for (int i = 0; i < padded(count); i += kLanes)
      highest = select(load(x + i) > highest, load(x + i), highest);
    double to = max;
    for (int lane = 0; lane < kLanes; lane++) to = highest[lane] * factor > to ? highest[lane] * factor : to;
    const double scale = to > max ? std::exp(max - to) : 1;
    sum *= scale;
    max = to;
    return scale;
  }
  double shift() const { return max > -HUGE_VAL ? max : 0; }
  double logsumexp() const { return max + std::log(sum); }
};

DLLM_SIMD double total(Floats v) {
  double sum = 0;
  for (int lane = 0; lane < kLanes; lane++) sum += v[lane];
  return sum;
}

class Divergence {
 public:
  // A chunk of x and y, padded with −inf. factor: what they are still to be multiplied with, as doubles.
  void add(const float* x, const float* y, int count, bool float64, double factor) {
    const double scale = p_.raise_max(x, count, factor);
    q_.raise_max(y, count, factor);
    cross_ = scale > 0 ? cross_ * scale : 0;
    float64 ? add_doubles(x, y, count, factor) : add_floats(x, y, count);
  }

  // Infinite where q is 0 and p is not, and where a row has no finite logit.
  double value() const {
    if (!(p_.sum > 0 && q_.sum > 0)) return HUGE_VAL;
    const double divergence = cross_ / p_.sum - p_.logsumexp() + q_.logsumexp();
    return divergence > 0 ? divergence : 0;
  }

 private:
  void add_floats(const float* x, const float* y, int count) {
    constexpr float kLog2e = 1.44269504f;
    const Floats max_x = broadcast(static_cast<float>(p_.shift())),
                 max_y = broadcast(static_cast<float>(q_.shift()));
    Floats sum_x = {}, sum_y = {}, cross = {};
    for (int i = 0; i < padded(count); i += kLanes) {
      const Floats vx = load(x + i), vy = load(y + i);
      const Floats e = exp2((vx - max_x) * kLog2e);
      sum_x += e;
      sum_y += exp2((vy - max_y) * kLog2e);
      cross += select(e > 0.0f, e * (vx - vy), Floats{});
    }
    p_.sum += total(sum_x);
    q_.sum += total(sum_y);
    cross_ += total(cross);
  }

  void add_doubles(const float* x, const float* y, int count, double factor) {
    for (int i = 0; i < count; i++) {
      const double vx = x[i] * factor, vy = y[i] * factor, e = std::exp(vx - p_.shift());
      p_.sum += e;
      q_.sum += std::exp(vy - q_.shift());
      if (e > 0) cross_ += e * (vx - vy);
    }
  }

  Softmax p_, q_;
  double cross_ = 0;  // Σ e·(x − y)
};

void load_distribution(const TokenDivergenceParams<TokenIds>& p, const LogitsView& logits, int64_t row,
                       int32_t first, int count, float* x) {
  load_chunk(logits, logits.offset(row) + first, count, x);
  IdsInChunk(p.suppress, first, count).bar(x, first);
  IdsInChunk(p.confidence_exclude, first, count).bar(x, first);
  if (!p.float64) scale_chunk(p.confidence_scale, count, x);
}

}  // namespace

void token_divergence(const TokenDivergenceParams<TokenIds>& p, long begin, long end) {
  alignas(64) float x[kChunkIds], y[kChunkIds];
  for (long row = begin; row < end; row++) {
    Divergence divergence;
    for (int32_t first = 0; first < p.vocabulary; first += kChunkIds) {
      const int count = p.vocabulary - first < kChunkIds ? p.vocabulary - first : kChunkIds;
      load_distribution(p, p.logits, row, first, count, x);
      load_distribution(p, p.previous, row, first, count, y);
      divergence.add(x, y, count, p.float64, p.float64 ? p.confidence_scale64 : 1);
    }
    if (p.float64) static_cast<double*>(p.divergence)[row] = divergence.value();
    else static_cast<float*>(p.divergence)[row] = static_cast<float>(divergence.value());
  }
}

}  // namespace dllm::cpu::DLLM_ISA
