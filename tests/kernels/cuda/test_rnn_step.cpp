// The CUDA kernels of one step, run on the host with products made here, beside the CPU's kernels in double: all cells
// with and without masks, forward and backward.
#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "../check.h"
#include "../rnn_case.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/rnn_step.h"

namespace pymtl::test {
namespace {

using cuda::RnnStepBackward;
using cuda::RnnStepForward;
using cuda::RnnSteps;

constexpr std::array<Cell, 8> kCells = {Cell::lstm,
                                        Cell::gru,
                                        Cell::rnn_tanh,
                                        Cell::rnn_relu,
                                        Cell::normalised_lstm,
                                        Cell::normalised_gru,
                                        Cell::normalised_rnn_tanh,
                                        Cell::normalised_rnn_relu};

void check_near(const char* name, double actual, double expected, int64_t at, double size) {
  CHECK(std::abs(actual - expected) <= 1e-11 * (size + std::abs(expected)), name, at, actual, expected);
}

void check_all_near(const char* name, const Buffer<double>& actual, const Buffer<double>& expected) {
  CHECK(actual.size() == expected.size(), name, actual.size(), expected.size());
  for (int64_t i = 0; i < std::min(actual.size(), expected.size()); ++i) {
    check_near(name, actual[i], expected[i], i, 1.0);
  }
}

// All weights of one kind side by side, or null.
Buffer<double> joined(const std::vector<Buffer<double>>& parts) {
  if (!parts.front()) return {};
  Buffer<double> all(static_cast<int64_t>(parts.size()) * parts.front().size());
  int64_t at = 0;
  for (const Buffer<double>& part : parts) at = std::copy_n(part.data(), part.size(), all.data() + at) - all.data();
  return all;
}

Buffer<double> zeros(int64_t count) {
  Buffer<double> all(count);
  std::fill(all.begin(), all.end(), 0.0);
  return all;
}

Buffer<double> copy_or_zeros(const Buffer<double>& given, int64_t count) {
  Buffer<double> all = zeros(count);
  if (given) std::copy_n(given.data(), count, all.data());
  return all;
}

struct Problem {
  RnnModel<double> model;
  RnnBatch<double> batch;
  Gradients<double> gradients;
  Buffer<int64_t> ends;
  Buffer<double> w_hh, b_ih, b_hh, g_hh, g_c, b_c, projected;
  RnnResult<double> expected;
  BackwardResult<double> expected_back;

  Problem(const ModelOptions& options, std::vector<int64_t> lengths, Layout layout, bool states, bool masks,
          Random& random)
      : model(options, random),
        batch(model, std::move(lengths), layout, states, states, random),
        w_hh(joined(model.w_hh)),
        b_ih(joined(model.b_ih)),
        b_hh(joined(model.b_hh)),
        g_hh(joined(model.g_hh)),
        g_c(joined(model.g_c)),
        b_c(joined(model.b_c)) {
    if (masks) batch.add_masks(model, random);
    gradients = Gradients<double>(model, batch, true, states, states, random);
    if (batch.batch_sizes) {
      ends = Buffer<int64_t>(batch.steps());
      std::copy_n(batch.starts.data() + 1, batch.steps(), ends.data());
    }
    expected = run_forward(model, batch, {}, serial());
    expected_back = run_backward(model, batch, expected, gradients, {}, serial());
    project();
  }

  // A normalised cell's input is that of its gates, as it is.
  void project() {
    const int64_t rows = model.sizes.gates * model.hidden_size;
    const int64_t width = model.recurrences * rows;
    projected = Buffer<double>(batch.tokens() * width);
    for (int64_t token = 0; token < batch.tokens(); ++token) {
      for (int64_t g = 0; g < model.recurrences; ++g) {
        for (int64_t row = 0; row < rows; ++row) {
          double& sum = projected[token * width + g * rows + row];
          const int64_t input = token * model.all_inputs();
          sum = model.sizes.normalised ? batch.input[input + g * rows + row] : 0.0;
          if (model.sizes.normalised) continue;
          const int64_t reads = g / (model.recurrences / model.inputs) * model.input_size;
          for (int64_t k = 0; k < model.input_size; ++k) {
            sum += model.w_ih[static_cast<size_t>(g)][row * model.input_size + k] * batch.input[input + reads + k];
          }
        }
      }
    }
  }

