// Which pages of a paged K/V cache belong to which sequence. Knows nothing of tensors.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <unordered_map>
#include <vector>

namespace dllm::host {

using PageId = std::int32_t;
using SequenceId = std::int64_t;

struct PagesExhausted : std::runtime_error {
  PagesExhausted(std::int64_t wanted, std::int64_t free, std::int64_t pages);
};

// A sequence is a list of pages; pages are counted references, so that sequences made by fork can share
// a prefix. A page that two sequences hold has the same pages before it in both. Sequence ids are never
// used twice, so a stale id is always an error. Every call costs O(pages it touches) and either succeeds
// or throws and changes nothing: PagesExhausted, or std::invalid_argument for a bad argument.
class BlockPool {
 public:
  explicit BlockPool(std::int64_t pages);

  SequenceId allocate(std::int64_t pages);
  void append(SequenceId sequence, std::int64_t pages);
  // A new sequence: the first `shared` pages of `sequence`, then `pages` of its own.
  SequenceId fork(SequenceId sequence, std::int64_t shared, std::int64_t pages);
  void free(SequenceId sequence);
  void reset();

  const std::vector<PageId>& pages_of(SequenceId sequence) const;
  // How many pages at the start of `sequence` another sequence holds too.
  std::int64_t shared_pages(SequenceId sequence) const;
  std::int64_t reference_count(PageId page) const;

  std::int64_t pages() const { return static_cast<std::int64_t>(references_.size()); }
  std::int64_t pages_free() const { return static_cast<std::int64_t>(free_.size()); }
  std::int64_t sequences() const { return static_cast<std::int64_t>(sequences_.size()); }

 private:
  void check_available(std::int64_t pages) const;
  void take(std::vector<PageId>& list, std::int64_t pages) noexcept;
  SequenceId insert(std::vector<PageId> list);

  std::vector<std::int32_t> references_;  // [pages], 0 = free
  std::vector<PageId> free_;              // a stack
  std::unordered_map<SequenceId, std::vector<PageId>> sequences_;
  SequenceId next_ = 0;
};

}  // namespace dllm::host
