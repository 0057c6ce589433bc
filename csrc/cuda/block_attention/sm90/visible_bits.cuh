// Which of the scores that a thread of a warpgroup holds are visible: of a row it holds columns
// 8·n + 2·pair + i, i < 2, as bit 2·n + i of a word.
#pragma once

#include "cuda/tiles/sequence_spans.cuh"

namespace dllm::cuda::sm90 {

// The held columns before `column`.
__device__ inline uint32_t held_before(int column, int pair) {
  const int shifted = min(max(column - 2 * pair, 0), 128);
  return static_cast<uint32_t>(first_bits(shifted / 8 * 2 + min(shifted % 8, 2)));
}

// The spans of one query; the first ones are kept in registers.
class QuerySpans {
 public:
  __device__ QuerySpans(const SequenceSpans& spans, int position, bool live) : position_(position) {
    count_ = live ? spans.count : 0;
#pragma unroll
    for (int r = 0; r < kKept; r++) kept_[r] = r < count_ ? spans.at(position, r) : int2{0, 0};
  }

  __device__ uint32_t visible(const SequenceSpans& spans, int begin, int end, int pair) const {
    const auto bits = [&](int2 span) {
      return held_before(min(span.y, end) - begin, pair) & ~held_before(span.x - begin, pair);
    };
    uint32_t visible = 0;
#pragma unroll
    for (int r = 0; r < kKept; r++) visible |= bits(kept_[r]);
#pragma unroll 1
    for (int r = kKept; r < count_; r++) visible |= bits(spans.at(position_, r));
    return visible;
  }

 private:
  static constexpr int kKept = 2;
  int position_, count_;
  int2 kept_[kKept];
};

// Scores whose bit is not set, in visible[0] for the row `group`, in visible[1] for `group` + 8, become
// `hidden`.
template <int kTiles>
__device__ void keep_visible(float (&scores)[kTiles][4], const uint32_t (&visible)[2], float hidden) {
  static_assert(kTiles <= 16);
#pragma unroll
  for (int n = 0; n < kTiles; n++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (!(visible[i / 2] >> (2 * n + i % 2) & 1)) scores[n][i] = hidden;
}

}  // namespace dllm::cuda::sm90
