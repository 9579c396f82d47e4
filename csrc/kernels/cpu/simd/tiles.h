// AMX: registers of 16 rows of 64 bytes ("tiles"), and an instruction that multiplies two of them. A panel of 8-bit
// weights has four depths of 16 lanes in 64 bytes, and so 64 depths of a vector are a tile as they lie there.
#pragma once

#include "vector.h"

#if defined(__AMX_INT8__)

namespace pymtl {
namespace {

constexpr int kRowsOfTile = 16;
constexpr int64_t kDepthOfTile = 64;  // 8-bit numbers

// The compiler does not know that tiles are loaded from memory: what was written before has to be there.
PYMTL_INLINE void finish_writes(const void* to) { asm volatile("" : : "r"(to) : "memory"); }

// The thread's tiles, while this lives: four for sums and one for rows, of `rows` rows each, two for weights.
class Tiles {
 public:
  Tiles() = default;
  Tiles(const Tiles&) = delete;
  ~Tiles() {
    if (rows_ > 0) _tile_release();
  }

  void configure(int64_t rows) {
    if (rows == rows_) return;
    rows_ = rows;
    struct alignas(64) {
      uint8_t palette = 1;
      uint8_t start = 0;
      uint8_t reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    static_assert(sizeof config == 64);
    for (int tile = 0; tile < 7; ++tile) {
      config.row_bytes[tile] = 64;
      config.rows[tile] = static_cast<uint8_t>(tile < 5 ? rows : kRowsOfTile);
    }
    finish_writes(&config);
    _tile_loadconfig(&config);
  }

  int64_t rows() const { return rows_; }

 private:
  int64_t rows_ = 0;
};

// sums [rows][V][16] = rows of unsigned bytes, `stride` apart, times the first `tiles` tiles of each of a panel's V
// vectors.
template <int V>
PYMTL_INLINE void multiply_tiles(const uint8_t* rows, int64_t stride, const uint8_t* panel, int64_t tiles,
                                 int32_t* sums) {
  constexpr int64_t kRow = V * 64;  // bytes of a panel's group, and of a row of sums
  finish_writes(rows);
  _tile_zero(0);
  if constexpr (V > 1) _tile_zero(1);
  if constexpr (V > 2) _tile_zero(2);
  if constexpr (V > 3) _tile_zero(3);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const uint8_t* const weights = panel + tile * kRowsOfTile * kRow;
    _tile_loadd(4, rows + tile * kDepthOfTile, stride);
    _tile_loadd(5, weights, kRow);
    _tile_dpbusd(0, 4, 5);
    if constexpr (V > 1) {
      _tile_loadd(6, weights + 64, kRow);
      _tile_dpbusd(1, 4, 6);
    }
    if constexpr (V > 2) {
      _tile_loadd(5, weights + 128, kRow);
      _tile_dpbusd(2, 4, 5);
    }
    if constexpr (V > 3) {
      _tile_loadd(6, weights + 192, kRow);
      _tile_dpbusd(3, 4, 6);
    }
  }
  _tile_stored(0, sums, kRow);
  if constexpr (V > 1) _tile_stored(1, sums + 16, kRow);
  if constexpr (V > 2) _tile_stored(2, sums + 32, kRow);
  if constexpr (V > 3) _tile_stored(3, sums + 48, kRow);
}

}  // namespace
}  // namespace pymtl

#endif
