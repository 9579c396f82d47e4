// Products of 8-bit integers: rows of x or h, made integers here, times panels of weights that are integers already.
// rnn.h in kernels/ has the formulas. The sums are exact, so that tiles, blocks and instruction sets give the same.
//
// Below, p is a row's number as it is multiplied: that of rnn.h, which is from 0 to 255, less 128. How four (or two)
// consecutive depths of a row and of a panel's lanes are multiplied and summed:
//
//   VNNI, AVX-VNNI     vpdpbusd takes one operand without sign: rows are stored as p + 128.
//   AMX                the same, for 16 rows and 64 depths at a time.
//   AVX2, AVX-512BW    vpmaddubsw takes one without sign too, but its sums of two products have 16 bits, which p + 128
//                      could exceed. Rows are stored as |p| and a mask of the negative ones, which flips the weights'
//                      bits: p w = |p| (~w) + |p| where p < 0. The sums of two lie between -2^15 and 2 * 128 * 127. A
//                      row's sums start from the sum of the |p| of its negative numbers.
//   NEON               products of signed numbers, with the dot-product instructions or without.
//   SSE2               16-bit products (vpmaddwd), two depths at a time: rows are stored as rnn.h's p - z.
//
// rnn.h multiplies the weights with p - z. Where another number is stored, it differs from that by the same for the
// whole row, and the row's sums start from the sum of the column's weights times that difference.
#pragma once

#include "rnn_products.h"
#include "tiles.h"

namespace pymtl {
namespace {

using Ints = IntVec<float>;
typedef int8_t ByteVec __attribute__((vector_size(kLanes<float>)));
typedef uint8_t UnsignedByteVec __attribute__((vector_size(kLanes<float>)));

#if defined(__AVX2__) || defined(__ARM_NEON)
constexpr PanelScheme kInt8Scheme = PanelScheme::int8_fours;
#else
constexpr PanelScheme kInt8Scheme = PanelScheme::int8_pairs;
#endif

constexpr int kInt8Group = kInt8Scheme == PanelScheme::int8_pairs ? 2 : 4;  // depths multiplied at a time
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr bool kOffsetRows = true;  // stored as p + 128
constexpr bool kMaskedRows = false;
#elif defined(__AVX2__)
constexpr bool kOffsetRows = false;
constexpr bool kMaskedRows = true;  // as |p| and a mask
#else
constexpr bool kOffsetRows = false;
constexpr bool kMaskedRows = false;
#endif
// Bytes of a row's group.
constexpr int kRowGroup = kMaskedRows ? 8 : 4;
// Bytes of a vector of a panel's group.
constexpr int64_t kPanelGroup = kLanes<float> * kInt8Group;

#if defined(__AVX512VNNI__)
constexpr int kInt8TileRows = 6;
#elif defined(__AVX512F__)
constexpr int kInt8TileRows = 4;
#elif defined(__AVXVNNI__)
constexpr int kInt8TileRows = 3;
#elif defined(__ARM_NEON)
constexpr int kInt8TileRows = 4;
#else
constexpr int kInt8TileRows = 2;
#endif

#if defined(__AVX512F__)
#define PYMTL_IN_REGISTER(vector) asm("" : "+v"(vector))
#elif defined(__SSE2__)
#define PYMTL_IN_REGISTER(vector) asm("" : "+x"(vector))
#else
#define PYMTL_IN_REGISTER(vector) asm("" : "+w"(vector))
#endif

// Vectors of sums that the registers hold beside the operands.
#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int kInt8Sums = 24;
#else
constexpr int kInt8Sums = 12;
#endif

// The row's numbers of a group, for all lanes.
struct RowGroup {
  Ints numbers;
  Ints mask;  // of kMaskedRows

