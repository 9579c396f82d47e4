// The LSTM and the heads in bfloat16 against the same in float, which test_rnn and test_heads judge: the inputs are
// the same numbers, so what differs is bfloat16's rounding of h, of what is saved for the backward pass and of results.
#include <algorithm>
#include <cmath>

#include "check.h"
#include "kernels/heads.h"
#include "kernels/rnn.h"
#include "rnn_case.h"

namespace pymtl::test {
namespace {

constexpr double kEpsilon = 0x1p-7;  // of bfloat16

float widened(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

float widened(float x) { return x; }

Buffer<float> widened(const Buffer<BFloat16>& from) {
  if (!from) return {};
  Buffer<float> to(from.size());
  for (int64_t i = 0; i < from.size(); ++i) to[i] = widened(from[i]);
  return to;
}

RnnModel<float> widened(const RnnModel<BFloat16>& model, const ModelOptions& options) {
  Random random(1);
  RnnModel<float> wide(options, random);
  for (size_t g = 0; g < model.w_ih.size(); ++g) {
    wide.w_ih[g] = widened(model.w_ih[g]);
    wide.w_hh[g] = widened(model.w_hh[g]);
    wide.b_ih[g] = widened(model.b_ih[g]);
    wide.b_hh[g] = widened(model.b_hh[g]);
  }
  wide.reverse = model.reverse;
  wide.head_weight = widened(model.head_weight);
  wide.head_bias = widened(model.head_bias);
  return wide;
}

RnnBatch<float> widened(const RnnBatch<BFloat16>& batch, const RnnModel<float>& model, Layout layout) {
  Random random(1);
  RnnBatch<float> wide(model, batch.lengths, layout, false, false, random);
  wide.input = widened(batch.input);
  wide.h0 = widened(batch.h0);
  wide.c0 = widened(batch.c0);
  return wide;
}

double largest_part = 0;

// max|actual - expected| <= factor eps max|expected|
template <typename T>
void check_close(const char* array, const Buffer<T>& actual, const Buffer<float>& expected, double factor) {
  CHECK(actual.size() == expected.size(), array, actual.size(), expected.size());
  double error = 0, size = 0;
  for (int64_t i = 0; i < actual.size(); ++i) {
    const double difference = std::abs(static_cast<double>(widened(actual[i])) - expected[i]);
    error = std::isnan(difference) ? INFINITY : std::max(error, difference);
    size = std::max(size, std::abs(static_cast<double>(expected[i])));
  }
  CHECK(error <= factor * kEpsilon * size, array, error, size);
  if (size > 0) largest_part = std::max(largest_part, error / (factor * kEpsilon * size));
}

void check_close(const RnnResult<BFloat16>& actual, const RnnResult<float>& expected) {
  check_close("output", actual.output, expected.output, 3);
  check_close("h_n", actual.h_n, expected.h_n, 3);
  check_close("c_n", actual.c_n, expected.c_n, 3);
  check_close("gates", actual.gates, expected.gates, 3);
  check_close("cells", actual.cells, expected.cells, 3);
  check_close("mean", actual.mean, expected.mean, 3);
  check_close("max", actual.max, expected.max, 3);
  check_close("logits", actual.logits, expected.logits, 3);
}

void check_same_bits(const RnnResult<BFloat16>& a, const RnnResult<BFloat16>& b) {
  CHECK(same_bits(a.output.data(), b.output.data(), a.output.size()));
  CHECK(same_bits(a.c_n.data(), b.c_n.data(), a.c_n.size()));
  CHECK(same_bits(a.gates.data(), b.gates.data(), a.gates.size()));
  CHECK(same_bits(a.cells.data(), b.cells.data(), a.cells.size()));
  CHECK(same_bits(a.logits.data(), b.logits.data(), a.logits.size()));
  CHECK(same_bits(a.mean.data(), b.mean.data(), a.mean.size()));
}

void lstm() {
  Random random(16);
  const std::vector<int64_t> sizes = {1, 2, 3, 15, 16, 17, 33, 64, 130};
  for (int64_t number = 0; number < 60; ++number) {
    const auto any = [&](const std::vector<int64_t>& of) {
      return of[static_cast<size_t>(random.below(static_cast<int64_t>(of.size())))];
    };
    ModelOptions options;
    options.recurrences = any({1, 2, 4});
    options.input_size = any(sizes);
    options.hidden_size = any(sizes);
    options.inputs = random.flip() ? options.recurrences : 1;
    options.b_ih = random.flip();
    options.b_hh = random.flip();
    options.head_width = any({0, 1, 7, 64, 72});
    options.head_bias = random.flip();
    const int64_t batch_size = any({1, 2, 7, 30});
    const int64_t steps = any({1, 2, 9});
    const Context context("G=", options.recurrences, " I=", options.input_size, " H=", options.hidden_size,
                          " C=", options.head_width, " B=", batch_size, " T=", steps);
    const RnnModel<BFloat16> model(options, random);
    const Layout layout = random.flip() ? Layout::packed : Layout::dense;
    const std::vector<int64_t> lengths = layout == Layout::dense
                                             ? std::vector<int64_t>(static_cast<size_t>(batch_size), steps)
                                             : ragged(batch_size, steps, random);
    const RnnBatch<BFloat16> batch(model, lengths, layout, random.flip(), random.flip(), random);
    const RnnModel<float> wide_model = widened(model, options);
    const RnnBatch<float> wide_batch = widened(batch, wide_model, layout);

    Asked asked;
    asked.prepacked = random.flip();
    const RnnResult<BFloat16> forward = run_forward(model, batch, asked, serial());
    const RnnResult<float> expected = run_forward(wide_model, wide_batch, asked, serial());
    check_close(forward, expected);
    check_same_bits(forward, run_forward(model, batch, asked, any_executor(random).executor));

    const Gradients<BFloat16> above(model, batch, true, random.flip(), random.flip(), random);
    Gradients<float> wide_above;
    wide_above.output = widened(above.output);
    wide_above.h_n = widened(above.h_n);
    wide_above.c_n = widened(above.c_n);
    const Wanted wanted;
    const BackwardResult<BFloat16> back =
        run_backward(model, batch, forward, above, wanted, any_executor(random).executor);
    const BackwardResult<float> wide_back =
        run_backward(wide_model, wide_batch, expected, wide_above, wanted, serial());
    check_close("grad_input", back.grad_input, wide_back.grad_input, 6);
    check_close("grad_h0", back.grad_h0, wide_back.grad_h0, 6);
    check_close("grad_c0", back.grad_c0, wide_back.grad_c0, 6);
    for (size_t g = 0; g < back.w_ih.size(); ++g) {
      check_close("w_ih", back.w_ih[g], wide_back.w_ih[g], 6);
      check_close("w_hh", back.w_hh[g], wide_back.w_hh[g], 6);
      check_close("bias", back.bias[g], wide_back.bias[g], 6);
    }
  }
  std::printf("largest error / allowed: %.2f\n", largest_part);
}

// More tokens than one block of the weights' gradients, whose sums are kept in float until the last.
void heads() {
  Random random(17);
  for (const int64_t rows : {1, 2, 127, 128, 129, 500, 501}) {
    for (const int64_t width : {1, 7, 72, 130}) {
      const int64_t parts = 1 + random.below(2);
      const int64_t depth = std::vector<int64_t>{1, 16, 33}[static_cast<size_t>(random.below(3))];
      const Context context("N=", rows, " C=", width, " parts=", parts, " K=", depth);
      const int64_t features = parts * depth;
      const Buffer<BFloat16> input = uniform<BFloat16>(rows * features, random);
      const Buffer<BFloat16> weight = uniform<BFloat16>(width * features, random);
      const Buffer<BFloat16> bias = random.flip() ? uniform<BFloat16>(width, random) : Buffer<BFloat16>();
      const Buffer<BFloat16> grad = uniform<BFloat16>(rows * width, random);
      const Buffer<float> wide_input = widened(input), wide_weight = widened(weight), wide_bias = widened(bias),
                          wide_grad = widened(grad);

      const auto project = [&]<typename T>(const Buffer<T>& x, const Buffer<T>& w, const Buffer<T>& b) {
        Buffer<T> output(rows * width);
        const Heads<T> args{rows, parts, depth, width, x.data(), w.data(), b.data(), output.data()};
        const Executor executor = any_executor(random).executor;
        Workspace workspace = workspace_of(heads_workspace(args, executor));
        heads_forward(args, workspace.data(), executor);
        return output;
      };
      check_close("output", project(input, weight, bias), project(wide_input, wide_weight, wide_bias), 1);

      const auto differentiate = [&]<typename T>(const Buffer<T>& dy, const Buffer<T>& x, const Buffer<T>& w) {
        std::vector<Buffer<T>> grads;
        grads.push_back(Buffer<T>(rows * features));
        grads.push_back(Buffer<T>(width * features));
        grads.push_back(Buffer<T>(width));
        const HeadsBackward<T> args{rows,     features,        width,           dy.data(),      x.data(),
                                    w.data(), grads[0].data(), grads[1].data(), grads[2].data()};
        const Executor executor = any_executor(random).executor;
        Workspace workspace = workspace_of(heads_backward_workspace(args, executor));
        heads_backward(args, workspace.data(), executor);
        return grads;
      };
      const std::vector<Buffer<BFloat16>> actual = differentiate(grad, input, weight);
      const std::vector<Buffer<float>> expected = differentiate(wide_grad, wide_input, wide_weight);
      check_close("grad_input", actual[0], expected[0], 1);
      check_close("grad_weight", actual[1], expected[1], 1);
      check_close("grad_bias", actual[2], expected[2], 1);
    }
  }
}

}  // namespace
}  // namespace pymtl::test

int main() {
  using namespace pymtl::test;
  return run_tests({{"lstm", lstm}, {"heads", heads}});
}
