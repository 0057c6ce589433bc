#include "shared_memory.h"

#include <link.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "clocks.h"
#include "cta.h"
#include "report.h"
#include "simt/hopper.h"
#include "static_variables.h"

namespace simt {
namespace {

// ---- the bytes: one arena for dynamic shared memory, the thread-local storage of this library for static
// one
constexpr size_t kMargin = 64 * 1024;  // accesses this near beyond the end are still told from others
alignas(1024) unsigned char arena[kMaxSharedBytes + kMargin];
size_t dynamic_bytes = 0;
constexpr size_t kDynamicBase =
    128;  // dynamic shared memory begins at a multiple of 128 bytes, and of no more
unsigned char* statics = nullptr;
size_t static_bytes = 0;

void find_statics() {
  const auto visit = [](dl_phdr_info* info, size_t, void*) {
    bool here = false;
    for (int i = 0; i < info->dlpi_phnum; i++) {
      const ElfW(Phdr) & part = info->dlpi_phdr[i];
      here |= part.p_type == PT_LOAD &&
              reinterpret_cast<uintptr_t>(arena) - info->dlpi_addr - part.p_vaddr < part.p_memsz;
    }
    for (int i = 0; here && i < info->dlpi_phnum; i++)
      if (info->dlpi_phdr[i].p_type == PT_TLS) {
        statics = static_cast<unsigned char*>(info->dlpi_tls_data);
        static_bytes = info->dlpi_phdr[i].p_memsz;
      }
    return here ? 1 : 0;
  };
  static_bytes = 0;
  // The loader allocates the block at the first use by a thread.
  static thread_local int first_use;
  asm volatile("" ::"r"(&first_use));
  dl_iterate_phdr(visit, nullptr);
}

// ---- what is known of them
struct Cell {
  Stamp write, read, other_read;  // epochs before first_epoch: never. Reads: the last two, by two threads
  uint32_t copied_by;             // the CTA of which an asynchronous copy is under way, by its first epoch
  bool atomic, asynchronous;      // the last write was
};
// A cell per word; where accesses are narrower, in this CTA, a cell for each of its bytes.
struct Word {
  Cell cell;
  uint32_t split_since;  // the CTA, by its first epoch
};
std::vector<Word> words;  // of the arena, then of the statics
std::vector<Cell> byte_cells;

uint32_t first_epoch = 1;

// ---- reports
struct Asked {
  Access access;
  const unsigned char* address;
  size_t bytes;
  Where where;

