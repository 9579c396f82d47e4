// A recurrence's weights in panels, as the time loop reads them.
#pragma once

#include "cells.h"

namespace pymtl {
namespace {

template <typename T>
constexpr int64_t padded_units(int64_t hidden_size) {
  return (hidden_size + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// Elements of T that a panel takes whose numbers are W (quantised.h has its own).
template <typename T, typename W>
struct WeightPanel {
  static int64_t size(int64_t vectors, int64_t depth) {
    return vectors * kLanes<T> * padded_depth<W>(depth) * static_cast<int64_t>(sizeof(W)) /
           static_cast<int64_t>(sizeof(T));
  }
};

// A recurrence's weights in panels of units, U vectors of them: W_ih [panels][I][gates][U][lanes], W_hh
// [panels][H][gates][U][lanes] and what sums start from [panels][biases][U][lanes], in Accum<T>: b_ih + b_hh for the
// gates whose sums over the input and over h are one, b_ih and b_hh for those whose are not. Units past H are zero. A
// normalised cell has no W_ih. The numbers of W_ih and W_hh are W, T or narrower. Offsets count T.
template <typename T, typename Cell, typename W = T>
struct RnnPanels {
  static constexpr int kVectors = Cell::kGates * Cell::kUnitVectors;
  static constexpr int kApart = Cell::kGates - Cell::kStarted;
  static constexpr int64_t kPanelUnits = Cell::kUnitVectors * kLanes<T>;
  static_assert(kVectors <= kPanelVectors && (kApart == 0 || Cell::kUnitVectors == 1));

  int64_t input_size;
  int64_t hidden_size;

  int64_t panels() const { return (hidden_size + kPanelUnits - 1) / kPanelUnits; }
  int64_t units() const { return panels() * kPanelUnits; }
  static int64_t panel_size(int64_t depth) { return WeightPanel<T, W>::size(kVectors, depth); }
  static int64_t bias_size() { return WeightPanel<T, T>::size(kVectors + kApart, 1); }
  int64_t input_panel(int64_t panel) const { return Cell::kNormalised ? 0 : panel * panel_size(input_size); }
  int64_t hidden_panel(int64_t panel) const { return input_panel(panels()) + panel * panel_size(hidden_size); }
  int64_t bias(int64_t panel) const { return hidden_panel(panels()) + panel * bias_size(); }
  int64_t size() const { return bias(panels()); }
};

template <typename T, typename W = T>
int64_t rnn_panels_size(Cell cell, int64_t input_size, int64_t hidden_size) {
  return with_cell(cell, [&]<typename C>() { return RnnPanels<T, C, W>{input_size, hidden_size}.size(); });
}

// Calls body(vector's number, its first row of the weights, how many of its rows there are) for a panel's vectors.
template <typename T, typename Cell, typename Body>
void for_panel_vectors(int64_t hidden_size, int64_t panel, Body&& body) {
  for (int gate = 0; gate < Cell::kGates; ++gate) {
    for (int v = 0; v < Cell::kUnitVectors; ++v) {
      const int64_t unit = panel * RnnPanels<T, Cell>::kPanelUnits + v * kLanes<T>;
      const int64_t left = hidden_size - unit;
      const int64_t count = left < 0 ? 0 : left < kLanes<T> ? left : kLanes<T>;
      body(gate * Cell::kUnitVectors + v, gate * hidden_size + (count > 0 ? unit : 0), count);
    }
  }
}

// to <- a panel of W_ih or W_hh [gates * H, depth].
template <typename T, typename Cell>
void pack_gates(const T* weight, int64_t depth, int64_t hidden_size, int64_t panel, T* to) {
  constexpr int group = kLanes<T> * kDepthGroup<T>;
  for_panel_vectors<T, Cell>(hidden_size, panel, [&](int vector, int64_t row, int64_t count) {
    pack_rows(weight + row * depth, depth, count, depth, to + vector * group, RnnPanels<T, Cell>::kVectors * group);
  });
}

// The same of weights narrower than float. Panels of bfloat16 numbers are those that meet rows of bfloat16 (quantised.h
// has integers).
template <typename W>
struct NarrowGates {
  template <typename Cell>
  static void pack(const W* weight, const float*, int64_t depth, int64_t hidden_size, int64_t panel, W* to) {
    pack_gates<W, Cell>(weight, depth, hidden_size, panel, to);
  }
};

template <typename T, typename Cell, typename Weights>
void pack_biases(const Weights& weights, int64_t hidden_size, int64_t panel, T* to) {
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

// All panels of weights whose numbers are W, for what is computed in float.
template <typename W>
void pack_narrow_rnn(Cell cell, const NarrowWeights& weights, int64_t input_size, int64_t hidden_size, float* panels) {
  with_cell(cell, [&]<typename C>() {
    const RnnPanels<float, C, W> layout{input_size, hidden_size};
    for (int64_t panel = 0; panel < layout.panels(); ++panel) {
      const auto pack = [&](const void* weight, const float* scales, int64_t depth, int64_t at) {
        NarrowGates<W>::template pack<C>(static_cast<const W*>(weight), scales, depth, hidden_size, panel,
                                         reinterpret_cast<W*>(panels + at));
      };
      if constexpr (!C::kNormalised) pack(weights.w_ih, weights.scale_ih, input_size, layout.input_panel(panel));
      pack(weights.w_hh, weights.scale_hh, hidden_size, layout.hidden_panel(panel));
      pack_biases<float, C>(weights, hidden_size, panel, panels + layout.bias(panel));
    }
  });
}

}  // namespace
}  // namespace pymtl
