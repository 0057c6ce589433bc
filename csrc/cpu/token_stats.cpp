#include "cpu/token_stats.h"

#include "cpu/token_filter.h"
#include "cpu/token_state_update.h"

namespace dllm::cpu::DLLM_ISA {
namespace {

// Where the next chunk lies: it is fetched while this one is worked on.
struct NextChunk {
  const char* logits;
  int bytes_per_id;
  NextChunk(const LogitsView& view, int64_t offset) : bytes_per_id(view.type == DType::float32 ? 4 : 2) {
    logits = static_cast<const char*>(view.data) + (offset + kChunkIds) * bytes_per_id;
  }
  DLLM_SIMD void operator()(int id) const { __builtin_prefetch(logits + id * bytes_per_id); }
};

template <class Real>
PartState<Real> part_state(const PartedStatsParams& p, int64_t visited, int32_t begin, int32_t end) {
  PartState<Real> part;
  alignas(64) float x[kChunkIds];
  for (int32_t first = begin; first < end; first += kChunkIds) {
    const int count = end - first < kChunkIds ? end - first : kChunkIds;
    const int64_t offset = p.logits.offset(p.row(visited)) + first;
    const float bound = load_chunk(p.logits, offset, count, x);
    add_chunk(part, p, visited, first, count, bound, x, NextChunk(p.logits, offset));
  }
  return part;
}

template <class Real>
void fill_states(const PartedStatsParams& p, long begin, long end) {
  for (long item = begin; item < end; item++) {
    const int64_t visited = item / p.parts, part = item % p.parts;
    const int32_t first = static_cast<int32_t>(part * kLogitsPart);
    const int32_t end = part + 1 < p.parts ? first + kLogitsPart : p.vocabulary;
    static_cast<PartState<Real>*>(p.states)[item] = part_state<Real>(p, visited, first, end);
  }
}

template <class Real>
PartState<Real> merged_parts(const PartedStatsParams& p, int64_t visited) {
  const auto* parts = static_cast<const PartState<Real>*>(p.states) + visited * p.parts;
  PartState<Real> row = parts[0];
  for (int i = 1; i < p.parts; i++) {
    merge(row.state, parts[i].state);
    if (row.state.token == parts[i].state.token) row.x = parts[i].x;
  }
  return row;
}

template <class Real>
TokenCut row_cut(const PartedStatsParams& p, int64_t visited) {
  const TokenState<Real> state = merged_parts<Real>(p, visited).state;
  TokenFilter filter(p.top_p, p.top_k, state.max, state.sum, p.vocabulary);
  alignas(64) float x[kChunkIds];
  for (int32_t first = 0; first < p.vocabulary; first += kChunkIds) {
    const int count = p.vocabulary - first < kChunkIds ? p.vocabulary - first : kChunkIds;
    load_chunk(p.logits, p.logits.offset(p.row(visited)) + first, count, x);
    IdsInChunk(p.suppress, first, count).bar(x, first);
    scale_chunk(p.confidence_scale, count, x);
    filter.add(x, count, first);
  }
  TokenCut cut = filter.cut();
  cut.fallback = state.token < 0 ? p.fallback : state.token;
  return cut;
}

template <class Real>
void write_result(const PartedStatsParams& p, int64_t visited) {
  const PartState<Real> part = merged_parts<Real>(p, visited);
  const int32_t fallback = p.cuts ? p.cuts[visited].fallback : p.fallback;
  const TokenResult<Real> result = finish(part.state, part.x, fallback, p.vocabulary);
  const int64_t row = p.row(visited);
  p.token[row] = result.token;
  static_cast<Real*>(p.prob)[row] = result.prob;
  static_cast<Real*>(p.margin)[row] = result.margin;
  static_cast<Real*>(p.entropy)[row] = result.entropy;
  static_cast<Real*>(p.logsumexp)[row] = result.logsumexp;
}

}  // namespace

void token_states(const PartedStatsParams& p, long begin, long end) {
  p.float64 ? fill_states<double>(p, begin, end) : fill_states<float>(p, begin, end);
}

void token_cuts(const PartedStatsParams& p, long begin, long end) {
  for (long item = begin; item < end; item++)
    p.cuts[item] = p.float64 ? row_cut<double>(p, item) : row_cut<float>(p, item);
}

void token_results(const PartedStatsParams& p, long begin, long end) {
  for (long item = begin; item < end; item++)
    p.float64 ? write_result<double>(p, item) : write_result<float>(p, item);
}

}  // namespace dllm::cpu::DLLM_ISA
