// The CUDA kernels of the recurrence, run on the host, against the formulas in double.
//
// Each number is compared with what the formulas make of the kernel's own rounded operands: h of the step before
// forward, gates, cells and gradients of gates backward. So what is left is one rounding to T, and sums in float. With
// TF32 both operands of a product are rounded here as there.
#include <algorithm>
#include <bit>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "../check.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/rnn.h"
#include "kernels/cuda/rnn/plans.h"

namespace pymtl::test {
namespace {

using cuda::from_float;
using cuda::RnnBackward;
using cuda::RnnForward;
using cuda::RnnWeights;

template <typename T>
Buffer<T> numbers(int64_t count, Random& random, double size) {
  Buffer<T> buffer(count, 64);
  for (T& value : buffer) value = from_float<T>(static_cast<float>(random.uniform(-size, size)));
  return buffer;
}

double value(float x) { return x; }
double value(BFloat16 x) { return cuda::to_float(x); }
double value(Float16 x) { return cuda::to_float(x); }

// Half the distance between neighbours near 1.
template <typename T>
constexpr double kRounding = std::is_same_v<T, float>     ? 0x1p-24
                             : std::is_same_v<T, Float16> ? 0x1p-11
                                                          : 0x1p-8;

double largest_part_of_bound = 0.0;

template <typename T>
void check_near(const char* name, T actual, double expected, int64_t at, double sums = 1.0) {
  // Below 2^-14 the numbers of float16 stand 2^-24 apart.
  const double bound = kRounding<T> * std::abs(expected) + 0x1p-20 * sums + 0x1p-25;
  const double error = std::abs(value(actual) - expected);
  if (error == error) largest_part_of_bound = std::max(largest_part_of_bound, error / bound);
  CHECK(error <= bound, name, at, value(actual), expected);
}

struct Case {
  int64_t G, B, T, H;
  bool ragged, states, biases;
};

template <typename T>
struct Problem {
  Case shape;
  std::vector<int64_t> lengths;
  std::vector<int64_t> starts;  // [T + 1]
  Buffer<int64_t> batch_sizes;
  std::vector<Buffer<T>> w_hh, b_ih, b_hh;
  std::vector<char> reverse;
  Buffer<float> projected;
  Buffer<T> h0, c0, grad_output, grad_h_n, grad_c_n;
  bool allow_tf32 = false;
  cuda::Plan tf32{};  // not the kernels' choice, but a cluster with products in TF32; 0 blocks: none

  Problem(const Case& given, Random& random) : shape(given) {
    const auto [G, B, steps, H, ragged, states, biases] = shape;
    lengths.assign(static_cast<size_t>(B), steps);
    if (ragged) {
      for (int64_t& length : lengths) length = 1 + random.below(steps);
      std::sort(lengths.begin(), lengths.end(), std::greater<>());
    }
    starts = {0};
    for (int64_t t = 0; t < steps; ++t) {
      const auto has = [t](int64_t length) { return length > t; };
      starts.push_back(starts.back() + std::count_if(lengths.begin(), lengths.end(), has));
    }
    if (ragged) {
      batch_sizes = Buffer<int64_t>(steps);
      for (int64_t t = 0; t < steps; ++t) batch_sizes[t] = starts[t + 1] - starts[t];
    }
    const double size = 2 / std::sqrt(static_cast<double>(H));
    const bool first_reverse = random.flip();
    for (int64_t g = 0; g < G; ++g) {
      w_hh.push_back(numbers<T>(4 * H * H, random, size));
      b_ih.push_back(biases ? numbers<T>(4 * H, random, 1) : Buffer<T>());
      b_hh.push_back(biases ? numbers<T>(4 * H, random, 1) : Buffer<T>());
      reverse.push_back((g % 2 == 0) == first_reverse);
    }
    projected = uniform<float>(tokens() * G * 4 * H, random, -2, 2);
    grad_output = numbers<T>(tokens() * G * H, random, 1);
    if (!states) return;
    h0 = numbers<T>(G * B * H, random, 1);
    c0 = numbers<T>(G * B * H, random, 2);
    grad_h_n = numbers<T>(G * B * H, random, 1);
    grad_c_n = numbers<T>(G * B * H, random, 1);
  }

  int64_t tokens() const { return starts.back(); }
  int64_t token(int64_t b, int64_t t) const { return starts[static_cast<size_t>(t)] + b; }