  PYMTL_INLINE static RowGroup of(const uint8_t* row) {
    int32_t numbers, mask = 0;
    std::memcpy(&numbers, row, sizeof numbers);
    if constexpr (kMaskedRows) std::memcpy(&mask, row + 4, sizeof mask);
    return {numbers - Ints{}, mask - Ints{}};
  }
};

// A vector of a panel's group.
PYMTL_INLINE Ints load_group(const uint8_t* panel) {
#if defined(__SSE2__) && !defined(__AVX2__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(panel));
  return (Ints)_mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8);
#else
  Ints weights;
  std::memcpy(&weights, panel, sizeof weights);
  return weights;
#endif
}

// sums += the group's products, in every lane.
PYMTL_INLINE Ints multiply_add(const RowGroup& row, Ints weights, Ints sums) {
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)row.numbers, (__m512i)weights);
#elif defined(__AVXVNNI__)
  return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)row.numbers, (__m256i)weights);
#elif defined(__AVX512BW__)
  const __m512i pairs = _mm512_maddubs_epi16((__m512i)row.numbers, (__m512i)(weights ^ row.mask));
  return sums + (Ints)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__AVX2__)
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)row.numbers, (__m256i)(weights ^ row.mask));
  return sums + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#elif defined(__ARM_FEATURE_DOTPROD)
  return (Ints)vdotq_s32((int32x4_t)sums, (int8x16_t)weights, (int8x16_t)row.numbers);
#elif defined(__ARM_NEON)
  const int8x16_t w = (int8x16_t)weights, p = (int8x16_t)row.numbers;
  const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(p));
  return (Ints)vpadalq_s16((int32x4_t)sums, vpaddq_s16(low, vmull_high_s8(w, p)));
#else
  return sums + (Ints)_mm_madd_epi16((__m128i)weights, (__m128i)row.numbers);
#endif
}

// Panels of 8-bit weights: [depth / kInt8Group][V][lanes][kInt8Group] bytes, the scales [V][lanes] in float and the
// sums of the weights [V][lanes] in int32_t.
template <>
struct WeightPanel<float, int8_t> {
  static int64_t groups(int64_t depth) { return (depth + 3) / 4 * (4 / kInt8Group); }
  static int64_t weights(int64_t vectors, int64_t depth) { return groups(depth) * vectors * kPanelGroup; }
  static int64_t size(int64_t vectors, int64_t depth) {
    return weights(vectors, depth) / static_cast<int64_t>(sizeof(float)) + 2 * vectors * kLanes<float>;
  }
};

template <>
struct NarrowGates<int8_t> {
  template <typename Cell>
  static void pack(const int8_t* weight, const float* scales, int64_t depth, int64_t hidden_size, int64_t panel,
                   int8_t* to) {
    constexpr int kVectors = RnnPanels<float, Cell>::kVectors;
    const int64_t groups = WeightPanel<float, int8_t>::groups(depth);
    float* const scale = reinterpret_cast<float*>(to + WeightPanel<float, int8_t>::weights(kVectors, depth));
    int32_t* const sums = reinterpret_cast<int32_t*>(scale + kVectors * kLanes<float>);
    for_panel_vectors<float, Cell>(hidden_size, panel, [&](int vector, int64_t row, int64_t count) {
      uint8_t* const first = reinterpret_cast<uint8_t*>(to) + vector * kPanelGroup;
      const int64_t packed = count == kLanes<float> ? pack_squares(weight + row * depth, depth, first, kVectors) : 0;
      for (int lane = 0; lane < kLanes<float>; ++lane) {
        const int8_t* const from = weight + (row + lane) * depth;
        const bool there = lane < count;
        for (int64_t group = packed / kInt8Group; group < groups; ++group) {
          uint8_t* const numbers = first + group * kVectors * kPanelGroup + lane * kInt8Group;
          const int64_t left = there ? depth - group * kInt8Group : 0;
          if (left >= kInt8Group) {
            std::memcpy(numbers, from + group * kInt8Group, kInt8Group);
          } else {
            for (int64_t k = 0; k < kInt8Group; ++k) {
              numbers[k] = k < left ? static_cast<uint8_t>(from[group * kInt8Group + k]) : uint8_t{0};
            }
          }
        }
        int32_t sum = 0;
        for (int64_t k = 0; there && k < depth; ++k) sum += from[k];
        scale[vector * kLanes<float> + lane] = there ? scales[row + lane] : 0.0f;
        sums[vector * kLanes<float> + lane] = sum;
      }
    });
  }

