// One pass over a row of logits, in chunks that stay in L1: widen, bar ids, add noise, update the state.
#include "cpu/token_stats.h"

#include <cfloat>
#include <cstring>

#include "cpu/gumbel_noise.h"
#include "cpu/simd.h"

namespace dllm::cpu::DLLM_ISA {
namespace {

constexpr int kChunk = 1024;
// Chunks are padded with −inf to a multiple of 64, and reduced in 32 lanes on every instruction set.
constexpr int padded(int count) { return (count + 63) / 64 * 64; }
constexpr int kReduced = 32, kParts = kReduced / kLanes;

// NaN becomes −inf, +inf the largest float: sums stay finite, and +inf wins where it should.
DLLM_SIMD Floats tame(Floats x) {
  const Floats number = max(x, broadcast(-kInfinity));
  return number < FLT_MAX ? number : broadcast(FLT_MAX);
}

// Widens a chunk and pads it; returns the highest of its lanes.
template <class T>
float load_chunk(const T* from, int count, float* x) {
  const int vectors = count / kLanes * kLanes;  // float32 is tamed on its way into x
  if constexpr (sizeof(T) != sizeof(float)) widen_row(from, x, count);
  else memcpy(x + vectors, from + vectors, (count - vectors) * sizeof(float));
  for (int i = count; i < padded(count); i++) x[i] = -kInfinity;
  Floats highest[2] = {broadcast(-kInfinity), broadcast(-kInfinity)};
  for (int i = 0; i < padded(count); i += 2 * kLanes)
    for (int j = 0; j < 2; j++) {
      const int at = i + j * kLanes;
      Floats v;
      if constexpr (sizeof(T) == sizeof(float)) v = load((at < vectors ? from : x) + at);
      else v = load(x + at);
      v = tame(v);
      store(x + at, v);
      highest[j] = max(v, highest[j]);
    }
  float lane[2 * kLanes], top = -kInfinity;
  store(lane, highest[0]);
  store(lane + kLanes, highest[1]);
  for (const float v : lane) top = v > top ? v : top;
  return top;
}

float load_chunk(const TokenStatsParams& p, int64_t offset, int count, float* x) {
  switch (p.type) {
    case LogitType::bfloat16: return load_chunk(static_cast<const BFloat16*>(p.logits) + offset, count, x);
    case LogitType::float16: return load_chunk(static_cast<const Float16*>(p.logits) + offset, count, x);
    default: return load_chunk(static_cast<const float*>(p.logits) + offset, count, x);
  }
}

// Where the next chunk lies: it is fetched while this one is worked on.
struct NextChunk {
  const char* logits;
  int bytes_per_id;
  NextChunk(const TokenStatsParams& p, int64_t offset) : bytes_per_id(p.type == LogitType::float32 ? 4 : 2) {
    logits = static_cast<const char*>(p.logits) + (offset + kChunk) * bytes_per_id;
  }
  DLLM_SIMD void fetch(int id) const { __builtin_prefetch(logits + id * bytes_per_id); }
};

// The listed ids that lie in [first, first + count).
struct IdsInChunk {
  const int32_t *begin, *end;
  IdsInChunk(const TokenIds& list, int32_t first, int count) : begin(list.ids), end(list.ids + list.count) {
    while (begin < end && *begin < first) begin++;
    while (begin < end && end[-1] - first >= count) end--;
  }
  bool empty() const { return begin == end; }
  void bar(float* x, int32_t first) const {
    for (const int32_t* id = begin; id < end; id++) x[*id - first] = -kInfinity;
  }
};

struct TopTwo {
  float first = -kInfinity, second = -kInfinity;
};

TopTwo top_two(const float* x, int count) {
  Floats first[kParts], second[kParts];
  for (int j = 0; j < kParts; j++) first[j] = second[j] = broadcast(-kInfinity);
  for (int i = 0; i < count; i += kReduced)
    for (int j = 0; j < kParts; j++) {
      const Floats v = load(x + i + j * kLanes);
      const Floats lower = v < first[j] ? v : first[j];
      second[j] = max(lower, second[j]);
      first[j] = max(v, first[j]);
    }
  float lane[2 * kReduced];
  for (int j = 0; j < kParts; j++) {
    store(lane + j * kLanes, first[j]);
    store(lane + kReduced + j * kLanes, second[j]);
  }
  TopTwo top;
  for (const float v : lane) {
    top.second = v > top.first ? top.first : (v > top.second ? v : top.second);
    top.first = v > top.first ? v : top.first;
  }
  return top;
}

template <class Real>
void propose(TokenState<Real>& state, const float* scores, float highest, int32_t first) {
  if (!(highest > state.score)) return;
  int at = 0;
  while (scores[at] != highest) at++;
  state.score = highest;
  state.token = first + at;
}

void add_exponentials(TokenState<float>& state, const float* x, int count, const NextChunk& next) {
  constexpr float kLog2e = 1.44269504f, kLn2 = 0.69314718f;
  // Below 2^−126 an exponential is under every rounding of the sum; the bound keeps −inf out of products.
  const Floats lowest = broadcast(-126.0f);
  Floats sum[kParts] = {}, weighted[kParts] = {};
  for (int i = 0; i < count; i += kReduced)
    for (int j = 0; j < kParts; j++) {
      next.fetch(i + j * kLanes);
      const Floats power = max((load(x + i + j * kLanes) - state.max) * kLog2e, lowest);
      const Floats e = exp2(power);
      sum[j] += e;
      weighted[j] += e * power;
    }
  float lane[2][kReduced];
  for (int j = 0; j < kParts; j++) {
    store(lane[0] + j * kLanes, sum[j]);
    store(lane[1] + j * kLanes, weighted[j]);
  }
  for (int width = kReduced / 2; width; width /= 2)
    for (int i = 0; i < width; i++) {
      lane[0][i] += lane[0][i + width];
      lane[1][i] += lane[1][i + width];
    }
  state.sum += lane[0][0];
  state.weighted += lane[1][0] * kLn2;
}

void add_exponentials(TokenState<double>& state, const float* x, int count, const NextChunk&) {
  for (int i = 0; i < count; i++) {
    if (x[i] == -kInfinity) continue;
    const double shifted = x[i] - state.max, e = std::exp(shifted);
    state.sum += e;
    state.weighted += e * shifted;
  }
}

template <class Real>
void add_top_two(TokenState<Real>& state, TopTwo top) {
  TokenState<Real> chunk;
  chunk.max = top.first;
  chunk.second = top.second;
  merge(state, chunk);
}

int64_t row_offset(const TokenStatsParams& p, int64_t row) {
  return row / p.inner * p.outer_stride + row % p.inner * p.inner_stride;
}

template <class Real>
TokenState<Real> range_state(const TokenStatsParams& p, int64_t row, int32_t begin, int32_t end) {
  const bool noisy = p.temperature > 0;
  TokenState<Real> state;
  alignas(64) float x[kChunk], scores[kChunk];
  for (int32_t first = begin; first < end; first += kChunk) {
    const int count = end - first < kChunk ? end - first : kChunk, whole = padded(count);
    const int64_t offset = row_offset(p, row) + first;
    const float bound = load_chunk(p, offset, count, x);
    IdsInChunk(p.suppress, first, count).bar(x, first);
    const IdsInChunk unproposed(p.proposal_exclude, first, count),
        uncounted(p.confidence_exclude, first, count);

    if (noisy || !unproposed.empty()) {
      if (noisy) add_gumbel_noise(p.seed, p.noise_ids + 3 * row, p.temperature, first, count, x, scores);
      else memcpy(scores, x, sizeof x);
      unproposed.bar(scores, first);
      propose(state, scores, top_two(scores, whole).first, first);
    } else if (bound > state.score) {
      propose(state, x, top_two(x, whole).first, first);
    }

    uncounted.bar(x, first);
    if (p.confidence_scale != 1)
      for (int i = 0; i < whole; i += kLanes) store(x + i, tame(load(x + i) * p.confidence_scale));
    if (p.confidence_scale != 1 || bound > state.second) add_top_two(state, top_two(x, whole));
    if (state.max > -kInfinity) add_exponentials(state, x, whole, NextChunk(p, offset));
  }
  return state;
}

template <class Real>
void write_result(const TokenStatsParams& p, int64_t row, const TokenState<Real>* ranges) {
  TokenState<Real> state = ranges[0];
  for (int i = 1; i < p.ranges(); i++) merge(state, ranges[i]);
  Real x = -kInfinity;
  if (state.token >= 0 && IdsInChunk(p.confidence_exclude, state.token, 1).empty()) {
    float logit[padded(1)];
    load_chunk(p, row_offset(p, row) + state.token, 1, logit);
    x = p.confidence_scale != 1 ? tame(broadcast(logit[0] * p.confidence_scale))[0] : logit[0];
  }
  const TokenResult<Real> result = finish(state, x, p.fallback, p.vocabulary);
  p.token[row] = result.token;
  static_cast<Real*>(p.prob)[row] = result.prob;
  static_cast<Real*>(p.margin)[row] = result.margin;
  static_cast<Real*>(p.entropy)[row] = result.entropy;
  static_cast<Real*>(p.logsumexp)[row] = result.logsumexp;
}

template <class Real>
void fill_states(const TokenStatsParams& p, long begin, long end) {
  for (long item = begin; item < end; item++) {
    const int64_t row = p.rows[item / p.ranges()], range = item % p.ranges();
    const int32_t first = static_cast<int32_t>(range * TokenStatsParams::kRange);
    const int32_t end = range + 1 < p.ranges() ? first + TokenStatsParams::kRange : p.vocabulary;
    static_cast<TokenState<Real>*>(p.states)[item] = range_state<Real>(p, row, first, end);
  }
}

}  // namespace

void token_states(const TokenStatsParams& p, long begin, long end) {
  p.float64 ? fill_states<double>(p, begin, end) : fill_states<float>(p, begin, end);
}

void token_results(const TokenStatsParams& p, long begin, long end) {
  for (long item = begin; item < end; item++) {
    const int64_t first = item * p.ranges();
    if (p.float64) write_result(p, p.rows[item], static_cast<const TokenState<double>*>(p.states) + first);
    else write_result(p, p.rows[item], static_cast<const TokenState<float>*>(p.states) + first);
  }
}

}  // namespace dllm::cpu::DLLM_ISA