  std::vector<RnnWeights<T>> weights() const {
    std::vector<RnnWeights<T>> all;
    for (size_t g = 0; g < w_hh.size(); ++g) {
      all.push_back({w_hh[g].data(), b_ih[g].data(), b_hh[g].data(), reverse[g] != 0});
    }
    return all;
  }
  double operand(T x) const {
    if (tf32.blocks > 0) return std::bit_cast<float>(cuda::rounded_to_tf32(static_cast<float>(value(x))));
    return value(x);
  }

  cuda::RnnShape rnn_shape() const {
    return {shape.G, shape.T, shape.B, tokens(), shape.H, batch_sizes.data(), allow_tf32};
  }
};

template <typename T>
struct Forward {
  Buffer<T> output, h_n, c_n, gates;
  Buffer<float> cells;

  Forward(const Problem<T>& problem, bool train) {
    const auto [G, B, steps, H, ragged, states, biases] = problem.shape;
    const int64_t N = problem.tokens();
    output = Buffer<T>(N * G * H, 64);
    h_n = Buffer<T>(G * B * H, 64);
    c_n = Buffer<T>(G * B * H, 64);
    if (train) {
      gates = Buffer<T>(G * N * 4 * H, 64);
      cells = Buffer<float>(G * N * H, 64);
    }
    const std::vector<RnnWeights<T>> weights = problem.weights();
    Workspace workspace = workspace_of(cuda::rnn_forward_workspace<T>(problem.rnn_shape()));
    const RnnForward<T> args{problem.rnn_shape(), weights.data(),    problem.projected.data(),
                             problem.h0.data(),   problem.c0.data(), output.data(),
                             h_n.data(),          c_n.data(),        gates.data(),
                             cells.data()};
    if constexpr (std::is_same_v<T, float>) {
      if (problem.tf32.blocks > 0) {
        run_forward_tf32(args, problem.tf32, nullptr);
        return;
      }
    }
    cuda::rnn_forward(args, workspace.data(), nullptr);
  }
};

template <typename T>
struct Backward {
  Buffer<T> gates, h0, c0;