 private:
  // A vector's groups by squares of lanes x groups, as far as these are whole. Returns how many depths that is.
  static int64_t pack_squares(const int8_t* rows, int64_t depth, uint8_t* to, int vectors) {
    constexpr int n = kLanes<float>;
    int64_t k = 0;
    for (; kInt8Group == 4 && k + 4 * n <= depth; k += 4 * n) {
      Vec<float> square[n];
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) std::memcpy(&square[i], rows + i * depth + k, sizeof square[i]);
      transpose<float>(square);
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) {
        std::memcpy(to + (k / kInt8Group + i) * vectors * kPanelGroup, &square[i], sizeof square[i]);
      }
    }
    return k;
  }
};

// Rows of integers, `stride` bytes apart, and for each the scale and what its sums start from: `shifts` times the sum
// of the weights, plus `starts`.
struct IntRows {
  uint8_t* numbers;
  int64_t stride;
  float* scales;
  int32_t* shifts;
  int32_t* starts;

  static constexpr int64_t kBytesBeside = sizeof(float) + 2 * sizeof(int32_t);  // for each row, beside its numbers

  static int64_t stride_of(int64_t depth) { return (depth + 63) / 64 * 64 * kRowGroup / kInt8Group; }
};

// Numbers that fit 8 bits.
PYMTL_INLINE ByteVec narrow(Ints numbers) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i all = (__m256i)numbers;
  const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  const __m128i bytes = _mm_packs_epi16(halves, halves);
  ByteVec result;
  std::memcpy(&result, &bytes, sizeof result);
  return result;
#else
  return __builtin_convertvector(numbers, ByteVec);
#endif
}

// Fours of `a` and of `b` in turns.
template <int... Word>
PYMTL_INLINE void store_in_turns(uint8_t* to, ByteVec a, ByteVec b, std::integer_sequence<int, Word...>) {
  typedef int32_t Words __attribute__((vector_size(kLanes<float>)));
  typedef int32_t Both __attribute__((vector_size(2 * kLanes<float>)));
  const Both both = __builtin_shufflevector((Words)a, (Words)b, (Word / 2 + Word % 2 * kLanes<float> / 4)...);
  std::memcpy(to, &both, sizeof both);
}

// Row `at` <- x as integers, by the formulas of rnn.h. An integer is the last bits of a number plus 1.5 * 2^23.
PYMTL_INLINE void quantise(const float* x, int64_t depth, const IntRows& rows, int64_t at) {
  Vec<float> most = {}, least = {};
  Vec<float> nothing = {};  // not a number where an x is not finite
  for (int64_t k = 0; k < depth; k += kLanes<float>) {
    const Vec<float> value = load_part(x + k, depth - k);
    most = at_least(value, most);
    least = at_most(value, least);
    nothing += value - value;
  }
  const float top = max_lanes<float>(most + nothing), bottom = -max_lanes<float>(-least);
  const float half = 0.5f * top - 0.5f * bottom;
  const bool finite = top == top;
  const bool counts = finite && half >= 1e-30f;
  rows.scales[at] = counts ? half / 127.5f : finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  const float inverse = counts ? 127.5f / half : 0.0f;
  constexpr float kShift = 12582912.0f;
  const auto nearest = [](float value) { return static_cast<int32_t>(value + kShift - kShift); };
  const int32_t zero = counts ? nearest(-bottom * inverse) : 0;  // what 0 becomes
  const Vec<float> factor = broadcast(inverse), shift = broadcast(kShift);
  const Ints lowest = -zero - Ints{}, highest = 255 - zero - Ints{};
  Ints below = {};  // of the negative numbers, the sum of their absolute values
  uint8_t* const to = rows.numbers + at * rows.stride;
  for (int64_t k = 0; k < depth; k += kLanes<float>) {
    Ints numbers = (Ints)(load_part(x + k, depth - k) * factor + shift) - (Ints)shift;
    numbers = numbers < lowest ? lowest : numbers;
    numbers = numbers > highest ? highest : numbers;
    if constexpr (kInt8Group == 2) {
      typedef int16_t Halves __attribute__((vector_size(2 * kLanes<float>)));
      const Halves halves = __builtin_convertvector(numbers, Halves);
      std::memcpy(to + 2 * k, &halves, sizeof halves);
      continue;
    }
    Ints shifted = numbers + (zero - 128);
    // `below` counts what the products count: nothing past the row's end.
    for (int64_t lane = depth - k; kMaskedRows && lane < kLanes<float>; ++lane) shifted[lane] = 0;
    const ByteVec bytes = narrow(shifted);
    if constexpr (kMaskedRows) {
      below -= shifted & (shifted >> 31);
      const ByteVec negative = bytes < 0;
      const ByteVec size = (ByteVec)((UnsignedByteVec)(bytes ^ negative) - (UnsignedByteVec)negative);  // up to 128
      store_in_turns(to + 2 * k, size, negative, std::make_integer_sequence<int, kLanes<float> / 2>{});
    } else {
      const ByteVec stored = kOffsetRows ? bytes ^ static_cast<int8_t>(-128) : bytes;
      std::memcpy(to + k, &stored, sizeof stored);
    }
  }
  rows.shifts[at] = kInt8Group == 2 ? 0 : (kOffsetRows ? 0 : 128) - zero;
  int32_t start = 0;
  for (int lane = 0; kMaskedRows && lane < kLanes<float>; ++lane) start += below[lane];
  rows.starts[at] = start;
}

