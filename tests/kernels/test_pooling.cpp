// Mean and maximum over tokens against plain loops, and the pooling fused into the LSTM against them.
#include "bounded.h"
#include "check.h"
#include "kernels/pooling.h"
#include "lstm_case.h"

namespace pymtl::test {
namespace {

template <typename T>
struct Pooled {
  Buffer<T> values;
  Buffer<int64_t> tokens;  // where each maximum came from; null for the mean
};

template <typename T>
Pooled<T> run_pool(const LstmShape& shape, const Buffer<bool>& reverse, Pooling kind, const Buffer<T>& input,
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

template <typename T>
void check_forward(const LstmModel<T>& model, const LstmBatch<T>& batch, const Buffer<bool>& reverse,
                   const Buffer<T>& input) {
  const int64_t H = model.hidden_size;
  const int64_t GH = model.all_hidden();
  const LstmShape shape = batch.shape(model);
  const Pooled<T> mean = run_pool(shape, reverse, Pooling::mean, input, serial());
  const Pooled<T> max = run_pool(shape, reverse, Pooling::max, input, serial());
  std::vector<Bounded<T>> expected;
  for (int64_t row = 0; row < batch.batch(); ++row) {
    for (int64_t column = 0; column < GH; ++column) {
      const bool backward = reverse[column / H];
      Bounded<T> sum;
      int64_t best = batch.walked(0, row, backward);  // the first of equal ones, in the order of the walk
      for (int64_t k = 0; k < batch.length(row); ++k) {
        const int64_t token = batch.walked(k, row, backward);
        sum = sum + Bounded<T>(input[token * GH + column]);
        if (input[token * GH + column] > input[best * GH + column]) best = token;
      }
      expected.push_back(sum / static_cast<T>(batch.length(row)));
      const int64_t at = row * GH + column;
      CHECK(max.values[at] == input[best * GH + column], row, column, max.values[at], input[best * GH + column]);
      CHECK(max.tokens[at] == best, row, column, max.tokens[at], best);
    }
  }
  check_within("mean", mean.values, expected);

  for (const NamedExecutor& named : executors()) {
    const Context how(named.name);
    const Pooled<T> mean_again = run_pool(shape, reverse, Pooling::mean, input, named.executor);
    const Pooled<T> max_again = run_pool(shape, reverse, Pooling::max, input, named.executor);
    CHECK(same_bits(mean.values.data(), mean_again.values.data(), mean.values.size()));
    CHECK(same_bits(max.values.data(), max_again.values.data(), max.values.size()));
    CHECK(same_bits(max.tokens.data(), max_again.tokens.data(), max.tokens.size()));
  }

  // What is not a number shows, in its own sequence and column, and says where it was.
  if (batch.tokens() < 2) return;
  Buffer<T> broken(input.size());
  std::copy_n(input.data(), input.size(), broken.data());
  const int64_t token = batch.token(batch.length(0) - 1, 0);
  const int64_t column = GH - 1;
  broken[token * GH + column] = std::numeric_limits<T>::quiet_NaN();
  const Pooled<T> broken_mean = run_pool(shape, reverse, Pooling::mean, broken, serial());
  const Pooled<T> broken_max = run_pool(shape, reverse, Pooling::max, broken, serial());
  for (int64_t at = 0; at < mean.values.size(); ++at) {
    const bool here = at == column;
    CHECK(here ? std::isnan(broken_mean.values[at]) : same_bits(&broken_mean.values[at], &mean.values[at], 1), at);
    CHECK(here ? std::isnan(broken_max.values[at]) : same_bits(&broken_max.values[at], &max.values[at], 1), at);
    CHECK(broken_max.tokens[at] == (here ? token : max.tokens[at]), at, broken_max.tokens[at]);
  }
}

template <typename T>
void check_backward(const LstmModel<T>& model, const LstmBatch<T>& batch, const Buffer<bool>& reverse,
                    const Buffer<T>& input, Random& random) {
  const int64_t GH = model.all_hidden();
  const LstmShape shape = batch.shape(model);
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
    for (const NamedExecutor& named : executors()) {
      const Context how(kind == Pooling::mean ? "mean, " : "max, ", named.name);
      Buffer<T> actual(batch.tokens() * GH);
      const PoolBackward<T> args{shape, kind, grad.data(), kind == Pooling::max ? max.tokens.data() : nullptr,
                                 actual.data()};
      pool_backward(args, named.executor);
      CHECK(same_bits(actual.data(), expected.data(), expected.size()));
    }
  }
}

template <typename T>
void check_fused(const LstmModel<T>& model, const LstmBatch<T>& batch) {
  Buffer<bool> reverse(model.recurrences);
  for (int64_t g = 0; g < model.recurrences; ++g) reverse[g] = model.reverse[static_cast<size_t>(g)] != 0;
  for (const NamedExecutor& named : executors()) {
    const Context how("fused, ", named.name);
    const LstmResult<T> result = run_forward(model, batch, {}, named.executor);
    check_finite(result);
    const Pooled<T> mean = run_pool(batch.shape(model), reverse, Pooling::mean, result.output, serial());
    const Pooled<T> max = run_pool(batch.shape(model), reverse, Pooling::max, result.output, serial());
    CHECK(same_bits(result.mean.data(), mean.values.data(), mean.values.size()));
    CHECK(same_bits(result.max.data(), max.values.data(), max.values.size()));
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
          const LstmModel<T> model(options, random);
          const LstmBatch<T> batch(model,
                                   layout == Layout::dense
                                       ? std::vector<int64_t>(static_cast<size_t>(batch_size), steps)
                                       : ragged(batch_size, steps, random),
                                   layout, true, true, random);
          const Buffer<bool> reverse = directions(recurrences, random);
          Buffer<T> input = uniform<T>(batch.tokens() * model.all_hidden(), random, -2, 2);
          // Few different values, so that a maximum is often met twice.
          if (random.flip())
            std::transform(input.begin(), input.end(), input.begin(), [](T x) { return std::round(x) + T(0.25); });
          check_forward(model, batch, reverse, input);
          check_backward(model, batch, reverse, input, random);
          if (steps < 50 || batch_size < 3) check_fused(model, batch);
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
  });
}
