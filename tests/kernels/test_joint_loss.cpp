// The tasks' losses and gradients against joint_loss.h's formulas in long double.
#include <cmath>

#include "check.h"
#include "kernels/joint_loss.h"

namespace pymtl::test {
namespace {

constexpr double kDoubleUnit = 0x1p-53;  // of one rounding in double, in which the kernels sum

template <typename T>
constexpr double kUnit = std::numeric_limits<T>::epsilon() / 2;

struct TaskOptions {
  Loss kind = Loss::cross_entropy;
  int64_t rows = 1;
  int64_t classes = 2;
  int64_t gap = 0;  // columns of other tasks between two rows
  bool weight = false;
  double label_smoothing = 0;
  int64_t ignore_index = -100;
  int64_t missing_of_8 = 2;  // how many of eight targets are missing
  double size = 3;           // of the logits
};

// One task's arrays.
template <typename T>
struct Task {
  TaskOptions options;
  Buffer<T> logits, value_targets, weight;
  Buffer<int64_t> class_targets;

  Task(const TaskOptions& given, Random& random) : options(given) {
    const int64_t rows = options.rows;
    const int64_t classes = options.classes;
    // The last row has no gap behind it.
    logits = uniform<T>(rows == 0 ? 0 : (rows - 1) * stride() + classes, random, -options.size, options.size);
    if (options.weight) weight = uniform<T>(classes, random, 0.1, 3);
    const auto missing = [&] { return random.below(8) < options.missing_of_8; };
    if (options.kind == Loss::cross_entropy) {
      class_targets = Buffer<int64_t>(rows);
      for (int64_t& target : class_targets) target = missing() ? options.ignore_index : random.below(classes);
      return;
    }
    value_targets = uniform<T>(rows * classes, random, -options.size, options.size);
    const bool binary = options.kind == Loss::binary_cross_entropy;
    for (T& target : value_targets) {
      if (binary) target = static_cast<T>(random.flip() ? random.below(2) : random.uniform(0, 1));
      if (!missing()) continue;
      target = binary && random.flip() ? static_cast<T>(options.ignore_index) : std::numeric_limits<T>::quiet_NaN();
    }
  }

  int64_t stride() const { return options.classes + options.gap; }

