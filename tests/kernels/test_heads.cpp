// heads_forward and heads_backward against plain loops in long double, and the projection fused into the LSTM
// against the former.
#include "bounded.h"
#include "check.h"
#include "kernels/heads.h"
#include "rnn_case.h"

namespace pymtl::test {
namespace {

template <typename T>
Buffer<T> run_heads(int64_t rows, int64_t parts, int64_t depth, int64_t width, const T* input, const T* weight,
                    const T* bias, const Executor& executor, bool prepacked = false) {
  Buffer<T> output(rows * width);
  Heads<T> args{rows, parts, depth, width, input, weight, bias, output.data()};
  Buffer<T> panels;
  if (prepacked) {
    panels = Buffer<T>(static_cast<int64_t>(heads_prepacked_size(args)), 64);
    heads_prepack(args, panels.data());
    args.prepacked = panels.data();
    CHECK(heads_workspace(args, executor) == 0);
  }
  Workspace workspace = workspace_of(heads_workspace(args, executor));
  heads_forward(args, workspace.data(), executor);
  return output;
}

template <typename T>
void check_case(int64_t rows, int64_t parts, int64_t depth, int64_t width, Random& random) {
  const Context context(kTypeName<T>, " N=", rows, " G=", parts, " K=", depth, " C=", width);
  const Buffer<T> input = uniform<T>(rows * parts * depth, random);
  const Buffer<T> weight = uniform<T>(width * parts * depth, random);
  const Buffer<T> bias = random.flip() ? uniform<T>(width, random) : Buffer<T>();
  const auto run = [&](int64_t first, int64_t count, const Executor& executor, bool prepacked = false) {
    return run_heads(count, parts, depth, width, input.data() + first * parts * depth, weight.data(), bias.data(),
                     executor, prepacked);
  };
  const Buffer<T> output = run(0, rows, serial());

  std::vector<Bounded<T>> expected;
  for (int64_t n = 0; n < rows; ++n) {
    const T* const row = input.data() + n * parts * depth;
    const std::vector<Bounded<T>> x(row, row + parts * depth);
    for (int64_t c = 0; c < width; ++c) {
      Bounded<T> sum;
      for (int64_t part = 0; part < parts; ++part) {
        sum = sum + add_products(Bounded<T>(), weight.data() + (c * parts + part) * depth, &x[part * depth], depth);
      }
      if (bias) sum = sum + Bounded<T>(bias[c]);
      expected.push_back(sum);
    }
  }
  check_within("output", output, expected);

  const NamedExecutor other = any_executor(random);
  const Context how(other.name);
  const Buffer<T> again = run(0, rows, other.executor, random.flip());
  CHECK(same_bits(again.data(), output.data(), output.size()));
  // A row's result depends on that row alone.
  for (int64_t n = 0; n < rows; n += 1 + rows / 8) {
    const Buffer<T> alone = run(n, 1, serial());
    CHECK(same_bits(alone.data(), output.data() + n * width, width), n);
    const int64_t some = std::min<int64_t>(rows - n, 1 + n % 7);
    const Buffer<T> few = run(n, some, serial());
    CHECK(same_bits(few.data(), output.data() + n * width, some * width), n, some);
  }
}

template <typename T>
void against_reference() {
  Random random(1);
  largest_part_of_bound = 0;
  for (const int64_t width : {1, 7, 8, 16, 17, 64, 65, 72, 130}) {
    for (const int64_t depth : {1, 3, 16, 33, 64}) {
      for (const int64_t parts : {1, 2, 4}) {
        for (const int64_t rows : {0, 1, 2, 5, 12, 25, 49, 100}) {
          // Every size with every other would take long: all of one size, or one of all.
          if (random.below(3) == 0) check_case<T>(rows, parts, depth, width, random);
        }
      }
    }
  }
  check_case<T>(3, 2, 300, 1000, random);
  std::printf("         largest error: %.2f of its bound\n", largest_part_of_bound);
}

template <typename T>
struct HeadsGradients {
  Buffer<T> input, weight, bias;
};

template <typename T>
HeadsGradients<T> run_backward(int64_t rows, int64_t features, int64_t width, const T* grad, const T* input,
                               const T* weight, bool wants_input, bool wants_weight, bool wants_bias,
                               const Executor& executor) {
  HeadsGradients<T> result{wants_input ? Buffer<T>(rows * features) : Buffer<T>(),
                           wants_weight ? Buffer<T>(width * features) : Buffer<T>(),
                           wants_bias ? Buffer<T>(width) : Buffer<T>()};
  const HeadsBackward<T> args{
      rows, features, width, grad, input, weight, result.input.data(), result.weight.data(), result.bias.data()};
  Workspace workspace = workspace_of(heads_backward_workspace(args, executor));
  heads_backward(args, workspace.data(), executor);
  return result;
}

template <typename T>
void check_backward(int64_t rows, int64_t features, int64_t width, Random& random) {
  const Context context(kTypeName<T>, " N=", rows, " F=", features, " C=", width);
  const Buffer<T> grad = uniform<T>(rows * width, random);
  const Buffer<T> input = uniform<T>(rows * features, random);
  const Buffer<T> weight = uniform<T>(width * features, random);
  const auto run = [&](bool x, bool w, bool b, const Executor& executor) {
    return run_backward(rows, features, width, grad.data(), input.data(), weight.data(), x, w, b, executor);
  };
  const HeadsGradients<T> result = run(true, true, true, serial());

  std::vector<Bounded<T>> of_input(static_cast<size_t>(rows * features));
  std::vector<Bounded<T>> of_weight(static_cast<size_t>(width * features));
  std::vector<Bounded<T>> of_bias(static_cast<size_t>(width));
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t c = 0; c < width; ++c) {
      const Bounded<T> dy(grad[n * width + c]);
      of_bias[c] = of_bias[c] + dy;
      for (int64_t f = 0; f < features; ++f) {
        of_input[n * features + f] = of_input[n * features + f] + dy * Bounded<T>(weight[c * features + f]);
        of_weight[c * features + f] = of_weight[c * features + f] + dy * Bounded<T>(input[n * features + f]);
      }
    }
  }
  check_within("gradient of input", result.input, of_input);
  check_within("gradient of weight", result.weight, of_weight);
  check_within("gradient of bias", result.bias, of_bias);

