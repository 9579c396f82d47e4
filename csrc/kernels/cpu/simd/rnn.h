// The time loop, forward. A worker takes one recurrence and some sequences through all steps, without
// waiting for anyone, or as one of a team some of its hidden units (see team.h): its weights stay in its own cache,
// and no gate leaves its registers in inference.
#pragma once

#include "rnn_scratch.h"

namespace pymtl {
namespace {

// Takes rows of logits; a type of its own, so that all cells share one product.
template <typename T>
struct PartialLogits {
  Accum<T>* const* rows;

  PYMTL_INLINE void operator()(int64_t n, int64_t column, int64_t valid, Vec<T> value) const {
    store_part(rows[n] + column, value, valid);
  }
};

// W: the numbers of the weights' panels.
template <typename T, typename Cell, typename W = T>
class RnnTimeLoopRun {
  using R = Accum<T>;
  using Layout = RnnPanels<T, Cell, W>;
  static constexpr bool kOwnNumbers = std::is_same_v<T, W>;
  // Whether a sequence alone is multiplied with as many panels at a time as have their cells updated together.
  static constexpr bool kJoinsPanels = kLockstep > 1 && !std::is_same_v<W, int8_t>;
  static constexpr int kVectors = Layout::kVectors;
  alignas(64) static constexpr R kZeros[kVectors * kLanes<T>] = {};

 public:
  explicit RnnTimeLoopRun(const RnnTimeLoop<T>& loop)
      : loop_(loop),
        layout_{loop.input_size, loop.hidden_size},
        scratch_(loop),
        rows_(scratch_.rows),
        units_(scratch_.units),
        pointers_(at<const T*>(scratch_.pointers)),
        waiting_(at<const T*>(scratch_.waiting)),
        waiting_rows_(at<R*>(scratch_.waiting_rows)),
        panel_(at<T>(scratch_.panel)),
        products_(at<char>(scratch_.products)),
        gates_(at<R>(scratch_.gates)),
        hidden_(shared(scratch_.hidden)),
        masked_(loop.masks.dropout != nullptr ? shared(scratch_.masked) : nullptr),
        cell_(at<R>(scratch_.cell)),
        cell_before_(loop.masks.zoneout_c != nullptr ? at<R>(scratch_.cell_before) : nullptr),
        sums_(at<R>(scratch_.sums)),
        sum_(loop.mean != nullptr ? at<R>(scratch_.sum) : nullptr),
        max_(loop.max != nullptr ? at<R>(scratch_.max) : nullptr) {}

  void run() {
    int64_t done = 0;
    pack();
    start_rows(rows_at(step_at(0)));
    meet_others();
    while (done < loop_.steps) {
      const int64_t end = project_block(done);
      const R* gates = gates_;
      for (; done < end; ++done) {
        const int64_t t = step_at(done);
        const int64_t active = rows_at(t);
        if (active > 0) {
          step(t, active, gates);
          finish_rows(t, active);
          gates += active * gate_row();
          slot_ = (slot_ + 1) % scratch_.slots;
        }
        start_rows(rows_at(step_at(done + 1)));
        meet_others();
        if (active > 0) queue_heads(t, active);
      }
    }
    project_heads();
  }

 private:
  template <typename U>
  U* at(size_t offset) const {
    return reinterpret_cast<U*>(static_cast<char*>(loop_.scratch) + offset);
  }

  // What all workers of a team read.
  T* shared(size_t offset) const {
    void* const memory = loop_.team == nullptr ? loop_.scratch : loop_.team->shared;
    return reinterpret_cast<T*>(static_cast<char*>(memory) + offset);
  }

  int64_t step_at(int64_t k) const { return loop_.reverse ? loop_.steps - 1 - k : k; }

  // All workers' h of this step, and initial h of the next, is there.
  void meet_others() const {
    if (team_size_ > 1) meet(*loop_.team, loop_.place);
  }