// The sums of a product's first `groups`, [R][V][lanes]; none where there are no tiles.
struct BegunSums {
  const int32_t* sums = nullptr;
  int64_t groups = 0;

  BegunSums from(int64_t place) const { return groups > 0 ? BegunSums{sums + place, groups} : BegunSums{}; }
};

// As add_product.
template <int R, int V, int S>
__attribute__((noinline)) void add_int8_product(const IntRows& rows, int64_t first, int64_t depth, const int8_t* panel,
                                                const float* from, int64_t from_stride, const float* rest, float* to,
                                                int64_t to_stride, const BegunSums& begun) {
  // Sums of different groups, where one alone would be waited for.
  constexpr int kSums = kMaskedRows || R * V > kInt8Sums / 2 ? 1 : R * V > kInt8Sums / 3 ? 2 : 3;
  const int64_t groups = WeightPanel<float, int8_t>::groups(depth);
  const uint8_t* weights = reinterpret_cast<const uint8_t*>(panel);
  const float* const scales = reinterpret_cast<const float*>(weights + groups * V * kPanelGroup);
  const int32_t* const weight_sums = reinterpret_cast<const int32_t*>(scales + V * kLanes<float>);
  const uint8_t* row[R];
  Ints sums[kSums][R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    row[r] = rows.numbers + (first + r) * rows.stride;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      Ints start;
      std::memcpy(&start, weight_sums + v * kLanes<float>, sizeof start);
      sums[0][r][v] = start * rows.shifts[first + r] + rows.starts[first + r];
      if (begun.groups > 0) {
        std::memcpy(&start, begun.sums + (r * V + v) * kLanes<float>, sizeof start);
        sums[0][r][v] += start;
      }
#pragma GCC unroll 4
      for (int s = 1; s < kSums; ++s) sums[s][r][v] = Ints{};
    }
  }
  const auto group = [&](int64_t at, Ints(&to_sums)[R][V]) PYMTL_INLINE_LAMBDA {
    RowGroup numbers[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) numbers[r] = RowGroup::of(row[r] + at * kRowGroup);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      Ints group_weights = load_group(weights + (at * V + v) * kPanelGroup);
      if constexpr (R > 1) PYMTL_IN_REGISTER(group_weights);  // or the compiler reads them again for every row
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) to_sums[r][v] = multiply_add(numbers[r], group_weights, to_sums[r][v]);
    }
  };
  int64_t at = begun.groups;
  for (; at + kSums <= groups; at += kSums) {
#pragma GCC unroll 4
    for (int s = 0; s < kSums; ++s) group(at + s, sums[s]);
  }
  for (; at < groups; ++at) group(at, sums[0]);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const Vec<float> scale = broadcast(rows.scales[first + r]);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      Ints sum = sums[0][r][v];
