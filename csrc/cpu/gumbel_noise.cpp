// Philox words and Gumbel noise of consecutive token ids, with the same bits as csrc/core on every
// instruction set (compiled with -ffp-contract=off).
//
// A vector holds whole Philox blocks in their natural order (words 0, 1, 2, 3 of one counter, then the
// next counter), so that lane i belongs to token id first + i without any transposition.
#include "cpu/gumbel_noise.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "core/gumbel.h"
#include "core/philox.h"
#include "cpu/simd.h"

namespace dllm::cpu::DLLM_ISA {
namespace {

typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint64_t WordPairs __attribute__((vector_size(kLanes * 4)));

// Several vectors computed side by side: one alone is a chain of some hundred dependent instructions.
constexpr int kGroup = kLanes == 16 ? 4 : 2;

template <class Vector>
struct Group {
  Vector part[kGroup];
  Group() = default;
  template <class Other>
  DLLM_SIMD explicit Group(const Group<Other>& other) {
    for (int i = 0; i < kGroup; i++) part[i] = (Vector)other.part[i];
  }
};

#define DLLM_GROUP_OPERATOR(op)                                                         \
  template <class Vector>                                                               \
  DLLM_SIMD Group<Vector> operator op(const Group<Vector>& a, const Group<Vector>& b) { \
    Group<Vector> result;                                                               \
    for (int i = 0; i < kGroup; i++) result.part[i] = a.part[i] op b.part[i];           \
    return result;                                                                      \
  }                                                                                     \
  template <class Vector, class Scalar>                                                 \
  DLLM_SIMD Group<Vector> operator op(const Group<Vector>& a, Scalar b) {               \
    Group<Vector> result;                                                               \
    for (int i = 0; i < kGroup; i++) result.part[i] = a.part[i] op b;                   \
    return result;                                                                      \
  }
DLLM_GROUP_OPERATOR(+)
DLLM_GROUP_OPERATOR(-)
DLLM_GROUP_OPERATOR(*)
DLLM_GROUP_OPERATOR(>>)
DLLM_GROUP_OPERATOR(<<)
DLLM_GROUP_OPERATOR(==)
#undef DLLM_GROUP_OPERATOR

template <class Vector>
DLLM_SIMD Group<Vector> operator~(const Group<Vector>& a) {
  Group<Vector> result;
  for (int i = 0; i < kGroup; i++) result.part[i] = ~a.part[i];
  return result;
}

// The arithmetic that core/gumbel.h is written for.
struct ManyLanes {
  using Float = Group<Floats>;
  using Bits = Group<Words>;
  using Signed = Group<Ints>;
  static DLLM_SIMD Float select(const Signed& mask, const Float& yes, const Float& no) {
    Float result;
    for (int i = 0; i < kGroup; i++) result.part[i] = mask.part[i] ? yes.part[i] : no.part[i];
    return result;
  }
  static DLLM_SIMD Float convert(const Signed& a) {
    Float result;
    for (int i = 0; i < kGroup; i++) result.part[i] = __builtin_convertvector(a.part[i], Floats);
    return result;
  }
  // Two exact halves and one rounding: what a direct conversion gives.
  static DLLM_SIMD Float convert_unsigned(const Bits& a) {
    Float result;
    for (int i = 0; i < kGroup; i++)
      result.part[i] = __builtin_convertvector((Ints)(a.part[i] >> 16), Floats) * 65536.0f +
                       __builtin_convertvector((Ints)(a.part[i] & 0xFFFFu), Floats);
    return result;
  }
  static DLLM_SIMD Bits bits(const Float& a) { return Bits(a); }
  static DLLM_SIMD Float from_bits(const Bits& a) { return Float(a); }
};

// (hi, lo) of word 2 times its multiplier, then of word 0 times its multiplier, in each block of four.
DLLM_SIMD Words reversed_products(Words words, Words multiplier) {
#if defined(__AVX512F__)
  // The masked forms: GCC 12 warns about its own unmasked ones.
  const __m512i products = _mm512_maskz_mul_epu32(0xFF, (__m512i)words, (__m512i)multiplier);
  return (Words)_mm512_maskz_shuffle_epi32(0xFFFF, products, _MM_PERM_ABCD);
#elif defined(__AVX2__)
  return (Words)_mm256_shuffle_epi32(_mm256_mul_epu32((__m256i)words, (__m256i)multiplier), 0x1B);
#elif defined(__SSE2__)
  return (Words)_mm_shuffle_epi32(_mm_mul_epu32((__m128i)words, (__m128i)multiplier), 0x1B);
#else
  const uint64_t product0 = uint64_t{words[0]} * multiplier[0], product1 = uint64_t{words[2]} * multiplier[2];
  return Words{static_cast<uint32_t>(product1 >> 32), static_cast<uint32_t>(product1),
               static_cast<uint32_t>(product0 >> 32), static_cast<uint32_t>(product0)};
#endif
}

// Words 1 and 3 of each block, in the places of words 0 and 2; zeros elsewhere.
DLLM_SIMD Words odd_words(Words words) { return (Words)((WordPairs)words >> 32); }

struct PhiloxRow {
  Words multiplier, round_key[Philox::kRounds];
  Words counter;  // of token id 0
  Words word0;    // all ones in the lanes of a counter's first word

  PhiloxRow(uint64_t seed, const int32_t* sequence_position_step) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    multiplier = counter = word0 = Words{};
    for (int lane = 0; lane < kLanes; lane += 4) {
      multiplier[lane] = Philox::kMultiplier0;
      multiplier[lane + 2] = Philox::kMultiplier1;
      word0[lane] = ~0u;
      counter[lane] = lane / 4;
      counter[lane + 1] = sequence_position_step[1];
      counter[lane + 2] = sequence_position_step[2];
      counter[lane + 3] = sequence_position_step[0];
    }
    for (Words& key : round_key) {
      key = Words{};
      for (int lane = 0; lane < kLanes; lane += 4) {
        key[lane] = k0;
        key[lane + 2] = k1;
      }
      k0 += Philox::kWeyl0;
      k1 += Philox::kWeyl1;
    }
  }

  // The words of token ids first, first + 1, …
  DLLM_SIMD Group<Words> operator()(uint32_t first) const {
    Group<Words> words;
    for (int i = 0; i < kGroup; i++) words.part[i] = counter + (word0 & ((first + i * kLanes) / 4));
    for (const Words& key : round_key)
      for (int i = 0; i < kGroup; i++)
        words.part[i] = reversed_products(words.part[i], multiplier) ^ odd_words(words.part[i]) ^ key;
    return words;
  }
};

}  // namespace

void add_gumbel_noise(uint64_t seed, const int32_t* noise_id, float temperature, int32_t first, int count,
                      const float* x, float* scores) {
  const PhiloxRow words(seed, noise_id);
  for (int i = 0; i < count; i += kGroup * kLanes) {
    const Group<Floats> noise = gumbel<ManyLanes>(words(first + i));
    for (int j = 0; j < kGroup; j++) {
      const int at = i + j * kLanes;
      store(scores + at, load(x + at) + noise.part[j] * temperature);
    }
  }
}

}  // namespace dllm::cpu::DLLM_ISA
