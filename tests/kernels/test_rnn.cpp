// rnn_forward and rnn_backward against plain loops in long double, and against each other.
#include <numeric>

#include "bounded.h"
#include "check.h"
#include "kernels/rnn.h"
#include "rnn_case.h"

namespace pymtl::test {
namespace {

const std::vector<int64_t> kHiddenSizes = {1, 3, 7, 16, 17, 33, 64};
const std::vector<int64_t> kInputSizes = {1, 5, 16, 40};
const std::vector<int64_t> kBatches = {1, 2, 3, 6, 7, 13};
const std::vector<int64_t> kSteps = {1, 2, 9};
const std::vector<int64_t> kRecurrences = {1, 2, 4};
const std::vector<int64_t> kHeadWidths = {0, 1, 7, 64, 72, 130};

long double value_of(long double x) { return x; }
template <typename T>
long double value_of(const Bounded<T>& x) {
  return x.value;
}

double largest_part_of_plain = 0;

// max|ours - truth| <= 2 max|plain - truth| + 4 eps max|truth|, the project's promise. Of a tensor with enough
// elements: the largest of a few errors of the plain loop may be small by luck.
template <typename T, typename Truth>
void check_no_worse(const char* array, const Buffer<T>& actual, const std::vector<T>& plain,
                    const std::vector<Truth>& truths) {
  constexpr int64_t kEnough = 64;
  if (actual.size() < kEnough) return;
  long double error = 0, plain_error = 0, size = 0;
  for (size_t i = 0; i < truths.size(); ++i) {
    const long double truth = value_of(truths[i]);
    error = std::max(error, std::abs(actual[static_cast<int64_t>(i)] - truth));
    plain_error = std::max(plain_error, std::abs(plain[i] - truth));
    size = std::max(size, std::abs(truth));
  }
  const long double allowed = 2 * plain_error + 4 * std::numeric_limits<T>::epsilon() * size;
  CHECK(error <= allowed, array, error, plain_error, size);
  if (allowed > 0) largest_part_of_plain = std::max(largest_part_of_plain, static_cast<double>(error / allowed));
}

// ---------------------------------------------------------------------------------------------------------
// The forward reference: rnn.h's formulas, one sequence after another, in any arithmetic.

template <typename Value, typename T>
std::vector<Value> row_of(const Buffer<T>& array, int64_t row, int64_t width) {
  std::vector<Value> values(static_cast<size_t>(width));
  if (array) std::copy_n(array.data() + row * width, width, values.begin());
  return values;
}

// Row `row` of an array <- values.
template <typename Value>
void put_row(const std::vector<Value>& values, std::vector<Value>& array, int64_t row) {
  std::copy(values.begin(), values.end(), array.begin() + row * static_cast<int64_t>(values.size()));
}

template <typename Value>
struct Reference {
  std::vector<Value> output, h_n, c_n, gates, cells, logits, mean, max;
};

// With `forced`, every step starts from the state that the kernel wrote for the step before, and the heads
// and features from the states that it wrote: then a bound is of one step's rounding, however long the time loop.
template <typename Value, typename T>
Reference<Value> reference_forward(const RnnModel<T>& model, const RnnBatch<T>& batch, const RnnResult<T>* forced) {
  const int64_t G = model.recurrences;
  const int64_t I = model.input_size;
  const int64_t H = model.hidden_size;
  const int64_t B = batch.batch();
  const int64_t N = batch.tokens();
  const int64_t C = model.head_width;
  const auto zeros = [](int64_t count) { return std::vector<Value>(static_cast<size_t>(count)); };
  Reference<Value> r{zeros(N * G * H), zeros(B * G * H), zeros(B * G * H), zeros(N * 4 * G * H),
                     zeros(N * G * H), zeros(N * C),     zeros(B * G * H), zeros(B * G * H)};
  std::vector<Value> states = zeros(N * G * H);  // those the heads read
  for (int64_t g = 0; g < G; ++g) {
    const RnnWeights<T> weights = model.weights()[static_cast<size_t>(g)];
    for (int64_t row = 0; row < B; ++row) {
      std::vector<Value> h = row_of<Value>(batch.h0, g * B + row, H);
      std::vector<Value> c = row_of<Value>(batch.c0, g * B + row, H);
      std::vector<std::vector<Value>> walked(static_cast<size_t>(H));  // the states of each unit
      std::vector<Value> mean = zeros(H);
      std::vector<Value> max = zeros(H);
      std::vector<Value> gates = zeros(4 * H);
      for (int64_t k = 0; k < batch.length(row); ++k) {
        const int64_t token = batch.walked(k, row, weights.reverse);
        const std::vector<Value> x = row_of<Value>(batch.input, token, I);
        for (int64_t j = 0; j < 4 * H; ++j) {
          Value a{};
          if (weights.b_ih != nullptr) a = Value(weights.b_ih[j]);
          if (weights.b_hh != nullptr) a = a + Value(weights.b_hh[j]);
          a = add_products(a, weights.w_ih + j * I, x.data(), I);
          a = add_products(a, weights.w_hh + j * H, h.data(), H);
          gates[static_cast<size_t>(j)] = j / H == 2 ? tanh_of(a) : sigmoid_of(a);
        }
        for (size_t u = 0, n = static_cast<size_t>(H); u < n; ++u) {
          c[u] = gates[n + u] * c[u] + gates[u] * gates[2 * n + u];
          h[u] = gates[3 * n + u] * tanh_of(c[u]);
        }
        put_row(h, r.output, token * G + g);
        put_row(gates, r.gates, g * N + token);
        put_row(c, r.cells, g * N + token);
        if (forced != nullptr) {
          h = row_of<Value>(forced->output, token * G + g, H);
          c = row_of<Value>(forced->cells, g * N + token, H);
        }
        put_row(h, states, token * G + g);
        for (size_t u = 0; u < h.size(); ++u) {
          walked[u].push_back(h[u]);
          max[u] = k == 0 ? h[u] : largest(max[u], h[u]);
        }
      }
      for (size_t u = 0; u < mean.size(); ++u) mean[u] = mean_of(walked[u]);
      put_row(h, r.h_n, g * B + row);
      put_row(c, r.c_n, g * B + row);
      put_row(mean, r.mean, row * G + g);
      put_row(max, r.max, row * G + g);
    }
  }
  for (int64_t token = 0; token < N; ++token) {
    for (int64_t column = 0; column < C; ++column) {
      Value logit{};
      for (int64_t g = 0; g < G; ++g) {
        const T* const weight = model.head_weight.data() + (column * G + g) * H;
        logit = logit + add_products(Value{}, weight, &states[static_cast<size_t>((token * G + g) * H)], H);
      }
      if (model.head_bias) logit = logit + Value(model.head_bias[column]);
      r.logits[static_cast<size_t>(token * C + column)] = logit;
    }
  }
  return r;
}

// ---------------------------------------------------------------------------------------------------------
// The backward reference.

template <typename Value>
struct BackwardReference {
  std::vector<Value> grad_gates, grad_h0, grad_c0;
};

// From what the forward kernel saved, and the gradient of each state from the gates' gradients that the
// backward kernel wrote, so that the bounds are of one step's rounding.
template <typename T>
BackwardReference<Bounded<T>> reference_backward(const RnnModel<T>& model, const RnnBatch<T>& batch,
                                                 const RnnResult<T>& forward, const Gradients<T>& gradients,
                                                 const BackwardResult<T>& forced) {
  using Value = Bounded<T>;
  const int64_t G = model.recurrences;
  const int64_t H = model.hidden_size;
  const int64_t B = batch.batch();
  const int64_t N = batch.tokens();
  const Value one(1);
  const auto zeros = [](int64_t count) { return std::vector<Value>(static_cast<size_t>(count)); };
  BackwardReference<Value> r{zeros(N * 4 * G * H), zeros(B * G * H), zeros(B * G * H)};
  for (int64_t g = 0; g < G; ++g) {
    const RnnWeights<T> weights = model.weights()[static_cast<size_t>(g)];
    std::vector<T> columns(static_cast<size_t>(4 * H * H));  // W_hh^T
    for (int64_t j = 0; j < 4 * H; ++j) {
      for (int64_t u = 0; u < H; ++u) columns[static_cast<size_t>(u * 4 * H + j)] = weights.w_hh[j * H + u];
    }
    for (int64_t row = 0; row < B; ++row) {
      std::vector<Value> dh = row_of<Value>(gradients.h_n, g * B + row, H);
      std::vector<Value> dc = row_of<Value>(gradients.c_n, g * B + row, H);
      std::vector<Value> da = zeros(4 * H);
      for (int64_t k = batch.length(row) - 1; k >= 0; --k) {
        const bool first = k == 0;
        const int64_t token = batch.walked(k, row, weights.reverse);
        const int64_t before = first ? 0 : batch.walked(k - 1, row, weights.reverse);
        const std::vector<Value> gates = row_of<Value>(forward.gates, g * N + token, 4 * H);
        const std::vector<Value> cell = row_of<Value>(forward.cells, g * N + token, H);
        const std::vector<Value> c_before =
            first ? row_of<Value>(batch.c0, g * B + row, H) : row_of<Value>(forward.cells, g * N + before, H);
        const std::vector<Value> from_above = row_of<Value>(gradients.output, token * G + g, H);
        for (size_t u = 0, n = static_cast<size_t>(H); u < n; ++u) {
          const Value i = gates[u];
          const Value f = gates[n + u];
          const Value z = gates[2 * n + u];  // the gate called g elsewhere
          const Value o = gates[3 * n + u];
          const Value tanh_c = tanh_of(cell[u]);
          const Value grad_h = dh[u] + from_above[u];
          const Value grad_c = dc[u] + grad_h * o * (one - tanh_c * tanh_c);
          da[u] = grad_c * z * (i * (one - i));
          da[n + u] = grad_c * c_before[u] * (f * (one - f));
          da[2 * n + u] = grad_c * i * (one - z * z);
          da[3 * n + u] = grad_h * tanh_c * (o * (one - o));
          dc[u] = grad_c * f;
        }
        put_row(da, r.grad_gates, g * N + token);
        da = row_of<Value>(forced.grad_gates, g * N + token, 4 * H);
        for (size_t u = 0; u < dh.size(); ++u) {
          dh[u] = add_products(Value(), &columns[u * static_cast<size_t>(4 * H)], da.data(), 4 * H);
        }
      }
      put_row(dh, r.grad_h0, g * B + row);
      put_row(dc, r.grad_c0, g * B + row);
    }
  }
  return r;
}

// A sum of products over tokens. No order is promised: in any, each term passes through at most as many
// roundings as there are terms, and one of its own.
template <typename T>
Bounded<T> sum_over(const std::vector<T>& a, const std::vector<T>& b) {
  Bounded<T> sum;
  double size = 0;
  for (size_t n = 0; n < a.size(); ++n) {
    const long double product = static_cast<long double>(a[n]) * b[n];
    sum.value += product;
    size += std::abs(static_cast<double>(product));
  }
  const double count = static_cast<double>(a.size());
  sum.error = 1.01 * (count + 1) * Bounded<T>::kUnit * size + count * Bounded<T>::kTiny;
  return sum;
}

// The gradients of what the gates are products of, from the gates' gradients that the kernel wrote, within their
// bounds and no worse than sums of T in order of the tokens.
template <typename T>
void check_products(const RnnModel<T>& model, const RnnBatch<T>& batch, const RnnResult<T>& forward,
                    const BackwardResult<T>& back) {
  const int64_t I = model.input_size;
  const int64_t H = model.hidden_size;
  const int64_t G = model.recurrences;
  const int64_t N = batch.tokens();
  const size_t tokens = static_cast<size_t>(N);
  using Columns = std::vector<std::vector<T>>;  // one for each column of a matrix with a row for each token
  const auto columns = [&](int64_t width) { return Columns(static_cast<size_t>(width), std::vector<T>(tokens)); };
  Columns x = columns(I);
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t k = 0; k < I; ++k) x[k][n] = batch.input[n * I + k];
  }
  for (int64_t g = 0; g < G; ++g) {
    const bool reverse = model.reverse[static_cast<size_t>(g)] != 0;
    Columns da = columns(4 * H);
    Columns h_before = columns(H);
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t j = 0; j < 4 * H; ++j) da[j][n] = back.grad_gates[(g * N + n) * 4 * H + j];
    }
    for (int64_t row = 0; row < batch.batch(); ++row) {
      for (int64_t k = 0; k < batch.length(row); ++k) {
        const std::vector<T> h = k == 0 ? row_of<T>(batch.h0, g * batch.batch() + row, H)
                                        : row_of<T>(forward.output, batch.walked(k - 1, row, reverse) * G + g, H);
        for (int64_t u = 0; u < H; ++u) h_before[u][batch.walked(k, row, reverse)] = h[u];
      }
    }
    const auto check = [&](const char* name, const Buffer<T>& actual, const Columns& factors) {
      if (!actual) return;
      std::vector<Bounded<T>> expected;
      std::vector<T> plain;
      for (const std::vector<T>& gate : da) {
        for (const std::vector<T>& factor : factors) {
          expected.push_back(sum_over(gate, factor));
          plain.push_back(add_products(T(0), gate.data(), factor.data(), N));
        }
      }
      check_within(name, actual, expected);
      check_no_worse(name, actual, plain, expected);
    };
    check("gradient of w_ih", back.w_ih[g], x);
    check("gradient of w_hh", back.w_hh[g], h_before);
    check("gradient of the biases", back.bias[g], Columns(1, std::vector<T>(tokens, T(1))));
  }

  if (!back.grad_input) return;
  std::vector<Bounded<T>> expected;
  std::vector<T> plain;
  std::vector<T> da(static_cast<size_t>(G * 4 * H));
  std::vector<T> weight(da.size());
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t k = 0; k < I; ++k) {
      for (int64_t g = 0; g < G; ++g) {
        for (int64_t j = 0; j < 4 * H; ++j) {
          da[g * 4 * H + j] = back.grad_gates[(g * N + n) * 4 * H + j];
          weight[g * 4 * H + j] = model.w_ih[g][j * I + k];
        }
      }
      expected.push_back(sum_over(da, weight));
      plain.push_back(add_products(T(0), weight.data(), da.data(), G * 4 * H));
    }
  }
  check_within("gradient of the input", back.grad_input, expected);
  check_no_worse("gradient of the input", back.grad_input, plain, expected);
}

