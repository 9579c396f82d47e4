// The LSTM's walk over time, forward. A worker takes one recurrence and some sequences through all steps, without
// waiting for anyone, or as one of a team some of its hidden units (see team.h): its weights stay in its own cache,
// and no gate leaves its registers in inference.
#pragma once

#include <limits>

#include "activation_simd.h"
#include "kernels.h"
#include "panels.h"

namespace pymtl {
namespace {

constexpr int kGates = 4;
static_assert(kGates == kPanelVectors, "a gate panel holds one vector of units, once per gate");

template <typename T>
constexpr int64_t padded_units(int64_t hidden_size) {
  return (hidden_size + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// A recurrence's weights: W_ih [units/lanes][I][gates][lanes], W_hh [units/lanes][H][gates][lanes] and the
// sum of the biases [units/lanes][gates][lanes], in Real<T>. Units past H are zero.
template <typename T>
struct PackedLstm {
  int64_t input_size;
  int64_t hidden_size;

  int64_t units() const { return padded_units<T>(hidden_size); }
  int64_t panels() const { return units() / kLanes<T>; }
  static int64_t panel_size(int64_t depth) { return kGates * kLanes<T> * padded_depth<T>(depth); }
  int64_t input_panel(int64_t panel) const { return panel * panel_size(input_size); }
  int64_t hidden_panel(int64_t panel) const { return input_panel(panels()) + panel * panel_size(hidden_size); }
  int64_t bias(int64_t panel) const { return hidden_panel(panels()) + panel * panel_size(1); }
  int64_t size() const { return bias(panels()); }
};

template <typename T>
int64_t lstm_packed_size(int64_t input_size, int64_t hidden_size) {
  return PackedLstm<T>{input_size, hidden_size}.size();
}

// to <- a panel of W_ih or W_hh [4H, depth].
template <typename T>
void pack_gates(const T* weight, int64_t depth, int64_t hidden_size, int64_t panel, T* to) {
  constexpr int n = kLanes<T>;
  constexpr int group = n * kDepthGroup<T>;
  const int64_t unit = panel * n;
  const int64_t count = hidden_size - unit < n ? hidden_size - unit : n;
  for (int gate = 0; gate < kGates; ++gate) {
    pack_rows(weight + (gate * hidden_size + unit) * depth, depth, count, depth, to + gate * group, kGates * group);
  }
}

template <typename T>
void pack_biases(const LstmWeights<T>& weights, int64_t hidden_size, int64_t panel, T* to) {
  const int64_t unit = panel * kLanes<T>;
  for (int gate = 0; gate < kGates; ++gate) {
    const int64_t row = gate * hidden_size + unit;
    Vec<T> bias = {};
    if (weights.b_ih != nullptr) bias = load_part(weights.b_ih + row, hidden_size - unit);
    if (weights.b_hh != nullptr) bias = bias + load_part(weights.b_hh + row, hidden_size - unit);
    store_group(to + gate * kLanes<T> * kDepthGroup<T>, bias);
  }
}

template <typename T>
void pack_lstm(const LstmWeights<T>& weights, int64_t input_size, int64_t hidden_size, int64_t part, int64_t parts,
               T* packed) {
  const PackedLstm<T> layout{input_size, hidden_size};
  const int64_t last = first_panel(layout.panels(), part + 1, parts);
  for (int64_t panel = first_panel(layout.panels(), part, parts); panel < last; ++panel) {
    pack_gates(weights.w_ih, input_size, hidden_size, panel, packed + layout.input_panel(panel));
    pack_gates(weights.w_hh, hidden_size, hidden_size, panel, packed + layout.hidden_panel(panel));
    pack_biases(weights, hidden_size, panel, packed + layout.bias(panel));
  }
}

// to[r] = from[r] + rows[r] * panel, one vector of units for all gates. A function of its own, so that the
// accumulators have the registers to themselves.
template <typename T, int R>
__attribute__((noinline)) void add_product(const T* const* rows, int64_t depth, const T* panel, const Real<T>* from,
                                           int64_t from_stride, Real<T>* to, int64_t to_stride) {
  Vec<T> acc[R][kGates];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int gate = 0; gate < kGates; ++gate) acc[r][gate] = load(from + r * from_stride + gate * kLanes<T>);
  }
  multiply_deep<T, R, kGates>(rows, depth, panel, acc);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int gate = 0; gate < kGates; ++gate) store(to + r * to_stride + gate * kLanes<T>, acc[r][gate]);
  }
}