#pragma GCC unroll 4
      for (int s = 1; s < kSums; ++s) sum += sums[s][r][v];
      const Vec<float> start =
          v < S ? load(from + r * from_stride + v * kLanes<float>) : load(rest + (v - S) * kLanes<float>);
      const Vec<float> product = __builtin_convertvector(sum, Vec<float>);
      store(to + r * to_stride + v * kLanes<float>, fma(product, load(scales + v * kLanes<float>) * scale, start));
    }
  }
}

template <>
class RnnProducts<float, int8_t> {
 public:
  static size_t scratch(int64_t rows, int64_t depth) {
    return static_cast<size_t>((rows + kMoreRows) * IntRows::stride_of(depth) + rows * IntRows::kBytesBeside);
  }

  // scratch: of the most rows that are taken, of the largest depth.
  explicit RnnProducts(void* scratch) : scratch_(static_cast<uint8_t*>(scratch)) {}

  void take(const float* const* rows, int64_t count, int64_t depth) {
    count_ = count;
    depth_ = depth;
    const int64_t stride = IntRows::stride_of(depth);
    float* const scales = reinterpret_cast<float*>(scratch_ + count * stride);
    int32_t* const integers = reinterpret_cast<int32_t*>(scales + count);
    rows_ = {scratch_, stride, scales, integers, integers + count};
    for (int64_t row = 0; row < count; ++row) quantise(rows[row], depth, rows_, row);
#if defined(__AMX_INT8__)
    if (in_tiles(count)) tiles_.configure(count < kRowsOfTile ? count : kRowsOfTile);
#endif
  }

  template <int V>
  void project(const int8_t* panel, const float* bias, float* to, int64_t stride) const {
    add<V, V>(0, count_, panel, bias, 0, nullptr, to, stride);
  }

  template <int V, int S>
  void add(int64_t first, int64_t count, const int8_t* panel, const float* from, int64_t from_stride, const float* rest,
           float* to, int64_t to_stride) const {
#if defined(__AMX_INT8__)
    if (in_tiles(count)) {
      alignas(64) int32_t sums[kRowsOfTile * V * kLanes<float>];
      const int64_t tiles = depth_ / kDepthOfTile;
      for (int64_t row = 0; row < count; row += tiles_.rows()) {
        // The last tile may read rows behind the last one, whose sums nobody asks for.
        multiply_tiles<V>(rows_.numbers + (first + row) * rows_.stride, rows_.stride,
                          reinterpret_cast<const uint8_t*>(panel), tiles, sums);
        const int64_t valid = count - row < tiles_.rows() ? count - row : tiles_.rows();
        add_rows<V, S>(first + row, valid, panel, from + row * from_stride, from_stride, rest, to + row * to_stride,
                       to_stride, {sums, tiles * kDepthOfTile / kInt8Group});
      }
      return;
    }
#endif
    add_rows<V, S>(first, count, panel, from, from_stride, rest, to, to_stride, {});
  }

 private:
#if defined(__AMX_INT8__)
  static constexpr int64_t kMoreRows = kRowsOfTile;

  // Of fewer rows a tile of weights takes longer to load than they take to multiply.
  bool in_tiles(int64_t count) const { return count >= 8 && depth_ >= kDepthOfTile; }

  Tiles tiles_;
#else
  static constexpr int64_t kMoreRows = 0;
#endif

  template <int V, int S>
  void add_rows(int64_t first, int64_t count, const int8_t* panel, const float* from, int64_t from_stride,
                const float* rest, float* to, int64_t to_stride, BegunSums begun) const {
    for_row_groups<kInt8TileRows>(count, [&]<int Rows>(int64_t row) {
      add_int8_product<Rows, V, S>(rows_, first + row, depth_, panel, from + row * from_stride, from_stride, rest,
                                   to + row * to_stride, to_stride, begun.from(row * V * kLanes<float>));
    });
  }

  uint8_t* const scratch_;
  IntRows rows_{};
  int64_t count_ = 0;
  int64_t depth_ = 0;
};

}  // namespace
}  // namespace pymtl