  RnnSteps steps(int64_t first, int64_t count) const {
    uint32_t reverse = 0;
    for (int64_t k = 0; k < count; ++k) {
      if (model.reverse[static_cast<size_t>(first + k)] != 0) reverse |= uint32_t{1} << k;
    }
    return {model.cell,
            model.recurrences,
            first,
            count,
            reverse,
            batch.steps(),
            batch.batch(),
            batch.tokens(),
            model.hidden_size,
            batch.batch_sizes.data(),
            ends.data()};
  }

  RnnNorm<double> norm() const { return {g_hh.data(), g_c.data(), b_c.data()}; }

  // result [count, B, columns of W_hh or of its transpose] = operand times that.
  void multiply(const RnnSteps& at, const double* operand, bool across, Buffer<double>& result) const {
    const int64_t H = model.hidden_size;
    const int64_t rows = model.sizes.gates * H;
    for (int64_t row = 0; row < at.count * at.batch; ++row) {
      const double* const weight = w_hh.data() + (at.first + row / at.batch) * rows * H;
      for (int64_t n = 0; n < (across ? rows : H); ++n) {
        double sum = 0.0;
        for (int64_t k = 0; k < (across ? H : rows); ++k) {
          sum += operand[row * (across ? H : rows) + k] * (across ? weight[n * H + k] : weight[k * H + n]);
        }
        result[row * (across ? rows : H) + n] = sum;
      }
    }
  }

  // The recurrences in two parts, where there are two.
  template <typename TimeLoop>
  void in_parts(const TimeLoop& loop) const {
    const int64_t half = (model.recurrences + 1) / 2;
    loop(steps(0, half));
    if (half < model.recurrences) loop(steps(half, model.recurrences - half));
  }

  void check_forward(bool train) const {
    const int64_t H = model.hidden_size;
    const int64_t states = batch.batch() * model.all_hidden();
    const int64_t reserve = sizes_of(model.cell).reserve_with(static_cast<bool>(batch.zoneout_h));
    Buffer<double> h = copy_or_zeros(batch.h0, states);
    Buffer<double> c = model.sizes.has_cell ? copy_or_zeros(batch.c0, states) : Buffer<double>();
    Buffer<double> operand;
    if (batch.dropout) {
      operand = Buffer<double>(states);
      for (int64_t i = 0; i < states; ++i) operand[i] = h[i] * batch.dropout[i];
    }
    Buffer<double> output(batch.tokens() * model.all_hidden());
    Buffer<double> gates, cells;
    if (train && reserve > 0) gates = Buffer<double>(batch.tokens() * reserve * model.all_hidden());
    if (train && model.sizes.has_cell) cells = Buffer<double>(batch.tokens() * model.all_hidden());
    in_parts([&](const RnnSteps& at) {
      Buffer<double> sums(at.count * at.batch * model.sizes.gates * H);
      const double* const multiplied = (batch.dropout ? operand.data() : h.data()) + at.first * at.batch * H;
      for (int64_t step = 0; step < at.steps; ++step) {
        multiply(at, multiplied, true, sums);
        cuda::rnn_step_forward(RnnStepForward<double>{at, projected.data(), b_ih.data(), b_hh.data(), norm(),
                                                      batch.masks(model), sums.data(), h.data(), operand.data(),
                                                      c.data(), output.data(), gates.data(), cells.data()},
                               step, nullptr);
      }
    });
    check_all_near("output", output, expected.output);
    check_all_near("h_n", h, expected.h_n);
    if (model.sizes.has_cell) check_all_near("c_n", c, expected.c_n);
    if (gates) check_all_near("gates", gates, expected.gates);
    if (cells) check_all_near("cells", cells, expected.cells);
  }