// How a walk's scratch memory is laid out. Every array starts on a cache line.
template <typename T>
struct LstmScratch {
  // Gates of this many tokens are projected at a time: enough rows to use each panel of W_ih well, few
  // enough to stay in the second-level cache until the walk reads them.
  static constexpr int64_t kBlockBytes = 192 * 1024;
  // h of this many tokens waits in first-level cache for the heads' projection.
  static constexpr int64_t kHeadTokens = 4 * kTileRows;

  int64_t rows;
  int64_t units;
  int64_t block;  // tokens of a block, unless one step alone has more
  int64_t slots;  // steps of h that are kept
  size_t pointers, waiting, waiting_rows, panel, gates, hidden, cell, sum, max, size;

  explicit LstmScratch(const LstmWalk<T>& walk) {
    rows = walk.last_row - walk.first_row;
    units = padded_units<T>(walk.hidden_size);
    const int64_t fitting = kBlockBytes / (kGates * units * static_cast<int64_t>(sizeof(Real<T>)));
    block = fitting < 2 * kTileRows ? 2 * kTileRows : fitting;
    const int64_t all = walk.starts[walk.steps] - walk.starts[0];
    if (block > all) block = all;
    if (block < rows) block = rows;
    // Every size below grows with `rows`, so that a plan made for the whole batch fits each slice of it.
    const bool heads = walk.head_panels != nullptr;
    slots = heads && rows > 0 ? (kHeadTokens + rows - 1) / rows + 1 : 2;
    const int64_t kept = (heads ? kHeadTokens : 0) + 2 * rows;
    size_t at = 0;
    const auto take = [&at](int64_t count, size_t bytes) {
      const size_t here = at;
      at += (static_cast<size_t>(count) * bytes + 63) / 64 * 64;
      return here;
    };
    pointers = take(block, sizeof(const T*));
    waiting = take(heads ? kept : 0, sizeof(const T*));
    waiting_rows = take(heads ? kept : 0, sizeof(Real<T>*));
    const int64_t depth = walk.input_size > walk.hidden_size ? walk.input_size : walk.hidden_size;
    panel = take(walk.weights != nullptr ? PackedLstm<T>::panel_size(depth) : 0, sizeof(T));
    gates = take(block * kGates * units, sizeof(Real<T>));
    hidden = take(kept * units, sizeof(T));
    cell = take(rows * units, sizeof(Real<T>));
    sum = take(walk.mean != nullptr ? 2 * rows * units : 0, sizeof(Real<T>));
    max = take(walk.max != nullptr ? rows * units : 0, sizeof(Real<T>));
    size = at;
  }
};

template <typename T>
size_t lstm_scratch(const LstmWalk<T>& walk) {
  return LstmScratch<T>(walk).size;
}

template <typename T>
class LstmWalker {
  using R = Real<T>;

 public:
  explicit LstmWalker(const LstmWalk<T>& walk)
      : walk_(walk),
        layout_{walk.input_size, walk.hidden_size},
        scratch_(walk),
        rows_(scratch_.rows),
        units_(scratch_.units),
        pointers_(at<const T*>(scratch_.pointers)),
        waiting_(at<const T*>(scratch_.waiting)),
        waiting_rows_(at<R*>(scratch_.waiting_rows)),
        panel_(at<T>(scratch_.panel)),
        gates_(at<R>(scratch_.gates)),
        hidden_(walk.team == nullptr ? at<T>(scratch_.hidden)
                                     : reinterpret_cast<T*>(static_cast<char*>(walk.team->shared) + scratch_.hidden)),
        cell_(at<R>(scratch_.cell)),
        sum_(walk.mean != nullptr ? at<R>(scratch_.sum) : nullptr),
        max_(walk.max != nullptr ? at<R>(scratch_.max) : nullptr) {}

