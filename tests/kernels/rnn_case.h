// Random LSTMs and batches, and calls of rnn_forward and rnn_backward on them, for the tests of the LSTM and of what
// is fused into it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

#include "check.h"
#include "kernels/heads.h"
#include "kernels/rnn.h"

namespace pymtl::test {

struct ModelOptions {
  Cell cell = Cell::lstm;
  int64_t recurrences = 1;
  int64_t input_size = 1;
  int64_t hidden_size = 1;
  int64_t inputs = 1;
  bool b_ih = true;
  bool b_hh = true;
  int64_t head_width = 0;
  bool head_bias = true;
};

// The parameters of G recurrences and of the heads on them.
template <typename T>
struct RnnModel {
  Cell cell;
  CellSizes sizes;
  int64_t recurrences;
  int64_t input_size;
  int64_t hidden_size;
  int64_t inputs;
  int64_t head_width;
  std::vector<Buffer<T>> w_ih, w_hh, b_ih,
      b_hh;                               // one array per recurrence; biases may be null, w_ih of a normalised one
  std::vector<Buffer<T>> g_hh, g_c, b_c;  // of normalised ones
  std::vector<char> reverse;
  Buffer<T> head_weight, head_bias;

  RnnModel(const ModelOptions& options, Random& random)
      : cell(options.cell),
        sizes(sizes_of(options.cell)),
        recurrences(options.recurrences),
        input_size(sizes.normalised ? sizes.gates * options.hidden_size : options.input_size),
        hidden_size(options.hidden_size),
        inputs(sizes.normalised ? options.recurrences : options.inputs),
        head_width(options.head_width) {
    // Gates of about the size they have in a trained model: neither all linear nor all saturated.
    const double size = 2 / std::sqrt(static_cast<double>(input_size + hidden_size));
    const bool first_reverse = random.flip();
    for (int64_t g = 0; g < recurrences; ++g) {
      const int64_t rows = sizes.gates * hidden_size;
      w_ih.push_back(sizes.normalised ? Buffer<T>() : uniform<T>(rows * input_size, random, -size, size));
      w_hh.push_back(uniform<T>(rows * hidden_size, random, -size, size));
      b_ih.push_back(options.b_ih ? uniform<T>(rows, random) : Buffer<T>());
      b_hh.push_back(options.b_hh ? uniform<T>(rows, random) : Buffer<T>());
      const bool normalised_c = sizes.normalised && sizes.has_cell;
      g_hh.push_back(sizes.normalised ? uniform<T>(rows, random, 0.5, 1.5) : Buffer<T>());
      g_c.push_back(normalised_c ? uniform<T>(hidden_size, random, 0.5, 1.5) : Buffer<T>());
      b_c.push_back(normalised_c && options.b_hh ? uniform<T>(hidden_size, random) : Buffer<T>());
      reverse.push_back((g % 2 == 0) == first_reverse);
    }
    if (head_width > 0) head_weight = uniform<T>(head_width * all_hidden(), random);
    if (head_width > 0 && options.head_bias) head_bias = uniform<T>(head_width, random);
  }

  int64_t all_inputs() const { return inputs * input_size; }
  int64_t all_hidden() const { return recurrences * hidden_size; }

  std::vector<RnnWeights<T>> weights() const {
    std::vector<RnnWeights<T>> all;
    for (size_t g = 0; g < w_ih.size(); ++g) {
      all.push_back({w_ih[g].data(),
                     w_hh[g].data(),
                     b_ih[g].data(),
                     b_hh[g].data(),
                     reverse[g] != 0,
                     {g_hh[g].data(), g_c[g].data(), b_c[g].data()}});
    }
    return all;
  }
};

// How a batch tells its lengths. `padded` ends in steps that no sequence has.
enum class Layout { dense, packed, padded };

// `batch` lengths, the longest first: `steps`; the last 1, others anything between.
inline std::vector<int64_t> ragged(int64_t batch, int64_t steps, Random& random) {
  std::vector<int64_t> lengths(static_cast<size_t>(batch));
  for (int64_t& length : lengths) length = 1 + random.below(steps);
  std::sort(lengths.begin(), lengths.end(), std::greater<int64_t>());
  lengths.back() = 1;
  lengths.front() = steps;
  return lengths;
}

// The sequences: their lengths, inputs and initial states.
template <typename T>
struct RnnBatch {
  std::vector<int64_t> lengths;  // longest first; may end in zeros
  std::vector<int64_t> starts;   // [T + 1] the first token of each step
  Buffer<int64_t> batch_sizes;   // [T], null: dense
  Buffer<T> input;               // [N, P*I]
  Buffer<T> h0, c0;              // [G, B, H] or null
  Buffer<T> dropout;             // [G, B, H] or null
  Buffer<T> zoneout_h;           // [N, G*H] or null
  Buffer<T> zoneout_c;           // [G*H] or null: the same for all tokens

