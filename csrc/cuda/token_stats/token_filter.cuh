// Where the ids that top-p and top-k keep end, one CTA per row, without sorting: bit by bit from the top, the
// lowest logit is found that has at most top_p of the mass and fewer than top_k ids above it. Every pass over
// the row counts ids and sums their mass in a few slots of what is left, in one order.
#pragma once

#include "cuda/token_stats/row_state.cuh"

namespace dllm::cuda {

// An unsigned integer of the same order; both zeros have one.
__device__ inline uint32_t ordered_key(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
}

// Low bits in which keys of logits of type T do not differ, unless they were scaled or infinite.
template <class T>
constexpr int kUnusedBits = 0;
template <>
constexpr int kUnusedBits<__nv_bfloat16> = 16;
template <>
constexpr int kUnusedBits<__half> = 13;

// The ids of one slot, or of all above one.
struct SlotTotal {
  double mass = 0;
  int32_t count = 0;
};

// The row as the confidence sees it, before confidence_exclude.
template <class T, class Real>
struct FilteredRow {
  const RowStatsParams& p;
  const T* logits;
  Real max;
  int unused_bits;

  __device__ uint32_t key(float x) const { return ordered_key(x) >> unused_bits; }
  __device__ double mass(float x) const { return exponential(static_cast<Real>(x) - max); }

  __device__ float operator[](int32_t id) const {
    return listed(p.suppress, id) ? -HUGE_VALF : scaled(widen(logits[id]));
  }

  template <class Visit>
  __device__ void for_each(const Visit& visit) const {
    const RowVectors<T> vectors(logits, p.vocabulary);
    for_each_vector<2, kFilterThreads>(logits, vectors, [&](int32_t vector, const uint4& raw) {
      float x[RowVectors<T>::kIds];
      unpack<T>(raw, x);
      bar(p.suppress, vectors.first_id(vector), x);
#pragma unroll
      for (int i = 0; i < RowVectors<T>::kIds; i++) visit(scaled(x[i]));
    });
    if (threadIdx.x < vectors.edges) visit((*this)[vectors.edge_id(threadIdx.x)]);
  }

 private:
  __device__ float scaled(float x) const { return tame(tame(x) * p.confidence_scale); }
};

// Every thread gets the totals of the CTA.
__device__ inline void add_up(SlotTotal (&slots)[kFilterSlots]) {
  __shared__ double warp_mass[kFilterSlots][kFilterWarps], mass[kFilterSlots];
  __shared__ int32_t warp_count[kFilterSlots][kFilterWarps], count[kFilterSlots];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int s = 0; s < kFilterSlots; s++) {
    const double slot_mass = warp_sum(slots[s].mass);
    const int32_t slot_count = __reduce_add_sync(kAllLanes, slots[s].count);
    if (lane == 0) warp_mass[s][warp] = slot_mass, warp_count[s][warp] = slot_count;
  }
  __syncthreads();
  if (warp < kFilterSlots) {
    const bool holds = lane < kFilterWarps;
    const double slot_mass = warp_sum(holds ? warp_mass[warp][lane] : 0.0);
    const int32_t slot_count = __reduce_add_sync(kAllLanes, holds ? warp_count[warp][lane] : 0);
    if (lane == 0) mass[warp] = slot_mass, count[warp] = slot_count;
  }
  __syncthreads();
#pragma unroll
  for (int s = 0; s < kFilterSlots; s++) slots[s] = {mass[s], count[s]};
}