  // How many of this worker's sequences have a token at step t.
  int64_t rows_at(int64_t t) const {
    if (t < 0 || t >= loop_.steps) return 0;
    const int64_t rows = loop_.starts[t + 1] - loop_.starts[t] - loop_.first_row;
    return rows < 0 ? 0 : rows < rows_ ? rows : rows_;
  }

  int64_t token(int64_t t, int64_t row) const { return loop_.starts[t] + loop_.first_row + row; }

  // Of this worker's units; none past H, but in the last one's vector.
  int64_t first_unit() const { return first_panel_ * Layout::kPanelUnits; }
  int64_t last_unit() const {
    const int64_t last = last_panel_ * Layout::kPanelUnits;
    const int64_t all = padded_units<T>(loop_.hidden_size);
    return last < all ? last : all;
  }

  // Numbers of the projected gates of a token.
  int64_t gate_row() const { return Cell::kGates * units_; }

  // The panel's part of a projected token.
  static int64_t gate_column(int64_t panel) { return panel * kVectors * kLanes<T>; }

  T* hidden(int64_t slot, int64_t row) const { return hidden_ + (slot * rows_ + row) * units_; }

  // What W_hh is multiplied with.
  const T* operand(int64_t slot, int64_t row) const {
    return (masked_ != nullptr ? masked_ : hidden_) + (slot * rows_ + row) * units_;
  }

  // The number of sums over tokens; as many rounding errors follow them in memory.
  int64_t sum_size() const { return rows_ * units_; }

  int64_t previous_slot() const { return (slot_ + scratch_.slots - 1) % scratch_.slots; }

  // Weights that are read once only are packed when they are, into memory that stays in the cache.
  bool reads_input_once() const { return loop_.starts[loop_.steps] - loop_.starts[0] <= scratch_.block; }
  bool packs_input() const { return loop_.weights != nullptr && reads_input_once(); }
  bool reads_hidden_once() const { return loop_.steps == 1; }
  bool packs_hidden() const { return loop_.weights != nullptr && reads_hidden_once(); }

  // Narrower weights come packed.
  void pack() const {
    if constexpr (kOwnNumbers) {
      if (loop_.weights == nullptr) return;
      for (int64_t panel = first_panel_; panel < last_panel_; ++panel) {
        T* const panels = loop_.panels_here;
        if (!Cell::kNormalised && !reads_input_once()) {
          pack_gates<T, Cell>(loop_.weights->w_ih, loop_.input_size, loop_.hidden_size, panel,
                              panels + layout_.input_panel(panel));
        }
        if (!reads_hidden_once()) {
          pack_gates<T, Cell>(loop_.weights->w_hh, loop_.hidden_size, loop_.hidden_size, panel,
                              panels + layout_.hidden_panel(panel));
        }
        pack_biases<T, Cell>(*loop_.weights, loop_.hidden_size, panel, panels + layout_.bias(panel));
      }
    }
  }

  const W* input_panel(int64_t panel) const {
    if constexpr (kOwnNumbers) {
      if (packs_input()) {
        pack_gates<T, Cell>(loop_.weights->w_ih, loop_.input_size, loop_.hidden_size, panel, panel_);
        return panel_;
      }
    }
    return reinterpret_cast<const W*>(loop_.panels + layout_.input_panel(panel));
  }

  const W* hidden_panel(int64_t panel) const {
    if constexpr (kOwnNumbers) {
      if (packs_hidden()) {
        pack_gates<T, Cell>(loop_.weights->w_hh, loop_.hidden_size, loop_.hidden_size, panel, panel_);
        return panel_;
      }
    }
    return reinterpret_cast<const W*>(loop_.panels + layout_.hidden_panel(panel));
  }

