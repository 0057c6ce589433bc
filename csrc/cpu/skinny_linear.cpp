// A product for few rows: the weight is read once, as it is stored. Lanes run along the inputs. A tile of
// some rows of the weight and a few rows of x keeps one accumulator for each pair, as many as a vector has
// lanes, so that their sums over lanes end up in one vector. An output is one chain of multiply-adds in each
// lane and one order of lanes, however many rows there are and whoever computes it.
#include "cpu/skinny_linear.h"

#include <math.h>

#include "cpu/dtype.h"

namespace dllm::cpu::DLLM_ISA {
namespace {

using Params = SkinnyProductParams;

constexpr int kWeights = 4;                // rows of the weight in a tile
constexpr int kTileX = kLanes / kWeights;  // rows of x in a tile
constexpr int kRowsAtOnce = 64;            // rows of x that rows of the weight meet while these are in cache
constexpr int kMostWidened = 4096;         // inputs of a weight whose rows are widened once for all rows of x

DLLM_SIMD int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- weights as floats -----------------------------------------------------------------------------------
DLLM_SIMD Floats load_wide(const float* from) { return load(from); }
#if defined(__AVX512F__)
DLLM_SIMD __m256i load_halves(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}
DLLM_SIMD Floats load_wide(const BFloat16* from) {
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_halves(from)), 16);
}
DLLM_SIMD Floats load_wide(const Float16* from) { return (Floats)_mm512_cvtph_ps(load_halves(from)); }
#elif defined(__AVX2__)
DLLM_SIMD __m128i load_halves(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
DLLM_SIMD Floats load_wide(const BFloat16* from) {
  return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_halves(from)), 16);
}
DLLM_SIMD Floats load_wide(const Float16* from) { return (Floats)_mm256_cvtph_ps(load_halves(from)); }
#else
template <class T>
DLLM_SIMD Floats load_wide(const T* from) {
  float wide[kLanes];
  widen_row(from, wide, kLanes);
  return load(wide);
}
#endif

// ---- a tile ----------------------------------------------------------------------------------------------
// Lines of memory that one pass over the inputs brings into the cache for a later one.
struct Fetch {
  const char* from = nullptr;
  int lines_a_step = 0;

  DLLM_SIMD void operator()(int step) const {
    for (int i = 0; i < lines_a_step; i++) __builtin_prefetch(from + (step * lines_a_step + i) * 64L);
  }
};

// The sum over the lanes of sums[i] in lane i: every round zips and adds the halves of two vectors.
template <int kHalf = kLanes / 2, class Vector>
DLLM_SIMD Vector sum_lanes(Vector (&sums)[kLanes]) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>{};
#pragma GCC unroll 8
  for (int i = 0; i < kHalf; i++)
    sums[i] = zip(sums[i], sums[i + kHalf], lanes) + zip_rest(sums[i], sums[i + kHalf], lanes);
  if constexpr (kHalf > 1) return sum_lanes<kHalf / 2>(sums);
  else return sums[0];
}

// Rows of the weight, of which `kStep` inputs are read together. tail: what is left, and zeros behind it:
// reading on would leave the weight.
template <class T, int kStep>
struct WeightRows {
  const T* data[kWeights];
  alignas(64) T tail[kWeights][kStep];

  // Rows first … end; in place of those behind the last one, the last.
  WeightRows(const SkinnyLinearParams& p, int first, int end) {
    const int left = p.inputs % kStep;
    for (int n = 0; n < kWeights; n++) {
      data[n] = static_cast<const T*>(p.weight) + least(first + n, end - 1) * p.weight_stride;
      if (left) {
        memset(tail[n], 0, sizeof tail[n]);
        memcpy(tail[n], data[n] + p.inputs - left, left * sizeof(T));
      }
    }
  }
};

// The products of a tile, [x][weight] in one vector.
template <class T>
Floats multiply(const WeightRows<T, kLanes>& weight, const float* const (&x)[kTileX], int inputs,
                const Fetch& fetch) {
  Floats sums[kLanes] = {};
  const auto add = [&](const Floats(&w)[kWeights], int k) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int m = 0; m < kTileX; m++) {
      const Floats row = load(x[m] + k);
#pragma GCC unroll 4
      for (int n = 0; n < kWeights; n++) sums[m * kWeights + n] += row * w[n];
    }
  };
  Floats w[kWeights];
  int k = 0;
  for (; k + kLanes <= inputs; k += kLanes) {
    fetch(k / kLanes);
#pragma GCC unroll 4
    for (int n = 0; n < kWeights; n++) w[n] = load_wide(weight.data[n] + k);
    add(w, k);
  }
  if (k < inputs) {
#pragma GCC unroll 4
    for (int n = 0; n < kWeights; n++) w[n] = load_wide(weight.tail[n]);
    add(w, k);
  }
  return sum_lanes(sums);
}