  std::string text() const {
    const char* name = access == Access::read    ? "read"
                       : access == Access::write ? "write"
                                                 : "atomic operation";
    const size_t offset = address - arena - kDynamicBase;
    return std::string(name) + " of " + std::to_string(bytes) +
           (offset < sizeof arena ? " bytes at offset " + std::to_string(static_cast<int64_t>(offset)) +
                                        " of dynamic shared memory"
                                  : " bytes of a __shared__ variable");
  }
  [[noreturn]] void fail(const std::string& problem) const { fail_at(text() + " " + problem, where); }
  [[noreturn]] void fail_race(const char* what, Stamp other) const {
    fail(std::string("races with a ") + what + " by thread " + std::to_string(other.thread) +
         ": no barrier lies between them");
  }
};

// ---- checks
void check_cell(Cell& cell, const Asked& asked) {
  const int thread = cta.current;
  const bool written = cell.write.epoch >= first_epoch;
  if (cell.copied_by == first_epoch)
    asked.fail("that an asynchronous copy is still on its way to: a wait is missing");
  if (asked.access != Access::write && !written) asked.fail("that no thread wrote");
  if (cell.write.epoch == epoch && !(cell.atomic && asked.access == Access::atomic) &&
      !is_ordered(cell.write, thread))
    asked.fail_race(cell.atomic ? "atomic operation" : "write", cell.write);
  const Stamp mine = stamp(thread);
  if (asked.access == Access::read) {
    if (cell.read == mine) return;
    if (cell.read.epoch == epoch && static_cast<int>(cell.read.thread) != thread) cell.other_read = cell.read;
    cell.read = mine;
    return;
  }
  for (const Stamp& read : {cell.read, cell.other_read})
    if (read.epoch == epoch && !is_ordered(read, thread)) asked.fail_race("read", read);
  cell.write = mine;
  cell.atomic = asked.access == Access::atomic;
  cell.asynchronous = false;
}

// visit(cell, at) for the cells of bytes [begin, begin + bytes), counted over arena and statics.
template <class Visit>
void for_cells(size_t begin, size_t bytes, bool overwrites, Visit visit) {
  for (size_t at = begin; at < begin + bytes;) {
    Word& word = words[at / 4];
    const size_t end = std::min(begin + bytes, at / 4 * 4 + 4);
    const bool whole = end - at == 4;
    const bool split = word.split_since == first_epoch;
    if (whole && !split) {
      visit(word.cell, at);
    } else {
      Cell* cells = &byte_cells[at / 4 * 4];
      if (!split) {
        std::fill_n(cells, 4, word.cell);
        word.split_since = first_epoch;
      }
      for (size_t i = at; i < end; i++) visit(cells[i % 4], i);
      if (whole && overwrites) {
        word.cell = cells[0];
        word.split_since = 0;
      }
    }
    at = end;
  }
}

// Where in the cells `address` lies; false: not in shared memory.
inline bool find(const void* address, size_t& at) {
  const size_t offset = static_cast<const unsigned char*>(address) - arena;
  if (offset < sizeof arena) return at = offset, true;
  const size_t static_offset = static_cast<const unsigned char*>(address) - statics;
  if (static_offset >= static_bytes) return false;
  note_use_of_static(static_offset);
  return at = sizeof arena + static_offset, true;
}

void check_shared(size_t at, const Asked& asked) {
  if (at < sizeof arena && (at < kDynamicBase || at + asked.bytes > kDynamicBase + dynamic_bytes))
    asked.fail("goes beyond the " + std::to_string(dynamic_bytes) + " bytes of the launch");
  // Structures are read whole, with padding that nobody writes: never the first byte of an aligned 8.
  bool first_of_8_written = false;
  for_cells(at, asked.bytes, asked.access == Access::write, [&](Cell& cell, size_t byte) {
    const bool written = cell.write.epoch >= first_epoch;
    if (byte % 8 == 0) first_of_8_written = written;
    const bool padding = asked.access == Access::read && asked.bytes >= 8 && !written && first_of_8_written;
    if (!padding) check_cell(cell, asked);
  });
}

// ---- asynchronous copies: the destination counts as unwritten until its thread has waited
struct Copy {
  void* to;
  const void* from;
  uint32_t group;
  Where where;
};
struct Copies {
  std::vector<Copy> under_way;
  uint32_t open_group = 1;
};
std::vector<Copies> copies;  // of each thread

}  // namespace

void reserve_shared_memory(size_t bytes, int threads) {
  find_statics();
  dynamic_bytes = bytes;
  const size_t covered = (sizeof arena + static_bytes + 3) / 4;
  if (words.size() < covered) words.resize(covered), byte_cells.resize(covered * 4);
  reserve_clocks(threads);
  begin_use_of_statics(static_bytes);
  copies.assign(threads, {});
}

void poison_shared_memory() {
  first_epoch = ++epoch;
  memset(arena + kDynamicBase, 0xFF, dynamic_bytes);
  memset(statics, 0xFF, static_bytes);
  for (Copies& of_thread : copies) of_thread.under_way.clear(), of_thread.open_group = 1;
}

std::string unfinished_copies_of_threads() {
  const auto found =
      std::ranges::find_if(copies, [](const Copies& of_thread) { return !of_thread.under_way.empty(); });
  if (found == copies.end()) return "";
  return "thread " + std::to_string(found - copies.begin()) + " exits without waiting for " +
         std::to_string(found->under_way.size()) + " of its asynchronous copies, the first of " +
         found->under_way[0].where.text();
}

void check_access(Access access, const void* address, size_t bytes, const Where& where) {
  size_t at = 0;
  if (cta.kernel && find(address, at))
    check_shared(at, {access, static_cast<const unsigned char*>(address), bytes, where});
}

void check_atomic(const void* address, size_t bytes, Site site) {
  size_t at = 0;
  if (find(address, at)) {
    check_shared(at, {Access::atomic, static_cast<const unsigned char*>(address), bytes, site});
  }
}

void* dynamic_shared() { return arena + kDynamicBase; }

void cp_async(void* shared, const void* global, Site site) {
  const Where where = site;
  if (global) cta.check_waited("cp_async", site);
  size_t at = 0;
  if (!find(shared, at)) fail_at("cp_async to an address outside shared memory", where);
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16)
    fail_at("cp_async needs addresses that are multiples of 16 bytes", where);
  check_shared(at, {Access::write, static_cast<unsigned char*>(shared), 16, where});
  start_copy(shared, 16);
  Copies& mine = copies[cta.current];
  mine.under_way.push_back({shared, global, mine.open_group, where});
}