  // gates_ = W_ih x + b for the tokens of the next steps, in the time loop's order; a normalised cell's input is W_ih x
  // already. Returns the step to stop at.
  int64_t project_block(int64_t first) {
    int64_t count = 0;
    int64_t end = first;
    for (; end < loop_.steps; ++end) {
      const int64_t t = step_at(end);
      const int64_t active = rows_at(t);
      if (count + active > scratch_.block) break;
      for (int64_t row = 0; row < active; ++row) pointers_[count++] = loop_.input + token(t, row) * loop_.input_stride;
    }
    if constexpr (!Cell::kNormalised) products_.take(pointers_, count, loop_.input_size);
    int64_t panel = first_panel_;
    if constexpr (kJoinsPanels && !Cell::kNormalised) {
      for (; count == 1 && !packs_input() && panel + kLockstep <= last_panel_; panel += kLockstep) {
        products_.template add_panels<kVectors, 0, kLockstep>(0, input_panel(panel), nullptr, bias_of(panel),
                                                              bias_of(panel + 1) - bias_of(panel),
                                                              gates_ + gate_column(panel));
      }
    }
    for (; panel < last_panel_; ++panel) {
      const R* const bias = bias_of(panel);
      R* const gates = gates_ + gate_column(panel);
      if constexpr (Cell::kNormalised) {
        for (int64_t row = 0; row < count; ++row) take_gates(pointers_[row], panel, bias, gates + row * gate_row());
      } else {
        products_.template project<kVectors>(input_panel(panel), bias, gates, gate_row());
      }
    }
    return end;
  }

  // Calls body(gate, unit, valid, place) for each vector of a panel that holds units, `place` its number.
  template <typename Body>
  PYMTL_INLINE void for_vectors(int64_t panel, Body&& body) const {
    for (int gate = 0; gate < Cell::kGates; ++gate) {
      for (int v = 0; v < Cell::kUnitVectors; ++v) {
        const int64_t unit = panel * Layout::kPanelUnits + v * kLanes<T>;
        if (unit < loop_.hidden_size) body(gate, unit, loop_.hidden_size - unit, gate * Cell::kUnitVectors + v);
      }
    }
  }

  // gates <- a panel's part of a projected row, plus the bias.
  void take_gates(const T* projected, int64_t panel, const R* bias, R* gates) const {
    for_vectors(panel, [&](int gate, int64_t unit, int64_t valid, int place) PYMTL_INLINE_LAMBDA {
      const Vec<T> x = load_part(projected + gate * loop_.hidden_size + unit, valid);
      store(gates + place * kLanes<T>, x + load(bias + place * kLanes<T>));
    });
  }

  // Sets the initial state of those of the `active` sequences that start at the next step.
  void start_rows(int64_t active) {
    for (; started_ < active; ++started_) {
      set_state(loop_.h0, started_, hidden(previous_slot(), started_));
      if constexpr (Cell::kHasCell) set_state(loop_.c0, started_, cell_ + started_ * units_);
      if (masked_ != nullptr) mask_row(previous_slot(), started_);
      for (int64_t unit = first_unit(); unit < last_unit(); unit += kLanes<T>) {
        if (sum_ != nullptr) store(sum_ + started_ * units_ + unit, Vec<T>{});
        if (sum_ != nullptr) store(sum_ + sum_size() + started_ * units_ + unit, Vec<T>{});
        if (max_ != nullptr) store(max_ + started_ * units_ + unit, broadcast(-std::numeric_limits<R>::infinity()));
      }
    }
  }

  template <typename Number>
  void set_state(const T* initial, int64_t row, Number* state) const {
    for (int64_t unit = first_unit(); unit < last_unit(); unit += kLanes<T>) {
      Vec<T> value = {};
      if (initial != nullptr) {
        value = load_part(initial + (loop_.first_row + row) * loop_.hidden_size + unit, loop_.hidden_size - unit);
      }
      store(state + unit, value);
    }
  }

  // Recurrent dropout, on this worker's units.
  void mask_row(int64_t slot, int64_t row) const {
    const T* const factors = loop_.masks.dropout + (loop_.first_row + row) * loop_.hidden_size;
    T* const to = masked_ + (slot * rows_ + row) * units_;
    for (int64_t unit = first_unit(); unit < last_unit(); unit += kLanes<T>) {
      store(to + unit, load(hidden(slot, row) + unit) * load_part(factors + unit, loop_.hidden_size - unit));
    }
  }

