// commit_ on CUDA: one CTA per canvas row. Edits what holds no mask; ranks the candidates by counting (a few
// hundred), then every rank asks the rule; the first rank that it does not keep ends the accepted ones.
#pragma once

#include "core/acceptance.h"
#include "cuda/commit/launch.h"
#include "cuda/ptx.cuh"

namespace dllm::cuda {

// For one canvas row of C candidates, in shared memory:
//   key[C] entropy[C] (Real)   position[C] (−1: no candidate)   order[C] (candidate of each rank)
template <class Real, class Id>
__global__ void __launch_bounds__(kCommitThreads) commit_kernel(const __grid_constant__ CommitParams p) {
  __shared__ int first_refused;
  Real* key = dynamic_shared<Real>();
  Real* entropy = key + p.candidates;
  int* position = reinterpret_cast<int*>(entropy + p.candidates);
  int* order = position + p.candidates;

  const int b = blockIdx.x, C = p.candidates;
  const int64_t row = static_cast<int64_t>(b) * C;
  Id* canvas = static_cast<Id*>(p.canvas) + b * p.canvas_stride;
  int32_t* state = p.state ? p.state + b * p.state_stride : nullptr;
  const auto* margin = static_cast<const Real*>(p.margin);
  const auto* prob = static_cast<const Real*>(p.prob);
  const auto candidate_at = [&](int c) {
    const DrawId draw{p.seed, p.sequence_ids ? p.sequence_ids[b] : b, position[c], p.step ? p.step[b] : 0};
    const int32_t stable = state ? state[position[c]] : 0;
    return make_candidate(p.rule, prob[row + c], margin[row + c], entropy[c], stable, draw);
  };
  const auto write = [&](int64_t at, int c) {
    canvas[at] = static_cast<Id>(p.token[row + c]);
    p.accepted[row + c] = true;
  };

  // Candidates, in whatever order they are listed.
  int masks = 0, edited = 0;
  for (int c = threadIdx.x; c < C; c += kCommitThreads) {
    p.accepted[row + c] = false;
    position[c] = -1;
    const int64_t at = p.positions ? p.positions[row + c] : static_cast<int64_t>(p.block_start[b]) + c;
    if (at < 0 || at >= p.length) continue;
    const int64_t token = p.token[row + c];
    const bool masked = canvas[at] == p.mask_id, proposed = token != p.mask_id && token >= 0;
    masks += masked;
    if (masked && state)
      state[at] = stable_steps(p.rule, static_cast<const Real*>(p.divergence)[row + c], state[at]);
    if (masked && proposed) {
      position[c] = static_cast<int>(at);
      entropy[c] = static_cast<const Real*>(p.entropy)[row + c];
      key[c] = candidate_at(c).key;
    } else if (proposed && canvas[at] != token && edits(p.rule, prob[row + c])) {
      write(at, c);
      edited++;
    }
  }
  if (threadIdx.x == 0) first_refused = C;
  __syncthreads();

  for (int c = threadIdx.x; c < C; c += kCommitThreads) {
    if (position[c] < 0) continue;
    const Candidate<Real> mine{Real(0), key[c], position[c], false};
    int rank = 0;
    for (int other = 0; other < C; other++) {
      if (position[other] < 0) continue;
      const Candidate<Real> theirs{Real(0), key[other], position[other], false};
      // Positions are distinct; should one be listed twice, the index keeps ranks distinct.
      const bool same = theirs.key == mine.key && theirs.position == mine.position;
      rank += precedes(theirs, mine) || (same && other < c);
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
    const Candidate<Real> candidate = candidate_at(order[rank]);
    if (!keeps(p.rule, rank, candidate, entropy_before, p.quota ? p.quota[b] : 0))
      atomicMin(&first_refused, rank);
  }
  __syncthreads();

  int unmasked = 0;
  for (int rank = threadIdx.x; rank < ranked && rank < first_refused; rank += kCommitThreads) {
    write(position[order[rank]], order[rank]);
    unmasked++;
  }
  if (!p.progress) return;
  __shared__ int left, written;
  if (threadIdx.x == 0) left = written = 0;
  __syncthreads();
  atomicAdd(&left, masks - unmasked);
  atomicAdd(&written, unmasked + edited);
  __syncthreads();
  if (threadIdx.x == 0) {
    p.progress[2 * b] = left;
    p.progress[2 * b + 1] = written;
  }
}

}  // namespace dllm::cuda
