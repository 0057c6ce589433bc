// mbarriers and the bulk tensor copies (TMA) that complete on them. A copy lands as
// late as it can: when no thread can run.
#include <cuda_runtime_api.h>

#include <cstring>
#include <map>

#include "clocks.h"
#include "cta.h"
#include "hopper.h"
#include "report.h"
#include "shared_memory.h"
#include "simt/hopper.h"

namespace simt {
namespace {

// ---- barriers
struct Mbarrier {
  int arrivals, to_come;
  int64_t bytes_to_come = 0;
  uint64_t phase = 0;
  Stamp initialised;
  bool published = false;
  std::vector<uint32_t> clocks, released;  // of those who arrived in this phase; of the phases that are over
  std::vector<int> waiting;
};
std::map<size_t, Mbarrier> barriers;  // by shared address

Mbarrier& find_barrier(void* address, const char* what, Site site) {
  const Where where = site;
  const size_t at = shared_offset(address);
  if (at % 8) fail_at(std::string(what) + ": a barrier is 8 aligned bytes of shared memory", where);
  check_access(Access::atomic, address, 8, where);
  const auto found = barriers.find(at);
  if (found == barriers.end()) fail_at(std::string(what) + ": mbarrier_init was not called", where);
  if (!has_seen(found->second.initialised))
    fail_at(std::string(what) + " races with mbarrier_init: no barrier lies between them", where);
  return found->second;
}

void end_phase_if_complete(Mbarrier& barrier) {
  if (barrier.to_come || barrier.bytes_to_come) return;
  barrier.phase++;
  barrier.to_come = barrier.arrivals;
  barrier.released = barrier.clocks;
  for (const int i : barrier.waiting) acquire_clock(i, barrier.released);
  cta.wake(barrier.waiting);
}

// ---- copies
struct BoxMap {  // what a CUtensorMap holds here
  char* data;
  uint64_t sizes[5], strides[5];  // strides in bytes, [0] the element's
  uint32_t box[5];
  uint16_t rank, swizzle;
};
static_assert(sizeof(BoxMap) <= sizeof(CUtensorMap));

struct BoxCopy {
  BoxMap map;
  size_t to;  // shared address
  size_t barrier;
  int64_t corner[5];
  int thread;
};
std::vector<BoxCopy> copies;

// Swizzling permutes the 16-byte pieces of 128, 64 or 32 bytes by the address bits above.
size_t swizzled(size_t address, int swizzle) {
  const size_t bits = (1 << swizzle) - 1;
  return address ^ (address >> 7 & bits) << 4;
}

size_t box_bytes(const BoxMap& map) {
  size_t bytes = map.strides[0];
  for (int i = 0; i < map.rank; i++) bytes *= map.box[i];
  return bytes;
}

void land(const BoxCopy& copy) {
  const BoxMap& map = copy.map;
  const size_t element = map.strides[0], bytes = box_bytes(map);
  for (size_t piece = 0; piece < bytes; piece += 16) {
    char values[16] = {};
    for (size_t i = 0; i < 16; i += element) {
      size_t index = (piece + i) / element;
      bool inside = true;
      const char* from = map.data;
      for (int d = 0; d < map.rank; d++) {
        const int64_t at = copy.corner[d] + static_cast<int64_t>(index % map.box[d]);
        index /= map.box[d];
        inside = inside && at >= 0 && at < static_cast<int64_t>(map.sizes[d]);
        from += at * static_cast<int64_t>(map.strides[d]);
      }
      if (inside) memcpy(values + i, from, element);
    }
    void* to = shared_pointer(swizzled(copy.to + piece, map.swizzle));
    memcpy(to, values, 16);
    land_copy(to, 16);
  }
}

}  // namespace

// ---- barriers
void mbarrier_init(void* address, int arrivals, Site site) {
  const Where where = site;
  const size_t at = shared_offset(address);
  if (at == ~size_t{0} || at % 8)
    fail_at("mbarrier_init: a barrier is 8 aligned bytes of shared memory", where);
  if (arrivals < 1) fail_at("mbarrier_init for " + std::to_string(arrivals) + " arrivals", where);
  check_access(Access::write, address, 8, where);
  Mbarrier barrier;
  barrier.arrivals = barrier.to_come = arrivals;
  barrier.initialised = this_moment();
  barrier.clocks = barrier.released = no_clocks();
  barriers[at] = barrier;
}

void fence_mbarrier_init() {
  for (auto& [at, barrier] : barriers)
    barrier.published |= static_cast<int>(barrier.initialised.thread) == cta.current;
}

void mbarrier_arrive_expect_tx(void* address, uint32_t bytes, Site site) {
  Mbarrier& barrier = find_barrier(address, "mbarrier_arrive", site);
  if (barrier.to_come == 0)
    fail_at("mbarrier_arrive: all " + std::to_string(barrier.arrivals) + " arrivals of phase " +
                std::to_string(barrier.phase) + " are there, but not its bytes",
            site);
  release_clock(cta.current, barrier.clocks);
  barrier.bytes_to_come += bytes;
  barrier.to_come--;
  end_phase_if_complete(barrier);
}

void mbarrier_wait_parity(void* address, unsigned parity, Site site) {
  Mbarrier& barrier = find_barrier(address, "mbarrier_wait_parity", site);
  if (parity > 1)
    fail_at("mbarrier_wait_parity: a parity is 0 or 1, not " + std::to_string(parity), Where(site));
  if (barrier.phase % 2 != parity) {
    acquire_clock(cta.current, barrier.released);
    return;
  }
  barrier.waiting.push_back(cta.current);
  cta.wait(parity ? "wait for a phase of parity 1" : "wait for a phase of parity 0", site);
}

// ---- copies
void cp_async_bulk_tensor(void* shared, const CUtensorMap& encoded, void* barrier, const int* coordinates,
                          int rank, Site site) {
  const Where where = site;
  cta.check_waited("cp_async_bulk_tensor", site);
  BoxCopy copy{};
  memcpy(&copy.map, &encoded, sizeof copy.map);
  if (copy.map.rank != rank)
    fail_at("cp_async_bulk_tensor with " + std::to_string(rank) + " coordinates of a tensor map of rank " +
                std::to_string(copy.map.rank),
            where);
  copy.to = shared_offset(shared);
  const size_t alignment = copy.map.swizzle ? size_t{128} << copy.map.swizzle : 128;
  if (copy.to == ~size_t{0} || copy.to % alignment)
    fail_at("cp_async_bulk_tensor goes to multiples of " + std::to_string(alignment) +
                " bytes of shared memory, not to offset " + std::to_string(copy.to),
            where);
  Mbarrier& complete = find_barrier(barrier, "cp_async_bulk_tensor", site);
  if (!complete.published)
    fail_at("cp_async_bulk_tensor: fence_mbarrier_init() is missing after mbarrier_init", where);
  copy.barrier = shared_offset(barrier);
  copy.thread = cta.current;
  for (int d = 0; d < rank; d++) copy.corner[d] = coordinates[d];
  const size_t bytes = box_bytes(copy.map);
  check_access(Access::write, shared, bytes, where);
  start_copy(shared, bytes);
  copies.push_back(copy);
}

void check_prefetch(const CUtensorMap& encoded, int rank, Site site) {
  BoxMap map;
  memcpy(&map, &encoded, sizeof map);
  if (map.rank != rank)
    fail_at("a prefetch with " + std::to_string(rank) + " coordinates of a tensor map of rank " +
                std::to_string(map.rank),
            Where(site));
}

bool progress_asynchronous() {
  if (copies.empty()) return false;
  size_t chosen = cta.order.seed == 0   ? 0
                  : cta.order.seed == 1 ? copies.size() - 1
                                        : cta.order.random() % copies.size();
  const BoxCopy copy = copies[chosen];
  copies.erase(copies.begin() + chosen);
  const int running = cta.current;
  cta.current = copy.thread;  // whom a fault is laid to
  land(copy);
  cta.current = running;
  Mbarrier& barrier = barriers.at(copy.barrier);
  release_clock(cta.threads, barrier.clocks);  // of the engine that copies
  barrier.bytes_to_come -= box_bytes(copy.map);
  end_phase_if_complete(barrier);
  return true;
}

std::string unfinished_copies() {
  return copies.empty()
             ? ""
             : "threads exit while " + std::to_string(copies.size()) + " bulk copies are under way";
}

std::string mbarriers_text() {
  std::string text;
  for (const auto& [at, barrier] : barriers)
    if (!barrier.waiting.empty())
      text += " Phase " + std::to_string(barrier.phase) + " of the barrier at shared address " +
              std::to_string(at) + " lacks " + std::to_string(barrier.to_come) + " arrivals and " +
              std::to_string(barrier.bytes_to_come) + " bytes.";
  return text;
}

void reset_transactions() {
  barriers.clear();
  copies.clear();
}

}  // namespace simt

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data,
                                const cuuint64_t* sizes, const cuuint64_t* byte_strides,
                                const cuuint32_t* box, const cuuint32_t* element_strides,
                                CUtensorMapInterleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                CUtensorMapFloatOOBfill) {
  const unsigned element = type == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 1
                           : type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ||
                                   type == CU_TENSOR_MAP_DATA_TYPE_INT32 ||
                                   type == CU_TENSOR_MAP_DATA_TYPE_UINT32
                               ? 4
                               : 2;
  if (rank < 1 || rank > 5 || reinterpret_cast<uintptr_t>(data) % 16) return CUDA_ERROR_INVALID_VALUE;
  simt::BoxMap encoded{};
  encoded.data = static_cast<char*>(data);
  encoded.rank = rank, encoded.swizzle = swizzle;
  encoded.strides[0] = element;
  for (cuuint32_t d = 0; d < rank; d++) {
    encoded.sizes[d] = sizes[d], encoded.box[d] = box[d];
    if (sizes[d] == 0 || sizes[d] > uint64_t{1} << 32 || box[d] == 0 || box[d] > 256 ||
        element_strides[d] != 1)
      return CUDA_ERROR_INVALID_VALUE;
    if (d > 0) {
      encoded.strides[d] = byte_strides[d - 1];
      if (encoded.strides[d] % 16 || encoded.strides[d] >= uint64_t{1} << 40) return CUDA_ERROR_INVALID_VALUE;
    }
  }
  const size_t row = size_t{box[0]} * element;
  if (row % 16 || (swizzle && row > size_t{16} << swizzle)) return CUDA_ERROR_INVALID_VALUE;
  memcpy(map, &encoded, sizeof encoded);
  return CUDA_SUCCESS;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool found = !strcmp(name, "cuTensorMapEncodeTiled");
  *function = found ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled) : nullptr;
  *result = found ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
