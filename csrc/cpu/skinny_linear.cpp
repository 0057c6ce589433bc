// Products of panels of weights with a few rows of x: tiles of rows and panels whose sums stay in registers.
// An output is one chain of multiply-adds in the order of the inputs, however many rows there are, whichever
// tile it falls into and whoever computes it.
#include "cpu/skinny_linear.h"

#include <float.h>
#include <math.h>

#include "cpu/dtype.h"
#include "cpu/sigmoid.h"

namespace dllm::cpu::DLLM_ISA {
namespace {

using Params = SkinnyProductParams;

constexpr int kPanel = Params::kPanel;
constexpr int kVectors = kPanel / kLanes;                 // of the outputs of a panel
constexpr int kTilePanels = kLanes == 16 ? 3 : 1;         // panels of a tile
constexpr int kWidth = Params::kMostItemPanels * kPanel;  // sums of a row
constexpr int kRowsAtOnce = 256;                          // rows whose sums exist at once
constexpr int kMostInputs = 4096;                         // whose panels stay in cache while rows pass

typedef float Row[kWidth];  // sums of the panels of an item

DLLM_SIMD int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// use(std::integral_constant<int, count>) for 1 <= count <= kMost.
template <int kMost, class Use>
DLLM_SIMD void with_count(int count, const Use& use) {
  if constexpr (kMost > 1) {
    if (count < kMost) return with_count<kMost - 1>(count, use);
  }
  use(std::integral_constant<int, kMost>{});
}

// Brings the panels that lie behind those of a tile into the second level of cache while rows pass over
// these: every pass fetches a share of them, some lines for each one that it reads.
class Fetch {
 public:
  // The `bytes` of panels that begin at `from`; each of `passes` reads `lines` lines of the tile's own.
  Fetch(const void* from, int64_t bytes, int lines, int pass, int passes) {
    const int64_t share = passes > 1 && lines ? bytes / kLine / passes : 0;
    from_ = static_cast<const char*>(from) + pass * share * kLine;
    a_line_ = share ? static_cast<int>((share + lines - 1) / lines) : 0;
  }
  DLLM_SIMD void operator()(int line) const {
    for (int i = 0; i < a_line_; i++)
      __builtin_prefetch(from_ + (int64_t{line} * a_line_ + i) * kLine, 0, kSecondLevel);
  }