  LossTask<T> with(T* loss, T* grad) const {
    return {options.kind,
            options.rows,
            options.classes,
            logits.data(),
            stride(),
            class_targets.data(),
            value_targets.data(),
            weight.data(),
            options.ignore_index,
            options.label_smoothing,
            loss,
            grad};
  }
};

// The truth, and how far rounding may take the kernel from it.
struct Expected {
  long double loss = 0;
  double loss_error = 0;
  std::vector<long double> grad;
  std::vector<double> grad_error;
};

// Errors, to first order (hence 1.01): a difference d from the largest logit is rounded once, exp(d) is within
// 4 units, so it is off by |d| + 4 units of itself; their sum by the mean of that and one unit for each of C
// additions; the logarithm by 2 units of itself.
template <typename T>
Expected cross_entropy(const Task<T>& task) {
  const TaskOptions& options = task.options;
  const int64_t C = options.classes;
  const double unit = kUnit<T>;
  const auto weight = [&](int64_t c) { return task.weight ? static_cast<long double>(task.weight[c]) : 1; };
  const long double smoothing = options.label_smoothing;
  const long double even = smoothing / C;
  long double total = 0;
  int64_t count = 0;
  for (const int64_t* target = task.class_targets.data(); target != task.class_targets.data() + options.rows;
       ++target) {
    if (*target == options.ignore_index) continue;
    total += weight(*target);
    ++count;
  }
  const double additions = static_cast<double>(count + C + 10);
  Expected expected;
  expected.grad.assign(static_cast<size_t>(options.rows * C), 0);
  expected.grad_error.assign(static_cast<size_t>(options.rows * C), 0);
  long double sum = 0;
  double size = 0;  // of all that is summed in double
  double error = 0;
  for (int64_t row = 0; row < options.rows; ++row) {
    const T* const z = task.logits.data() + row * task.stride();
    const int64_t target = task.class_targets[row];
    if (target == options.ignore_index) continue;
    const long double shift = *std::max_element(z, z + C);
    long double exp_sum = 0;
    long double exp_error = 0;
    for (int64_t c = 0; c < C; ++c) {
      const long double e = std::exp(z[c] - shift);
      exp_sum += e;
      if (e > 0) exp_error += e * (shift - z[c] + 4) * unit;
    }
    const double sum_error = static_cast<double>(exp_error / exp_sum) + static_cast<double>(C) * unit;
    const long double log_sum = std::log(exp_sum);
    const double log_error = sum_error + 2 * unit * static_cast<double>(log_sum);
    const auto minus_log_p = [&](int64_t c) { return log_sum - (z[c] - shift); };

    const long double hard = (1 - smoothing) * weight(target);
    long double spread = 0;
    long double loss = hard * minus_log_p(target);
    for (int64_t c = 0; smoothing > 0 && c < C; ++c) {
      spread += weight(c);
      loss += even * weight(c) * minus_log_p(c);
    }
    const long double pull = hard + even * spread;
    sum += loss;
    error += static_cast<double>(pull) * log_error;
    size += static_cast<double>(loss + pull * log_sum);
    for (int64_t c = 0; c < C; ++c) {
      const size_t at = static_cast<size_t>(row * C + c);
      const long double p = std::exp(z[c] - shift) / exp_sum;
      const long double given = (smoothing > 0 ? even * weight(c) : 0) + (c == target ? hard : 0);
      expected.grad[at] = (pull * p - given) / total;
      // p's own error; three roundings of pull p and of what is taken from it; the factors, made in double,
      // with a sum of weights over rows and one over classes; the result.
      const long double own = p > 0 ? p * (shift - z[c] + 4) * unit + p * sum_error : 0;
      const long double roundings = (3 * unit + additions * kDoubleUnit) * (pull * p + given);
      const long double all = (pull * own + roundings) / total + 2 * unit * std::abs(expected.grad[at]);
      expected.grad_error[at] = 1.01 * static_cast<double>(all) + 4 * std::numeric_limits<T>::denorm_min();
    }
  }
  if (count == 0) return expected;
  expected.loss = sum / total;
  expected.loss_error = 1.01 * (error + additions * kDoubleUnit * size) / static_cast<double>(total) +
                        1.01 * unit * std::abs(static_cast<double>(expected.loss)) +
                        std::numeric_limits<T>::denorm_min();
  return expected;
}

// All in double, but for the rounding of the results. In binary cross-entropy exp is within 4 units, what is
// made of it within a few more: at most 16 of everything that is added.
template <typename T>
Expected of_values(const Task<T>& task) {
  const TaskOptions& options = task.options;
  const int64_t C = options.classes;
  const double unit = kUnit<T>;
  const bool binary = options.kind == Loss::binary_cross_entropy;
  Expected expected;
  expected.grad.assign(static_cast<size_t>(options.rows * C), 0);
  expected.grad_error.assign(static_cast<size_t>(options.rows * C), 0);
  int64_t count = 0;
  long double size = 0;
  for (int64_t row = 0; row < options.rows; ++row) {
    for (int64_t c = 0; c < C; ++c) {
      const T target = task.value_targets[row * C + c];
      if (std::isnan(target) || (binary && target == static_cast<T>(options.ignore_index))) continue;
      ++count;
      const size_t at = static_cast<size_t>(row * C + c);
      const long double z = task.logits[row * task.stride() + c];
      const long double y = target;
      if (!binary) {
        expected.loss += (z - y) * (z - y);
        expected.grad[at] = 2 * (z - y);
        expected.grad_error[at] = 8 * kDoubleUnit * std::abs(static_cast<double>(2 * (z - y)));
        continue;
      }
      const long double w = task.weight ? static_cast<long double>(task.weight[c]) : 1;
      const long double p = 1 / (1 + std::exp(-z));
      const long double tail = std::log1p(std::exp(-std::abs(z)));
      const long double log_p = (z < 0 ? z : 0) - tail;
      const long double log_not_p = (z < 0 ? 0 : -z) - tail;
      expected.loss -= w * y * log_p + (1 - y) * log_not_p;
      expected.grad[at] = p * (w * y + 1 - y) - w * y;
      expected.grad_error[at] = 16 * kDoubleUnit * static_cast<double>(p * (w * y + 1 - y) + w * y);
    }
  }
  if (count == 0) return expected;
  size = expected.loss;  // a sum of what is not negative
  expected.loss /= count;
  expected.loss_error =
      static_cast<double>((static_cast<double>(count) + 16) * kDoubleUnit * size / count + 2 * unit * expected.loss) +
      std::numeric_limits<T>::denorm_min();
  for (size_t at = 0; at < expected.grad.size(); ++at) {
    expected.grad[at] /= count;
    expected.grad_error[at] = expected.grad_error[at] / static_cast<double>(count) +
                              2 * unit * std::abs(static_cast<double>(expected.grad[at])) +
                              std::numeric_limits<T>::denorm_min();
  }
  return expected;
}

template <typename T>
Expected truth_of(const Task<T>& task) {
  return task.options.kind == Loss::cross_entropy ? cross_entropy(task) : of_values(task);
}

template <typename T>
struct Result {
  std::vector<Buffer<T>> losses, grads;  // one array per task
};

template <typename T>
Result<T> run(const std::vector<const Task<T>*>& tasks, bool with_grad, const Executor& executor) {
  Result<T> result;
  std::vector<LossTask<T>> all;
  for (const Task<T>* const task : tasks) {
    result.losses.push_back(Buffer<T>(1));
    result.grads.push_back(with_grad ? Buffer<T>(task->options.rows * task->options.classes) : Buffer<T>());
    all.push_back(task->with(result.losses.back().data(), result.grads.back().data()));
    CHECK(first_bad_target(all.back()) == -1);
  }
  const int64_t count = static_cast<int64_t>(all.size());
  Workspace workspace = workspace_of(joint_loss_workspace(all.data(), count));
  joint_loss(all.data(), count, workspace.data(), executor);
  return result;
}

double largest_part = 0;

template <typename T>
void check_task(const Task<T>& task, const Result<T>& result, size_t at) {
  const TaskOptions& options = task.options;
  const Context context("kind ", static_cast<int>(options.kind), " M=", options.rows, " C=", options.classes, " gap ",
                        options.gap, options.weight ? " weight" : "", " smoothing ", options.label_smoothing,
                        " ignore_index ", options.ignore_index, " missing ", options.missing_of_8, "/8 size ",
                        options.size);
  const Expected expected = truth_of(task);
  const T loss = result.losses[at][0];
  const double error = std::abs(static_cast<double>(loss - expected.loss));
  CHECK(error <= expected.loss_error, loss, expected.loss, error, expected.loss_error);
  if (expected.loss_error > 0) largest_part = std::max(largest_part, error / expected.loss_error);
  for (int64_t i = 0; i < result.grads[at].size(); ++i) {
    const size_t n = static_cast<size_t>(i);
    const T grad = result.grads[at][i];
    const double grad_error = std::abs(static_cast<double>(grad - expected.grad[n]));
    CHECK(grad_error <= expected.grad_error[n], i, grad, expected.grad[n], grad_error, expected.grad_error[n]);
    if (expected.grad_error[n] > 0) largest_part = std::max(largest_part, grad_error / expected.grad_error[n]);
  }
}

template <typename T>
void check_same(const Result<T>& a, size_t at_a, const Result<T>& b, size_t at_b) {
  CHECK(same_bits(a.losses[at_a].data(), b.losses[at_b].data(), 1), a.losses[at_a][0], b.losses[at_b][0]);
  if (a.grads[at_a] && b.grads[at_b]) {
    CHECK(same_bits(a.grads[at_a].data(), b.grads[at_b].data(), a.grads[at_a].size()));
  }
}

TaskOptions random_options(Loss kind, int64_t classes, Random& random) {
  const int64_t rows[] = {1, 2, 3, 63, 64, 65, 130, 300};
  const double sizes[] = {0.01, 3, 30, 3000};
  const double smoothings[] = {0, 0, 0.1, 1};
  TaskOptions options;
  options.kind = kind;
  options.classes = classes;
  options.rows = rows[random.below(8)];
  options.gap = random.flip() ? random.below(20) : 0;
  options.weight = random.flip() && kind != Loss::mean_squared_error;
  options.size = sizes[random.below(4)];
  options.missing_of_8 = random.flip() ? 2 : random.below(9);
  if (kind != Loss::mean_squared_error) {
    const int64_t ignored[] = {-100, -1, classes, kind == Loss::cross_entropy ? random.below(classes) : -7};
    options.ignore_index = ignored[random.below(4)];
    // Targets of zero and one are not to be missing here by accident.
    if (kind == Loss::binary_cross_entropy && classes == 1) options.ignore_index = -100;
  }
  if (kind == Loss::cross_entropy) options.label_smoothing = smoothings[random.below(4)];
  return options;
}

template <typename T>
void against_formulas() {
  Random random(1);
  largest_part = 0;
  for (const int64_t classes : {1, 2, 3, 7, 8, 15, 16, 17, 33, 72, 130}) {
    for (const Loss kind : {Loss::cross_entropy, Loss::mean_squared_error, Loss::binary_cross_entropy}) {
      for (int i = 0; i < 40; ++i) {
        const Task<T> task(random_options(kind, classes, random), random);
        const Result<T> result = run<T>({&task}, true, serial());
        check_task(task, result, 0);
        check_same(result, 0, run<T>({&task}, false, serial()), 0);
        const NamedExecutor other = any_executor(random);
        const Context how(other.name);
        check_same(result, 0, run<T>({&task}, true, other.executor), 0);
      }
    }
  }
  std::printf("         largest error: %.2f of its bound\n", largest_part);
}

// Several tasks in one call give what each gives alone.
template <typename T>
void together() {
  Random random(2);
  for (int i = 0; i < 60; ++i) {
    std::vector<Task<T>> tasks;
    for (int64_t k = random.below(6); k >= 0; --k) {
      tasks.emplace_back(random_options(static_cast<Loss>(random.below(3)), 1 + random.below(40), random), random);
    }
    std::vector<const Task<T>*> pointers;
    for (const Task<T>& task : tasks) pointers.push_back(&task);
    const Result<T> all = run<T>(pointers, true, any_executor(random).executor);
    for (size_t k = 0; k < tasks.size(); ++k) {
      check_task(tasks[k], all, k);
      check_same(all, k, run<T>({pointers[k]}, true, serial()), 0);
    }
  }
  run<T>({}, true, serial());
}

template <typename T>
void special_cases() {
  Random random(3);
  const T infinity = std::numeric_limits<T>::infinity();
  for (const Loss kind : {Loss::cross_entropy, Loss::mean_squared_error, Loss::binary_cross_entropy}) {
    for (const int64_t rows : {0, 1, 100}) {
      const Context context("no target, kind ", static_cast<int>(kind), " M=", rows);
      TaskOptions options;
      options.kind = kind;
      options.rows = rows;
      options.classes = 5;
      options.missing_of_8 = 8;
      options.label_smoothing = 0.1;
      const Task<T> task(options, random);
      const Result<T> result = run<T>({&task}, true, serial());
      CHECK(result.losses[0][0] == 0, result.losses[0][0]);
      for (int64_t i = 0; i < result.grads[0].size(); ++i) CHECK(result.grads[0][i] == 0, i, result.grads[0][i]);
    }
  }

  // Only NaN is missing in squared errors: ignore_index is a number like any other.
  TaskOptions options;
  options.kind = Loss::mean_squared_error;
  options.rows = 3;
  options.missing_of_8 = 0;
  Task<T> squared(options, random);
  squared.value_targets[2] = static_cast<T>(options.ignore_index);
  check_task(squared, run<T>({&squared}, true, serial()), 0);

  // Classes ruled out by -inf take no part; a target ruled out costs infinity, and +inf is not a number.
  options.kind = Loss::cross_entropy;
  options.classes = 20;
  Task<T> ruled_out(options, random);
  for (int64_t row = 0; row < 3; ++row) {
    ruled_out.class_targets[row] = row;
    for (int64_t c = 5; c < 20; ++c) ruled_out.logits[row * 20 + c] = -infinity;
  }
  const Result<T> result = run<T>({&ruled_out}, true, serial());
  check_task(ruled_out, result, 0);
  CHECK(std::isfinite(result.losses[0][0]), result.losses[0][0]);
  for (int64_t c = 5; c < 20; ++c) CHECK(result.grads[0][c] == 0, c, result.grads[0][c]);
  ruled_out.class_targets[1] = 7;
  CHECK(run<T>({&ruled_out}, true, serial()).losses[0][0] == infinity);
  ruled_out.class_targets[1] = 1;
  ruled_out.logits[20] = infinity;
  CHECK(std::isnan(run<T>({&ruled_out}, true, serial()).losses[0][0]));
  ruled_out.logits[20] = std::numeric_limits<T>::quiet_NaN();
  CHECK(std::isnan(run<T>({&ruled_out}, true, serial()).losses[0][0]));
  // Not where the row has no target.
  ruled_out.class_targets[1] = options.ignore_index;
  const Result<T> without = run<T>({&ruled_out}, true, serial());
  CHECK(std::isfinite(without.losses[0][0]), without.losses[0][0]);
  for (int64_t c = 20; c < 40; ++c) CHECK(without.grads[0][c] == 0, c, without.grads[0][c]);
}

template <typename T>
void bad_targets() {
  Random random(4);
  TaskOptions options;
  options.rows = 100;
  options.classes = 7;
  const auto first_bad = [](const Task<T>& task) { return first_bad_target(task.with(nullptr, nullptr)); };
  Task<T> task(options, random);
  CHECK(first_bad(task) == -1);
  task.class_targets[99] = 7;
  CHECK(first_bad(task) == 99, first_bad(task));
  task.class_targets[41] = -1;
  CHECK(first_bad(task) == 41, first_bad(task));
  task.class_targets[40] = std::numeric_limits<int64_t>::max();
  CHECK(first_bad(task) == 40, first_bad(task));
  task.class_targets[0] = std::numeric_limits<int64_t>::min();
  CHECK(first_bad(task) == 0, first_bad(task));

  // The target to ignore is good, wherever it is; another may not be.
  options.ignore_index = 9;
  Task<T> other(options, random);
  CHECK(first_bad(other) == -1);
  other.class_targets[5] = -100;
  CHECK(first_bad(other) == 5, first_bad(other));

  options.kind = Loss::mean_squared_error;
  CHECK(first_bad(Task<T>(options, random)) == -1);
  options.kind = Loss::binary_cross_entropy;
  CHECK(first_bad(Task<T>(options, random)) == -1);
}

}  // namespace
}  // namespace pymtl::test

int main() {
  using namespace pymtl::test;
  return run_tests({
      {"against the formulas, float", against_formulas<float>},
      {"against the formulas, double", against_formulas<double>},
      {"together, float", together<float>},
      {"together, double", together<double>},
      {"special cases, float", special_cases<float>},
      {"special cases, double", special_cases<double>},
      {"bad targets, float", bad_targets<float>},
      {"bad targets, double", bad_targets<double>},
  });
}