// ---------------------------------------------------------------------------------------------------------
// Every combination of sizes, with and without everything optional, forward and backward.

template <typename T>
void check_case(const ModelOptions& options, int64_t batch_size, int64_t steps, Random& random) {
  const RnnModel<T> model(options, random);
  const Layout layout = static_cast<Layout>(random.below(3));
  const bool even = layout == Layout::dense || random.below(4) == 0;
  const std::vector<int64_t> lengths =
      even ? std::vector<int64_t>(static_cast<size_t>(batch_size), steps) : ragged(batch_size, steps, random);
  const RnnBatch<T> batch(model, lengths, layout, random.flip(), random.flip(), random);
  Asked asked;
  asked.mean = random.flip();
  asked.max = random.flip();
  asked.prepacked = random.flip();
  const Context context(kTypeName<T>, " G=", options.recurrences, " I=", options.input_size, " H=", options.hidden_size,
                        " B=", batch_size, " T=", steps, " C=", options.head_width, " layout ",
                        static_cast<int>(layout), even ? " even" : " ragged", options.b_ih ? " b_ih" : "",
                        options.b_hh ? " b_hh" : "", batch.h0 ? " h0" : "", batch.c0 ? " c0" : "",
                        asked.prepacked ? " prepacked" : "", model.reverse[0] ? " first reverse" : "");
  const RnnResult<T> result = run_forward(model, batch, asked, serial());
  const Reference<Bounded<T>> expected = reference_forward<Bounded<T>>(model, batch, &result);
  check_within("output", result.output, expected.output);
  check_within("h_n", result.h_n, expected.h_n);
  check_within("c_n", result.c_n, expected.c_n);
  check_within("gates", result.gates, expected.gates);
  check_within("cells", result.cells, expected.cells);
  check_within("logits", result.logits, expected.logits);
  check_within("mean", result.mean, expected.mean);
  check_within("max", result.max, expected.max);

  const Gradients<T> gradients(model, batch, random.below(4) != 0, random.flip(), random.flip(), random);
  const Wanted wanted{random.flip(), random.flip(), random.flip(), random.flip(), random.flip(), random.flip()};
  const BackwardResult<T> back = run_backward(model, batch, result, gradients, wanted, serial());
  const BackwardReference<Bounded<T>> expected_back = reference_backward(model, batch, result, gradients, back);
  check_within("grad_gates", back.grad_gates, expected_back.grad_gates);
  check_within("grad_h0", back.grad_h0, expected_back.grad_h0);
  check_within("grad_c0", back.grad_c0, expected_back.grad_c0);
  if (random.below(3) == 0) check_products(model, batch, result, back);  // some cases are enough

  // The whole time loop at once, by the error that a plain loop in T makes. Some cases are enough.
  if (random.below(4) != 0) return;
  const Reference<long double> truth = reference_forward<long double, T>(model, batch, nullptr);
  const Reference<T> plain = reference_forward<T, T>(model, batch, nullptr);
  check_no_worse("output", result.output, plain.output, truth.output);
  check_no_worse("h_n", result.h_n, plain.h_n, truth.h_n);
  check_no_worse("c_n", result.c_n, plain.c_n, truth.c_n);
  check_no_worse("logits", result.logits, plain.logits, truth.logits);
  check_no_worse("mean", result.mean, plain.mean, truth.mean);
  check_no_worse("max", result.max, plain.max, truth.max);
}