  Backward(const Problem<T>& problem, const Forward<T>& forward) {
    const auto [G, B, steps, H, ragged, states, biases] = problem.shape;
    gates = Buffer<T>(G * problem.tokens() * 4 * H, 64);
    h0 = Buffer<T>(G * B * H, 64);
    c0 = Buffer<T>(G * B * H, 64);
    const std::vector<RnnWeights<T>> weights = problem.weights();
    Workspace workspace = workspace_of(cuda::rnn_backward_workspace<T>(problem.rnn_shape()));
    const RnnBackward<T> args{problem.rnn_shape(),
                              weights.data(),
                              problem.c0.data(),
                              forward.gates.data(),
                              forward.cells.data(),
                              problem.grad_output.data(),
                              problem.grad_h_n.data(),
                              problem.grad_c_n.data(),
                              gates.data(),
                              h0.data(),
                              c0.data()};
    if constexpr (std::is_same_v<T, float>) {
      if (problem.tf32.blocks > 0) {
        run_backward_tf32(args, problem.tf32, nullptr);
        return;
      }
    }
    cuda::rnn_backward(args, workspace.data(), nullptr);
  }
};

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

template <typename T>
void check_forward(const Problem<T>& problem, const Forward<T>& ours) {
  const auto [G, B, steps, H, ragged, states, biases] = problem.shape;
  for (int64_t g = 0; g < G; ++g) {
    const Context context("recurrence ", g, problem.reverse[g] ? " in reverse" : "");
    for (int64_t b = 0; b < B; ++b) {
      std::vector<double> h(H, 0.0);  // as an operand
      std::vector<double> last(H, 0.0);
      std::vector<double> c(H, 0.0);
      for (int64_t u = 0; states && u < H; ++u) {
        h[u] = problem.operand(problem.h0[(g * B + b) * H + u]);
        c[u] = value(problem.c0[(g * B + b) * H + u]);
      }
      const int64_t length = problem.lengths[b];
      for (int64_t s = 0; s < length; ++s) {
        const int64_t token = problem.token(b, problem.reverse[g] ? length - 1 - s : s);
        std::vector<double> a(4 * H);
        for (int64_t row = 0; row < 4 * H; ++row) {
          a[row] = problem.projected[(token * G + g) * 4 * H + row];
          if (biases) a[row] += value(problem.b_ih[g][row]) + value(problem.b_hh[g][row]);
          for (int64_t k = 0; k < H; ++k) a[row] += problem.operand(problem.w_hh[g][row * H + k]) * h[k];
        }
        for (int64_t u = 0; u < H; ++u) {
          const double gates[4] = {sigmoid(a[u]), sigmoid(a[H + u]), std::tanh(a[2 * H + u]), sigmoid(a[3 * H + u])};
          c[u] = gates[1] * c[u] + gates[0] * gates[2];
          const int64_t at = (g * problem.tokens() + token) * H + u;
          if (ours.gates) {
            for (int64_t q = 0; q < 4; ++q) {
              const int64_t place = ((g * problem.tokens() + token) * 4 + q) * H + u;
              check_near("gates", ours.gates[place], gates[q], place);
            }
            check_near("cells", ours.cells[at], c[u], at);
          }
          const int64_t place = (token * G + g) * H + u;
          check_near("output", ours.output[place], gates[3] * std::tanh(c[u]), place);
          h[u] = problem.operand(ours.output[place]);
          last[u] = value(ours.output[place]);
        }
      }
      for (int64_t u = 0; u < H; ++u) {
        const int64_t at = (g * B + b) * H + u;
        CHECK(value(ours.h_n[at]) == last[u], at, value(ours.h_n[at]), last[u]);
        check_near("c_n", ours.c_n[at], c[u], at);
      }
    }
  }
}

template <typename T>
void check_backward(const Problem<T>& problem, const Forward<T>& forward, const Backward<T>& ours) {
  const auto [G, B, steps, H, ragged, states, biases] = problem.shape;
  for (int64_t g = 0; g < G; ++g) {
    const Context context("recurrence ", g, problem.reverse[g] ? " in reverse" : "");
    for (int64_t b = 0; b < B; ++b) {
      std::vector<double> grad_h(H, 0.0);
      std::vector<double> grad_c(H, 0.0);
      for (int64_t u = 0; states && u < H; ++u) {
        grad_h[u] = value(problem.grad_h_n[(g * B + b) * H + u]);
        grad_c[u] = value(problem.grad_c_n[(g * B + b) * H + u]);
      }
      const int64_t length = problem.lengths[b];
      for (int64_t s = length; s-- > 0;) {
        const int64_t t = problem.reverse[g] ? length - 1 - s : s;
        const int64_t token = problem.token(b, t);
        const int64_t row = g * problem.tokens() + token;
        std::vector<double> grads(4 * H);
        for (int64_t u = 0; u < H; ++u) {
          const auto gate = [&](int64_t q) { return value(forward.gates[(row * 4 + q) * H + u]); };
          double before = states ? value(problem.c0[(g * B + b) * H + u]) : 0.0;
          if (s > 0) {
            const int64_t earlier = problem.token(b, problem.reverse[g] ? t + 1 : t - 1);
            before = forward.cells[(g * problem.tokens() + earlier) * H + u];
          }
          const double i = gate(0), f = gate(1), g_ = gate(2), o = gate(3);
          const double tanh_c = std::tanh(static_cast<double>(forward.cells[row * H + u]));
          const double of_h = grad_h[u] + value(problem.grad_output[(token * G + g) * H + u]);
          const double of_c = grad_c[u] + of_h * o * (1 - tanh_c * tanh_c);
          const double expected[4] = {of_c * g_ * i * (1 - i), of_c * before * f * (1 - f), of_c * i * (1 - g_ * g_),
                                      of_h * tanh_c * o * (1 - o)};
          for (int64_t q = 0; q < 4; ++q) {
            const int64_t at = ((token * G + g) * 4 + q) * H + u;
            check_near("grad_gates", ours.gates[at], expected[q], at, 16.0);
            grads[q * H + u] = problem.operand(ours.gates[at]);
          }
          grad_c[u] = of_c * f;
        }
        for (int64_t u = 0; u < H; ++u) {
          grad_h[u] = 0.0;
          for (int64_t k = 0; k < 4 * H; ++k) grad_h[u] += problem.operand(problem.w_hh[g][k * H + u]) * grads[k];
        }
      }
      for (int64_t u = 0; u < H; ++u) {
        const int64_t at = (g * B + b) * H + u;
        check_near("grad_h0", ours.h0[at], grad_h[u], at, 16.0);
        check_near("grad_c0", ours.c0[at], grad_c[u], at, 16.0);
      }
    }
  }
}

template <typename T>
void check_case(const Case& shape, Random& random, const cuda::Plan& tf32 = {}) {
  const Context context("G=", shape.G, " B=", shape.B, " T=", shape.T, " H=", shape.H, shape.ragged ? " ragged" : "",
                        shape.states ? " states" : "", shape.biases ? " biases" : "");
  Problem<T> problem(shape, random);
  problem.tf32 = tf32;
  cuda::emulator::seed = random.bits();
  const Forward<T> trained(problem, true);
  check_forward(problem, trained);
  const Backward<T> gradients(problem, trained);
  check_backward(problem, trained, gradients);
  // Another order of the threads and messages gives the same bits, and so does inference.
  cuda::emulator::seed = random.bits();
  const Forward<T> inferred(problem, false);
  CHECK(same_bits(inferred.output.data(), trained.output.data(), trained.output.size()));
  CHECK(same_bits(inferred.c_n.data(), trained.c_n.data(), trained.c_n.size()));
  const Backward<T> again(problem, trained);
  CHECK(same_bits(again.gates.data(), gradients.gates.data(), gradients.gates.size()));
  CHECK(same_bits(again.h0.data(), gradients.h0.data(), gradients.h0.size()));
}

// Every size of cluster, with sizes that fill it and sizes that do not.
template <typename T>
void all_cases() {
  Random random(7);
  largest_part_of_bound = 0.0;
  for (const int64_t H : {1, 2, 7, 33, 64, 65, 128, 190, 192, 200, 321}) {
    for (const int64_t B : {1, 11}) {
      if (H > 192 && B == 1) continue;
      const int64_t steps = H > 64 ? 3 : 1 + random.below(6);
      check_case<T>({1 + random.below(2), B, steps, H, random.flip(), random.flip(), random.flip()}, random);
    }
  }
  check_case<T>({2, 3, 4, 20, true, true, true}, random);
  check_case<T>({33, 2, 2, 3, true, true, true}, random);  // more recurrences than a launch takes
  check_case<T>({1, 2, 1, 5, true, false, true}, random);
  check_case<T>({1, 2, 40, 9, true, true, true}, random);
  // More rows to a cluster, because few clusters run at the same time.
  cuda::emulator::clusters_at_once = 1;
  for (const int64_t H : {5, 70, 200}) check_case<T>({1, 21, 4, H, true, true, true}, random);
  cuda::emulator::clusters_at_once = 3;
  for (const int64_t B : {2, 5, 11}) check_case<T>({2, B, 4, 34, true, true, true}, random);
  cuda::emulator::clusters_at_once = 16;
  // Where a device has no cluster of just as many blocks, a larger one does.
  for (const int refused : {3, 5}) {
    cuda::emulator::refused_cluster = refused;
    check_case<T>({2, 3, 3, (std::is_same_v<T, float> ? 32 : 64) * refused - 7, true, true, true}, random);
  }
  cuda::emulator::refused_cluster = 0;
  std::printf("         largest error: %.2f of its bound\n", largest_part_of_bound);
}

// Groups of blocks all over the device, as where there are no clusters.
template <typename T>
void groups() {
  Random random(9);
  largest_part_of_bound = 0.0;
  cuda::emulator::clusters_at_once = 0;
  for (const int64_t H : {1, 5, 16, 17, 33, 64, 130}) {
    for (const int64_t B : {1, 11}) {
      check_case<T>({1 + random.below(2), B, 1 + random.below(5), H, random.flip(), random.flip(), random.flip()},
                    random);
    }
  }
  check_case<T>({2, 3, 4, 20, true, true, true}, random);
  check_case<T>({33, 2, 2, 3, true, true, true}, random);
  // More rows to a group, or several launches, because few blocks run at the same time.
  for (const int blocks : {2, 4}) {
    cuda::emulator::blocks_at_once = blocks;
    for (const int64_t B : {9, 17, 33, 70}) check_case<T>({2, B, 3, 20, true, true, true}, random);
  }
  cuda::emulator::blocks_at_once = 132;
  cuda::emulator::clusters_at_once = 16;
  std::printf("         largest error: %.2f of its bound\n", largest_part_of_bound);
}

// Every size of cluster with products in TF32, and every number of rows of the batch.
void tf32() {
  Random random(10);
  largest_part_of_bound = 0.0;
  const auto cluster = [](int64_t H, int rows) {
    return cuda::Plan{static_cast<int>((H + 31) / 32), 8, 4, rows, true};
  };
  for (const int rows : {8, 16, 32}) {
    const Context context("rows=", rows);
    for (const int64_t H : {1, 7, 32, 33, 100, 190, 256}) {
      const int64_t B = 1 + random.below(2 * rows);
      const int64_t steps = H > 64 ? 2 : 1 + random.below(5);
      check_case<float>({1 + random.below(2), B, steps, H, random.flip(), random.flip(), random.flip()}, random,
                        cluster(H, rows));
    }
    check_case<float>({2, rows + 3, 5, 20, true, true, true}, random, cluster(20, rows));
    check_case<float>({33, 2, 2, 3, true, true, true}, random, cluster(3, rows));
  }
  check_case<float>({2, 5, 3, 40, true, true, true}, random, {4, 8, 4, 8, true});  // blocks without units
  check_case<float>({1, 19, 2, 333, true, true, true}, random, cluster(333, 16));  // weights in shared memory
  check_case<float>({1, 3, 2, 512, true, true, true}, random, cluster(512, 8));
  check_case<float>({1, 29, 2, 300, true, true, true}, random, cluster(300, 32));
  std::printf("         largest error: %.2f of its bound\n", largest_part_of_bound);
}

// With TF32 allowed, many sequences run in TF32, and one is not.
void tf32_where_faster() {
  Random random(11);
  for (const int64_t B : {1, 40}) {
    const Context context("B=", B);
    Problem<float> problem({2, B, 3, 250, false, true, true}, random);
    const Forward<float> exact(problem, true);
    const Backward<float> exact_gradients(problem, exact);
    problem.allow_tf32 = true;
    const Forward<float> allowed(problem, true);
    const Backward<float> gradients(problem, exact);
    const bool same = same_bits(allowed.output.data(), exact.output.data(), exact.output.size());
    const bool same_gradients = same_bits(gradients.gates.data(), exact_gradients.gates.data(), gradients.gates.size());
    CHECK(same == (B == 1), same);
    CHECK(same_gradients == (B == 1), same_gradients);
    for (int64_t i = 0; i < exact.output.size(); ++i) {
      CHECK(std::abs(allowed.output[i] - exact.output[i]) < 0x1p-8, i, allowed.output[i], exact.output[i]);
    }
  }
}

// Every way that there is for a hidden size, with as many rows as the other passes take.
template <typename T>
void every_choice() {
  Random random(12);
  for (const int64_t H : {270, 384, 400, 512}) {
    for (const bool backward : {false, true}) {
      const std::vector<cuda::RnnChoice> choices = cuda::rnn_choices<T>({2, 1, 3, 3, H, nullptr}, backward);
      CHECK(choices.size() == 2 * 2 + 4, choices.size());  // two kinds of clusters and the groups
      CHECK(std::count_if(choices.begin(), choices.end(), [](const auto& choice) { return choice.chosen; }) == 1);
    }
  }
  const auto forced = [&](const std::string& name, const Case& shape) {
    const Context context(name);
    cuda::rnn_force_choice(name);
    check_case<T>(shape, random);
    cuda::rnn_force_choice("");
  };
  for (const char* rows : {", rows 8", ", rows 16"}) {
    forced(std::string("cluster of 12x32") + rows, {2, 19, 4, 270, true, true, true});
    forced(std::string("cluster of 16x32") + rows, {1, 3, 3, 511, false, true, false});
    forced(std::string("cluster of 8x64") + rows, {1, 11, 3, 500, true, false, true});
    forced(std::string("group of 17x16") + rows, {1, 11, 3, 270, true, true, true});
  }
  bool refused = false;
  cuda::rnn_force_choice("cluster of 3x64, rows 8");
  try {
    check_case<T>({1, 1, 1, 300, false, false, false}, random);
  } catch (const std::runtime_error& error) {
    refused = std::string(error.what()).find("300 that is a cluster of 3x64, rows 8") != std::string::npos;
  }
  CHECK(refused);
  cuda::rnn_force_choice("");
}

// The largest sizes, where much of the weights overflows into shared memory.
template <typename T>
void large_cases() {
  Random random(8);
  const int64_t limit = cuda::rnn_hidden_size_limit<T>();
  CHECK(limit >= 512, limit);
  check_case<T>({1, 3, 2, 512, true, true, true}, random);
  if (limit > 512) check_case<T>({1, 3, 2, 767, true, true, true}, random);  // the largest cluster
  check_case<T>({1, 3, 2, limit - 1, true, true, true}, random);
}

}  // namespace
}  // namespace pymtl::test

int main() {
  using namespace pymtl::test;
  return run_tests({
      {"float", all_cases<float>},
      {"bfloat16", all_cases<pymtl::BFloat16>},
      {"float16", all_cases<pymtl::Float16>},
      {"groups, bfloat16", groups<pymtl::BFloat16>},
      {"float in TF32", tf32},
      {"float in TF32 where faster", tf32_where_faster},
      {"every choice, bfloat16", every_choice<pymtl::BFloat16>},
      {"large, float", large_cases<float>},
      {"large, bfloat16", large_cases<pymtl::BFloat16>},
  });
}