void cp_async_commit_group() { copies[cta.current].open_group++; }

void cp_async_wait_group(int pending) {
  Copies& mine = copies[cta.current];
  const int64_t last_done = static_cast<int64_t>(mine.open_group) - 1 - pending;
  const auto waiting = std::ranges::stable_partition(
      mine.under_way, [&](const Copy& copy) { return copy.group <= last_done; });
  for (auto copy = mine.under_way.begin(); copy != waiting.begin(); ++copy) {
    if (copy->from) memcpy(copy->to, copy->from, 16);
    else memset(copy->to, 0, 16);
    size_t at = 0;
    find(copy->to, at);
    for_cells(at, 16, true, [](Cell& cell, size_t) {
      cell.copied_by = 0;
      cell.write = stamp(cta.current);
    });
  }
  mine.under_way.erase(mine.under_way.begin(), waiting.begin());
}

// ---- asynchronous reads and writes of Hopper
void check_asynchronous_read(const void* address, size_t bytes, const Where& where) {
  size_t at = 0;
  const Asked asked{Access::read, static_cast<const unsigned char*>(address), bytes, where};
  if (!find(address, at)) asked.fail("is outside shared memory");
  check_shared(at, asked);
  for_cells(at, bytes, false, [&](Cell& cell, size_t) {
    if (!cell.asynchronous && !is_fenced(cell.write))
      asked.fail("by a matrix product, of what thread " + std::to_string(cell.write.thread) +
                 " wrote by ordinary stores: its fence_proxy_async() is missing");
  });
}

void start_copy(void* address, size_t bytes) {
  size_t at = 0;
  find(address, at);
  memset(address, 0xFF, bytes);
  for_cells(at, bytes, true, [](Cell& cell, size_t) { cell.copied_by = first_epoch; });
}

void land_copy(void* address, size_t bytes) {
  size_t at = 0;
  find(address, at);
  for_cells(at, bytes, true, [](Cell& cell, size_t) {
    cell.copied_by = 0;
    cell.write = stamp(cta.threads);
    cell.asynchronous = true;
  });
}

size_t shared_offset(const void* shared) {
  size_t at = 0;
  return find(shared, at) ? at : ~size_t{0};
}

void* shared_pointer(size_t offset) {
  return offset < sizeof arena ? arena + offset : statics + (offset - sizeof arena);
}

}  // namespace simt

// ---- what the compiler calls before every access of instrumented code (-fsanitize=thread; the sanitizer's
// own runtime is not linked)
#define SIMT_HOOK(name, access, bytes)                                                           \
  extern "C" void name(void* address) {                                                          \
    size_t at = 0;                                                                               \
    if (simt::cta.kernel && simt::find(address, at))                                             \
      simt::check_shared(at, {simt::Access::access, static_cast<unsigned char*>(address), bytes, \
                              simt::Where(__builtin_return_address(0))});                        \
  }
#define SIMT_HOOKS(bytes)                                       \
  SIMT_HOOK(__tsan_read##bytes, read, bytes)                    \
  SIMT_HOOK(__tsan_write##bytes, write, bytes)                  \
  SIMT_HOOK(__tsan_unaligned_read##bytes, read, bytes)          \
  SIMT_HOOK(__tsan_unaligned_write##bytes, write, bytes)        \
  SIMT_HOOK(__tsan_volatile_read##bytes, read, bytes)           \
  SIMT_HOOK(__tsan_volatile_write##bytes, write, bytes)         \
  SIMT_HOOK(__tsan_unaligned_volatile_read##bytes, read, bytes) \
  SIMT_HOOK(__tsan_unaligned_volatile_write##bytes, write, bytes)
SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)
extern "C" {
void __tsan_read_range(void* address, size_t bytes) {
  simt::check_access(simt::Access::read, address, bytes, simt::Where(__builtin_return_address(0)));
}
void __tsan_write_range(void* address, size_t bytes) {
  simt::check_access(simt::Access::write, address, bytes, simt::Where(__builtin_return_address(0)));
}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
void __tsan_init() {}
}
