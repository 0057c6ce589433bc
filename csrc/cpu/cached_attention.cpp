#include "cpu/cached_attention.h"

#include "cpu/query_tile.h"

namespace dllm::cpu::DLLM_ISA {
namespace {

using Params = CachedAttentionItems;

// A tile of queries and the keys that it attends to.
template <typename T>
class CachedTile {
 public:
  CachedTile(const Params& p, int64_t item)
      : p_(p),
        at_(tile_item(item, p.q_heads, p.kv_heads, p.q_len)),
        length_(p.q_lengths ? p.q_lengths[at_.batch] : p.q_len),
        live_(clamp(length_ * at_.rows.group - at_.rows.first, 0, at_.rows.count)),
        tile_({at_.rows.first, live_, at_.rows.group}, p.head_dim, p.scale) {
    tile_.template set_queries<T>([&](int i) { return at_.template row<const T>(p_.q, p_.q_layout, i); });
  }

  void attend_range(int range) {
    if (live_ == 0) return;
    const int32_t* pages = p_.page_table + static_cast<int64_t>(at_.batch) * p_.table_length;
    const auto slot = [&](const void* cache, const PagesLayout& layout, int key) {
      return static_cast<const T*>(cache) + pages[key / p_.page_size] * layout.page_stride +
             key % p_.page_size * layout.slot_stride + at_.kv_head * layout.head_stride;
    };
    const int first = range * Params::kRangeKeys;
    const int end = range + 1 < p_.ranges() ? first + Params::kRangeKeys : INT_MAX;
    tile_.template attend<T>(
        {p_.cache_spans, at_.batch, INT_MAX}, false,
        [&](int key) { return slot(p_.cache_k, p_.cache_k_layout, key); },
        [&](int key) { return slot(p_.cache_v, p_.cache_v_layout, key); }, first, end);
    if (range > 0) return;
    tile_.template attend<T>(
        {p_.fresh_spans, at_.batch, length_}, false,
        [&](int key) { return at_.template key<const T>(p_.k, p_.k_layout, key); },
        [&](int key) { return at_.template key<const T>(p_.v, p_.v_layout, key); });
  }

  // Attends to all ranges, one after the other.
  void attend() {
    attend_range(0);
    if (p_.ranges() > 1) attend_later_ranges();
  }

  void save(float* state) const { tile_.save(state); }

  // Takes over what was saved of all ranges; states: state_floats() each.
  void merge(float* states) {
    for (int range = 1; range < p_.ranges(); range++) tile_.merge(states, states + range * p_.state_floats());
    tile_.restore(states);
  }

  void store() {
    const auto out = [&](int i) { return at_.template row<T>(p_.out, p_.out_layout, i); };
    const auto lse = [&](int i) { return p_.lse + at_.lse_index(i, p_.q_heads, p_.q_len); };
    tile_.template store_outputs<T>(out, lse);
    for (int i = live_; i < at_.rows.count; i++) {
      memset(out(i), 0, sizeof(T) * p_.head_dim);
      *lse(i) = -kInfinity;
    }
  }

 private:
  __attribute__((noinline)) void attend_later_ranges() {
    alignas(64) float state[kMaxTileQueries * (kMaxHeadDim + 2)], more[kMaxTileQueries * (kMaxHeadDim + 2)];
    tile_.save(state);
    for (int range = 1; range < p_.ranges(); range++) {
      tile_.forget();
      attend_range(range);
      tile_.save(more);
      tile_.merge(state, more);
    }
    tile_.restore(state);
  }

  const Params& p_;
  TileItem at_;
  int length_, live_;
  QueryTile tile_;
};

}  // namespace

void cached_block_attention(const Params& p, long begin, long end) {
  with_storage_type(p.dtype, [&]<class T>(T) {
    for (int64_t item = begin; item < end; item++) {
      if (!p.states) {
        CachedTile<T> tile(p, item);
        tile.attend();
        tile.store();
      } else {
        CachedTile<T> tile(p, item / p.ranges());
        tile.attend_range(static_cast<int>(item % p.ranges()));
        tile.save(p.states + item * p.state_floats());
      }
    }
  });
}

void merge_cached_attention(const Params& p, long begin, long end) {
  with_storage_type(p.dtype, [&]<class T>(T) {
    for (int64_t item = begin; item < end; item++) {
      CachedTile<T> tile(p, item);
      tile.merge(p.states + item * p.ranges() * p.state_floats());
      tile.store();
    }
  });
}

}  // namespace dllm::cpu::DLLM_ISA