// ---- bytes -----------------------------------------------------------------------------------------------
// Four products of bytes in each lane of 32 bits, added to `sum`. kOffset: x is made unsigned by adding 128,
// whose products with the weight are taken off again.
#if defined(__AVX512F__)
constexpr int kBytes = 64;
typedef __m512i Bytes;
DLLM_SIMD Bytes load_bytes(const int8_t* from) { return _mm512_loadu_si512(from); }

struct DotBytes {  // VNNI: unsigned times signed
  static constexpr bool kOffset = true;
  static DLLM_SIMD Bytes prepare(Bytes x) { return _mm512_xor_si512(x, _mm512_set1_epi8(-128)); }
  static DLLM_SIMD Ints add(Ints sum, Bytes x, Bytes weight) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(weight));
    return sum;
  }
};
struct WidenBytes {
  static constexpr bool kOffset = false;
  static DLLM_SIMD Bytes prepare(Bytes x) { return x; }
  static DLLM_SIMD __m512i half(Bytes x, int which) {
    return _mm512_cvtepi8_epi16(which ? _mm512_extracti64x4_epi64(x, 1) : _mm512_castsi512_si256(x));
  }
  static DLLM_SIMD Ints add(Ints sum, Bytes x, Bytes weight) {
    return sum + (Ints)_mm512_madd_epi16(half(x, 0), half(weight, 0)) +
           (Ints)_mm512_madd_epi16(half(x, 1), half(weight, 1));
  }
};
#elif defined(__AVX2__)
constexpr int kBytes = 32;
typedef __m256i Bytes;
DLLM_SIMD Bytes load_bytes(const int8_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}
struct WidenBytes {  // |weight| times x with the sign of the weight: two such products fit 16 bits
  static constexpr bool kOffset = false;
  static DLLM_SIMD Bytes prepare(Bytes x) { return x; }
  static DLLM_SIMD Ints add(Ints sum, Bytes x, Bytes weight) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weight), _mm256_sign_epi8(x, weight));
    return sum + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
};
typedef WidenBytes DotBytes;
#else
constexpr int kBytes = 16;
typedef int8_t Bytes __attribute__((vector_size(16)));
DLLM_SIMD Bytes load_bytes(const int8_t* from) {
  Bytes bytes;
  memcpy(&bytes, from, sizeof bytes);
  return bytes;
}
struct WidenBytes {
  static constexpr bool kOffset = false;
  static DLLM_SIMD Bytes prepare(Bytes x) { return x; }
  static DLLM_SIMD Ints add(Ints sum, Bytes x, Bytes weight) {
    for (int i = 0; i < 16; i++) sum[i / 4] += static_cast<int32_t>(x[i]) * weight[i];
    return sum;
  }
};
typedef WidenBytes DotBytes;
#endif

// The products of the inputs of one group, [x][weight] in one vector.
template <class Dot>
Ints multiply_bytes(const WeightRows<int8_t, kBytes>& weight, const int8_t* const (&x)[kTileX], int first,
                    int end, const Fetch& fetch) {
  Ints sums[kLanes] = {};
  const auto add = [&](const Bytes(&w)[kWeights], int k) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int m = 0; m < kTileX; m++) {
      const Bytes row = Dot::prepare(load_bytes(x[m] + k));
#pragma GCC unroll 4
      for (int n = 0; n < kWeights; n++) {
        Ints& sum = sums[m * kWeights + n];
        sum = Dot::add(sum, row, w[n]);
      }
    }
  };
  Bytes w[kWeights];
  int k = first;
  for (; k + kBytes <= end; k += kBytes) {
    fetch((k - first) / kBytes);
#pragma GCC unroll 4
    for (int n = 0; n < kWeights; n++) w[n] = load_bytes(weight.data[n] + k);
    add(w, k);
  }
  if (k < end) {
#pragma GCC unroll 4
    for (int n = 0; n < kWeights; n++) w[n] = load_bytes(weight.tail[n]);
    add(w, k);
  }
  return sum_lanes(sums);
}

