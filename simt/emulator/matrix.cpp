// ldmatrix and mma.sync: one lane works for its warp once all have come.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <string>

#include "report.h"
#include "shared_memory.h"

namespace simt {
namespace {

struct MatrixRows {
  uint32_t* r;
  const void* row;
};

void give_rows(void* const* exchanges, bool transposed) {
  const auto lane = [&](int i) -> MatrixRows& { return *static_cast<MatrixRows*>(exchanges[i]); };
  for (int matrix = 0; matrix < 4; matrix++) {
    uint16_t x[8][8];
    for (int row = 0; row < 8; row++) memcpy(x[row], lane(8 * matrix + row).row, 16);
    for (int i = 0; i < 32; i++) {
      const int group = i / 4, pair = i % 4 * 2;
      const uint32_t low = transposed ? x[pair][group] : x[group][pair];
      const uint32_t high = transposed ? x[pair + 1][group] : x[group][pair + 1];
      lane(i).r[matrix] = high << 16 | low;
    }
  }
}

struct Product {
  float* d;
  const uint32_t *a, *b;
};

template <class T>
void unpack(uint32_t word, float& low, float& high) {
  low = std::bit_cast<T>(static_cast<uint16_t>(word));
  high = std::bit_cast<T>(static_cast<uint16_t>(word >> 16));
}

template <class T>
void multiply(void* const* exchanges, unsigned) {
  float a[16][16], b[16][8], d[16][8];
  for (int i = 0; i < 32; i++) {
    const Product& lane = *static_cast<Product*>(exchanges[i]);
    const int group = i / 4, pair = i % 4 * 2;
    for (int half = 0; half < 2; half++) {
      unpack<T>(lane.a[2 * half], a[group][pair + 8 * half], a[group][pair + 8 * half + 1]);
      unpack<T>(lane.a[2 * half + 1], a[group + 8][pair + 8 * half], a[group + 8][pair + 8 * half + 1]);
      unpack<T>(lane.b[half], b[pair + 8 * half][group], b[pair + 8 * half + 1][group]);
      for (int j = 0; j < 2; j++) d[group + 8 * half][pair + j] = lane.d[2 * half + j];
    }
  }
  for (int row = 0; row < 16; row++)
    for (int k = 0; k < 16; k++)
      for (int column = 0; column < 8; column++) d[row][column] += a[row][k] * b[k][column];
  for (int i = 0; i < 32; i++) {
    const Product& lane = *static_cast<Product*>(exchanges[i]);
    const int group = i / 4, pair = i % 4 * 2;
    for (int half = 0; half < 2; half++)
      for (int j = 0; j < 2; j++) lane.d[2 * half + j] = d[group + 8 * half][pair + j];
  }
}

}  // namespace

void ldmatrix_x4(uint32_t (&r)[4], const void* row, bool transposed, Site site) {
  const Where where = site;
  if (shared_offset(row) == ~size_t{0}) fail_at("ldmatrix_x4 of a row outside shared memory", where);
  if (reinterpret_cast<uintptr_t>(row) % 16)
    fail_at("ldmatrix_x4 needs rows at multiples of 16 bytes", where);
  check_access(Access::read, row, 16, where);
  MatrixRows exchange{r, row};
  if (transposed)
    rendezvous(
        "ldmatrix_x4_trans", ~0u, &exchange,
        [](void* const* exchanges, unsigned) { give_rows(exchanges, true); }, false, site);
  else
    rendezvous(
        "ldmatrix_x4", ~0u, &exchange, [](void* const* exchanges, unsigned) { give_rows(exchanges, false); },
        false, site);
}

void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bfloat16, Site site) {
  Product exchange{d, a, b};
  rendezvous("mma_m16n8k16", ~0u, &exchange, bfloat16 ? multiply<__nv_bfloat16> : multiply<__half>, false,
             site);
}

}  // namespace simt