  const NamedExecutor other = any_executor(random);
  const Context how(other.name);
  const bool x = random.flip(), w = random.flip(), b = random.flip();
  const HeadsGradients<T> again = run(x, w, b, other.executor);
  CHECK(!x || same_bits(again.input.data(), result.input.data(), result.input.size()));
  CHECK(!w || same_bits(again.weight.data(), result.weight.data(), result.weight.size()));
  CHECK(!b || same_bits(again.bias.data(), result.bias.data(), result.bias.size()));
}

template <typename T>
void backward() {
  Random random(3);
  largest_part_of_bound = 0;
  for (const int64_t width : {1, 7, 16, 24, 25, 72, 130}) {
    for (const int64_t features : {1, 5, 16, 66, 128, 250}) {
      for (const int64_t rows : {1, 2, 15, 16, 127, 128, 129, 300}) {
        if (random.below(4) == 0) check_backward<T>(rows, features, width, random);
      }
    }
  }
  check_backward<T>(3, 20, 1500, random);
  std::printf("         largest error: %.2f of its bound\n", largest_part_of_bound);
}

template <typename T>
void check_fused(const ModelOptions& options, int64_t batch_size, int64_t steps, Random& random) {
  const Context context(kTypeName<T>, " G=", options.recurrences, " H=", options.hidden_size, " B=", batch_size,
                        " T=", steps, " C=", options.head_width);
  const RnnModel<T> model(options, random);
  const Layout layout = static_cast<Layout>(random.below(3));
  const std::vector<int64_t> lengths = layout == Layout::dense
                                           ? std::vector<int64_t>(static_cast<size_t>(batch_size), steps)
                                           : ragged(batch_size, steps, random);
  const RnnBatch<T> batch(model, lengths, layout, true, true, random);
  Asked asked;
  asked.saved = false;
  asked.mean = random.flip();
  asked.prepacked = random.flip();
  const RnnResult<T> result = run_forward(model, batch, asked, any_executor(random).executor);
  CHECK(not_finite(result.logits) == 0);
  const Buffer<T> logits = run_heads(batch.tokens(), model.recurrences, model.hidden_size, model.head_width,
                                     result.output.data(), model.head_weight.data(), model.head_bias.data(), serial());
  CHECK(same_bits(result.logits.data(), logits.data(), logits.size()));
}

template <typename T>
void fused() {
  Random random(2);
  for (const int64_t hidden : {1, 3, 16, 17, 33, 64}) {
    for (const int64_t width : {1, 7, 64, 72, 130}) {
      for (const int64_t recurrences : {1, 2, 4}) {
        for (const int64_t batch : {1, 2, 5, 13, 30}) {
          ModelOptions options;
          options.recurrences = recurrences;
          options.input_size = 5;
          options.hidden_size = hidden;
          options.head_width = width;
          options.head_bias = random.flip();
          check_fused<T>(options, batch, batch == 1 ? 60 : 9, random);
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
      {"against long double, float", against_reference<float>},
      {"against long double, double", against_reference<double>},
      {"gradients, float", backward<float>},
      {"gradients, double", backward<double>},
      {"fused into the LSTM, float", fused<float>},
      {"fused into the LSTM, double", fused<double>},
  });
}