  void check_backward() const {
    const int64_t H = model.hidden_size;
    const int64_t states = batch.batch() * model.all_hidden();
    const int64_t each = model.sizes.gradients * H;
    Buffer<double> grad_h = copy_or_zeros(gradients.h_n, states);
    Buffer<double> grad_c = model.sizes.has_cell ? copy_or_zeros(gradients.c_n, states) : Buffer<double>();
    Buffer<double> grad_h0(states);
    Buffer<double> grad_gates(batch.tokens() * model.recurrences * each);
    Buffer<double> before(batch.tokens() * model.all_hidden());
    in_parts([&](const RnnSteps& at) {
      Buffer<double> operand = zeros(at.count * at.batch * model.sizes.gates * H);
      Buffer<double> product = zeros(at.count * at.batch * H);
      const RnnStepBackward<double> args{at,
                                         norm(),
                                         batch.masks(model),
                                         batch.h0.data(),
                                         batch.c0.data(),
                                         expected.output.data(),
                                         expected.gates.data(),
                                         expected.cells.data(),
                                         gradients.output.data(),
                                         product.data(),
                                         grad_h.data(),
                                         grad_c.data(),
                                         operand.data(),
                                         grad_gates.data(),
                                         before.data()};
      for (int64_t step = at.steps - 1; step >= 0; --step) {
        cuda::rnn_step_backward(args, step, nullptr);
        multiply(at, operand.data(), false, product);
      }
      cuda::rnn_step_initial_gradient(args, grad_h0.data(), nullptr);
    });
    check_all_near("grad_h0", grad_h0, expected_back.grad_h0);
    if (model.sizes.has_cell) check_all_near("grad_c0", grad_c, expected_back.grad_c0);
    const int64_t first_hidden = (model.sizes.normalised ? model.sizes.gates : 0) + (model.sizes.gates == 3 ? 1 : 0);
    for (int64_t g = 0; g < model.recurrences; ++g) {
      for (int64_t k = 0; k < each; ++k) {
        double sum = 0.0;
        for (int64_t token = 0; token < batch.tokens(); ++token) {
          const double grad = grad_gates[(token * model.recurrences + g) * each + k];
          const int64_t there = (g * batch.tokens() + token) * each + k;
          check_near("grad_gates", grad, expected_back.grad_gates[there], there, 1.0);
          sum += grad;
        }
        check_near("bias", sum, expected_back.bias[static_cast<size_t>(g)][k], k, 1.0);
      }
      // What was multiplied shows in the gradient of W_hh.
      for (int64_t row = 0; row < model.sizes.gates * H; ++row) {
        for (int64_t unit = 0; unit < H; ++unit) {
          double sum = 0.0;
          for (int64_t token = 0; token < batch.tokens(); ++token) {
            sum += grad_gates[(token * model.recurrences + g) * each + first_hidden * H + row] *
                   before[token * model.all_hidden() + g * H + unit];
          }
          check_near("w_hh", sum, expected_back.w_hh[static_cast<size_t>(g)][row * H + unit], row * H + unit, 1.0);
        }
      }
    }
  }
};

struct Sizes {
  int64_t recurrences, input_size, hidden_size, batch, steps;
};

void test_steps_are_the_cpus() {
  Random random(1);
  for (const Sizes& sizes : {Sizes{1, 1, 1, 1, 1}, {2, 3, 7, 4, 6}, {3, 5, 40, 3, 5}, {2, 2, 33, 9, 2}}) {
    for (const Cell cell : kCells) {
      for (const Layout layout : {Layout::dense, Layout::packed, Layout::padded}) {
        for (const bool masks : {false, true}) {
          const Context context("G ", sizes.recurrences, " H ", sizes.hidden_size, " B ", sizes.batch, " cell ",
                                static_cast<int>(cell), " layout ", static_cast<int>(layout), masks ? " masks" : "");
          const std::vector<int64_t> dense(static_cast<size_t>(sizes.batch), sizes.steps);
          const Problem problem({.cell = cell,
                                 .recurrences = sizes.recurrences,
                                 .input_size = sizes.input_size,
                                 .hidden_size = sizes.hidden_size,
                                 .b_ih = random.flip(),
                                 .b_hh = random.flip()},
                                layout == Layout::dense ? dense : ragged(sizes.batch, sizes.steps, random), layout,
                                random.flip(), masks, random);
          problem.check_forward(true);
          problem.check_forward(false);
          problem.check_backward();
        }
      }
    }
  }
}

void test_more_units_than_threads() {
  Random random(2);
  for (const Cell cell : kCells) {
    const Problem problem({.cell = cell, .recurrences = 2, .input_size = 2, .hidden_size = 300}, {2, 1}, Layout::packed,
                          true, true, random);
    problem.check_forward(true);
    problem.check_backward();
  }
}

}  // namespace
}  // namespace pymtl::test

int main() {
  using namespace pymtl::test;
  return run_tests({
      {"steps are the CPU's", test_steps_are_the_cpus},
      {"more units than threads", test_more_units_than_threads},
  });
}
