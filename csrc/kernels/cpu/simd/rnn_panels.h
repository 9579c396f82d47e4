// A recurrence's weights in panels, as the time loop reads them.
#pragma once

#include "cells.h"

namespace pymtl {
namespace {

template <typename T>
constexpr int64_t padded_units(int64_t hidden_size) {
  return (hidden_size + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// A recurrence's weights in panels of units, U vectors of them: W_ih [panels][I][gates][U][lanes], W_hh
// [panels][H][gates][U][lanes] and what sums start from [panels][biases][U][lanes], in Accum<T>: b_ih + b_hh for the
// gates whose sums over the input and over h are one, b_ih and b_hh for those whose are not. Units past H are zero. A
// normalised cell has no W_ih.
template <typename T, typename Cell>
struct RnnPanels {
  static constexpr int kVectors = Cell::kGates * Cell::kUnitVectors;
  static constexpr int kApart = Cell::kGates - Cell::kStarted;
  static constexpr int64_t kPanelUnits = Cell::kUnitVectors * kLanes<T>;
  static_assert(kVectors <= kPanelVectors && (kApart == 0 || Cell::kUnitVectors == 1));

  int64_t input_size;
  int64_t hidden_size;

  int64_t panels() const { return (hidden_size + kPanelUnits - 1) / kPanelUnits; }
  int64_t units() const { return panels() * kPanelUnits; }
  static int64_t panel_size(int64_t depth, int64_t vectors = kVectors) {
    return vectors * kLanes<T> * padded_depth<T>(depth);
  }
  int64_t input_panel(int64_t panel) const { return Cell::kNormalised ? 0 : panel * panel_size(input_size); }
  int64_t hidden_panel(int64_t panel) const { return input_panel(panels()) + panel * panel_size(hidden_size); }
  int64_t bias(int64_t panel) const { return hidden_panel(panels()) + panel * panel_size(1, kVectors + kApart); }
  int64_t size() const { return bias(panels()); }
};

template <typename T>
int64_t rnn_panels_size(Cell cell, int64_t input_size, int64_t hidden_size) {
  return with_cell(cell, [&]<typename C>() { return RnnPanels<T, C>{input_size, hidden_size}.size(); });
}

// to <- a panel of W_ih or W_hh [gates * H, depth].
template <typename T, typename Cell>
void pack_gates(const T* weight, int64_t depth, int64_t hidden_size, int64_t panel, T* to) {
  constexpr int group = kLanes<T> * kDepthGroup<T>;
  constexpr int vectors = RnnPanels<T, Cell>::kVectors;
  for (int gate = 0; gate < Cell::kGates; ++gate) {
    for (int v = 0; v < Cell::kUnitVectors; ++v) {
      const int64_t unit = panel * RnnPanels<T, Cell>::kPanelUnits + v * kLanes<T>;
      const int64_t left = hidden_size - unit;
      const int64_t count = left < 0 ? 0 : left < kLanes<T> ? left : kLanes<T>;
      pack_rows(weight + (gate * hidden_size + (count > 0 ? unit : 0)) * depth, depth, count, depth,
                to + (gate * Cell::kUnitVectors + v) * group, vectors * group);
    }
  }
}

template <typename T, typename Cell>
void pack_biases(const RnnWeights<T>& weights, int64_t hidden_size, int64_t panel, T* to) {
  const auto bias = [&](const T* b, int gate, int v) PYMTL_INLINE_LAMBDA {
    const int64_t unit = panel * RnnPanels<T, Cell>::kPanelUnits + v * kLanes<T>;
    if (b == nullptr || unit >= hidden_size) return Vec<T>{};
    return load_part(b + gate * hidden_size + unit, hidden_size - unit);
  };
  const auto put = [&](Vec<T> value) PYMTL_INLINE_LAMBDA {
    store_group(to, value);
    to += kLanes<T> * kDepthGroup<T>;
  };
  for (int gate = 0; gate < Cell::kGates; ++gate) {
    for (int v = 0; v < Cell::kUnitVectors; ++v) {
      const Vec<T> b_ih = bias(weights.b_ih, gate, v);
      put(gate < Cell::kStarted ? b_ih + bias(weights.b_hh, gate, v) : b_ih);
    }
  }
  for (int gate = Cell::kStarted; gate < Cell::kGates; ++gate) put(bias(weights.b_hh, gate, 0));
}

template <typename T, typename Cell>
void pack_weights(const RnnWeights<T>& weights, int64_t input_size, int64_t hidden_size, int64_t part, int64_t parts,
                  T* panels) {
  const RnnPanels<T, Cell> layout{input_size, hidden_size};
  const int64_t last = first_panel(layout.panels(), part + 1, parts);
  for (int64_t panel = first_panel(layout.panels(), part, parts); panel < last; ++panel) {
    if constexpr (!Cell::kNormalised) {
      pack_gates<T, Cell>(weights.w_ih, input_size, hidden_size, panel, panels + layout.input_panel(panel));
    }
    pack_gates<T, Cell>(weights.w_hh, hidden_size, hidden_size, panel, panels + layout.hidden_panel(panel));
    pack_biases<T, Cell>(weights, hidden_size, panel, panels + layout.bias(panel));
  }
}

template <typename T>
void pack_rnn(Cell cell, const RnnWeights<T>& weights, int64_t input_size, int64_t hidden_size, int64_t part,
              int64_t parts, T* panels) {
  with_cell(cell, [&]<typename C>() { pack_weights<T, C>(weights, input_size, hidden_size, part, parts, panels); });
}

}  // namespace
}  // namespace pymtl
