#include "host/block_pool.h"

#include <algorithm>
#include <limits>
#include <string>
#include <utility>

namespace dllm::host {
namespace {

std::invalid_argument bad(const std::string& name, const std::string& allowed, std::int64_t got) {
  return std::invalid_argument(name + " must " + allowed + ", got " + std::to_string(got));
}

}  // namespace

PagesExhausted::PagesExhausted(std::int64_t wanted, std::int64_t free, std::int64_t pages)
    : std::runtime_error("pages wanted: " + std::to_string(wanted) + ", free: " + std::to_string(free) +
                         " of " + std::to_string(pages) +
                         "; free a sequence first, or make the cache larger") {}

BlockPool::BlockPool(std::int64_t pages) {
  if (pages < 1 || pages > std::numeric_limits<PageId>::max())
    throw bad("pages", "lie in 1.." + std::to_string(std::numeric_limits<PageId>::max()), pages);
  references_.resize(pages);
  free_.reserve(pages);
  reset();
}

SequenceId BlockPool::allocate(std::int64_t pages) {
  check_available(pages);
  std::vector<PageId> list;
  list.reserve(pages);
  const SequenceId sequence = insert(std::move(list));
  take(sequences_.find(sequence)->second, pages);
  return sequence;
}

void BlockPool::append(SequenceId sequence, std::int64_t pages) {
  pages_of(sequence);
  check_available(pages);
  std::vector<PageId>& list = sequences_.find(sequence)->second;
  const std::size_t wanted = list.size() + static_cast<std::size_t>(pages);
  if (wanted > list.capacity()) list.reserve(std::max(wanted, 2 * list.capacity()));
  take(list, pages);
}

SequenceId BlockPool::fork(SequenceId sequence, std::int64_t shared, std::int64_t pages) {
  const std::vector<PageId>& parent = pages_of(sequence);
  const auto held = static_cast<std::int64_t>(parent.size());
  if (shared < 0 || shared > held)
    throw bad("shared", "lie in 0.." + std::to_string(held) + ", the pages of the sequence", shared);
  check_available(pages);
  std::vector<PageId> list;
  list.reserve(shared + pages);
  list.assign(parent.begin(), parent.begin() + shared);
  const SequenceId child = insert(std::move(list));
  std::vector<PageId>& own = sequences_.find(child)->second;
  for (const PageId page : own) ++references_[page];
  take(own, pages);
  return child;
}

void BlockPool::free(SequenceId sequence) {
  const std::vector<PageId>& list = pages_of(sequence);
  for (auto page = list.rbegin(); page != list.rend(); ++page)
    if (--references_[*page] == 0) free_.push_back(*page);
  sequences_.erase(sequence);
}

void BlockPool::reset() {
  sequences_.clear();
  std::fill(references_.begin(), references_.end(), 0);
  free_.clear();
  for (auto page = static_cast<PageId>(pages()); page-- > 0;) free_.push_back(page);
}

const std::vector<PageId>& BlockPool::pages_of(SequenceId sequence) const {
  const auto found = sequences_.find(sequence);
  if (found == sequences_.end())
    throw std::invalid_argument("sequence " + std::to_string(sequence) + " is unknown or was freed");
  return found->second;
}

std::int64_t BlockPool::shared_pages(SequenceId sequence) const {
  const std::vector<PageId>& list = pages_of(sequence);
  const auto own =
      std::find_if(list.begin(), list.end(), [&](PageId page) { return references_[page] == 1; });
  return own - list.begin();
}

std::int64_t BlockPool::reference_count(PageId page) const {
  if (page < 0 || page >= pages()) throw bad("page", "lie in 0.." + std::to_string(pages() - 1), page);
  return references_[page];
}

void BlockPool::check_available(std::int64_t pages) const {
  if (pages < 0) throw bad("pages", "not be negative", pages);
  if (pages > pages_free()) throw PagesExhausted(pages, pages_free(), this->pages());
}

void BlockPool::take(std::vector<PageId>& list, std::int64_t pages) noexcept {
  for (; pages > 0; --pages) {
    const PageId page = free_.back();
    free_.pop_back();
    references_[page] = 1;
    list.push_back(page);  // within the capacity reserved by the caller
  }
}

SequenceId BlockPool::insert(std::vector<PageId> list) {
  sequences_.emplace(next_, std::move(list));
  return next_++;
}

}  // namespace dllm::host