  void step(int64_t t, int64_t active, const R* gates) {
    for (int64_t row = 0; row < active; ++row) pointers_[row] = operand(previous_slot(), row);
    products_.take(pointers_, active, loop_.hidden_size);
    if constexpr (Cell::kNormalised) {
      normalised_step(t, active, gates);
    } else {
      plain_step(t, active, gates);
    }
    for (int64_t row = 0; row < active && masked_ != nullptr; ++row) mask_row(slot_, row);
  }

  void plain_step(int64_t t, int64_t active, const R* gates) {
    // Where there are few sequences, several panels' cells are updated together.
    const int64_t together = kLockstep > 1 && active < kLockstep ? kLockstep : 1;
    const int64_t groups = (last_panel_ - first_panel_ + together - 1) / together;
    for_panels(0, groups, t, [&](int64_t group) {
      const int64_t begin = first_panel_ + group * together;
      const int64_t end = begin + together < last_panel_ ? begin + together : last_panel_;
      const W* w_hh = hidden_panel(begin);  // once for all sequences: it may have to be packed
      for (int64_t first = 0; first < active; first += kUpdateRows) {
        const int64_t count = active - first < kUpdateRows ? active - first : kUpdateRows;
        alignas(64) R sums[kUpdateRows][kVectors][kLanes<T>];
        int64_t panel = begin;
        if constexpr (kJoinsPanels) {
          if (count == 1 && end - begin == kLockstep && !packs_hidden()) {
            products_.template add_panels<kVectors, Cell::kStarted * Cell::kUnitVectors, kLockstep>(
                first, w_hh, gates + gate_column(begin), rest_of(begin), rest_of(begin + 1) - rest_of(begin),
                &sums[0][0][0]);
            panel = end;
          }
        }
        for (; panel < end; ++panel) {
          if (panel > begin) w_hh = hidden_panel(panel);
          const R* const from = gates + gate_column(panel);
          products_.template add<kVectors, Cell::kStarted * Cell::kUnitVectors>(
              first, count, w_hh, from + first * gate_row(), gate_row(), rest_of(panel),
              &sums[(panel - begin) * count][0][0], kVectors * kLanes<T>);
        }
        if (first + kUpdateRows < active) {
          prefetch_gates(gates, begin, first + kUpdateRows, active);
        } else {
          prefetch_gates(gates, t % 2 == 0 ? end : begin - together, 0, active);
        }
        Cells cells{};
        cells.t = t;
        cells.first = first;
        cells.count = count;
        cells.unit = begin * Layout::kPanelUnits;
        cells.vectors = vectors_of_units(begin, end);
        cells.sums = &sums[0][0][0];
        cells.stride = kVectors * kLanes<T>;
        cells.panel_stride = count * kVectors * kLanes<T>;
        cells.projected = gates + first * gate_row() + gate_column(begin);
        step_cells(cells);
      }
    });
  }

  // While cells are updated: what the next sums start from.
  PYMTL_INLINE void prefetch_gates(const R* gates, int64_t panel, int64_t row, int64_t rows) const {
    if (panel < first_panel_ || panel >= last_panel_) return;
    const int64_t count = rows - row < kTileRows ? rows - row : kTileRows;
    prefetch_rows<kVectors>(gates + row * gate_row() + gate_column(panel), gate_row(), count);
  }

  // What the gates' sums start from; behind it, what those start from that do not go on from the projected input.
  const R* bias_of(int64_t panel) const { return reinterpret_cast<const R*>(loop_.panels + layout_.bias(panel)); }
  const R* rest_of(int64_t panel) const { return bias_of(panel) + kVectors * kLanes<T>; }

  // Of the panels [begin, end), without those past H.
  int64_t vectors_of_units(int64_t begin, int64_t end) const {
    const int64_t last = end * Layout::kPanelUnits;
    const int64_t units = (last < loop_.hidden_size ? last : loop_.hidden_size) - begin * Layout::kPanelUnits;
    return (units + kLanes<T> - 1) / kLanes<T>;
  }