template <typename T>
void against_reference() {
  largest_part_of_bound = 0;
  Random random(1);
  for (const int64_t hidden : kHiddenSizes) {
    for (const int64_t input : kInputSizes) {
      for (const int64_t batch : kBatches) {
        for (const int64_t steps : kSteps) {
          for (const int64_t recurrences : kRecurrences) {
            ModelOptions options;
            options.recurrences = recurrences;
            options.input_size = input;
            options.hidden_size = hidden;
            options.b_ih = random.flip();
            options.b_hh = random.flip();
            options.head_width = kHeadWidths[static_cast<size_t>(random.below(6))];
            options.head_bias = random.flip();
            check_case<T>(options, batch, steps, random);
          }
        }
      }
    }
  }
  // More tokens than a block of anything.
  for (const int64_t recurrences : kRecurrences) {
    ModelOptions options;
    options.recurrences = recurrences;
    options.input_size = 5;
    options.hidden_size = 17;
    options.head_width = 7;
    check_case<T>(options, 2, 150, random);
    check_case<T>(options, 50, 9, random);
  }
  std::printf("         largest error: %.2f of its bound, %.2f of what is allowed over a plain loop's\n",
              largest_part_of_bound, largest_part_of_plain);
}

// ---------------------------------------------------------------------------------------------------------
// The forward and the backward kernel together, by differences of a scalar.