// The same of x = 0: what the way x was made unsigned adds.
template <class Dot>
Ints products_of_zeros(const WeightRows<int8_t, kBytes>& weight, int first, int end) {
  alignas(64) static constexpr int8_t zeros[kBytes] = {};
  const Bytes zero = Dot::prepare(load_bytes(zeros));
  Ints sums[kLanes] = {};
#pragma GCC unroll 4
  for (int n = 0; n < kWeights; n++) {
    Ints sum = {};
    int k = first;
    for (; k + kBytes <= end; k += kBytes) sum = Dot::add(sum, zero, load_bytes(weight.data[n] + k));
    if (k < end) sum = Dot::add(sum, zero, load_bytes(weight.tail[n]));
#pragma GCC unroll 4
    for (int m = 0; m < kTileX; m++) sums[m * kWeights + n] = sum;
  }
  return sum_lanes(sums);
}

// ---- all outputs of an item ------------------------------------------------------------------------------
// Packed rows of x from `row` on; in place of those behind the last one, the last.
template <class T>
struct XRows {
  const T* data[kTileX];
  XRows(const Params& p, int64_t row, int64_t last) {
    for (int m = 0; m < kTileX; m++)
      data[m] = static_cast<const T*>(p.packed) + least(row + m, last - 1) * p.padded_inputs();
  }
};

// The rows of the weight behind a tile's, of which each pass of the tile fetches a share.
struct NextRows {
  const char* data = nullptr;
  int64_t share = 0;  // bytes
  int lines_a_step = 0;

  // Where rows are contiguous and another tile follows.
  NextRows(const Params& p, int first, int bytes, int64_t passes, int64_t steps) {
    if (p.weight_stride != p.inputs || first + 2 * kWeights > p.outputs || !steps) return;
    const int64_t row_bytes = static_cast<int64_t>(p.inputs) * bytes,
                  lines = kWeights * row_bytes / 64 / passes;
    data = static_cast<const char*>(p.weight) + (first + kWeights) * row_bytes;
    share = lines * 64, lines_a_step = static_cast<int>((lines + steps - 1) / steps);
  }
  Fetch of(int64_t pass) const { return {data + pass * share, lines_a_step}; }
};

// Both fill tiles[i]: the outputs first … end of rows block + i * kTileX …, [x][weight].
typedef Floats Tiles[kRowsAtOnce / kTileX];

template <class T>
struct FloatWeight {
  static void fill(const Params& p, int64_t block, int64_t last, int first, int end, Tiles& tiles) {
    const int64_t passes = (last - block + kTileX - 1) / kTileX;
    const NextRows next(p, first, sizeof(T), passes, p.inputs / kLanes);
    const auto multiply_all = [&](const auto& weight) {
      for (int64_t i = 0; i < passes; i++)
        tiles[i] = multiply(weight, XRows<float>(p, block + i * kTileX, last).data, p.inputs, next.of(i));
    };
    const WeightRows<T, kLanes> weight(p, first, end);
    if (sizeof(T) == sizeof(float) || passes == 1 || p.inputs > kMostWidened) return multiply_all(weight);
    alignas(64) float widened[kWeights][kMostWidened];
    SkinnyLinearParams wide = p;
    wide.weight = widened, wide.weight_stride = kMostWidened;
    for (int n = 0; n < kWeights; n++) widen_row(weight.data[n], widened[n], p.inputs);
    multiply_all(WeightRows<float, kLanes>(wide, 0, kWeights));
  }
  static float scale(const Params&, int64_t) { return 1.0f; }
};

template <class Dot>
struct ByteWeight {
  static void fill(const Params& p, int64_t block, int64_t last, int first, int end, Tiles& tiles) {
    const int64_t passes = (last - block + kTileX - 1) / kTileX;
    const WeightRows<int8_t, kBytes> weight(p, first, end);
    const int group = p.inputs / p.groups;
    const NextRows next(p, first, 1, passes * p.groups, group / kBytes);
    for (int g = 0; g < p.groups; g++) {
      const int begin = g * group;
      Ints offset = {};
      if constexpr (Dot::kOffset) offset = products_of_zeros<Dot>(weight, begin, begin + group);
      alignas(64) float scales[kLanes];
      for (int i = 0; i < kLanes; i++)
        scales[i] = p.scales[least(first + i % kWeights, end - 1) * p.groups + g];
      for (int64_t i = 0; i < passes; i++) {
        const Ints products = multiply_bytes<Dot>(weight, XRows<int8_t>(p, block + i * kTileX, last).data,
                                                  begin, begin + group, next.of(g * passes + i));
        const Floats scaled = __builtin_convertvector(products - offset, Floats) * load(scales);
        tiles[i] = g ? tiles[i] + scaled : scaled;
      }
    }
  }
  static float scale(const Params& p, int64_t row) { return p.x_scales[row]; }
};