  // All gates of a row meet before any cell is updated, and all c before h is computed.
  void normalised_step(int64_t t, int64_t active, const R* gates) {
    for_panels(first_panel_, last_panel_, t, [&](int64_t panel) {
      products_.template add<kVectors, kVectors>(0, active, hidden_panel(panel), kZeros, 0, nullptr,
                                                 sums_ + gate_column(panel), gate_row());
    });
    for (int64_t row = 0; row < active; ++row) normalise_gates(token(t, row), gates + row * gate_row(), row);
    const auto for_cells = [&](auto&& body) PYMTL_INLINE_LAMBDA {
      for (int64_t unit = 0; unit < loop_.hidden_size; unit += kLanes<T>) {
        const int64_t column = gate_column(unit / Layout::kPanelUnits) + unit % Layout::kPanelUnits;
        Cells cells{};
        cells.t = t;
        cells.count = active;
        cells.unit = unit;
        cells.vectors = 1;
        cells.sums = sums_ + column;
        cells.stride = gate_row();
        cells.projected = gates + column;
        body(cells);
      }
    };
    if constexpr (Cell::kHasCell) {
      for_cells([&](const Cells& cells) PYMTL_INLINE_LAMBDA {
        keep_cells(cells);
        in_lockstep(cells, []<int N>(const CellPlace<T>& at, const CellStep& step)
                               PYMTL_INLINE_LAMBDA { Cell::template update<N>(at, step); });
      });
      for (int64_t row = 0; row < active; ++row) squash_cell(row);
      for_cells([&](const Cells& cells) PYMTL_INLINE_LAMBDA { give_states(cells); });
    } else {
      for_cells([&](const Cells& cells) PYMTL_INLINE_LAMBDA { step_cells(cells); });
    }
  }

  // sums_ <- a row's normalised W_hh h_{t-1}, with what was projected from the input where the cell wants their sum.
  void normalise_gates(int64_t token, const R* projected, int64_t row) const {
    R* const sums = sums_ + row * gate_row();
    const auto for_all = [&](auto&& take) PYMTL_INLINE_LAMBDA {
      for (int64_t panel = 0; panel < layout_.panels(); ++panel) {
        for_vectors(panel, [&](int, int64_t, int64_t valid, int place) PYMTL_INLINE_LAMBDA {
          take(load(sums + gate_column(panel) + place * kLanes<T>), valid);
        });
      }
    };
    const Moments<T> moments = moments_of<T>(Cell::kGates * loop_.hidden_size, for_all);
    for (int64_t panel = 0; panel < layout_.panels(); ++panel) {
      const R* const bias = bias_of(panel);
      for_vectors(panel, [&](int gate, int64_t unit, int64_t valid, int place) PYMTL_INLINE_LAMBDA {
        const int64_t row_of = gate * loop_.hidden_size + unit;
        const int64_t column = gate_column(panel) + place * kLanes<T>;
        const Vec<T> sum = load(sums + column);
        if (loop_.gates != nullptr) {
          store_part(loop_.gates + (token * reserve() + Cell::kPlainReserve) * loop_.hidden_size + row_of, sum, valid);
        }
        const Vec<T> from = gate < Cell::kStarted ? load(projected + column)
                                                  : load(bias + (kVectors + gate - Cell::kStarted) * kLanes<T>);
        store(sums + column, fma(load_part(loop_.norm.g_hh + row_of, valid), moments.normalised(sum), from));
      });
    }
  }

  // h <- o tanh(LN(c)), o where the cell's update has left it.
  void squash_cell(int64_t row) const {
    const R* const cell = cell_ + row * units_;
    const int64_t H = loop_.hidden_size;
    const Moments<T> moments = moments_of<T>(H, [&](auto&& take) PYMTL_INLINE_LAMBDA {
      for (int64_t unit = 0; unit < H; unit += kLanes<T>) take(load(cell + unit), H - unit);
    });
    for (int64_t unit = 0; unit < H; unit += kLanes<T>) {
      const int64_t column = gate_column(unit / Layout::kPanelUnits) + 3 * kLanes<T>;
      const Vec<T> o = load(sums_ + row * gate_row() + column);
      const Vec<T> squashed =
          Cell::template squashed<T>(moments.normalised(load(cell + unit)), loop_.norm, unit, H - unit);
      store(hidden(slot_, row) + unit, o * squashed);
    }
  }

