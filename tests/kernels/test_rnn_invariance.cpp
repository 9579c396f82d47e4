// The promise that a sequence's results, forward and backward, are the same bits whatever else happens.
#include "check.h"
#include "kernels/rnn.h"
#include "rnn_case.h"

namespace pymtl::test {
namespace {

struct Sizes {
  int64_t recurrences, input_size, hidden_size, batch, steps, head_width;
};

// Small and large enough for threads, for several blocks of projected gates, for a step with more rows than a
// block, for the heads' ring of states to go round, and for workers to share the hidden units.
const std::vector<Sizes> kSizes = {
    {1, 1, 1, 2, 1, 1},      {2, 5, 3, 6, 9, 7},      {4, 16, 7, 13, 9, 64},  {2, 1, 16, 7, 9, 72},
    {2, 40, 17, 13, 9, 130}, {2, 5, 33, 30, 9, 1},    {2, 16, 64, 13, 9, 72}, {1, 40, 64, 3, 2, 0},
    {2, 5, 16, 2, 60, 72},   {2, 20, 130, 30, 9, 64}, {1, 7, 600, 22, 2, 7},  {1, 20, 260, 3, 60, 72},
    {3, 5, 200, 5, 40, 7},
};

template <typename T>
int64_t not_finite(const BackwardResult<T>& back) {
  int64_t count = not_finite(back.grad_gates) + not_finite(back.grad_input) + not_finite(back.grad_h0);
  count += not_finite(back.grad_c0);
  for (const std::vector<Buffer<T>>* const arrays : {&back.w_ih, &back.w_hh, &back.bias}) {
    for (const Buffer<T>& array : *arrays) count += not_finite(array);
  }
  return count;
}

// The gradients are the same bits for any executor and whatever else is wanted.
template <typename T>
BackwardResult<T> check_backward_bits(const RnnModel<T>& model, const RnnBatch<T>& batch, const RnnResult<T>& forward,
                                      const Gradients<T>& gradients) {
  BackwardResult<T> base = run_backward(model, batch, forward, gradients, {}, serial());
  CHECK(not_finite(base) == 0, not_finite(base));
  const auto check_all = [&](const BackwardResult<T>& other) {
    const auto check_array = [](const char* name, const Buffer<T>& a, const Buffer<T>& b) {
      check_same_row(name, a, 0, b, 0, a.size());
    };
    check_array("grad_gates", base.grad_gates, other.grad_gates);
    check_array("grad_input", base.grad_input, other.grad_input);
    check_array("grad_h0", base.grad_h0, other.grad_h0);
    check_array("grad_c0", base.grad_c0, other.grad_c0);
    for (size_t g = 0; g < base.w_ih.size(); ++g) {
      check_array("gradient of w_ih", base.w_ih[g], other.w_ih[g]);
      check_array("gradient of w_hh", base.w_hh[g], other.w_hh[g]);
      check_array("gradient of the biases", base.bias[g], other.bias[g]);
    }
  };
  for (const NamedExecutor& named : executors()) {
    const Context context("backward, ", named.name);
    check_all(run_backward(model, batch, forward, gradients, {}, named.executor));
  }
  for (int alone = -1; alone < 6; ++alone) {
    const Context context("backward, wanted: ", alone);
    const Wanted wanted{alone == 0, alone == 1, alone == 2, alone == 3, alone == 4, alone == 5};
    check_all(run_backward(model, batch, forward, gradients, wanted, alone % 2 == 0 ? threads<3>() : serial()));
  }
  return base;
}

template <typename T>
void check_some(const RnnModel<T>& model, const RnnBatch<T>& batch, const RnnResult<T>& base,
                const Gradients<T>& gradients, const BackwardResult<T>& base_back, const std::vector<int64_t>& rows,
                Layout layout, const Executor& executor) {
  const Context context("sequences ", rows.front(), " to ", rows.back(), ", ", rows.size(), " of them, in layout ",
                        static_cast<int>(layout));
  const RnnBatch<T> some(model, batch, rows, layout);
  const RnnResult<T> result = run_forward(model, some, {}, executor);
  check_same(model, batch, base, rows, some, result);

  Gradients<T> some_gradients;
  some_gradients.output = some.take_tokens(batch, rows, gradients.output, model.all_hidden());
  some_gradients.h_n = some.take_states(batch, rows, gradients.h_n, model);
  some_gradients.c_n = some.take_states(batch, rows, gradients.c_n, model);
  const BackwardResult<T> back = run_backward(model, some, result, some_gradients, {}, executor);
  const int64_t hidden = model.hidden_size;
  for (int64_t g = 0; g < model.recurrences; ++g) {
    for (int64_t row = 0; row < some.batch(); ++row) {
      const int64_t from = rows[static_cast<size_t>(row)];
      for (int64_t t = 0; t < some.length(row); ++t) {
        const int64_t token_a = g * batch.tokens() + batch.token(t, from);
        const int64_t token_b = g * some.tokens() + some.token(t, row);
        check_same_row("grad_gates", base_back.grad_gates, token_a, back.grad_gates, token_b,
                       model.sizes.gradients * hidden);
      }
      for (int64_t t = 0; g == 0 && t < some.length(row); ++t) {
        check_same_row("grad_input", base_back.grad_input, batch.token(t, from), back.grad_input, some.token(t, row),
                       model.all_inputs());
      }
      const int64_t row_a = g * batch.batch() + from;
      const int64_t row_b = g * some.batch() + row;
      check_same_row("grad_h0", base_back.grad_h0, row_a, back.grad_h0, row_b, hidden);
      check_same_row("grad_c0", base_back.grad_c0, row_a, back.grad_c0, row_b, hidden);
    }
  }
}

template <typename T>
void check_bits(Cell cell, bool masks, const Sizes& sizes, Layout layout, Random& random) {
  ModelOptions options;
  options.cell = cell;
  options.recurrences = sizes.recurrences;
  options.input_size = sizes.input_size;
  options.hidden_size = sizes.hidden_size;
  options.head_width = sizes.head_width;
  const RnnModel<T> model(options, random);
  const bool dense = layout == Layout::dense;
  RnnBatch<T> batch(model,
                    dense ? std::vector<int64_t>(static_cast<size_t>(sizes.batch), sizes.steps)
                          : ragged(sizes.batch, sizes.steps, random),
                    layout, random.flip(), random.flip(), random);
  if (masks) batch.add_masks(model, random);
  const std::vector<int64_t> rows = all_rows(sizes.batch);
  const Context context(kTypeName<T>, " cell ", static_cast<int>(cell), masks ? " masks" : "", " G=", sizes.recurrences,
                        " I=", sizes.input_size, " H=", sizes.hidden_size, " B=", sizes.batch, " T=", sizes.steps,
                        " C=", sizes.head_width, " layout ", static_cast<int>(layout));

  const RnnResult<T> base = run_forward(model, batch, {}, serial());
  check_finite(base);
  for (const NamedExecutor& named : executors()) {
    for (const bool prepacked : {false, true}) {
      const Context how(named.name, prepacked ? ", prepacked weights" : "");
      Asked asked;
      asked.prepacked = prepacked;
      check_same(model, batch, base, rows, batch, run_forward(model, batch, asked, named.executor));
    }
  }

  for (int mask = 0; mask < 32; ++mask) {
    Asked asked;
    asked.output = (mask & 1) != 0;
    asked.saved = (mask & 2) != 0;
    asked.heads = (mask & 4) != 0;
    asked.mean = (mask & 8) != 0;
    asked.max = (mask & 16) != 0;
    const Context how("asked for", asked.output ? " output" : "", asked.saved ? " gates and cells" : "",
                      asked.heads ? " heads" : "", asked.mean ? " mean" : "", asked.max ? " max" : "");
    check_same(model, batch, base, rows, batch, run_forward(model, batch, asked, mask % 2 ? serial() : threads<2>()));
  }

  const Gradients<T> gradients(model, batch, true, true, true, random);
  const BackwardResult<T> back = check_backward_bits(model, batch, base, gradients);
  const auto check_rows = [&](const std::vector<int64_t>& some, Layout in, const Executor& executor) {
    check_some(model, batch, base, gradients, back, some, in, executor);
  };
  for (const int64_t row : rows) check_rows({row}, row % 2 == 0 ? Layout::dense : Layout::padded, threads<2>());
  std::vector<int64_t> odd;
  for (const int64_t row : rows) {
    if (row % 2 == 1) odd.push_back(row);
  }
  check_rows(odd, Layout::packed, threads<3>());
  check_rows({rows.begin(), rows.begin() + (sizes.batch + 1) / 2}, Layout::padded, serial());
  check_rows({rows.begin() + sizes.batch / 2, rows.end()}, Layout::packed, threads<2>());
  if (dense) {
    check_rows(rows, Layout::packed, serial());
    check_rows(rows, Layout::padded, threads<5>());
    check_rows(odd, Layout::dense, threads<2>());
  }

  // The batch may count sequences that have no token.
  if (!dense && !masks) {
    RnnBatch<T> longer(model, batch, rows, layout);
    longer.lengths.insert(longer.lengths.end(), {0, 0});
    longer.h0 = Buffer<T>();
    longer.c0 = Buffer<T>();
    RnnBatch<T> same(model, batch, rows, layout);
    same.h0 = Buffer<T>();
    same.c0 = Buffer<T>();
    const Context how("two more sequences, empty");
    check_same(model, longer, run_forward(model, longer, {}, threads<5>()), rows, same,
               run_forward(model, same, {}, serial()));
  }

  // What is not a number stays in its own sequence.
  RnnBatch<T> broken(model, batch, rows, layout);
  broken.input[broken.token(0, 0) * model.all_inputs()] = std::numeric_limits<T>::quiet_NaN();
  broken.input[broken.token(broken.length(1) - 1, 1) * model.all_inputs()] = std::numeric_limits<T>::infinity();
  const RnnResult<T> broken_result = run_forward(model, broken, {}, threads<2>());
  CHECK(std::isnan(broken_result.output[broken.token(0, 0) * model.all_hidden()]));
  if (sizes.batch > 2) {
    const std::vector<int64_t> others(rows.begin() + 2, rows.end());
    const Context how("beside what is not a number");
    check_same(model, broken, broken_result, others, RnnBatch<T>(model, batch, others, Layout::packed),
               run_forward(model, RnnBatch<T>(model, batch, others, Layout::packed), {}, serial()));
  }
}

template <typename T>
void same_bits_always() {
  Random random(2);
  for (const Layout layout : {Layout::dense, Layout::packed, Layout::padded}) {
    for (size_t i = 0; i < kSizes.size(); ++i) {
      if (kSizes[i].hidden_size > 100 && layout != Layout::packed) continue;  // they take long
      check_bits<T>(Cell::lstm, false, kSizes[i], layout, random);
      const Cell others[] = {Cell::gru, Cell::rnn_tanh, Cell::rnn_relu};
      check_bits<T>(others[i % 3], false, kSizes[i], layout, random);
    }
  }
}

// With recurrent dropout and zoneout, and of normalised cells.
template <typename T>
void variants() {
  Random random(4);
  const Cell plain[] = {Cell::lstm, Cell::gru, Cell::rnn_tanh, Cell::rnn_relu};
  const Cell normalised[] = {Cell::normalised_lstm, Cell::normalised_gru, Cell::normalised_rnn_tanh,
                             Cell::normalised_rnn_relu};
  for (size_t i = 0; i < kSizes.size(); ++i) {
    const Layout layout = static_cast<Layout>(i % 3);
    check_bits<T>(plain[i % 4], true, kSizes[i], layout, random);
    if (kSizes[i].hidden_size > 300) continue;
    check_bits<T>(normalised[i % 4], false, kSizes[i], layout, random);
    check_bits<T>(normalised[(i + 1) % 4], true, kSizes[i], layout, random);
  }
}

// Columns [first, first + width) of an array of rows.
template <typename T>
Buffer<T> take_columns(const Buffer<T>& from, int64_t row_width, int64_t first, int64_t width) {
  const int64_t rows = from.size() / row_width;
  Buffer<T> to(rows * width);
  for (int64_t row = 0; row < rows; ++row) std::copy_n(&from[row * row_width + first], width, &to[row * width]);
  return to;
}

// Encoders side by side, each with its own input, have the bits they have alone.
template <typename T>
void inputs_side_by_side() {
  Random random(3);
  struct SideBySide {
    int64_t inputs, readers, input_size, hidden_size;
  };
  for (const auto& [P, readers, I, H] :
       {SideBySide{2, 1, 3, 5}, SideBySide{3, 2, 1, 7}, SideBySide{4, 2, 17, 16}, SideBySide{2, 3, 40, 33}}) {
    const Context context(kTypeName<T>, " P=", P, " G=", P * readers, " I=", I, " H=", H);
    ModelOptions options;
    options.recurrences = P * readers;
    options.input_size = I;
    options.hidden_size = H;
    options.inputs = P;
    const RnnModel<T> model(options, random);
    const RnnBatch<T> batch(model, ragged(9, 11, random), Layout::packed, false, false, random);
    const Gradients<T> gradients(model, batch, true, false, false, random);
    options.recurrences = readers;
    options.inputs = 1;
    RnnModel<T> alone(options, random);
    RnnBatch<T> own(alone, batch.lengths, Layout::packed, false, false, random);
    const int64_t part = readers * H;
    for (const NamedExecutor& named : executors()) {
      const Context how(named.name);
      const RnnResult<T> all = run_forward(model, batch, {}, named.executor);
      const BackwardResult<T> all_back = run_backward(model, batch, all, gradients, {}, named.executor);
      for (int64_t p = 0; p < P; ++p) {
        for (int64_t r = 0; r < readers; ++r) {
          const size_t from = static_cast<size_t>(p * readers + r);
          const size_t to = static_cast<size_t>(r);
          alone.w_ih[to] = take_columns(model.w_ih[from], 1, 0, 1);
          alone.w_hh[to] = take_columns(model.w_hh[from], 1, 0, 1);
          alone.b_ih[to] = take_columns(model.b_ih[from], 1, 0, 1);
          alone.b_hh[to] = take_columns(model.b_hh[from], 1, 0, 1);
          alone.reverse[to] = model.reverse[from];
        }
        own.input = take_columns(batch.input, P * I, p * I, I);
        const RnnResult<T> result = run_forward(alone, own, {}, serial());
        Gradients<T> own_gradients;
        own_gradients.output = take_columns(gradients.output, P * part, p * part, part);
        const BackwardResult<T> back = run_backward(alone, own, result, own_gradients, {}, serial());
        const auto check_same = [&](const char* name, const Buffer<T>& a, const Buffer<T>& b) {
          CHECK(a.size() == b.size());
          check_same_row(name, a, 0, b, 0, b.size());
        };
        check_same("output", take_columns(all.output, P * part, p * part, part), result.output);
        check_same("grad_input", take_columns(all_back.grad_input, P * I, p * I, I), back.grad_input);
        for (int64_t r = 0; r < readers; ++r) {
          const size_t g = static_cast<size_t>(p * readers + r);
          check_same("gradient of w_ih", all_back.w_ih[g], back.w_ih[static_cast<size_t>(r)]);
          check_same("gradient of w_hh", all_back.w_hh[g], back.w_hh[static_cast<size_t>(r)]);
          check_same("gradient of the biases", all_back.bias[g], back.bias[static_cast<size_t>(r)]);
        }
      }
    }
  }
}

}  // namespace
}  // namespace pymtl::test

int main() {
  using namespace pymtl::test;
  return run_tests({
      {"the same bits always, float", same_bits_always<float>},
      {"the same bits always, double", same_bits_always<double>},
      {"variants, float", variants<float>},
      {"variants, double", variants<double>},
      {"inputs side by side, float", inputs_side_by_side<float>},
      {"inputs side by side, double", inputs_side_by_side<double>},
  });
}
