// Mean, maximum and attention over tokens against plain loops, and the pooling fused into the LSTM against them.
#include "bounded.h"
#include "check.h"
#include "kernels/pooling.h"
#include "rnn_case.h"

namespace pymtl::test {
namespace {

template <typename T>
struct Pooled {
  Buffer<T> values;
  Buffer<int64_t> tokens;  // where each maximum came from; null for the mean
};

template <typename T>
Pooled<T> run_pool(const RnnShape& shape, const Buffer<bool>& reverse, Pooling kind, const Buffer<T>& input,
                   const Executor& executor) {
  const int64_t count = shape.batch * shape.recurrences * shape.hidden_size;
  Pooled<T> pooled{Buffer<T>(count), kind == Pooling::max ? Buffer<int64_t>(count) : Buffer<int64_t>()};
  const Pool<T> args{shape, reverse.data(), kind, input.data(), pooled.values.data(), pooled.tokens.data()};
  pool_forward(args, executor);
  return pooled;
}

Buffer<bool> directions(int64_t recurrences, Random& random) {
  Buffer<bool> reverse(recurrences);
  for (bool& flag : reverse) flag = random.flip();
  return reverse;
}

// The first token, in the order of the time loop, that holds a sequence's maximum of a column; NaN is above all.
template <typename T>
int64_t largest_token(const RnnBatch<T>& batch, bool backward, const Buffer<T>& input, int64_t width, int64_t row,
                      int64_t column) {
  int64_t best = batch.walked(0, row, backward);
  for (int64_t k = 1; k < batch.length(row); ++k) {
    const int64_t token = batch.walked(k, row, backward);
    const T most = input[best * width + column];
    const T value = input[token * width + column];
    if (value > most || (std::isnan(value) && !std::isnan(most))) best = token;
  }
  return best;
}

template <typename T>
bool same_number(T a, T b) {
  return a == b || (std::isnan(a) && std::isnan(b));
}

template <typename T>
void check_forward(const RnnModel<T>& model, const RnnBatch<T>& batch, const Buffer<bool>& reverse,
                   const Buffer<T>& input, Random& random) {
  const int64_t H = model.hidden_size;
  const int64_t GH = model.all_hidden();
  const RnnShape shape = batch.shape(model);
  const Pooled<T> mean = run_pool(shape, reverse, Pooling::mean, input, serial());
  const Pooled<T> max = run_pool(shape, reverse, Pooling::max, input, serial());
  const auto check_max = [&](const Pooled<T>& pooled, const Buffer<T>& of, int64_t row, int64_t column) {
    const int64_t best = largest_token(batch, reverse[column / H], of, GH, row, column);
    const int64_t at = row * GH + column;
    CHECK(same_number(pooled.values[at], of[best * GH + column]), row, column, pooled.values[at]);
    CHECK(pooled.tokens[at] == best, row, column, pooled.tokens[at], best);
  };
  std::vector<Bounded<T>> expected;
  for (int64_t row = 0; row < batch.batch(); ++row) {
    for (int64_t column = 0; column < GH; ++column) {
      std::vector<Bounded<T>> values;
      for (int64_t t = 0; t < batch.length(row); ++t) values.push_back(input[batch.token(t, row) * GH + column]);
      expected.push_back(mean_of(values));
      check_max(max, input, row, column);
    }
  }
  check_within("mean", mean.values, expected);

  const NamedExecutor other = any_executor(random);
  const Context with(other.name);
  const Pooled<T> mean_again = run_pool(shape, reverse, Pooling::mean, input, other.executor);
  const Pooled<T> max_again = run_pool(shape, reverse, Pooling::max, input, other.executor);
  CHECK(same_bits(mean.values.data(), mean_again.values.data(), mean.values.size()));
  CHECK(same_bits(max.values.data(), max_again.values.data(), max.values.size()));
  CHECK(same_bits(max.tokens.data(), max_again.tokens.data(), max.tokens.size()));

  // What is not finite shows, in its own sequence and column.
  const T infinity = std::numeric_limits<T>::infinity();
  for (const T broken : {std::numeric_limits<T>::quiet_NaN(), infinity, -infinity}) {
    const Context how("beside ", broken);
    Buffer<T> holed(input.size());
    std::copy_n(input.data(), input.size(), holed.data());
    holed[batch.token(batch.length(0) / 2, 0) * GH + GH - 1] = broken;
    const Pooled<T> holed_mean = run_pool(shape, reverse, Pooling::mean, holed, serial());
    const Pooled<T> holed_max = run_pool(shape, reverse, Pooling::max, holed, serial());
    CHECK(same_number(holed_mean.values[GH - 1], broken), holed_mean.values[GH - 1]);
    check_max(holed_max, holed, 0, GH - 1);
    for (int64_t at = 0; at < mean.values.size(); ++at) {
      if (at == GH - 1) continue;
      CHECK(same_bits(&holed_mean.values[at], &mean.values[at], 1), at);
      CHECK(same_bits(&holed_max.values[at], &max.values[at], 1), at);
      CHECK(holed_max.tokens[at] == max.tokens[at], at, holed_max.tokens[at]);
    }
  }
}

// Sums that grow long: without compensation the mean would lose digits.
template <typename T>
void long_sequences() {
  Random random(2);
  ModelOptions options;
  options.recurrences = 2;
  options.hidden_size = 5;
  const RnnModel<T> model(options, random);
  const RnnBatch<T> batch(model, {20000, 19999, 3000}, Layout::packed, false, false, random);
  const Buffer<bool> reverse = directions(options.recurrences, random);
  check_forward(model, batch, reverse, uniform<T>(batch.tokens() * model.all_hidden(), random, 0.5, 1), random);
}

template <typename T>
void check_backward(const RnnModel<T>& model, const RnnBatch<T>& batch, const Buffer<bool>& reverse,
                    const Buffer<T>& input, Random& random) {
  const int64_t GH = model.all_hidden();
  const RnnShape shape = batch.shape(model);
  const Pooled<T> max = run_pool(shape, reverse, Pooling::max, input, serial());
  const Buffer<T> grad = uniform<T>(batch.batch() * GH, random);
  for (const Pooling kind : {Pooling::mean, Pooling::max}) {
    Buffer<T> expected(batch.tokens() * GH);
    for (int64_t row = 0; row < batch.batch(); ++row) {
      for (int64_t t = 0; t < batch.length(row); ++t) {
        for (int64_t column = 0; column < GH; ++column) {
          const int64_t token = batch.token(t, row);
          const T above = grad[row * GH + column];
          const bool here = max.tokens[row * GH + column] == token;
          expected[token * GH + column] =
              kind == Pooling::mean ? above / static_cast<T>(batch.length(row)) : (here ? above : T(0));
        }
      }
    }
    const NamedExecutor any = any_executor(random);
    const Context how("backward, ", kind == Pooling::mean ? "mean, " : "max, ", any.name);
    Buffer<T> actual(batch.tokens() * GH);
    const PoolBackward<T> args{shape, kind, grad.data(), kind == Pooling::max ? max.tokens.data() : nullptr,
                               actual.data()};
    pool_backward(args, any.executor);
    CHECK(same_bits(actual.data(), expected.data(), expected.size()));
  }
}

template <typename T>
void check_fused(const RnnModel<T>& model, const RnnBatch<T>& batch, Random& random) {
  Buffer<bool> reverse(model.recurrences);
  for (int64_t g = 0; g < model.recurrences; ++g) reverse[g] = model.reverse[static_cast<size_t>(g)] != 0;
  const NamedExecutor any = any_executor(random);
  const Context how("fused, ", any.name);
  const RnnResult<T> result = run_forward(model, batch, {}, any.executor);
  check_finite(result);
  const Pooled<T> mean = run_pool(batch.shape(model), reverse, Pooling::mean, result.output, serial());
  const Pooled<T> max = run_pool(batch.shape(model), reverse, Pooling::max, result.output, serial());
  CHECK(same_bits(result.mean.data(), mean.values.data(), mean.values.size()));
  CHECK(same_bits(result.max.data(), max.values.data(), max.values.size()));
}

template <typename T>
struct Attended {
  Buffer<T> output, grad_input, grad_scores;
};

template <typename T>
Attended<T> run_attention(const RnnShape& shape, int64_t heads, const Buffer<T>& input, const Buffer<T>& scores,
                          const Buffer<T>& grad, const Executor& executor) {
  Attended<T> found{Buffer<T>(grad.size()), Buffer<T>(input.size()), Buffer<T>(scores.size())};
  const AttentionPool<T> args{shape, heads, input.data(), scores.data(), found.output.data()};
  attention_pool_forward(args, executor);
  attention_pool_backward(
      AttentionPoolBackward<T>{args, grad.data(), found.grad_input.data(), found.grad_scores.data()}, executor);
  return found;
}

template <typename T>
void check_attention(const RnnBatch<T>& batch, const RnnShape& shape, int64_t heads, Random& random) {
  const int64_t F = shape.hidden_size;
  const int64_t slice = F / heads;
  const Buffer<T> input = uniform<T>(batch.tokens() * F, random);
  const Buffer<T> scores = uniform<T>(batch.tokens() * heads, random, -5, 5);
  const Buffer<T> grad = uniform<T>(batch.batch() * F, random);
  const Attended<T> found = run_attention(shape, heads, input, scores, grad, serial());
  std::vector<Bounded<T>> output(static_cast<size_t>(grad.size()), Bounded<T>(T(0)));
  std::vector<Bounded<T>> grad_input(static_cast<size_t>(input.size()));
  std::vector<Bounded<T>> grad_scores(static_cast<size_t>(scores.size()));
  for (int64_t row = 0; row < batch.batch(); ++row) {
    for (int64_t j = 0; j < heads; ++j) {
      std::vector<int64_t> tokens;
      for (int64_t t = 0; t < batch.length(row); ++t) tokens.push_back(batch.token(t, row));
      T most = scores[tokens[0] * heads + j];
      for (const int64_t token : tokens) most = std::max(most, scores[token * heads + j]);
      std::vector<Bounded<T>> weights, of_weights, products;
      for (const int64_t token : tokens) {
        weights.push_back(exponential_of(Bounded<T>(scores[token * heads + j]) - Bounded<T>(most)));
      }
      const Bounded<T> sum = sum_of(weights);
      for (size_t t = 0; t < tokens.size(); ++t) {
        weights[t] = quotient(weights[t], sum);
        std::vector<Bounded<T>> parts;
        for (int64_t f = j * slice; f < (j + 1) * slice; ++f) {
          const Bounded<T> dy(grad[row * F + f]);
          const Bounded<T> x(input[tokens[t] * F + f]);
          Bounded<T>& to = output[static_cast<size_t>(row * F + f)];
          to = to + weights[t] * x;
          grad_input[static_cast<size_t>(tokens[t] * F + f)] = weights[t] * dy;
          parts.push_back(dy * x);
        }
        of_weights.push_back(sum_of(parts));
        products.push_back(weights[t] * of_weights.back());
      }
      const Bounded<T> mean = sum_of(products);
      for (size_t t = 0; t < tokens.size(); ++t) {
        grad_scores[static_cast<size_t>(tokens[t] * heads + j)] = weights[t] * (of_weights[t] - mean);
      }
    }
  }
  check_within("attention", found.output, output);
  check_within("attention's gradient of the input", found.grad_input, grad_input);
  check_within("attention's gradient of the scores", found.grad_scores, grad_scores);
  const NamedExecutor any = any_executor(random);
  const Attended<T> again = run_attention(shape, heads, input, scores, grad, any.executor);
  CHECK(same_bits(found.output.data(), again.output.data(), found.output.size()), any.name);
  CHECK(same_bits(found.grad_input.data(), again.grad_input.data(), found.grad_input.size()), any.name);
  CHECK(same_bits(found.grad_scores.data(), again.grad_scores.data(), found.grad_scores.size()), any.name);
}

template <typename T>
void attention_cases() {
  Random random(3);
  for (const int64_t features : {1, 6, 33, 256}) {
    for (const int64_t heads : {1, 3}) {
      for (const int64_t batch_size : {1, 7, 20}) {
        for (const int64_t steps : {1, 9, 50}) {
          if (features % heads != 0) continue;
          const Context context(kTypeName<T>, " F=", features, " J=", heads, " B=", batch_size, " T=", steps);
          ModelOptions options;
          options.hidden_size = features;
          const RnnModel<T> model(options, random);
          const RnnBatch<T> batch(model, ragged(batch_size, steps, random), Layout::packed, false, false, random);
          check_attention(batch, batch.shape(model), heads, random);
        }
      }
    }
  }
}

template <typename T>
void all_cases() {
  Random random(1);
  largest_part_of_bound = 0;
  for (const int64_t hidden : {1, 3, 7, 16, 17, 33, 64}) {
    for (const int64_t recurrences : {1, 2, 4}) {
      for (const int64_t batch_size : {1, 2, 7, 13, 40}) {
        for (const int64_t steps : {1, 2, 9, 50}) {
          const Layout layout = static_cast<Layout>(random.below(3));
          const Context context(kTypeName<T>, " G=", recurrences, " H=", hidden, " B=", batch_size, " T=", steps,
                                " layout ", static_cast<int>(layout));
          ModelOptions options;
          options.recurrences = recurrences;
          options.hidden_size = hidden;
          const RnnModel<T> model(options, random);
          const RnnBatch<T> batch(model,
                                  layout == Layout::dense ? std::vector<int64_t>(static_cast<size_t>(batch_size), steps)
                                                          : ragged(batch_size, steps, random),
                                  layout, true, true, random);
          const Buffer<bool> reverse = directions(recurrences, random);
          Buffer<T> input = uniform<T>(batch.tokens() * model.all_hidden(), random, -2, 2);
          // Few different values, so that a maximum is often met twice.
          if (random.flip())
            std::transform(input.begin(), input.end(), input.begin(), [](T x) { return std::round(x) + T(0.25); });
          check_forward(model, batch, reverse, input, random);
          check_backward(model, batch, reverse, input, random);
          if (steps < 50 || batch_size < 3) check_fused(model, batch, random);
        }
      }
    }
  }
  std::printf("         largest error: %.2f of its bound\n", largest_part_of_bound);
}

}  // namespace
}  // namespace pymtl::test

int main() {
  using namespace pymtl::test;
  return run_tests({
      {"mean and maximum, float", all_cases<float>},
      {"mean and maximum, double", all_cases<double>},
      {"attention, float", attention_cases<float>},
      {"attention, double", attention_cases<double>},
      {"long sequences, float", long_sequences<float>},
      {"long sequences, double", long_sequences<double>},
  });
}