  void run() {
    int64_t done = 0;
    pack();
    start_rows(rows_at(step_at(0)));
    meet_others();
    while (done < walk_.steps) {
      const int64_t end = project_block(done);
      const R* gates = gates_;
      for (; done < end; ++done) {
        const int64_t t = step_at(done);
        const int64_t active = rows_at(t);
        if (active > 0) {
          step(t, active, gates);
          finish_rows(t, active);
          gates += active * kGates * units_;
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
    return reinterpret_cast<U*>(static_cast<char*>(walk_.scratch) + offset);
  }

  int64_t step_at(int64_t k) const { return walk_.reverse ? walk_.steps - 1 - k : k; }

  // All workers' h of this step, and initial h of the next, is there.
  void meet_others() const {
    if (team_size_ > 1) meet(*walk_.team, walk_.place);
  }

  // How many of this worker's sequences have a token at step t.
  int64_t rows_at(int64_t t) const {
    if (t < 0 || t >= walk_.steps) return 0;
    const int64_t rows = walk_.starts[t + 1] - walk_.starts[t] - walk_.first_row;
    return rows < 0 ? 0 : rows < rows_ ? rows : rows_;
  }

  int64_t token(int64_t t, int64_t row) const { return walk_.starts[t] + walk_.first_row + row; }

  int64_t first_unit() const { return first_panel_ * kLanes<T>; }
  int64_t last_unit() const { return last_panel_ * kLanes<T>; }

  T* hidden(int64_t slot, int64_t row) const { return hidden_ + (slot * rows_ + row) * units_; }

  // Elements of the sums over tokens; as many rounding errors stand behind them.
  int64_t sum_size() const { return rows_ * units_; }

  int64_t previous_slot() const { return (slot_ + scratch_.slots - 1) % scratch_.slots; }

  // Weights that are read once only are packed when they are, into memory that stays in the cache.
  bool reads_input_once() const { return walk_.starts[walk_.steps] - walk_.starts[0] <= scratch_.block; }
  bool reads_hidden_once() const { return walk_.steps == 1; }

  void pack() const {
    if (walk_.weights == nullptr) return;
    for (int64_t panel = first_panel_; panel < last_panel_; ++panel) {
      T* const packed = walk_.packed_here;
      if (!reads_input_once()) {
        pack_gates(walk_.weights->w_ih, walk_.input_size, walk_.hidden_size, panel,
                   packed + layout_.input_panel(panel));
      }
      if (!reads_hidden_once()) {
        pack_gates(walk_.weights->w_hh, walk_.hidden_size, walk_.hidden_size, panel,
                   packed + layout_.hidden_panel(panel));
      }
      pack_biases(*walk_.weights, walk_.hidden_size, panel, packed + layout_.bias(panel));
    }
  }

  const T* input_panel(int64_t panel) const {
    if (walk_.weights == nullptr || !reads_input_once()) return walk_.packed + layout_.input_panel(panel);
    pack_gates(walk_.weights->w_ih, walk_.input_size, walk_.hidden_size, panel, panel_);
    return panel_;
  }

  const T* hidden_panel(int64_t panel) const {
    if (walk_.weights == nullptr || !reads_hidden_once()) return walk_.packed + layout_.hidden_panel(panel);
    pack_gates(walk_.weights->w_hh, walk_.hidden_size, walk_.hidden_size, panel, panel_);
    return panel_;
  }

  // gates_ = W_ih x + b for the tokens of the next steps, in walking order. Returns the step to stop at.
  int64_t project_block(int64_t first) {
    int64_t count = 0;
    int64_t end = first;
    for (; end < walk_.steps; ++end) {
      const int64_t t = step_at(end);
      const int64_t active = rows_at(t);
      if (count + active > scratch_.block) break;
      for (int64_t row = 0; row < active; ++row) pointers_[count++] = walk_.input + token(t, row) * walk_.input_stride;
    }
    for (int64_t panel = first_panel_; panel < last_panel_; ++panel) {
      const R* const bias = reinterpret_cast<const R*>(walk_.packed + layout_.bias(panel));
      const T* const w_ih = input_panel(panel);
      R* const gates = gates_ + panel * kGates * kLanes<T>;
      for_row_groups(count, [&]<int Rows>(int64_t row) {
        add_product<T, Rows>(pointers_ + row, walk_.input_size, w_ih, bias, 0, gates + row * kGates * units_,
                             kGates * units_);
      });
    }
    return end;
  }

  // Of the `active` sequences of the next step those whose first it is take their initial state.
  void start_rows(int64_t active) {
    for (; started_ < active; ++started_) {
      set_state(walk_.h0, started_, hidden(previous_slot(), started_));
      set_state(walk_.c0, started_, cell_ + started_ * units_);
      for (int64_t unit = first_unit(); unit < last_unit(); unit += kLanes<T>) {
        if (sum_ != nullptr) store(sum_ + started_ * units_ + unit, Vec<T>{});
        if (sum_ != nullptr) store(sum_ + sum_size() + started_ * units_ + unit, Vec<T>{});
        if (max_ != nullptr) store(max_ + started_ * units_ + unit, broadcast(-std::numeric_limits<R>::infinity()));
      }
    }
  }

  template <typename State>
  void set_state(const T* initial, int64_t row, State* state) const {
    for (int64_t unit = first_unit(); unit < last_unit(); unit += kLanes<T>) {
      Vec<T> value = {};
      if (initial != nullptr) {
        value = load_part(initial + (walk_.first_row + row) * walk_.hidden_size + unit, walk_.hidden_size - unit);
      }
      store(state + unit, value);
    }
  }

  void step(int64_t t, int64_t active, const R* gates) {
    for (int64_t row = 0; row < active; ++row) pointers_[row] = hidden(previous_slot(), row);
    for_panels(first_panel_, last_panel_, t, [&](int64_t panel) {
      const T* const w_hh = hidden_panel(panel);
      const R* const from = gates + panel * kGates * kLanes<T>;
      for (int64_t first = 0; first < active; first += kUpdateRows) {
        const int64_t count = active - first < kUpdateRows ? active - first : kUpdateRows;
        alignas(64) R sums[kUpdateRows][kGates][kLanes<T>];
        for_row_groups(count, [&]<int Rows>(int64_t row) {
          add_product<T, Rows>(pointers_ + first + row, walk_.hidden_size, w_hh, from + (first + row) * kGates * units_,
                               kGates * units_, &sums[row][0][0], kGates * kLanes<T>);
        });
        update_cells(t, first, count, panel * kLanes<T>, sums);
      }
    });
  }

  // Sequences that are updated together: a few tiles, since every update waits for long chains of operations,
  // which only other sequences' can fill.
  static constexpr int64_t kUpdateRows = 4 * kTileRows;

  // From the gates' sums of one vector of units to c and h, for `count` sequences from `first` on.
  __attribute__((noinline)) void update_cells(int64_t t, int64_t first, int64_t count, int64_t unit,
                                              R (*sums)[kGates][kLanes<T>]) const {
    const int64_t valid = walk_.hidden_size - unit;
    R* const cell = cell_ + first * units_ + unit;
    T* const hidden_state = hidden(slot_, first) + unit;
    for (int64_t r = 0; r < count; ++r) {
      const Vec<T> i = sigmoid<R>(load(sums[r][0]));
      const Vec<T> f = sigmoid<R>(load(sums[r][1]));
      const Vec<T> g = tanh<R>(load(sums[r][2]));
      const Vec<T> o = sigmoid<R>(load(sums[r][3]));
      const Vec<T> c = fma(f, load(cell + r * units_), i * g);
      store(cell + r * units_, c);
      store(sums[r][3], o);
      if (walk_.gates != nullptr) keep_for_backward(token(t, first + r), unit, valid, i, f, g, o, c);
    }
    // A loop of its own: after the long chain of operations to c, another to h would leave the processor nothing
    // to overlap it with.
    for (int64_t r = 0; r < count; ++r) {
      store(hidden_state + r * units_, load(sums[r][3]) * tanh<R>(load(cell + r * units_)));
    }
    if (walk_.output != nullptr) {
      T* const output = walk_.output + token(t, first) * walk_.output_stride + unit;
      for (int64_t r = 0; r < count; ++r) {
        store_part(output + r * walk_.output_stride, load(hidden_state + r * units_), valid);
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

  void keep_for_backward(int64_t token, int64_t unit, int64_t valid, Vec<T> i, Vec<T> f, Vec<T> g, Vec<T> o,
                         Vec<T> c) const {
    T* const gates = walk_.gates + token * kGates * walk_.hidden_size + unit;
    store_part(gates, i, valid);
    store_part(gates + walk_.hidden_size, f, valid);
    store_part(gates + 2 * walk_.hidden_size, g, valid);
    store_part(gates + 3 * walk_.hidden_size, o, valid);
    store_part(walk_.cells + token * walk_.hidden_size + unit, c, valid);
  }

  // Sequences whose last step this was give their final state and features.
  void finish_rows(int64_t t, int64_t active) {
    const int64_t staying = walk_.reverse ? (t == 0 ? 0 : active) : rows_at(t + 1);
    for (int64_t row = staying; row < active; ++row) {
      const int64_t to = (walk_.first_row + row) * walk_.hidden_size;
      const int64_t pooled = (walk_.first_row + row) * walk_.pooled_stride;
      const Vec<T> length = broadcast(static_cast<R>(sum_ != nullptr ? length_of(row) : 1));
      for (int64_t unit = first_unit(); unit < last_unit(); unit += kLanes<T>) {
        const int64_t valid = walk_.hidden_size - unit;
        store_part(walk_.h_n + to + unit, load(hidden(slot_, row) + unit), valid);
        store_part(walk_.c_n + to + unit, load(cell_ + row * units_ + unit), valid);
        if (sum_ != nullptr) store_part(walk_.mean + pooled + unit, load(sum_ + row * units_ + unit) / length, valid);
        if (max_ != nullptr) store_part(walk_.max + pooled + unit, load(max_ + row * units_ + unit), valid);
      }
    }
  }

  // The step before gives h to the heads.
  void queue_heads(int64_t t, int64_t active) {
    if (walk_.head_panels == nullptr) return;
    for (int64_t row = 0; row < active; ++row) {
      waiting_[waiting_count_] = hidden(previous_slot(), row);
      waiting_rows_[waiting_count_++] = walk_.partial + token(t, row) * walk_.head_width;
    }
    if (++waiting_steps_ == scratch_.slots - 1) project_heads();
  }

  int64_t length_of(int64_t row) const {
    int64_t length = walk_.steps;
    while (length > 0 && rows_at(length - 1) <= row) --length;
    return length;
  }

  // The waiting h through the heads' weights.
  void project_heads() {
    if (waiting_count_ > 0) {
      const PanelLayout<T> layout{walk_.hidden_size, walk_.head_width};
      multiply_panels<T>(
          waiting_, waiting_count_, layout, walk_.head_panels,
          [&](int64_t n, int64_t column, int64_t valid, Vec<T> value)
              PYMTL_INLINE_LAMBDA { store_part(waiting_rows_[n] + column, value, valid); },
          first_panel(layout.panels(), walk_.place, team_size_),
          first_panel(layout.panels(), walk_.place + 1, team_size_));
    }
    waiting_count_ = 0;
    waiting_steps_ = 0;
  }

  const LstmWalk<T>& walk_;
  const PackedLstm<T> layout_;
  const LstmScratch<T> scratch_;
  const int64_t rows_;
  const int64_t units_;
  const T** const pointers_;
  const T** const waiting_;
  R** const waiting_rows_;
  T* const panel_;
  R* const gates_;
  T* const hidden_;
  R* const cell_;
  R* const sum_;
  R* const max_;
  const int64_t team_size_ = walk_.team == nullptr ? 1 : walk_.team->size;
  const int64_t first_panel_ = first_panel(layout_.panels(), walk_.place, team_size_);
  const int64_t last_panel_ = first_panel(layout_.panels(), walk_.place + 1, team_size_);
  int64_t slot_ = 1;           // of the step being computed; the one before holds its h_{t-1}
  int64_t started_ = 0;        // sequences that have their initial state
  int64_t waiting_count_ = 0;  // tokens whose h waits for the heads
  int64_t waiting_steps_ = 0;
};

template <typename T>
void lstm_walk(const LstmWalk<T>& walk) {
  LstmWalker<T>(walk).run();
}

}  // namespace
}  // namespace pymtl