// The id of the n-th logit, counted from 1 in the order of ids, whose key is `key`; each warp counts those of
// consecutive ids, and the thread that has it calls found(id).
template <class T, class Real, class Found>
__device__ void find_tie(const FilteredRow<T, Real>& row, uint32_t key, int32_t n, const Found& found) {
  __shared__ int32_t counts[kFilterWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int32_t per_warp = (row.p.vocabulary + kFilterThreads - 1) / kFilterThreads * 32;
  const auto ties_at = [&](int32_t first) {
    const int32_t id = first + lane;
    return __ballot_sync(kAllLanes, id < row.p.vocabulary && row.key(row[id]) == key);
  };
  int32_t count = 0;
  for (int32_t i = 0; i < per_warp; i += 32) count += __popc(ties_at(warp * per_warp + i));
  if (lane == 0) counts[warp] = count;
  __syncthreads();
  int32_t before = __reduce_add_sync(kAllLanes, lane < warp ? counts[lane] : 0);
  if (n <= before || n > before + count) return;
  for (int32_t first = warp * per_warp;; first += 32) {
    const unsigned ties = ties_at(first);
    const int rank = before + __popc(ties & ((1u << lane) - 1)) + 1;
    if ((ties >> lane & 1) && rank == n) found(first + lane);
    before += __popc(ties);
    if (before >= n) return;
  }
}

template <class T, class Real>
__global__ void __launch_bounds__(kFilterThreads, 1)
    token_filter_kernel(const __grid_constant__ RowStatsParams p) {
  const int32_t at = row_of_cta();
  if (at < 0 || at >= p.rows || !row_identity(p, at).masked) return;
  const TokenState<Real> state = merged_ranges<Real>(p, at);
  TokenCut cut;
  cut.fallback = state.token < 0 ? p.fallback : state.token;
  if (!(state.sum > 0)) {
    if (threadIdx.x == 0) p.cuts[at] = cut;
    return;
  }
  const FilteredRow<T, Real> row{p, row_of<const T>(p.logits, at), state.max,
                                 p.confidence_scale == 1 && state.max < FLT_MAX ? kUnusedBits<T> : 0};
  const double limit = p.top_p < 1 ? p.top_p * state.sum : HUGE_VAL;
  // Ids of less than (1 − top_p) / vocabulary hold less than 1 − top_p together, so the cut is above them;
  // half of that leaves room for the rounding of sum.
  const double lowest = state.max + log((1 - p.top_p) * state.sum / p.vocabulary / 2);
  uint32_t low = row.key(lowest > -FLT_MAX ? static_cast<float>(lowest) : -FLT_MAX);
  uint32_t high = row.key(static_cast<float>(state.max));

  SlotTotal above, ties;  // of the slot that holds the cut
  for (int shift = 32; shift > 0;) {
    shift = max(32 - __clz(high - low) - kFilterSlotBits, 0);
    SlotTotal slots[kFilterSlots];
    row.for_each([&](float x) {
      const uint32_t key = row.key(x);
      if (key < low || key > high) return;
      const double mass = row.mass(x);
#pragma unroll
      for (uint32_t s = 0; s < kFilterSlots; s++) {
        const bool inside = (key - low) >> shift == s;
        slots[s].count += inside;
        slots[s].mass += inside ? mass : 0;
      }
    });
    add_up(slots);
    SlotTotal higher = above;
    uint32_t chosen = 0;
#pragma unroll
    for (int s = kFilterSlots - 1; s >= 0; s--) {
      if (slots[s].count == 0) continue;
      if (higher.mass <= limit && higher.count < p.top_k) chosen = s, above = higher, ties = slots[s];
      higher.mass += slots[s].mass;
      higher.count += slots[s].count;
    }
    low += chosen << shift;
    high = low + min(high - low, (1u << shift) - 1);
  }

  const uint32_t bits = low << row.unused_bits;
  // Below zero the key is the complement, and bits that were not looked at are ones.
  const uint32_t unseen = (1u << row.unused_bits) - 1;
  cut.lowest = __uint_as_float(bits >> 31 ? bits ^ 0x80000000u : ~(bits | unseen));
  const double room = (limit - above.mass) / row.mass(cut.lowest) + 1;
  if (!(room < ties.count)) {
    if (threadIdx.x == 0) p.cuts[at] = cut;
    return;
  }
  find_tie(row, low, static_cast<int32_t>(room), [&](int32_t id) {
    cut.last_tie = id;
    p.cuts[at] = cut;
  });
}

}  // namespace dllm::cuda