  RnnBatch(const RnnModel<T>& model, std::vector<int64_t> given, Layout layout, bool with_h0, bool with_c0,
           Random& random)
      : lengths(std::move(given)) {
    lay_out(layout);
    input = uniform<T>(tokens() * model.all_inputs(), random);
    if (with_h0) h0 = uniform<T>(batch() * model.all_hidden(), random);
    if (with_c0 && model.sizes.has_cell) c0 = uniform<T>(batch() * model.all_hidden(), random, -2, 2);
  }

  // Recurrent dropout and zoneout for them.
  void add_masks(const RnnModel<T>& model, Random& random) {
    dropout = uniform<T>(batch() * model.all_hidden(), random, 0, 2);
    zoneout_h = uniform<T>(tokens() * model.all_hidden(), random, 0, 1);
    if (model.sizes.has_cell) zoneout_c = uniform<T>(model.all_hidden(), random, 0, 1);
  }

  RnnMasks<T> masks(const RnnModel<T>& model) const {
    return {dropout.data(), zoneout_h.data(), zoneout_c.data(), model.all_hidden(), 0};
  }

  // The sequences `rows` of another batch, in rising order.
  RnnBatch(const RnnModel<T>& model, const RnnBatch& other, const std::vector<int64_t>& rows, Layout layout) {
    for (const int64_t row : rows) lengths.push_back(other.length(row));
    lay_out(layout);
    input = take_tokens(other, rows, other.input, model.all_inputs());
    h0 = take_states(other, rows, other.h0, model);
    c0 = take_states(other, rows, other.c0, model);
    dropout = take_states(other, rows, other.dropout, model);
    zoneout_h = take_tokens(other, rows, other.zoneout_h, model.all_hidden());
    if (other.zoneout_c) {
      zoneout_c = Buffer<T>(model.all_hidden());
      std::copy_n(other.zoneout_c.data(), model.all_hidden(), zoneout_c.data());
    }
  }

  // Those of these sequences' tokens, of an array [N, width] of the batch they were taken from; null from null.
  Buffer<T> take_tokens(const RnnBatch& other, const std::vector<int64_t>& rows, const Buffer<T>& from,
                        int64_t width) const {
    if (!from) return {};
    Buffer<T> to(tokens() * width);
    for (int64_t row = 0; row < batch(); ++row) {
      for (int64_t t = 0; t < length(row); ++t) {
        copy_row(from, other.token(t, rows[static_cast<size_t>(row)]), to, token(t, row), width);
      }
    }
    return to;
  }

  // The same of an array [G, B, H].
  Buffer<T> take_states(const RnnBatch& other, const std::vector<int64_t>& rows, const Buffer<T>& from,
                        const RnnModel<T>& model) const {
    if (!from) return {};
    Buffer<T> to(batch() * model.all_hidden());
    for (int64_t g = 0; g < model.recurrences; ++g) {
      for (int64_t row = 0; row < batch(); ++row) {
        copy_row(from, g * other.batch() + rows[static_cast<size_t>(row)], to, g * batch() + row, model.hidden_size);
      }
    }
    return to;
  }

