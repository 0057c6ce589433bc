// The tiles of keys that a tile of queries sees, as one warp hands them to others.
#pragma once

#include "cuda/block_attention/sm90/operand_tile.cuh"
#include "cuda/tiles/sequence_spans.cuh"

namespace dllm::cuda::sm90 {

// The keys of one buffer: those from `begin` on that belong to [begin, end). Queries that see nothing get one
// such tile without keys.
struct KeyTile {
  int begin, end;
  bool all_visible;  // the whole buffer to all queries
  bool last;         // of these queries
};

// visit(tile) for the tiles of kKeys keys that queries [first, first + live) see, by all lanes of a warp.
template <int kKeys, class Visit>
__device__ void for_key_tiles(const SequenceSpans& spans, int first, int live, SpanBounds* bounds,
                              const Visit& visit) {
  __syncwarp();
  tile_bounds(spans, first, live, bounds);
  __syncwarp();
  KeyWalk walk(bounds, spans.bounds_count(), kKeys);
  KeyRange range;
  for (bool begun = false, last = false; !last; begun = true) {
    const KeyRange next = walk.next();
    last = begun && next.begin >= next.end;
    if (begun) visit(KeyTile{range.begin, range.end, range.full && range.end - range.begin == kKeys, last});
    range = next;
  }
}

// Bit i: one of these queries sees key begin + i, i < 64, of those before `end`; by all lanes of a warp.
__device__ inline uint64_t seen_keys(const SequenceSpans& spans, int first, int live, int begin, int end) {
  uint64_t seen = 0;
#pragma unroll 1
  for (int i = threadIdx.x % 32; i < live; i += 32)
    seen |= spans.visible_keys(first + i, {begin, end, false});
  return warp_or(seen);
}

}  // namespace dllm::cuda::sm90