 private:
  static constexpr int kLine = 64, kSecondLevel = 2;
  const char* from_;
  int a_line_;
};

// ---- float weights ---------------------------------------------------------------------------------------
struct FloatPanels {
  typedef float Unit;
  static constexpr int kInputs = 1;  // of a unit
  static DLLM_SIMD void widen(const Unit* units, Floats (&weight)[1]) { weight[0] = load(units); }
};
struct BFloat16Panels {
  typedef uint32_t Unit;
  static constexpr int kInputs = 2;
  static DLLM_SIMD void widen(const Unit* units, Floats (&weight)[2]) {
    const Ints pair = load(reinterpret_cast<const int32_t*>(units));
    weight[0] = (Floats)(pair << 16);
    weight[1] = (Floats)(pair & broadcast(static_cast<int32_t>(0xffff0000u)));
  }
};

// sums[m][i] += the products of row m of x with vector i of the outputs.
template <class Panels, int kRows, int kCount>
void multiply(const typename Panels::Unit* weight, int64_t panel_stride, const float* x, int64_t x_stride,
              int inputs, Row* sums, const Fetch& fetch) {
  constexpr int kInputs = Panels::kInputs, kWide = kCount * kVectors;
  Floats sum[kRows][kWide];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; m++)
#pragma GCC unroll 4
    for (int i = 0; i < kWide; i++) sum[m][i] = load(sums[m] + i * kLanes);
  const auto add = [&](int k, int count) __attribute__((always_inline)) {
    Floats w[kWide][kInputs];
#pragma GCC unroll 4
    for (int i = 0; i < kWide; i++)
      Panels::widen(weight + (i / kVectors) * panel_stride + k / kInputs * kPanel + i % kVectors * kLanes,
                    w[i]);
#pragma GCC unroll 2
    for (int j = 0; j < count; j++) {
#pragma GCC unroll 8
      for (int m = 0; m < kRows; m++) {
        const Floats value = broadcast(x[m * x_stride + k + j]);
#pragma GCC unroll 4
        for (int i = 0; i < kWide; i++) sum[m][i] += value * w[i][j];
      }
    }
  };
  int k = 0;
  for (; k + kInputs <= inputs; k += kInputs) {
    fetch(k / kInputs);
    add(k, kInputs);
  }
  if (kInputs > 1 && k < inputs) add(k, 1);
#pragma GCC unroll 8
  for (int m = 0; m < kRows; m++)
#pragma GCC unroll 4
    for (int i = 0; i < kWide; i++) store(sums[m] + i * kLanes, sum[m][i]);
}

// ---- bytes -----------------------------------------------------------------------------------------------
// Four products of bytes in each lane of 32 bits, added to `sum`. Weights are stored with 128 added.
// kBiased: this is how they are multiplied; what the 128 add is taken off again.
#if defined(__AVX512F__)
struct DotBytes {  // VNNI: unsigned times signed
  static constexpr bool kBiased = true;
  static constexpr int kRows = 8;
  struct Weight {
    Ints bytes;
  };
  static DLLM_SIMD Weight prepare(Ints bytes) { return {bytes}; }
  static DLLM_SIMD Ints add(Ints sum, Weight weight, Ints x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weight.bytes), "v"(x));
    return sum;
  }
};
struct WidenBytes {
  static constexpr bool kBiased = false;
  static constexpr int kRows = 4;
  struct Weight {
    __m512i even, odd;
  };
  static DLLM_SIMD __m512i even(Ints bytes) {
    return _mm512_srai_epi16(_mm512_slli_epi16((__m512i)bytes, 8), 8);
  }
  static DLLM_SIMD __m512i odd(Ints bytes) { return _mm512_srai_epi16((__m512i)bytes, 8); }
  static DLLM_SIMD Weight prepare(Ints bytes) {
    const Ints plain = bytes ^ broadcast(static_cast<int32_t>(0x80808080u));
    return {even(plain), odd(plain)};
  }
  static DLLM_SIMD Ints add(Ints sum, Weight weight, Ints x) {
    return sum + (Ints)_mm512_madd_epi16(even(x), weight.even) + (Ints)_mm512_madd_epi16(odd(x), weight.odd);
  }
};
#elif defined(__AVX2__)
struct WidenBytes {  // |weight| times x with the sign of the weight: two such products fit 16 bits
  static constexpr bool kBiased = false;
  static constexpr int kRows = 4;
  struct Weight {
    __m256i plain, magnitude;
  };
  static DLLM_SIMD Weight prepare(Ints bytes) {
    const __m256i plain = (__m256i)(bytes ^ broadcast(static_cast<int32_t>(0x80808080u)));
    return {plain, _mm256_abs_epi8(plain)};
  }
  static DLLM_SIMD Ints add(Ints sum, Weight weight, Ints x) {
    const __m256i pairs = _mm256_maddubs_epi16(weight.magnitude, _mm256_sign_epi8((__m256i)x, weight.plain));
    return sum + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
};
typedef WidenBytes DotBytes;
#else
struct WidenBytes {
  static constexpr bool kBiased = false;
  static constexpr int kRows = 2;
  typedef Ints Weight;
  static DLLM_SIMD Weight prepare(Ints bytes) { return bytes ^ broadcast(static_cast<int32_t>(0x80808080u)); }
  static DLLM_SIMD Ints add(Ints sum, Weight weight, Ints x) {
#pragma GCC unroll 4
    for (int shift = 0; shift < 32; shift += 8) sum += (weight << shift >> 24) * (x << shift >> 24);
    return sum;
  }
};
typedef WidenBytes DotBytes;
#endif

constexpr int kBytes = 4;  // of a unit of an int8 weight

// Where the bytes of a tile's rows, their sums and the scales of its outputs lie.
struct ByteRows {
  const int8_t* x;
  int64_t x_stride;
  const int32_t* x_sums;  // of every group
  const float* scales;    // of the tile's outputs, groups scale_stride apart
  int64_t scale_stride;
};

// sums[m][i] += the scaled products of all groups.
template <class Dot, int kRows, int kCount>
void multiply(const int32_t* weight, int64_t panel_stride, const ByteRows& rows, int inputs, int groups,
              Row* sums, const Fetch& fetch) {
  constexpr int kWide = kCount * kVectors;
  const int group = inputs / groups;
  for (int g = 0; g < groups; g++) {
    Ints sum[kRows][kWide] = {};
    const int end = (g + 1) * group;
    for (int k = g * group; k < end; k += kBytes) {
      fetch(k / kBytes);
      typename Dot::Weight w[kWide];
#pragma GCC unroll 4
      for (int i = 0; i < kWide; i++)
        w[i] = Dot::prepare(
            load(weight + i / kVectors * panel_stride + k / kBytes * kPanel + i % kVectors * kLanes));
#pragma GCC unroll 8
      for (int m = 0; m < kRows; m++) {
        int32_t bytes;
        memcpy(&bytes, rows.x + m * rows.x_stride + k, sizeof bytes);
        const Ints x = broadcast(bytes);
#pragma GCC unroll 4
        for (int i = 0; i < kWide; i++) sum[m][i] = Dot::add(sum[m][i], w[i], x);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < kRows; m++) {
      const Ints bias = broadcast(Dot::kBiased ? 128 * rows.x_sums[m * groups + g] : 0);
#pragma GCC unroll 4
      for (int i = 0; i < kWide; i++) {
        const Floats products = __builtin_convertvector(sum[m][i] - bias, Floats);
        float* to = sums[m] + i * kLanes;
        store(to, load(to) + products * load(rows.scales + g * rows.scale_stride + i * kLanes));
      }
    }
  }
}

// ---- tiles -----------------------------------------------------------------------------------------------
typedef Row Sums[kRowsAtOnce];

// The sums of rows `row` …, from an item's panel `column` on.
DLLM_SIMD Row* sums_of(Sums& sums, int64_t row, int column) {
  return reinterpret_cast<Row*>(&sums[row][column * kPanel]);
}

// use(first row, rows, pass, passes): rows first … end in tiles of at most kMost, as even as can be.
template <int kMost, class Use>
DLLM_SIMD void for_tiles(int64_t first, int64_t end, const Use& use) {
  const int tiles = static_cast<int>((end - first + kMost - 1) / kMost);
  for (int i = 0; i < tiles; i++) {
    const int count = static_cast<int>((end - first + tiles - i - 1) / (tiles - i));
    use(first, count, i, tiles);
    first += count;
  }
}

template <class Panels>
struct FloatWeight {
  static constexpr int kRows = kLanes == 16 ? 8 : kLanes == 8 ? 6 : 2;

  template <int kCount>
  static void fill(const Params& p, int64_t first, int64_t end, int64_t panel, Sums& sums, int column) {
    const auto* weight = static_cast<const typename Panels::Unit*>(p.weight) + panel * p.panel_units();
    for (int64_t row = first; row < end; row++)
      memset(*sums_of(sums, row - first, column), 0, kCount * kPanel * sizeof(float));
    for (int begin = 0; begin < p.inputs; begin += kMostInputs) {
      const int inputs = static_cast<int>(least(p.inputs - begin, kMostInputs));
      const auto* from = weight + begin / Panels::kInputs * kPanel;
      for_tiles<kRows>(first, end, [&](int64_t row, int rows, int pass, int passes) {
        const float* x = static_cast<const float*>(p.read) + row * p.read_stride + begin;
        const Fetch fetch(weight + kCount * p.panel_units(), kCount * p.panel_units() * 4L,
                          inputs / Panels::kInputs, pass, passes);
        with_count<kRows>(rows, [&](auto count) {
          multiply<Panels, count, kCount>(from, p.panel_units(), x, p.read_stride, inputs,
                                          sums_of(sums, row - first, column), fetch);
        });
      });
    }
  }
  static float scale(const Params&, int64_t) { return 1.0f; }
};

template <class Dot>
struct ByteWeight {
  template <int kCount>
  static void fill(const Params& p, int64_t first, int64_t end, int64_t panel, Sums& sums, int column) {
    const auto* weight = static_cast<const int32_t*>(p.weight) + panel * p.panel_units();
    for (int64_t row = first; row < end; row++)
      memset(*sums_of(sums, row - first, column), 0, kCount * kPanel * sizeof(float));
    for_tiles<Dot::kRows>(first, end, [&](int64_t row, int rows, int pass, int passes) {
      const ByteRows bytes{static_cast<const int8_t*>(p.read) + row * p.read_stride, p.read_stride,
                           p.x_sums + row * p.groups, p.scales + panel * kPanel, p.weight_panels() * kPanel};
      const Fetch fetch(weight + kCount * p.panel_units(), kCount * p.panel_units() * 4L, p.row_units(), pass,
                        passes);
      with_count<Dot::kRows>(rows, [&](auto count) {
        multiply<Dot, count, kCount>(weight, p.panel_units(), bytes, p.padded_inputs(), p.groups,
                                     sums_of(sums, row - first, column), fetch);
      });
    });
  }
  static float scale(const Params& p, int64_t row) { return p.x_scales[row]; }
};

// What is added to the sums of an item's panels.
void load_bias(const Params& p, int64_t panel, int panels, float* bias) {
  memset(bias, 0, panels * kPanel * sizeof(float));
  if (!p.bias) return;
  const auto load = [&](int64_t first, int64_t offset, int count, float* to) {
    widen_any(p.bias, p.bias_type, offset + first, static_cast<int>(least(count, p.outputs - first)), to);
  };
  if (!p.gated) return load(panel * kPanel, 0, panels * kPanel, bias);
  for (int i = 0; i < panels; i++)
    load((panel + i) / 2 * kPanel, i % 2 * int64_t{p.outputs}, kPanel, bias + i * kPanel);
}

// Pairs of panels, a gate and what it lets through, become one: silu(gate) · up.
DLLM_SIMD void gate(float* sums, int panels) {
  for (int i = 0; i < panels * kPanel / 2; i += kLanes) {
    const float* pair = sums + i / kPanel * 2 * kPanel + i % kPanel;
    const Floats x = load(pair);
    store(sums + i, x * sigmoid(x).value * load(pair + kPanel));
  }
}

// Writes the outputs of an item's panels of a row; the last one may be partly beyond the outputs.
DLLM_SIMD void write(const Params& p, int64_t row, int64_t panel, int panels, float scale, const float* bias,
                     float* sums) {
  for (int i = 0; i < panels * kPanel; i++) sums[i] = sums[i] * scale + bias[i];
  if (p.gated) gate(sums, panels);
  const int64_t first = (p.gated ? panel / 2 : panel) * kPanel;
  const int count = static_cast<int>(least((p.gated ? panels / 2 : panels) * kPanel, p.outputs - first));
  with_storage_type(p.x_type, [&]<class T>(T) {
    narrow_row(sums, static_cast<T*>(p.out) + row * p.outputs + first, count);
  });
}

template <class Weight>
void fill_item(const Params& p, int64_t item) {
  const int64_t first = item * p.item_panels();
  const int panels = static_cast<int>(least(p.item_panels(), p.weight_panels() - first));
  alignas(64) Sums sums;
  alignas(64) float bias[kWidth];
  load_bias(p, first, panels, bias);
  for (int64_t block = 0; block < p.rows; block += kRowsAtOnce) {
    const int64_t end = least(block + kRowsAtOnce, p.rows);
    int panel = 0;
    for (; panel + kTilePanels <= panels; panel += kTilePanels)
      Weight::template fill<kTilePanels>(p, block, end, first + panel, sums, panel);
    for (; panel < panels; panel++) Weight::template fill<1>(p, block, end, first + panel, sums, panel);
    for (int64_t row = block; row < end; row++)
      write(p, row, first, panels, Weight::scale(p, row), bias, sums[row - block]);
  }
}

// ---- x as the product reads it ---------------------------------------------------------------------------
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

// Symmetric: the largest magnitude becomes 127. The outputs of a row that is not finite are NaN. A scale has
// an inverse: those of rows near 0 are a number that is not denormal.
void pack_bytes(const Params& p, int64_t row) {
  uint32_t largest = 0;  // as bits: magnitudes are in their order, infinities and NaN behind all numbers
  for_chunks(p, row, [&](int, int count, const float* values) {
    for (int i = 0; i < count; i++) {
      const uint32_t magnitude = bits_of(values[i]) & 0x7fffffffu;
      largest = magnitude > largest ? magnitude : largest;
    }
  });
  const bool finite = largest < 0x7f800000u;
  const float exact = float_of(largest) / 127, scale = exact > FLT_MIN ? exact : FLT_MIN;
  const float inverse = finite ? 1 / scale : 0;
  int8_t* to = static_cast<int8_t*>(p.read) + row * p.read_stride;
  for_chunks(p, row, [&](int first, int count, const float* values) {
    for (int i = 0; i < count; i++) {
      const float rounded = finite ? rintf(values[i] * inverse) : 0;
      to[first + i] = static_cast<int8_t>(rounded > 127 ? 127 : rounded < -127 ? -127 : rounded);
    }
  });
  memset(to + p.inputs, 0, p.padded_inputs() - p.inputs);
  const int group = p.padded_inputs() / p.groups;
  for (int g = 0; g < p.groups; g++) {
    int32_t sum = 0;
    for (int i = 0; i < group; i++) sum += to[g * group + i];
    p.x_sums[row * p.groups + g] = sum;
  }
  p.x_scales[row] = finite ? scale : __builtin_nanf("");
}

// ---- weights as panels -----------------------------------------------------------------------------------
// The inputs of a row of the weight from `first` on, as `units` units.
DLLM_SIMD void copy_units(const PackWeightParams& p, int64_t row, int first, int units, uint32_t* to) {
  const int count = static_cast<int>(least(p.inputs - first, static_cast<int64_t>(units) * p.unit_inputs()));
  const int64_t offset = row * p.weight_stride + first;
  if (p.bytes) {
    const uint8_t* from = static_cast<const uint8_t*>(p.weight) + offset;
    uint8_t* bytes = reinterpret_cast<uint8_t*>(to);
    for (int i = 0; i < count; i++) bytes[i] = static_cast<uint8_t>(from[i] + 128);
  } else if (p.weight_type == DType::bfloat16) {
    memcpy(to, static_cast<const BFloat16*>(p.weight) + offset, count * sizeof(BFloat16));
  } else {
    widen_any(p.weight, p.weight_type, offset, count, reinterpret_cast<float*>(to));
  }
}

}  // namespace

void pack_panels(const PackWeightParams& p, long begin, long end) {
  constexpr int kUnits = 64;  // of a row that are transposed together
  for (int64_t panel = begin; panel < end; panel++) {
    float* out = static_cast<float*>(p.out) + panel * p.panel_units();
    for (int unit = 0; unit < p.row_units(); unit += kUnits) {
      const int units = static_cast<int>(least(p.row_units() - unit, kUnits));
      alignas(64) uint32_t rows[kPanel][kUnits] = {};
      for (int64_t i = 0; i < least(kPanel, p.outputs - panel * kPanel); i++)
        copy_units(p, panel * kPanel + i, unit * p.unit_inputs(), units, rows[i]);
      transpose(reinterpret_cast<const float*>(rows), kUnits, kPanel, units, out + unit * kPanel, kPanel);
    }
  }
}

void pack_rows(const Params& p, long begin, long end) {
  for (long row = begin; row < end; row++) {
    if (p.scales) pack_bytes(p, row);
    else
      widen_any(p.x, p.x_type, row * p.inputs, p.inputs, static_cast<float*>(p.read) + row * p.read_stride);
  }
}

void skinny_product(const Params& p, long begin, long end) {
  for (long item = begin; item < end; item++) {
    if (p.scales) {
      if (p.dot_bytes) fill_item<ByteWeight<DotBytes>>(p, item);
      else fill_item<ByteWeight<WidenBytes>>(p, item);
    } else if (p.weight_type == DType::bfloat16) {
      fill_item<FloatWeight<BFloat16Panels>>(p, item);
    } else {
      fill_item<FloatWeight<FloatPanels>>(p, item);
    }
  }
}

}  // namespace dllm::cpu::DLLM_ISA