  // Rows of sums that are there together before they are used up.
  static constexpr int64_t kUpdateRows = 4 * kTileRows;
  static_assert(kUpdateRows >= kLockstep * (kLockstep - 1));  // of several panels, few sequences each

  // Some vectors of units, from the first of a panel on, of `count` sequences from `first` on, at step t.
  struct Cells {
    int64_t t, first, count, unit, vectors;
    R* sums;  // of the gates, sequences `stride` and panels `panel_stride` apart
    int64_t stride;
    int64_t panel_stride;
    const R* projected;  // sequences a token's gates apart
  };

  int64_t reserve() const { return reserve_blocks<Cell>(loop_.masks.zoneout_h != nullptr); }

  PYMTL_INLINE CellPlace<T> place(const Cells& cells, int64_t v, int64_t r) const {
    const int64_t unit = cells.unit + v * kLanes<T>;
    const int64_t panel = v / Cell::kUnitVectors;
    const int64_t within = v % Cell::kUnitVectors * kLanes<T>;
    CellPlace<T> at{};
    at.sums = cells.sums + panel * cells.panel_stride + r * cells.stride + within;
    at.projected = cells.projected + gate_column(panel) + r * gate_row() + within;
    if constexpr (Cell::kHasCell) at.cell = cell_ + (cells.first + r) * units_ + unit;
    at.before = hidden(previous_slot(), cells.first + r) + unit;
    at.after = hidden(slot_, cells.first + r) + unit;
    at.stride = loop_.hidden_size;
    at.valid = loop_.hidden_size - unit;
    if (reserve() > 0 && loop_.gates != nullptr) {
      const int64_t here = token(cells.t, cells.first + r);
      at.reserve = loop_.gates + here * reserve() * loop_.hidden_size + unit;
      if constexpr (Cell::kHasCell) at.reserve_cell = loop_.cells + here * loop_.hidden_size + unit;
    }
    return at;
  }

  // From the gates' sums to h.
  __attribute__((noinline)) void step_cells(const Cells& cells) const {
    keep_cells(cells);
    if constexpr (kLockstep > 1) {
      in_lockstep(cells, []<int N>(const CellPlace<T>& at, const CellStep& step) PYMTL_INLINE_LAMBDA {
        Cell::template update<N>(at, step);
        Cell::template finish<N>(at, step);
      });
    } else {
      // After the long chain of operations to c, another to h would leave the processor nothing to overlap it with.
      in_lockstep(cells, []<int N>(const CellPlace<T>& at, const CellStep& step)
                             PYMTL_INLINE_LAMBDA { Cell::template update<N>(at, step); });
      in_lockstep(cells, []<int N>(const CellPlace<T>& at, const CellStep& step)
                             PYMTL_INLINE_LAMBDA { Cell::template finish<N>(at, step); });
    }
    give_states(cells);
  }

  // Calls body.operator()<N>(place, step) for all vectors of all sequences, N in lockstep: the sequences of a vector,
  // or the vectors of a single sequence.
  template <typename Body>
  PYMTL_INLINE void in_lockstep(const Cells& cells, Body&& body) const {
    const int64_t lanes = kLanes<T>;
    const bool single = kLockstep > 1 && cells.count == 1 && Cell::kUnitVectors == 1;
    const CellStep step =
        single ? CellStep{cells.panel_stride, kVectors * lanes, lanes, lanes, lanes, lanes}
               : CellStep{cells.stride, gate_row(), units_, reserve() * loop_.hidden_size, loop_.hidden_size, 0};
    const int64_t count = single ? cells.vectors : cells.count;
    for (int64_t v = 0; v < (single ? 1 : cells.vectors); ++v) {
      int64_t i = 0;
      const auto some = [&]<int N>() PYMTL_INLINE_LAMBDA {
        body.template operator()<N>(single ? place(cells, i, 0) : place(cells, v, i), step);
        i += N;
      };
      while (i + kLockstep <= count) some.template operator()<kLockstep>();
      if constexpr (kLockstep > 2) {
        if (i + 2 == count) some.template operator()<2>();
      }
      if constexpr (kLockstep > 1) {
        if (i + 1 == count) some.template operator()<1>();
      }
    }
  }

