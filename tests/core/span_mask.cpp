// The walks of core/span_mask.h for test_span_mask_core.py, which calls them through ctypes.
#include "core/span_mask.h"

#include <vector>

using namespace dllm;

namespace {

// Of rows with spans [rows][count][2].
std::vector<SpanBounds> bounds_of(const int* spans, int rows, int count) {
  std::vector<SpanBounds> bounds(count, no_rows());
  for (int row = 0; row < rows; row++)
    for (int r = 0; r < count; r++)
      include(bounds[r], spans[(row * count + r) * 2], spans[(row * count + r) * 2 + 1]);
  return bounds;
}

}  // namespace

// {begin, end, full} of every range into ranges; returns how many there are.
extern "C" int key_walk(const int* spans, int rows, int count, int limit, int* ranges) {
  const std::vector<SpanBounds> bounds = bounds_of(spans, rows, count);
  KeyWalk walk(bounds.data(), count, limit);
  int found = 0;
  for (KeyRange keys = walk.next(); keys.begin < keys.end; keys = walk.next(), found++) {
    ranges[3 * found] = keys.begin;
    ranges[3 * found + 1] = keys.end;
    ranges[3 * found + 2] = keys.full;
  }
  return found;
}

extern "C" int tile_visibility(const int* spans, int rows, int count, int begin, int end) {
  return static_cast<int>(visibility(bounds_of(spans, rows, count).data(), count, begin, end));
}

extern "C" uint64_t visible_bits(int start, int end, int begin) { return key_bits(start, end, begin); }
