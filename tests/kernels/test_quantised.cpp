// Weights kept in fewer bits than what is computed with: in bfloat16 the bits of rounded weights, in 8-bit integers the
// formulas of rnn.h, from step to step with the kernel's own h.
#include <cmath>

#include "kernels/rnn.h"
#include "rnn_case.h"

namespace pymtl::test {
namespace {

float widened(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// A model whose matrices are the numbers of `narrow`, which holds them.
struct NarrowModel {
  RnnModel<float> model;
  std::vector<Buffer<BFloat16>> halves;
  std::vector<Buffer<int8_t>> integers;
  std::vector<Buffer<float>> scales;
  std::vector<NarrowWeights> narrow;

  NarrowModel(const ModelOptions& options, WeightFormat format, Random& random) : model(options, random) {
    for (int64_t g = 0; g < model.recurrences; ++g) {
      NarrowWeights weights{};
      const auto keep = [&](Buffer<float>& matrix, int64_t rows, const void*& numbers, const float*& scale) {
        if (!matrix) return;
        const int64_t columns = matrix.size() / rows;
        if (format == WeightFormat::bfloat16) {
          halves.push_back(uniform<BFloat16>(matrix.size(), random));
          for (int64_t i = 0; i < matrix.size(); ++i) matrix[i] = widened(halves.back()[i]);
          numbers = halves.back().data();
          return;
        }
        integers.push_back(Buffer<int8_t>(matrix.size()));
        scales.push_back(Buffer<float>(rows));
        for (int64_t row = 0; row < rows; ++row) {
          const bool zeros = random.below(8) == 0;
          scales.back()[row] = zeros ? 0.0f : 0.02f / std::sqrt(static_cast<float>(columns)) * (1 + random.below(3));
          for (int64_t k = 0; k < columns; ++k) {
            // The ends of the range often: that is where sums could overflow.
            const int64_t any = random.below(3) == 0 ? (random.flip() ? 127 : -127) : random.below(255) - 127;
            integers.back()[row * columns + k] = static_cast<int8_t>(zeros ? 0 : any);
          }
        }
        numbers = integers.back().data();
        scale = scales.back().data();
      };
      const int64_t rows = model.sizes.gates * model.hidden_size;
      keep(model.w_ih[static_cast<size_t>(g)], rows, weights.w_ih, weights.scale_ih);
      keep(model.w_hh[static_cast<size_t>(g)], rows, weights.w_hh, weights.scale_hh);
      weights.b_ih = model.b_ih[static_cast<size_t>(g)].data();
      weights.b_hh = model.b_hh[static_cast<size_t>(g)].data();
      narrow.push_back(weights);
    }
  }
};

ModelOptions any_options(Random& random, Cell cell) {
  const auto any = [&](const std::vector<int64_t>& of) {
    return of[static_cast<size_t>(random.below(static_cast<int64_t>(of.size())))];
  };
  ModelOptions options;
  options.cell = cell;
  options.recurrences = any({1, 2, 4});
  options.input_size = any({1, 2, 3, 4, 5, 15, 16, 17, 33, 64, 130});
  options.hidden_size = any({1, 2, 3, 7, 8, 15, 16, 17, 33, 64, 70, 129});
  options.inputs = random.flip() ? options.recurrences : 1;
  options.b_ih = random.flip();
  options.b_hh = random.flip();
  options.head_width = any({0, 1, 7, 64});
  return options;
}

RnnBatch<float> any_batch(const RnnModel<float>& model, Random& random) {
  const std::vector<int64_t> batches = {1, 2, 3, 5, 7, 13};
  const std::vector<int64_t> steps = {1, 2, 9};
  const int64_t batch = batches[static_cast<size_t>(random.below(6))];
  const int64_t T = steps[static_cast<size_t>(random.below(3))];
  const Layout layout = random.flip() ? Layout::packed : Layout::dense;
  const std::vector<int64_t> lengths =
      layout == Layout::dense ? std::vector<int64_t>(static_cast<size_t>(batch), T) : ragged(batch, T, random);
  return RnnBatch<float>(model, lengths, layout, random.flip(), random.flip(), random);
}

void check_all_bits(const RnnModel<float>& model, const RnnBatch<float>& batch, const RnnResult<float>& a,
                    const RnnResult<float>& b) {
  check_finite(a);
  check_same(model, batch, a, all_rows(batch.batch()), batch, b);
}

constexpr Cell kPlainCells[] = {Cell::lstm, Cell::gru, Cell::rnn_tanh, Cell::rnn_relu};
constexpr Cell kAllCells[] = {Cell::lstm,
                              Cell::gru,
                              Cell::rnn_tanh,
                              Cell::rnn_relu,
                              Cell::normalised_lstm,
                              Cell::normalised_gru,
                              Cell::normalised_rnn_tanh,
                              Cell::normalised_rnn_relu};

void bfloat16_weights() {
  Random random(31);
  for (int64_t number = 0; number < 160; ++number) {
    const ModelOptions options = any_options(random, kAllCells[number % 8]);
    const Context context("bfloat16 weights, cell ", number % 8, " G=", options.recurrences, " I=", options.input_size,
                          " H=", options.hidden_size);
    const NarrowModel narrow(options, WeightFormat::bfloat16, random);
    RnnBatch<float> batch = any_batch(narrow.model, random);
    if (random.flip()) batch.add_masks(narrow.model, random);
    Asked asked;
    const RnnResult<float> expected = run_forward(narrow.model, batch, asked, serial());
    asked.format = WeightFormat::bfloat16;
    asked.narrow = narrow.narrow.data();
    const NamedExecutor any = any_executor(random);
    check_all_bits(narrow.model, batch, run_forward(narrow.model, batch, asked, any.executor), expected);
  }
}

// W v of one row of W, by the formulas of rnn.h.
float int8_product(const int8_t* weights, float scale, const float* v, int64_t depth) {
  float top = 0, bottom = 0;
  for (int64_t k = 0; k < depth; ++k) top = std::max(top, v[k]), bottom = std::min(bottom, v[k]);
  const float half = 0.5f * top - 0.5f * bottom;
  if (half < 1e-30f) return 0;
  const float inverse = 127.5f / half;
  const auto zero = static_cast<int64_t>(std::nearbyint(-bottom * inverse));
  int64_t sum = 0;
  for (int64_t k = 0; k < depth; ++k) {
    const float scaled = v[k] * inverse;
    const auto number = static_cast<int64_t>(std::nearbyint(scaled)) + zero;
    sum += (std::clamp<int64_t>(number, 0, 255) - zero) * weights[k];
  }
  return static_cast<float>(sum) * (scale * (half / 127.5f));
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// Every token's h and c from those before it.
void check_steps(const NarrowModel& narrow, const RnnBatch<float>& batch, const RnnResult<float>& result) {
  const RnnModel<float>& model = narrow.model;
  const int64_t H = model.hidden_size, I = model.input_size, gates = model.sizes.gates;
  double error = 0;
  for (int64_t g = 0; g < model.recurrences; ++g) {
    const size_t own = static_cast<size_t>(g);
    const NarrowWeights& weights = narrow.narrow[own];
    const float* const input = batch.input.data() + g / (model.recurrences / model.inputs) * I;
    for (int64_t row = 0; row < batch.batch(); ++row) {
      std::vector<float> h(static_cast<size_t>(H)), c(static_cast<size_t>(H));
      const int64_t state = (g * batch.batch() + row) * H;
      for (int64_t u = 0; u < H; ++u) {
        if (batch.h0) h[static_cast<size_t>(u)] = batch.h0[state + u];
        if (batch.c0) c[static_cast<size_t>(u)] = batch.c0[state + u];
      }
      for (int64_t k = 0; k < batch.length(row); ++k) {
        const int64_t token = batch.walked(k, row, model.reverse[own] != 0);
        const float* const output = result.output.data() + token * model.all_hidden() + g * H;
        for (int64_t u = 0; u < H; ++u) {
          double x[4], q[4];
          for (int64_t gate = 0; gate < gates; ++gate) {
            const int64_t at = gate * H + u;
            x[gate] = int8_product(static_cast<const int8_t*>(weights.w_ih) + at * I, weights.scale_ih[at],
                                   input + token * model.all_inputs(), I) +
                      (weights.b_ih != nullptr ? weights.b_ih[at] : 0.0f);
            q[gate] =
                int8_product(static_cast<const int8_t*>(weights.w_hh) + at * H, weights.scale_hh[at], h.data(), H) +
                (weights.b_hh != nullptr ? weights.b_hh[at] : 0.0f);
          }
          double expected = 0;
          const size_t unit = static_cast<size_t>(u);
          if (model.cell == Cell::lstm) {
            const double before = c[unit];
            const double now = sigmoid(x[1] + q[1]) * before + sigmoid(x[0] + q[0]) * std::tanh(x[2] + q[2]);
            const float cell = result.cells[(g * batch.tokens() + token) * H + u];
            error = std::max(error, std::abs(now - cell) / (1 + std::abs(now)));
            c[unit] = cell;
            expected = sigmoid(x[3] + q[3]) * std::tanh(now);
          } else if (model.cell == Cell::gru) {
            const double z = sigmoid(x[1] + q[1]);
            const double n = std::tanh(x[2] + sigmoid(x[0] + q[0]) * q[2]);
            expected = (1 - z) * n + z * h[unit];
          } else {
            const double sum = x[0] + q[0];
            expected = model.cell == Cell::rnn_tanh ? std::tanh(sum) : std::max(sum, 0.0);
          }
          error = std::max(error, std::abs(expected - output[u]) / (1 + std::abs(expected)));
        }
        for (int64_t u = 0; u < H; ++u) h[static_cast<size_t>(u)] = output[u];
      }
    }
  }
  CHECK(error < 2e-6, error);
}

void int8_weights() {
  Random random(32);
  for (int64_t number = 0; number < 120; ++number) {
    const ModelOptions options = any_options(random, kPlainCells[number % 4]);
    const Context context("int8 weights, cell ", number % 4, " G=", options.recurrences, " I=", options.input_size,
                          " H=", options.hidden_size);
    const NarrowModel narrow(options, WeightFormat::int8, random);
    const RnnBatch<float> batch = any_batch(narrow.model, random);
    Asked asked;
    asked.format = WeightFormat::int8;
    asked.narrow = narrow.narrow.data();
    const RnnResult<float> result = run_forward(narrow.model, batch, asked, serial());
    check_finite(result);
    check_steps(narrow, batch, result);
  }
}

// Alone, in any part of a batch, by any executor, with teams, masks and all cells.
void int8_invariance() {
  Random random(33);
  for (int64_t number = 0; number < 80; ++number) {
    ModelOptions options = any_options(random, kAllCells[number % 8]);
    if (number % 8 == 0) options.hidden_size = 272;  // units enough for teams
    const Context context("int8 invariance, cell ", number % 8, " G=", options.recurrences, " I=", options.input_size,
                          " H=", options.hidden_size);
    const NarrowModel narrow(options, WeightFormat::int8, random);
    RnnBatch<float> batch = any_batch(narrow.model, random);
    if (random.flip()) batch.add_masks(narrow.model, random);
    Asked asked;
    asked.format = WeightFormat::int8;
    asked.narrow = narrow.narrow.data();
    const RnnResult<float> expected = run_forward(narrow.model, batch, asked, serial());
    const NamedExecutor any = any_executor(random);
    check_all_bits(narrow.model, batch, run_forward(narrow.model, batch, asked, any.executor), expected);
    const std::vector<int64_t> rows = {random.below(batch.batch())};
    const RnnBatch<float> alone(narrow.model, batch, rows, Layout::packed);
    check_same(narrow.model, batch, expected, rows, alone, run_forward(narrow.model, alone, asked, serial()));
  }
}

}  // namespace
}  // namespace pymtl::test

int main() {
  using namespace pymtl::test;
  return run_tests(
      {{"bfloat16 weights", bfloat16_weights}, {"int8 weights", int8_weights}, {"int8 invariance", int8_invariance}});
}
