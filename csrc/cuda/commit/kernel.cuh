// commit_ on CUDA: one CTA per canvas row. Ranks by counting (a few hundred candidates), then every rank
// asks the rule; the first rank that it does not keep ends the accepted ones.
#pragma once

#include "cuda/commit/launch.h"

namespace dllm::cuda {

// For one canvas row of C candidates, in shared memory:
//   key[C] entropy[C] (Real)   position[C] (−1: no candidate)   order[C] (candidate of each rank)
template <class Real, class Id>
__global__ void __launch_bounds__(kCommitThreads) commit_kernel(const __grid_constant__ CommitParams p) {
  extern __shared__ double shared[];
  __shared__ int first_refused;
  Real* key = reinterpret_cast<Real*>(shared);
  Real* entropy = key + p.candidates;
  int* position = reinterpret_cast<int*>(entropy + p.candidates);
  int* order = position + p.candidates;

  const int b = blockIdx.x, C = p.candidates;
  const int64_t row = static_cast<int64_t>(b) * C;
  Id* canvas = static_cast<Id*>(p.canvas) + b * p.canvas_stride;
  const auto* margin = static_cast<const Real*>(p.margin);
  const auto* prob = static_cast<const Real*>(p.prob);
  const auto candidate_at = [&](int c) {
    const DrawId draw{p.seed, p.sequence_ids ? p.sequence_ids[b] : b, position[c], p.step ? p.step[b] : 0};
    return make_candidate(p.rule, prob[row + c], margin[row + c], entropy[c], draw);
  };

  // Candidates, in whatever order they are listed.
  int masks = 0;
  for (int c = threadIdx.x; c < C; c += kCommitThreads) {
    const int64_t at = p.positions ? p.positions[row + c] : static_cast<int64_t>(p.block_start[b]) + c;
    const bool masked = at >= 0 && at < p.length && canvas[at] == p.mask_id;
    const bool candidate = masked && p.token[row + c] != p.mask_id && p.token[row + c] >= 0;
    masks += masked;
    p.accepted[row + c] = false;
    position[c] = candidate ? static_cast<int>(at) : -1;
    if (!candidate) continue;
    entropy[c] = static_cast<const Real*>(p.entropy)[row + c];
    key[c] = candidate_at(c).key;
  }
  if (threadIdx.x == 0) first_refused = C;
  __syncthreads();

  for (int c = threadIdx.x; c < C; c += kCommitThreads) {
    if (position[c] < 0) continue;
    const Candidate<Real> mine{Real(0), key[c], position[c]};
    int rank = 0;
    for (int other = 0; other < C; other++) {
      const Candidate<Real> theirs{Real(0), key[other], position[other]};
      // Positions are distinct; should one be listed twice, the index keeps ranks distinct.
      const bool same = theirs.key == mine.key && theirs.position == mine.position;
      rank += theirs.position >= 0 && (precedes(theirs, mine) || (same && other < c));
    }
    order[rank] = c;
  }
  __syncthreads();

  int ranked = 0;
  for (int base = 0; base < C; base += kCommitThreads) {
    const int c = base + static_cast<int>(threadIdx.x);
    ranked += __syncthreads_count(c < C && position[c] >= 0);
  }
  for (int rank = threadIdx.x; rank < ranked; rank += kCommitThreads) {
    Real entropy_before = 0;
    if (p.rule.name == RuleName::entropy_bound)
      for (int before = 0; before < rank; before++) entropy_before += entropy[order[before]];
    const Real confidence = candidate_at(order[rank]).confidence;
    if (!keeps(p.rule, rank, confidence, entropy_before, p.quota ? p.quota[b] : 0))
      atomicMin(&first_refused, rank);
  }
  __syncthreads();

  int changed = 0;
  for (int rank = threadIdx.x; rank < ranked && rank < first_refused; rank += kCommitThreads) {
    const int c = order[rank];
    canvas[position[c]] = static_cast<Id>(p.token[row + c]);
    p.accepted[row + c] = true;
    changed++;
  }
  if (!p.progress) return;
  __shared__ int left, written;
  if (threadIdx.x == 0) left = written = 0;
  __syncthreads();
  atomicAdd(&left, masks - changed);
  atomicAdd(&written, changed);
  __syncthreads();
  if (threadIdx.x == 0) {
    p.progress[2 * b] = left;
    p.progress[2 * b + 1] = written;
  }
}

}  // namespace dllm::cuda