  // c_{t-1}, where zoneout asks for it.
  PYMTL_INLINE void keep_cells(const Cells& cells) const {
    if (cell_before_ == nullptr) return;
    for (int64_t r = 0; r < cells.count; ++r) {
      for (int64_t v = 0; v < cells.vectors; ++v) {
        const int64_t here = (cells.first + r) * units_ + cells.unit + v * kLanes<T>;
        store(cell_before_ + here, load(cell_ + here));
      }
    }
  }

  PYMTL_INLINE void give_states(const Cells& cells) const {
    if (loop_.masks.zoneout_h != nullptr || cell_before_ != nullptr) zone_out(cells);
    for (int64_t v = 0; v < cells.vectors; ++v) give_states(cells, cells.unit + v * kLanes<T>);
  }

  PYMTL_INLINE void give_states(const Cells& cells, int64_t unit) const {
    const int64_t first = cells.first, count = cells.count;
    const int64_t valid = loop_.hidden_size - unit;
    T* const hidden_state = hidden(slot_, first) + unit;
    if (loop_.output != nullptr) {
      T* const output = loop_.output + token(cells.t, first) * loop_.output_stride + unit;
      for (int64_t r = 0; r < count; ++r) {
        store_part(output + r * loop_.output_stride, load(hidden_state + r * units_), valid);
      }
    }
    if (sum_ != nullptr) {
      R* const sum = sum_ + first * units_ + unit;
      for (int64_t r = 0; r < count; ++r) {
        Vec<T> total = load(sum + r * units_);
        Vec<T> error = load(sum + sum_size() + r * units_);
        add_compensated<R>(load(hidden_state + r * units_), total, error);
        store(sum + r * units_, total);
        store(sum + sum_size() + r * units_, error);
      }
    }
    if (max_ != nullptr) {
      R* const max = max_ + first * units_ + unit;
      for (int64_t r = 0; r < count; ++r) {
        store(max + r * units_, maximum<R>(load(max + r * units_), load(hidden_state + r * units_)));
      }
    }
  }

  // d before + (1 - d) now: one of them where d is 1 or 0, even if the other is infinite.
  static PYMTL_INLINE Vec<T> mixed(Vec<T> d, Vec<T> before, Vec<T> now) {
    const Vec<T> one = broadcast(R(1));
    const Vec<T> mix = fma(d, before, (one - d) * now);
    return select<R>(d == one, before, select<R>(d == Vec<T>{}, now, mix));
  }

  __attribute__((noinline)) void zone_out(const Cells& cells) const {
    for (int64_t v = 0; v < cells.vectors; ++v) {
      for (int64_t r = 0; r < cells.count; ++r) zone_out(cells, v, r);
    }
  }

  void zone_out(const Cells& cells, int64_t v, int64_t r) const {
    const RnnMasks<T>& masks = loop_.masks;
    const int64_t unit = cells.unit + v * kLanes<T>;
    const int64_t here = token(cells.t, cells.first + r);
    const CellPlace<T> at = place(cells, v, r);
    if (masks.zoneout_h != nullptr) {
      if (Cell::kKeepsCandidate && at.reserve != nullptr) {
        store_part(at.reserve + Cell::kReserve * at.stride, load(at.after), at.valid);
      }
      const Vec<T> d = load_part(masks.zoneout_h + here * masks.zoneout_h_stride + unit, at.valid);
      store(at.after, mixed(d, load(at.before), load(at.after)));
    }
    if (cell_before_ != nullptr) {
      const Vec<T> d = load_part(masks.zoneout_c + here * masks.zoneout_c_stride + unit, at.valid);
      const R* const before = cell_before_ + (cells.first + r) * units_ + unit;
      const Vec<T> c = mixed(d, load(before), load(at.cell));
      store(at.cell, c);
      if (at.reserve_cell != nullptr) store_part(at.reserve_cell, c, at.valid);
    }
  }

