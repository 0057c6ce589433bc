// wgmma: products of a warpgroup, each warp's 16 rows by themselves. They read shared memory when they are
// waited for; until then their sums are NaN.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstring>
#include <map>

#include "cta.h"
#include "hopper.h"
#include "report.h"
#include "shared_memory.h"
#include "simt/hopper.h"

namespace simt {
namespace {

constexpr int kWarpRows = 16, kDepth = 16, kMaxColumns = 256;

struct Product {
  float* d[kLanes];
  const uint32_t* a_source[kLanes];  // null: in shared memory
  uint32_t a_registers[kLanes][4];
  Operand a, b;
  int tiles;
  bool bfloat16, add;
  uint32_t group;
};

struct WarpProducts {
  std::vector<Product> under_way;
  uint32_t open_group = 1;
  uint64_t begun = 0;
  std::map<float*, std::vector<float>> sums;  // of lane 0's d: the true values of all lanes, [lane][4·tiles]
};
WarpProducts warps[kMaxWarps];
bool may_begin[kMaxThreads];  // wgmma_fence since the last wait

// What registers held when wgmma_fence was called with them.
struct Handed {
  const char* registers;
  std::string contents;
};
std::vector<Handed> handed[kMaxThreads];

bool are_handed(const uint32_t (&a)[4]) {
  const char* begin = reinterpret_cast<const char*>(a);
  for (auto it = handed[cta.current].rbegin(); it != handed[cta.current].rend(); ++it)
    if (begin >= it->registers && begin + sizeof a <= it->registers + it->contents.size())
      return !memcmp(it->contents.data() + (begin - it->registers), begin, sizeof a);
  return false;
}

// ---- operands in shared memory
// Byte address of the 16-byte piece that holds elements (i, k) to (i, k + 7), or (i + 7, k) where i runs
// along the rows of memory. Layouts in units of 16 bytes, as PTX documents them: pieces of 8 rows of 16 <<
// swizzle bytes, the leading offset from one to the next along the row, the stride offset along the other
// index.
size_t piece_address(const Operand& operand, int i, int k) {
  const uint64_t descriptor = operand.descriptor;
  const size_t start = (descriptor & 0x3FFF) << 4, leading = (descriptor >> 16 & 0x3FFF) << 4,
               stride = (descriptor >> 32 & 0x3FFF) << 4;
  static constexpr int kSwizzles[] = {0, 3, 2, 1};
  const int swizzle = kSwizzles[descriptor >> 62];
  const int row_bytes = 16 << swizzle, row_elements = row_bytes / 2;
  size_t address;
  if (operand.mn_major) {
    const int row = i / row_elements, within = i % row_elements * 2;
    address = start + within + k % 8 * row_bytes +
              (swizzle ? row * leading + k / 8 * stride : row * stride + k / 8 * leading);
  } else {
    address = start + i % 8 * row_bytes + i / 8 * stride + (swizzle ? k / 8 * 16 : k / 8 * leading);
  }
  const size_t bits = (1 << swizzle) - 1;
  return address ^ (address >> 7 & bits) << 4;
}

template <class Visit>
void for_pieces(const Operand& operand, int first, int count, Visit visit) {
  for (int i = first; i < first + count; i += operand.mn_major ? 8 : 1)
    for (int k = 0; k < kDepth; k += operand.mn_major ? 1 : 8) visit(i, k, piece_address(operand, i, k));
}

void check_operand(const Operand& operand, int first, int count, const Where& where) {
  if (operand.descriptor >> 49 & 7)
    fail_at("wgmma_mma_async: base offsets of descriptors are not emulated", where);
  for_pieces(operand, first, count,
             [&](int, int, size_t at) { check_asynchronous_read(shared_pointer(at), 16, where); });
}

float widen(uint16_t bits, bool bfloat16) {
  return bfloat16 ? static_cast<float>(std::bit_cast<__nv_bfloat16>(bits))
                  : static_cast<float>(std::bit_cast<__half>(bits));
}

// x[index][k]
void read_operand(const Operand& operand, int first, int count, bool bfloat16, float (*x)[kDepth]) {
  for_pieces(operand, first, count, [&](int i, int k, size_t at) {
    uint16_t bits[8];
    memcpy(bits, shared_pointer(at), 16);
    for (int e = 0; e < 8; e++) {
      float& to = operand.mn_major ? x[i - first + e][k] : x[i - first][k + e];
      to = widen(bits[e], bfloat16);
    }
  });
}

void read_registers(const Product& product, float (*x)[kDepth]) {
  for (int lane = 0; lane < kLanes; lane++)
    for (int r = 0; r < 4; r++) {
      const int row = lane / 4 + r % 2 * 8, k = lane % 4 * 2 + r / 2 * 8;
      const uint32_t word = product.a_registers[lane][r];
      x[row][k] = widen(word & 0xFFFF, product.bfloat16);
      x[row][k + 1] = widen(word >> 16, product.bfloat16);
    }
}

void execute(WarpProducts& warp, const Product& product, int first_row, const Where& where) {
  static float a[kWarpRows][kDepth], b[kMaxColumns][kDepth];
  const int columns = 8 * product.tiles;
  if (product.a.registers) {
    read_registers(product, a);
  } else {
    check_operand(product.a, first_row, kWarpRows, where);
    read_operand(product.a, first_row, kWarpRows, product.bfloat16, a);
  }
  check_operand(product.b, 0, columns, where);
  read_operand(product.b, 0, columns, product.bfloat16, b);
  std::vector<float>& sums = warp.sums.at(product.d[0]);
  for (int lane = 0; lane < kLanes; lane++)
    for (int i = 0; i < 4 * product.tiles; i++) {
      const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      float& sum = sums[lane * 4 * product.tiles + i];
      float total = 0;
      for (int k = 0; k < kDepth; k++) total += a[row][k] * b[column][k];
      sum = product.add ? sum + total : total;
    }
}

struct Request {
  float* d;
  Operand a, b;
  int tiles;
  bool bfloat16, add;
  const Where* where;
};

int current_warp() { return cta.current / kLanes; }

void begin(void* const* exchanges, unsigned) {
  const Request& first = *static_cast<Request*>(exchanges[0]);
  WarpProducts& warp = warps[current_warp()];
  Product product{};
  product.a = first.a, product.b = first.b;
  product.tiles = first.tiles, product.bfloat16 = first.bfloat16, product.add = first.add;
  product.group = warp.open_group;
  for (int lane = 0; lane < kLanes; lane++) {
    const Request& mine = *static_cast<Request*>(exchanges[lane]);
    if (mine.b.descriptor != first.b.descriptor || mine.a.descriptor != first.a.descriptor ||
        mine.add != first.add)
      fail_at("wgmma_mma_async: lanes of a warp name different operands", *mine.where);
    product.d[lane] = mine.d;
    product.a_source[lane] = mine.a.registers;
    if (mine.a.registers)
      memcpy(product.a_registers[lane], mine.a.registers, sizeof product.a_registers[lane]);
  }
  const int floats = 4 * product.tiles, first_row = current_warp() % 4 * kWarpRows;
  if (!product.a.registers) check_operand(product.a, first_row, kWarpRows, *first.where);
  check_operand(product.b, 0, 8 * product.tiles, *first.where);
  std::vector<float>& sums = warp.sums[product.d[0]];
  if (sums.empty()) {
    for (int lane = 0; lane < kLanes; lane++) {
      sums.insert(sums.end(), product.d[lane], product.d[lane] + floats);
      std::fill_n(product.d[lane], floats, NAN);
    }
  }
  warp.under_way.push_back(product);
  warp.begun++;
}

struct Wait {
  int pending;
  const Where* where;
};

void finish(void* const* exchanges, unsigned) {
  const Wait& wait = *static_cast<Wait*>(exchanges[0]);
  WarpProducts& warp = warps[current_warp()];
  const int64_t last_done = static_cast<int64_t>(warp.open_group) - 1 - wait.pending;
  auto next = warp.under_way.begin();
  std::map<float*, Product> done;
  for (; next != warp.under_way.end() && next->group <= last_done; ++next) {
    for (int lane = 0; lane < kLanes && next->a.registers; lane++)
      if (memcmp(next->a_source[lane], next->a_registers[lane], sizeof next->a_registers[lane]))
        fail_at("wgmma_wait_group: registers that a product reads were written before it was waited for",
                *wait.where);
    execute(warp, *next, current_warp() % 4 * kWarpRows, *wait.where);
    done[next->d[0]] = *next;
  }
  warp.under_way.erase(warp.under_way.begin(), next);
  for (const Product& later : warp.under_way) done.erase(later.d[0]);
  for (const auto& [d, product] : done) {
    const int floats = 4 * product.tiles;
    const std::vector<float>& sums = warp.sums[d];
    for (int lane = 0; lane < kLanes; lane++)
      std::copy_n(sums.begin() + lane * floats, floats, product.d[lane]);
    warp.sums.erase(d);
  }
}

}  // namespace

void wgmma_fence(const void* const* registers, const size_t* sizes, int count) {
  may_begin[cta.current] = true;
  for (int i = 0; i < count; i++) {
    const char* from = static_cast<const char*>(registers[i]);
    handed[cta.current].push_back({from, std::string(from, sizes[i])});
  }
}

void wgmma_mma_async(float* d, int tiles, bool bfloat16, Operand a, Operand b, bool add, Site site) {
  const Where where = site;
  if (!may_begin[cta.current])
    fail_at("wgmma_mma_async: wgmma_fence() is missing since the last wgmma_wait_group", where);
  if (a.registers && !are_handed(*reinterpret_cast<const uint32_t (*)[4]>(a.registers)))
    fail_at("wgmma_mma_async: registers of A were written after wgmma_fence, or not handed to it", where);
  if (cta.threads < (cta.current / 128 + 1) * 128)
    fail_at("wgmma_mma_async: this warpgroup lacks warps", where);
  Request request{d, a, b, tiles, bfloat16, add, &where};
  rendezvous("wgmma_mma_async", ~0u, &request, begin, false, site);
}

void wgmma_commit_group(Site site) {
  rendezvous(
      "wgmma_commit_group", ~0u, nullptr, [](void* const*, unsigned) { warps[current_warp()].open_group++; },
      false, site);
}

void wgmma_wait_group(int pending, Site site) {
  const Where where = site;
  Wait wait{pending, &where};
  rendezvous("wgmma_wait_group", ~0u, &wait, finish, false, site);
  may_begin[cta.current] = false;
  handed[cta.current].clear();
}

std::string unfinished_products() {
  for (int w = 0; w < cta.threads / kLanes; w++) {
    if (!warps[w].under_way.empty()) return "warp " + std::to_string(w) + " exits without wgmma_wait_group";
    if (warps[w].begun != warps[w / 4 * 4].begun)
      return "warps " + std::to_string(w / 4 * 4) + " and " + std::to_string(w) +
             " of one warpgroup began different numbers of products";
  }
  return "";
}

void reset_products() {
  for (WarpProducts& warp : warps) warp = {};
  std::fill_n(may_begin, kMaxThreads, false);
  for (auto& of_thread : handed) of_thread.clear();
}

void reset_asynchronous() {
  reset_transactions();
  reset_products();
  reset_registers();
}

std::string unfinished_asynchronous() {
  const std::string copies = unfinished_copies();
  return copies.empty() ? unfinished_products() : copies;
}

}  // namespace simt
