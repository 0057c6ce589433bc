// Takes a chunk of logits into the state of its row: ids barred, noise added, proposal and softmax updated.
#pragma once

#include <cstring>
#include <type_traits>

#include "cpu/gumbel_noise.h"
#include "cpu/load_logits.h"

namespace dllm::cpu::DLLM_ISA {

struct TopTwo {
  float first = -kInfinity, second = -kInfinity;
};

inline TopTwo top_two(const float* x, int count) {
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

// Bars what the row's cut leaves out.
inline void apply(const TokenCut& cut, float scale, int32_t first, int count, float* x) {
  Ints id;
  for (int lane = 0; lane < kLanes; lane++) id[lane] = first + lane;
  for (int i = 0; i < padded(count); i += kLanes, id += kLanes) {
    const Floats v = load(x + i), scaled = scale == 1 ? v : tame(v * scale);
    const Ints kept = (scaled > cut.lowest) | ((scaled == cut.lowest) & (id <= cut.last_tie));
    store(x + i, select(kept, v, broadcast(-kInfinity)));
  }
}

template <class Real>
void propose(TokenState<Real>& state, const float* scores, float highest, int32_t first) {
  if (!(highest > state.score)) return;
  int at = 0;
  while (scores[at] != highest) at++;
  state.score = highest;
  state.token = first + at;
}

// fetch(i) is called for every vector: it may prefetch what comes next.
template <class Fetch>
void add_exponentials(TokenState<float>& state, const float* x, int count, float, const Fetch& fetch) {
  constexpr float kLog2e = 1.44269504f, kLn2 = 0.69314718f;
  // Below 2^−126 an exponential is under every rounding of the sum; the bound keeps −inf out of products.
  const Floats lowest = broadcast(-126.0f);
  Floats sum[kParts] = {}, weighted[kParts] = {};
  for (int i = 0; i < count; i += kReduced)
    for (int j = 0; j < kParts; j++) {
      fetch(i + j * kLanes);
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

template <class Fetch>
void add_exponentials(TokenState<double>& state, const float* x, int count, double scale, const Fetch&) {
  for (int i = 0; i < count; i++) {
    if (x[i] == -kInfinity) continue;
    const double shifted = x[i] * scale - state.max, e = std::exp(shifted);
    state.sum += e;
    state.weighted += e * shifted;
  }
}

template <class Real>
void add_top_two(TokenState<Real>& state, TopTwo top, Real scale) {
  TokenState<Real> chunk;
  chunk.max = top.first * scale;
  chunk.second = top.second * scale;
  merge(state, chunk);
}

// x: the logits of ids first … first + count of a row, from load_chunk, which returned `bound`; overwritten.
template <class Real, class Fetch>
void add_chunk(PartState<Real>& part, const PartedStatsParams& p, int64_t visited, int32_t first, int count,
               float bound, float* x, const Fetch& fetch) {
  TokenState<Real>& state = part.state;
  const int whole = padded(count);
  IdsInChunk(p.suppress, first, count).bar(x, first);
  if (p.cuts) apply(p.cuts[visited], p.confidence_scale, first, count, x);

  const IdsInChunk unproposed(p.proposal_exclude, first, count);
  if (p.temperature > 0 || !unproposed.empty()) {
    alignas(64) float scores[kChunkIds];
    const int64_t row = p.row(visited);
    const int32_t row_id[3] = {0, static_cast<int32_t>(row), 0};
    const int32_t* noise_id = p.noise_ids ? p.noise_ids + 3 * row : row_id;
    if (p.temperature > 0) add_gumbel_noise(p.seed, noise_id, p.temperature, first, whole, x, scores);
    else memcpy(scores, x, sizeof(float) * whole);
    unproposed.bar(scores, first);
    propose(state, scores, top_two(scores, whole).first, first);
  } else if (bound > state.score) {
    propose(state, x, top_two(x, whole).first, first);
  }

  IdsInChunk(p.confidence_exclude, first, count).bar(x, first);
  // A double is scaled where it is used: x has room for no more than a float.
  Real scale = 1;
  if constexpr (std::is_same_v<Real, double>) scale = p.confidence_scale64;
  else scale_chunk(p.confidence_scale, count, x);
  if (state.token >= first) part.x = x[state.token - first] * scale;
  if (p.confidence_scale64 != 1 || bound > state.second) add_top_two(state, top_two(x, whole), scale);
  if (state.max > -kInfinity) add_exponentials(state, x, whole, scale, fetch);
}

}  // namespace dllm::cpu::DLLM_ISA
