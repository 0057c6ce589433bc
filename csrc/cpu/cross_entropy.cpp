// A row is taken up in chunks that stay in L1, with an online softmax [Milakov & Gimelshein 2018]. NaN and
// infinite logits show in the row's result, as they do in torch.
#include "cpu/cross_entropy.h"

#include <math.h>

#include "cpu/simd.h"

namespace dllm::cpu::DLLM_ISA {

DLLM_SIMD double widen(double x) { return x; }
DLLM_SIMD void narrow(double x, double& to) { to = x; }

namespace {

using Params = CrossEntropyParams<TokenIds>;

constexpr int kChunk = kCrossEntropyChunk;
// Reductions run in 32 lanes on every instruction set; what is beyond the vocabulary is −inf.
constexpr int kReduced = 32, kParts = kReduced / kLanes;

float highest(const float* x, int count) {
  Floats top[kParts];
  for (Floats& part : top) part = broadcast(-kInfinity);
  for (int i = 0; i < count; i += kReduced)
    for (int j = 0; j < kParts; j++) top[j] = max(load(x + i + j * kLanes), top[j]);
  float lane[kReduced], result = -kInfinity;
  for (int j = 0; j < kParts; j++) store(lane + j * kLanes, top[j]);
  for (const float v : lane) result = v > result ? v : result;
  return result;
}

double highest(const double* x, int count) {
  double result = -kInfinity;
  for (int i = 0; i < count; i++) result = x[i] > result ? x[i] : result;
  return result;
}

// x becomes exp(x − shift); returns the sum.
double exponentiate(float* x, int count, float shift) {
  constexpr float kLog2e = 1.44269504f;
  Floats sum[kParts] = {};
  for (int i = 0; i < count; i += kReduced)
    for (int j = 0; j < kParts; j++) {
      const Floats e = exp2((load(x + i + j * kLanes) - shift) * kLog2e);
      store(x + i + j * kLanes, e);
      sum[j] += e;
    }
  float lane[kReduced];
  for (int j = 0; j < kParts; j++) store(lane + j * kLanes, sum[j]);
  double result = 0;
  for (const float v : lane) result += v;
  return result;
}

double exponentiate(double* x, int count, double shift) {
  double result = 0;
  for (int i = 0; i < count; i++) result += x[i] = exp(x[i] - shift);
  return result;
}

template <class Real>
struct OnlineSoftmax {
  Real max = -kInfinity;
  double sum = 0;  // of exp(x − shift())

  // Finite when nothing but −inf was seen, so that exp(−inf − shift) is 0.
  Real shift() const { return max == -kInfinity ? 0 : max; }
  double logsumexp() const { return shift() + log(sum); }

  // x becomes exp(x − shift()).
  void add(Real* x, int count) {
    const double before = max;
    const Real here = highest(x, count);
    if (here > max) max = here;
    sum = sum * exp(before - shift()) + exponentiate(x, count, shift());
  }
};

// T: how logits are stored. Real: what they are computed in.
template <class T, class Real>
class Row {
 public:
  Row(const Params& p, int64_t row)
      : p(p),
        row(row),
        logits(static_cast<T*>(p.logits.data) + p.logits.offset(static_cast<int32_t>(row))),
        target(p.targets[row]),
        weight(static_cast<const Real*>(p.weights)[row]) {}

  void write_loss() {
    double logsumexp = 0, ce = 0;
    if (weight != 0) {
      OnlineSoftmax<Real> softmax;
      for (int32_t first = 0; first < p.vocabulary; first += kChunk) softmax.add(x, load(first));
      logsumexp = softmax.logsumexp();
      ce = logsumexp - widen(logits[target]);
    }
    static_cast<Real*>(p.logsumexp)[row] = static_cast<Real>(logsumexp);
    static_cast<Real*>(p.ce)[row] = static_cast<Real>(ce);
  }