  // Sequences whose last step this was give their final state and features.
  void finish_rows(int64_t t, int64_t active) {
    const int64_t staying = loop_.reverse ? (t == 0 ? 0 : active) : rows_at(t + 1);
    for (int64_t row = staying; row < active; ++row) {
      const int64_t to = (loop_.first_row + row) * loop_.hidden_size;
      const int64_t pooled = (loop_.first_row + row) * loop_.pooled_stride;
      const Vec<T> length = broadcast(static_cast<R>(sum_ != nullptr ? length_of(row) : 1));
      for (int64_t unit = first_unit(); unit < last_unit(); unit += kLanes<T>) {
        const int64_t valid = loop_.hidden_size - unit;
        store_part(loop_.h_n + to + unit, load(hidden(slot_, row) + unit), valid);
        if constexpr (Cell::kHasCell) store_part(loop_.c_n + to + unit, load(cell_ + row * units_ + unit), valid);
        if (sum_ != nullptr) store_part(loop_.mean + pooled + unit, load(sum_ + row * units_ + unit) / length, valid);
        if (max_ != nullptr) store_part(loop_.max + pooled + unit, load(max_ + row * units_ + unit), valid);
      }
    }
  }

  // The step before gives h to the heads.
  void queue_heads(int64_t t, int64_t active) {
    if (loop_.head_panels == nullptr) return;
    for (int64_t row = 0; row < active; ++row) {
      waiting_[waiting_count_] = hidden(previous_slot(), row);
      waiting_rows_[waiting_count_++] = loop_.partial + token(t, row) * loop_.head_width;
    }
    if (++waiting_steps_ == scratch_.slots - 1) project_heads();
  }

  int64_t length_of(int64_t row) const {
    int64_t length = loop_.steps;
    while (length > 0 && rows_at(length - 1) <= row) --length;
    return length;
  }

  // The waiting h through the heads' weights.
  void project_heads() {
    if (waiting_count_ > 0) {
      const PanelLayout<T> layout{loop_.hidden_size, loop_.head_width};
      multiply_panels<T>(waiting_, waiting_count_, layout, loop_.head_panels, PartialLogits<T>{waiting_rows_},
                         first_panel(layout.panels(), loop_.place, team_size_),
                         first_panel(layout.panels(), loop_.place + 1, team_size_));
    }
    waiting_count_ = 0;
    waiting_steps_ = 0;
  }

  const RnnTimeLoop<T>& loop_;
  const Layout layout_;
  const RnnScratch<T, Cell, W> scratch_;
  const int64_t rows_;
  const int64_t units_;
  const T** const pointers_;
  const T** const waiting_;
  R** const waiting_rows_;
  T* const panel_;
  RnnProducts<T, W> products_;
  R* const gates_;
  T* const hidden_;
  T* const masked_;  // D h, or null
  R* const cell_;
  R* const cell_before_;  // c_{t-1} for zoneout, or null
  R* const sums_;         // of a normalised cell's gates
  R* const sum_;
  R* const max_;
  const int64_t team_size_ = loop_.team == nullptr ? 1 : loop_.team->size;
  const int64_t first_panel_ = first_panel(layout_.panels(), loop_.place, team_size_);
  const int64_t last_panel_ = first_panel(layout_.panels(), loop_.place + 1, team_size_);
  int64_t slot_ = 1;           // of the step being computed; the one before holds its h_{t-1}
  int64_t started_ = 0;        // sequences that have their initial state
  int64_t waiting_count_ = 0;  // tokens whose h waits for the heads
  int64_t waiting_steps_ = 0;
};

template <typename T, typename W = T>
void rnn_time_loop(const RnnTimeLoop<T>& loop) {
  with_cell(loop.cell, [&]<typename C>() { RnnTimeLoopRun<T, C, W>(loop).run(); });
}

}  // namespace
}  // namespace pymtl