void check_differences(Cell cell, bool masks) {
  Random random(3);
  ModelOptions options;
  options.cell = cell;
  options.recurrences = 2;
  options.input_size = 4;
  options.hidden_size = 5;
  const Context context("cell ", static_cast<int>(cell), masks ? " masks" : "");
  RnnModel<double> model(options, random);
  RnnBatch<double> batch(model, {4, 3, 3, 1}, Layout::padded, true, true, random);
  if (masks) batch.add_masks(model, random);
  const Gradients<double> gradients(model, batch, true, true, true, random);
  const auto loss = [&] {
    const RnnResult<double> result = run_forward(model, batch, {}, serial());
    double sum = 0;
    for (int64_t i = 0; i < result.output.size(); ++i) sum += result.output[i] * gradients.output[i];
    for (int64_t i = 0; i < result.h_n.size(); ++i) sum += result.h_n[i] * gradients.h_n[i];
    for (int64_t i = 0; i < result.c_n.size(); ++i) sum += result.c_n[i] * gradients.c_n[i];
    return sum;
  };
  // Fourth order: with this step both truncation and cancellation are below 1e-11 for values of this size. To normalise
  // is to divide by what may be small.
  const double kBound = model.sizes.normalised ? 1e-6 : 1e-10;
  const auto check_gradient = [&](const char* name, double& value, double gradient) {
    constexpr double kStep = 1e-3;
    const double given = value;
    const auto loss_at = [&](double offset) {
      value = given + offset;
      return loss();
    };
    const double near = loss_at(kStep) - loss_at(-kStep);
    const double far = loss_at(2 * kStep) - loss_at(-2 * kStep);
    value = given;
    const double difference = (8 * near - far) / (12 * kStep);
    CHECK(std::abs(difference - gradient) <= kBound * std::max(1.0, std::abs(gradient)), name, difference, gradient);
  };

  const BackwardResult<double> back =
      run_backward(model, batch, run_forward(model, batch, {}, serial()), gradients, {}, serial());
  const auto check_array = [&](const char* name, Buffer<double>& values, const Buffer<double>& gradient) {
    CHECK(values.size() == gradient.size(), name, values.size(), gradient.size());
    for (int64_t i = 0; i < values.size(); ++i) check_gradient(name, values[i], gradient[i]);
  };
  // Of the gradient of the biases, the part that is called so: which blocks, in the order of the array's rows.
  const auto blocks = [&](const Buffer<double>& all, const std::vector<int64_t>& of) {
    Buffer<double> part(static_cast<int64_t>(of.size()) * model.hidden_size);
    for (size_t k = 0; k < of.size(); ++k) {
      std::copy_n(all.data() + of[k] * model.hidden_size, model.hidden_size,
                  part.data() + static_cast<int64_t>(k) * model.hidden_size);
    }
    return part;
  };
  const auto from = [](int64_t first, int64_t count) {
    std::vector<int64_t> range(static_cast<size_t>(count));
    std::iota(range.begin(), range.end(), first);
    return range;
  };
  const int64_t gates = model.sizes.gates;
  const bool is_gru = gates == 3;
  const int64_t plain = is_gru ? 4 : gates;
  for (size_t g = 0; g < back.w_ih.size(); ++g) {
    if (!model.sizes.normalised) check_array("w_ih", model.w_ih[g], back.w_ih[g]);
    check_array("w_hh", model.w_hh[g], back.w_hh[g]);
    check_array("b_ih", model.b_ih[g], blocks(back.bias[g], is_gru ? std::vector<int64_t>{1, 2, 0} : from(0, gates)));
    check_array("b_hh", model.b_hh[g], blocks(back.bias[g], from(is_gru ? 1 : 0, gates)));
    if (!model.sizes.normalised) continue;
    check_array("g_hh", model.g_hh[g], blocks(back.bias[g], from(plain + gates, gates)));
    if (!model.sizes.has_cell) continue;
    check_array("g_c", model.g_c[g], blocks(back.bias[g], {plain + 2 * gates}));
    check_array("b_c", model.b_c[g], blocks(back.bias[g], {plain + 2 * gates + 1}));
  }
  check_array("input", batch.input, back.grad_input);
  check_array("h0", batch.h0, back.grad_h0);
  if (model.sizes.has_cell) check_array("c0", batch.c0, back.grad_c0);
}

void against_differences() {
  for (const Cell cell : {Cell::lstm, Cell::gru, Cell::rnn_tanh, Cell::normalised_lstm, Cell::normalised_gru,
                          Cell::normalised_rnn_tanh}) {
    for (const bool masks : {false, true}) check_differences(cell, masks);
  }
}

}  // namespace
}  // namespace pymtl::test

int main() {
  using namespace pymtl::test;
  return run_tests({
      {"against long double, float", against_reference<float>},
      {"against long double, double", against_reference<double>},
      {"against differences", against_differences},
  });
}