  int64_t batch() const { return static_cast<int64_t>(lengths.size()); }
  int64_t steps() const { return static_cast<int64_t>(starts.size()) - 1; }
  int64_t tokens() const { return starts.back(); }
  int64_t length(int64_t row) const { return lengths[static_cast<size_t>(row)]; }
  int64_t token(int64_t t, int64_t row) const { return starts[static_cast<size_t>(t)] + row; }
  // The token a recurrence reads k-th of a sequence.
  int64_t walked(int64_t k, int64_t row, bool reverse) const { return token(reverse ? length(row) - 1 - k : k, row); }

  RnnShape shape(const RnnModel<T>& model) const {
    return {model.recurrences,  steps(),      batch(),   tokens(), model.input_size, model.hidden_size,
            batch_sizes.data(), model.inputs, model.cell};
  }

 private:
  void lay_out(Layout layout) {
    std::vector<int64_t> sizes(static_cast<size_t>(lengths.front()));
    for (const int64_t length : lengths) {
      for (int64_t t = 0; t < length; ++t) ++sizes[static_cast<size_t>(t)];
    }
    if (layout == Layout::padded) sizes.insert(sizes.end(), {0, 0});
    starts = {0};
    for (const int64_t size : sizes) starts.push_back(starts.back() + size);
    if (layout != Layout::dense) batch_sizes = copy_of(sizes);
  }

  static void copy_row(const Buffer<T>& from, int64_t from_row, Buffer<T>& to, int64_t to_row, int64_t width) {
    std::copy_n(from.data() + from_row * width, width, to.data() + to_row * width);
  }
};

// What rnn_forward is asked for, and how.
struct Asked {
  bool output = true;
  bool saved = true;  // gates and cells, which the backward pass needs both
  bool heads = true;
  bool mean = true;
  bool max = true;
  bool prepacked = false;                   // the weights, and the heads'
  WeightFormat format = WeightFormat::own;  // of float; any other has `narrow` [G] in the weights' place
  const NarrowWeights* narrow = nullptr;
};

template <typename T>
struct RnnResult {
  Buffer<T> output, h_n, c_n, gates, logits, mean, max;  // null: not asked for
  Buffer<Accum<T>> cells;
};

template <typename T>
RnnResult<T> run_forward(const RnnModel<T>& model, const RnnBatch<T>& batch, const Asked& asked,
                         const Executor& executor) {
  const int64_t all_hidden = model.all_hidden();
  const bool heads = asked.heads && model.head_width > 0;
  RnnResult<T> result;
  if (asked.output) result.output = Buffer<T>(batch.tokens() * all_hidden);
  result.h_n = Buffer<T>(batch.batch() * all_hidden);
  const bool has_cell = model.sizes.has_cell;
  if (has_cell) result.c_n = Buffer<T>(batch.batch() * all_hidden);
  const int64_t reserve = sizes_of(model.cell).reserve_with(static_cast<bool>(batch.zoneout_h));
  if (asked.saved && reserve > 0) result.gates = Buffer<T>(batch.tokens() * reserve * all_hidden);
  if (asked.saved && has_cell) result.cells = Buffer<Accum<T>>(batch.tokens() * all_hidden);
  if (heads) result.logits = Buffer<T>(batch.tokens() * model.head_width);
  if (asked.mean) result.mean = Buffer<T>(batch.batch() * all_hidden);
  if (asked.max) result.max = Buffer<T>(batch.batch() * all_hidden);

  const std::vector<RnnWeights<T>> weights = model.weights();
  Buffer<T> prepacked;
  if (asked.prepacked) {
    const size_t size = rnn_prepacked_size<T>(model.cell, model.recurrences, model.input_size, model.hidden_size);
    prepacked = Buffer<T>(static_cast<int64_t>(size), 64);
    rnn_prepack(model.cell, weights.data(), model.recurrences, model.input_size, model.hidden_size, prepacked.data(),
                executor);
  }
  if constexpr (std::is_same_v<T, float>) {
    if (asked.format != WeightFormat::own) {
      const size_t size =
          rnn_prepacked_size<T>(model.cell, model.recurrences, model.input_size, model.hidden_size, asked.format);
      prepacked = Buffer<T>(static_cast<int64_t>(size), 64);
      rnn_prepack(model.cell, asked.format, asked.narrow, model.recurrences, model.input_size, model.hidden_size,
                  prepacked.data(), executor);
    }
  }

  RnnForward<T> args{};
  args.shape = batch.shape(model);
  args.weights = weights.data();
  args.prepacked = prepacked.data();
  args.format = asked.format;
  args.input = batch.input.data();
  args.h0 = batch.h0.data();
  args.c0 = batch.c0.data();
  args.output = result.output.data();
  args.h_n = result.h_n.data();
  args.c_n = result.c_n.data();
  args.gates = result.gates.data();
  args.cells = result.cells.data();
  if (heads) {
    args.heads.width = model.head_width;
    args.heads.weight = model.head_weight.data();
    args.heads.bias = model.head_bias.data();
    args.heads.logits = result.logits.data();
  }
  Buffer<T> head_panels;
  if (heads && asked.prepacked) {
    Heads<T> only{};
    only.parts = model.recurrences;
    only.depth = model.hidden_size;
    only.width = model.head_width;
    only.weight = model.head_weight.data();
    head_panels = Buffer<T>(static_cast<int64_t>(heads_prepacked_size(only)), 64);
    heads_prepack(only, head_panels.data());
    args.heads.prepacked = head_panels.data();
  }
  args.masks = batch.masks(model);
  args.heads.mean = result.mean.data();
  args.heads.max = result.max.data();
  Workspace workspace = workspace_of(rnn_forward_workspace(args, executor));
  rnn_forward(args, workspace.data(), executor);
  return result;
}

// What comes from above in the backward pass; null: zeros.
template <typename T>
struct Gradients {
  Buffer<T> output, h_n, c_n;

