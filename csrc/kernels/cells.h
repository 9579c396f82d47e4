// The cells of the recurrent layers and how large they are: the one table that every layer reads or is checked against.
// rnn.h has their formulas.
#pragma once

#include <cstdint>

namespace pymtl {

enum class Cell {
  lstm,
  gru,
  rnn_tanh,
  rnn_relu,
  normalised_lstm,
  normalised_gru,
  normalised_rnn_tanh,
  normalised_rnn_relu
};

struct CellSizes {
  const char* mode;  // torch.nn.RNNBase's
  bool normalised;   // layer normalisation
  bool has_cell;     // whether there is a c
  // Blocks of H numbers:
  int64_t gates;              // the rows of W_ih and of W_hh
  int64_t reserve;            // what a token keeps for the backward pass: its part of the reserve
  int64_t reserve_candidate;  // under zoneout besides: h~
  int64_t gradients;  // of a token's gates, and of the biases: of a_n, a_r, a_z and q_n of a GRU, otherwise of a. A
                      // normalised cell has besides: of W_hh h_{t-1}, of g_hh, and of an LSTM of g_c and b_c

  int64_t reserve_with(bool zoneout_h) const { return reserve + (zoneout_h ? reserve_candidate : 0); }
};

inline constexpr CellSizes kCells[] = {
    // in the order of Cell
    {"LSTM", false, true, 4, 4, 0, 4},      {"GRU", false, false, 3, 4, 0, 4},
    {"RNN_TANH", false, false, 1, 0, 1, 1}, {"RNN_RELU", false, false, 1, 0, 1, 1},
    {"LSTM", true, true, 4, 8, 0, 14},      {"GRU", true, false, 3, 7, 0, 10},
    {"RNN_TANH", true, false, 1, 1, 1, 3},  {"RNN_RELU", true, false, 1, 1, 1, 3},
};

inline const CellSizes& sizes_of(Cell cell) { return kCells[static_cast<int>(cell)]; }

// Whether a kernel's cell has the sizes of the table's.
template <typename KernelCell, Cell kCell>
inline constexpr bool kAsInTable = kCells[static_cast<int>(kCell)].gates == KernelCell::kGates &&
                                   kCells[static_cast<int>(kCell)].reserve == KernelCell::kReserve &&
                                   kCells[static_cast<int>(kCell)].gradients == KernelCell::kGradients &&
                                   kCells[static_cast<int>(kCell)].has_cell == KernelCell::kHasCell;

}  // namespace pymtl