  void write_gradient() {
    T* grad = static_cast<T*>(p.grad) + row * p.vocabulary;
    if (weight == 0) return clear(grad);
    const Real logsumexp = static_cast<const Real*>(p.logsumexp)[row];
    const double factor = *static_cast<const double*>(p.grad_loss) * weight;
    for (int32_t first = 0; first < p.vocabulary; first += kChunk) {
      exponentiate(x, load(first), logsumexp);
      store(first, static_cast<Real>(factor), grad);
    }
    const double log_probability = double(widen(logits[target])) - logsumexp;
    narrow(static_cast<Real>(factor * expm1(log_probability)), grad[target]);
  }

  void replace_by_gradient() {
    Real& ce = static_cast<Real*>(p.ce)[row] = 0;
    if (weight == 0) return clear(logits);
    const double target_logit = logits[target];
    Real* chunk_max = static_cast<Real*>(p.chunk_max) + row * cross_entropy_chunks(p.vocabulary);
    OnlineSoftmax<Real> softmax;
    for (int32_t first = 0; first < p.vocabulary; first += kChunk) {
      softmax.add(x, load(first));
      store(first, 1, logits);
      chunk_max[first / kChunk] = softmax.max;
    }
    const double logsumexp = softmax.logsumexp();
    for (int32_t first = 0; first < p.vocabulary; first += kChunk) {
      const Real factor = static_cast<Real>(weight * exp(chunk_max[first / kChunk] - logsumexp));
      for (int32_t i = first; i < first + count(first); i++) logits[i] *= factor;
    }
    ce = static_cast<Real>(logsumexp - target_logit);
    logits[target] = static_cast<Real>(weight * expm1(target_logit - logsumexp));
  }

 private:
  int count(int32_t first) const { return p.vocabulary - first < kChunk ? p.vocabulary - first : kChunk; }

  // The chunk that starts at id `first`, into x; returns its padded length.
  int load(int32_t first) {
    const int count = this->count(first), padded = (count + kReduced - 1) / kReduced * kReduced;
    for (int i = 0; i < count; i++) x[i] = widen(logits[first + i]);
    for (int i = count; i < padded; i++) x[i] = -kInfinity;
    for (int i = 0; i < p.suppress.count; i++) {
      const int32_t at = p.suppress.ids[i] - first;
      if (at >= 0 && at < count) x[at] = -kInfinity;
    }
    return padded;
  }

  void store(int32_t first, Real factor, T* to) const {
    for (int i = 0; i < count(first); i++) narrow(x[i] * factor, to[first + i]);
  }

  void clear(T* to) const {
    for (int32_t i = 0; i < p.vocabulary; i++) narrow(Real(0), to[i]);
  }

  const Params& p;
  const int64_t row;
  T* const logits;
  const int64_t target;
  const Real weight;
  alignas(64) Real x[kChunk];
};

template <class Visit>
void for_each_row(const Params& p, long begin, long end, Visit visit) {
  for (long row = begin; row < end; row++) switch (p.logits.type) {
      case DType::float32: visit(Row<float, float>(p, row)); break;
      case DType::bfloat16: visit(Row<BFloat16, float>(p, row)); break;
      case DType::float16: visit(Row<Float16, float>(p, row)); break;
      case DType::float64: visit(Row<double, double>(p, row)); break;
    }
}

}  // namespace

void cross_entropy(const Params& p, long begin, long end) {
  for_each_row(p, begin, end, [](auto&& row) { row.write_loss(); });
}

void cross_entropy_backward(const Params& p, long begin, long end) {
  for_each_row(p, begin, end, [](auto&& row) { row.write_gradient(); });
}

void cross_entropy_in_place(const Params& p, long begin, long end) {
  for (long row = begin; row < end; row++)
    if (p.logits.type == DType::float64) Row<double, double>(p, row).replace_by_gradient();
    else Row<float, float>(p, row).replace_by_gradient();
}

}  // namespace dllm::cpu::DLLM_ISA