  Gradients() = default;
  Gradients(const RnnModel<T>& model, const RnnBatch<T>& batch, bool of_output, bool of_h_n, bool of_c_n,
            Random& random) {
    if (of_output) output = uniform<T>(batch.tokens() * model.all_hidden(), random);
    if (of_h_n) h_n = uniform<T>(batch.batch() * model.all_hidden(), random);
    if (of_c_n && model.sizes.has_cell) c_n = uniform<T>(batch.batch() * model.all_hidden(), random);
  }
};

// What rnn_backward is asked for.
struct Wanted {
  bool input = true;
  bool w_ih = true;
  bool w_hh = true;
  bool bias = true;
  bool h0 = true;
  bool c0 = true;
};

template <typename T>
struct BackwardResult {
  Buffer<T> grad_gates, grad_input, grad_h0, grad_c0;  // null: not wanted
  std::vector<Buffer<T>> w_ih, w_hh, bias;             // the gradients of each recurrence's weights
};

template <typename T>
BackwardResult<T> run_backward(const RnnModel<T>& model, const RnnBatch<T>& batch, const RnnResult<T>& forward,
                               const Gradients<T>& gradients, const Wanted& wanted, const Executor& executor) {
  const int64_t I = model.input_size;
  const int64_t H = model.hidden_size;
  const auto array = [](bool is_wanted, int64_t count) { return is_wanted ? Buffer<T>(count) : Buffer<T>(); };
  BackwardResult<T> result;
  result.grad_gates = Buffer<T>(batch.tokens() * model.sizes.gradients * model.all_hidden());
  result.grad_input = array(wanted.input, batch.tokens() * model.all_inputs());
  result.grad_h0 = array(wanted.h0, batch.batch() * model.all_hidden());
  result.grad_c0 = array(wanted.c0 && model.sizes.has_cell, batch.batch() * model.all_hidden());
  std::vector<RnnWeightGradients<T>> grad_weights;
  for (int64_t g = 0; g < model.recurrences; ++g) {
    result.w_ih.push_back(array(wanted.w_ih && !model.sizes.normalised, model.sizes.gates * H * I));
    result.w_hh.push_back(array(wanted.w_hh, model.sizes.gates * H * H));
    result.bias.push_back(array(wanted.bias, model.sizes.gradients * H));
    grad_weights.push_back({result.w_ih.back().data(), result.w_hh.back().data(), result.bias.back().data()});
  }

  const std::vector<RnnWeights<T>> weights = model.weights();
  RnnBackward<T> args{};
  args.shape = batch.shape(model);
  args.weights = weights.data();
  args.input = batch.input.data();
  args.h0 = batch.h0.data();
  args.c0 = batch.c0.data();
  args.output = forward.output.data();
  args.gates = forward.gates.data();
  args.cells = forward.cells.data();
  args.grad_output = gradients.output.data();
  args.grad_h_n = gradients.h_n.data();
  args.grad_c_n = gradients.c_n.data();
  args.grad_gates = result.grad_gates.data();
  args.grad_input = result.grad_input.data();
  args.grad_weights = grad_weights.data();
  args.grad_h0 = result.grad_h0.data();
  args.grad_c0 = result.grad_c0.data();
  args.masks = batch.masks(model);
  Workspace workspace = workspace_of(rnn_backward_workspace(args, executor));
  rnn_backward(args, workspace.data(), executor);
  return result;
}

template <typename T>
int64_t not_finite(const Buffer<T>& values) {
  int64_t count = 0;
  for (int64_t i = 0; i < values.size(); ++i) count += !std::isfinite(values[i]);
  return count;
}

// Everything that was asked for was written, and is a number.
template <typename T>
void check_finite(const RnnResult<T>& result) {
  CHECK(not_finite(result.output) == 0);
  CHECK(not_finite(result.h_n) == 0);
  CHECK(not_finite(result.c_n) == 0);
  CHECK(not_finite(result.gates) == 0);
  CHECK(not_finite(result.cells) == 0);
  CHECK(not_finite(result.logits) == 0);
  CHECK(not_finite(result.mean) == 0);
  CHECK(not_finite(result.max) == 0);
}

// One row of an array and of another are the same bits, where both were asked for.
template <typename T>
void check_same_row(const char* array, const Buffer<T>& a, int64_t row_a, const Buffer<T>& b, int64_t row_b,
                    int64_t width) {
  if (!a || !b) return;
  CHECK(same_bits(a.data() + row_a * width, b.data() + row_b * width, width), array, row_a, row_b, width);
}

// Sequence rows[i] of a batch has the bits that sequence i of another has, in everything both were asked for.
template <typename T>
void check_same(const RnnModel<T>& model, const RnnBatch<T>& all, const RnnResult<T>& result,
                const std::vector<int64_t>& rows, const RnnBatch<T>& some, const RnnResult<T>& some_result) {
  const int64_t hidden = model.hidden_size;
  const int64_t all_hidden = model.all_hidden();
  const int64_t reserve = sizes_of(model.cell).reserve_with(static_cast<bool>(all.zoneout_h));
  for (int64_t b = 0; b < some.batch(); ++b) {
    const int64_t a = rows[static_cast<size_t>(b)];
    for (int64_t t = 0; t < some.length(b); ++t) {
      const int64_t token_a = all.token(t, a);
      const int64_t token_b = some.token(t, b);
      check_same_row("output", result.output, token_a, some_result.output, token_b, all_hidden);
      check_same_row("logits", result.logits, token_a, some_result.logits, token_b, model.head_width);
      for (int64_t g = 0; g < model.recurrences; ++g) {
        const int64_t row_a = g * all.tokens() + token_a;
        const int64_t row_b = g * some.tokens() + token_b;
        check_same_row("gates", result.gates, row_a, some_result.gates, row_b, reserve * hidden);
        check_same_row("cells", result.cells, row_a, some_result.cells, row_b, hidden);
      }
    }
    for (int64_t g = 0; g < model.recurrences; ++g) {
      const int64_t row_a = g * all.batch() + a;
      const int64_t row_b = g * some.batch() + b;
      check_same_row("h_n", result.h_n, row_a, some_result.h_n, row_b, hidden);
      check_same_row("c_n", result.c_n, row_a, some_result.c_n, row_b, hidden);
    }
    check_same_row("mean", result.mean, a, some_result.mean, b, all_hidden);
    check_same_row("max", result.max, a, some_result.max, b, all_hidden);
  }
}

inline std::vector<int64_t> all_rows(int64_t batch) {
  std::vector<int64_t> rows(static_cast<size_t>(batch));
  for (int64_t row = 0; row < batch; ++row) rows[static_cast<size_t>(row)] = row;
  return rows;
}

}  // namespace pymtl::test