// sums: of `count` outputs from `first` on.
void write(const Params& p, int64_t row, int first, int count, const float* bias, float scale, float* sums) {
  for (int n = 0; n < count; n++) sums[n] = sums[n] * scale + bias[n];
  with_storage_type(p.x_type, [&]<class T>(T) {
    narrow_row(sums, static_cast<T*>(p.out) + row * p.outputs + first, count);
  });
}

template <class Weight>
void fill_item(const Params& p, int64_t item) {
  const int begin = static_cast<int>(item * Params::kOutputs);
  const int end = static_cast<int>(least(begin + Params::kOutputs, p.outputs));
  float bias[Params::kOutputs] = {};
  if (p.bias) widen_any(p.bias, p.bias_type, begin, end - begin, bias);
  alignas(64) float results[kRowsAtOnce][Params::kOutputs];
  for (int64_t block = 0; block < p.rows; block += kRowsAtOnce) {
    const int64_t last = least(block + kRowsAtOnce, p.rows);
    for (int first = begin; first < end; first += kWeights) {
      Tiles tiles;
      Weight::fill(p, block, last, first, end, tiles);
      for (int64_t row = block; row < last; row++) {
        const auto* tile = reinterpret_cast<const float*>(&tiles[(row - block) / kTileX]);
        memcpy(&results[row - block][first - begin], tile + (row - block) % kTileX * kWeights,
               kWeights * sizeof(float));
      }
    }
    for (int64_t row = block; row < last; row++)
      write(p, row, begin, end - begin, bias, Weight::scale(p, row), results[row - block]);
  }
}

constexpr int kChunk = 512;  // inputs that are widened together

// use(first, count, values) for every chunk of a row of x.
template <class Use>
DLLM_SIMD void for_chunks(const Params& p, int64_t row, const Use& use) {
  alignas(64) float values[kChunk];
  for (int first = 0; first < p.inputs; first += kChunk) {
    const int count = static_cast<int>(least(p.inputs - first, kChunk));
    widen_any(p.x, p.x_type, row * p.inputs + first, count, values);
    use(first, count, values);
  }
}

// Symmetric: the largest magnitude becomes 127. The outputs of a row that is not finite are NaN.
void pack_bytes(const Params& p, int64_t row) {
  uint32_t largest = 0;  // as bits: magnitudes are in their order, infinities and NaN behind all numbers
  for_chunks(p, row, [&](int, int count, const float* values) {
    for (int i = 0; i < count; i++) {
      const uint32_t magnitude = bits_of(values[i]) & 0x7fffffffu;
      largest = magnitude > largest ? magnitude : largest;
    }
  });
  const bool finite = largest < 0x7f800000u;
  const float scale = float_of(largest) / 127;
  const float inverse = finite && scale > 0 ? 1 / scale : 0;
  int8_t* to = static_cast<int8_t*>(p.packed) + row * p.padded_inputs();
  for_chunks(p, row, [&](int first, int count, const float* values) {
    for (int i = 0; i < count; i++) {
      const float rounded = finite ? rintf(values[i] * inverse) : 0;
      to[first + i] = static_cast<int8_t>(rounded > 127 ? 127 : rounded < -127 ? -127 : rounded);
    }
  });
  memset(to + p.inputs, 0, p.padded_inputs() - p.inputs);
  p.x_scales[row] = finite ? scale : __builtin_nanf("");
}

void pack_floats(const Params& p, int64_t row) {
  float* to = static_cast<float*>(p.packed) + row * p.padded_inputs();
  widen_any(p.x, p.x_type, row * p.inputs, p.inputs, to);
  memset(to + p.inputs, 0, (p.padded_inputs() - p.inputs) * sizeof(float));
}

}  // namespace

void pack_rows(const Params& p, long begin, long end) {
  for (long row = begin; row < end; row++) p.scales ? pack_bytes(p, row) : pack_floats(p, row);
}

void skinny_product(const Params& p, long begin, long end) {
  for (long item = begin; item < end; item++) {
    if (p.scales) {
      if (p.dot_bytes) fill_item<ByteWeight<DotBytes>>(p, item);
      else fill_item<ByteWeight<WidenBytes>>(p, item);
    } else {
      with_storage_type(p.weight_type, [&]<class T>(T) { fill_item<FloatWeight<T>>(p, item); });
    }
  }
}

}  // namespace dllm::cpu::DLLM_ISA
