// Filters over the characters of words against plain loops, forward and backward.
#include "bounded.h"
#include "check.h"
#include "kernels/char_cnn.h"

namespace pymtl::test {
namespace {

struct Words {
  CharCnnShape shape;
  Buffer<int64_t> widths;
  Buffer<int64_t> ids;

  Words(int64_t count, int64_t length, int64_t characters, int64_t filters, const std::vector<int64_t>& all_widths,
        Random& random)
      : widths(copy_of(all_widths)), ids(count * length) {
    for (int64_t n = 0; n < count; ++n) {
      const int64_t filled = random.below(length + 1);
      for (int64_t j = 0; j < length; ++j) {
        ids[n * length + j] = j < filled && characters > 1 ? 1 + random.below(characters - 1) : 0;
      }
    }
    int64_t all = 0;
    for (const int64_t width : all_widths) all += width;
    shape = {count,         length,    characters, filters, widths.data(), widths.size(), widths.size() * filters,
             all * filters, ids.data()};
  }

  int64_t places(int64_t n) const {
    int64_t count = 0;
    for (int64_t j = 0; j < shape.length; ++j) count += ids[n * shape.length + j] != 0;
    return std::max<int64_t>(count, 1);
  }

  // Calls body(column) of the table for each of a filter's entries at a place, body(character, column).
  template <typename Body>
  void for_window(int64_t n, int64_t d, int64_t f, int64_t place, Body&& body) const {
    int64_t begin = 0;
    for (int64_t before = 0; before < d; ++before) begin += widths[before] * shape.filters;
    for (int64_t k = 0; k < widths[d]; ++k) {
      const int64_t at = place + k - widths[d] / 2;
      if (at >= 0 && at < shape.length) body(ids[n * shape.length + at], begin + k * shape.filters + f);
    }
  }
};

template <typename T>
struct Result {
  Buffer<T> output;
  Buffer<int64_t> places;
};

template <typename T>
Result<T> run(const Words& words, const Buffer<T>& table, bool places, const Executor& executor) {
  const int64_t count = words.shape.words * words.shape.features;
  Result<T> result{Buffer<T>(count), places ? Buffer<int64_t>(count) : Buffer<int64_t>()};
  char_cnn_forward(CharCnn<T>{words.shape, table.data(), result.output.data(), result.places.data()}, executor);
  return result;
}

template <typename T>
Buffer<T> run_backward(const Words& words, const Buffer<T>& grad, const Buffer<int64_t>& places,
                       const Executor& executor) {
  Buffer<T> grad_table(words.shape.characters * words.shape.row);
  const CharCnnBackward<T> args{words.shape, grad.data(), places.data(), grad_table.data()};
  Workspace workspace = workspace_of(char_cnn_backward_workspace(args));
  char_cnn_backward(args, workspace.data(), executor);
  return grad_table;
}

template <typename T>
void check(const Words& words, const Buffer<T>& table, Random& random) {
  const CharCnnShape& shape = words.shape;
  const Result<T> result = run(words, table, true, serial());
  const Buffer<T> grad = uniform<T>(result.output.size(), random);
  const Buffer<T> grad_table = run_backward(words, grad, result.places, serial());
  std::vector<Bounded<T>> output;
  std::vector<long double> sums(static_cast<size_t>(grad_table.size()), 0.0L);
  std::vector<double> sizes(sums.size(), 0.0);
  for (int64_t n = 0; n < shape.words; ++n) {
    for (int64_t d = 0; d < shape.count; ++d) {
      for (int64_t f = 0; f < shape.filters; ++f) {
        const int64_t feature = (n * shape.count + d) * shape.filters + f;
        const auto value_at = [&](int64_t place) {
          Bounded<T> sum(T(0));
          words.for_window(n, d, f, place,
                           [&](int64_t c, int64_t column) { sum = sum + Bounded<T>(table[c * shape.row + column]); });
          return sum;
        };
        Bounded<T> most = value_at(0);
        for (int64_t place = 1; place < words.places(n); ++place) most = largest(most, value_at(place));
        output.push_back(most);
        const int64_t place = result.places[feature];
        CHECK(place >= 0 && place < words.places(n), n, d, f, place);
        const Bounded<T> there = value_at(place);
        CHECK(std::abs(static_cast<double>(there.value - most.value)) <= there.error + most.error, n, d, f, place);
        words.for_window(n, d, f, place, [&](int64_t c, int64_t column) {
          sums[static_cast<size_t>(c * shape.row + column)] += grad[feature];
          sizes[static_cast<size_t>(c * shape.row + column)] += std::abs(static_cast<double>(grad[feature]));
        });
      }
    }
  }
  check_within("output", result.output, output);
  // Summed in double, rounded once.
  for (int64_t i = 0; i < grad_table.size(); ++i) {
    const long double truth = sums[static_cast<size_t>(i)];
    const double error = std::abs(static_cast<double>(grad_table[i] - truth));
    const double bound = static_cast<double>(shape.words) * 0x1p-53 * sizes[static_cast<size_t>(i)] +
                         Bounded<T>::kUnit * std::abs(static_cast<double>(truth));
    CHECK(error <= bound, i, grad_table[i], truth, error, bound);
  }
  const NamedExecutor other = any_executor(random);
  const Context with(other.name);
  const Result<T> again = run(words, table, true, other.executor);
  const Result<T> alone = run(words, table, false, other.executor);
  CHECK(same_bits(result.output.data(), again.output.data(), again.output.size()));
  CHECK(same_bits(result.output.data(), alone.output.data(), alone.output.size()));
  CHECK(same_bits(result.places.data(), again.places.data(), again.places.size()));
  const Buffer<T> grad_again = run_backward(words, grad, result.places, other.executor);
  CHECK(same_bits(grad_table.data(), grad_again.data(), grad_again.size()));
}

template <typename T>
void all_cases() {
  Random random(1);
  for (const int64_t count : {0, 1, 9, 100}) {
    for (const int64_t length : {1, 2, 7, 30}) {
      for (const int64_t characters : {1, 2, 50}) {
        for (const int64_t filters : {1, 5, 16, 50, 130}) {
          for (const std::vector<int64_t>& widths : {std::vector<int64_t>{1}, {3, 5}, {9}, {1, 3, 7}}) {
            const Context context(kTypeName<T>, " N=", count, " W=", length, " C=", characters, " F=", filters,
                                  " D=", widths.size());
            const Words words(count, length, characters, filters, widths, random);
            Buffer<T> table = uniform<T>(characters * words.shape.row, random);
            // Few different values, so that a maximum is often met twice.
            if (random.flip())
              std::transform(table.begin(), table.end(), table.begin(), [](T x) { return std::round(x); });
            check(words, table, random);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace pymtl::test

int main() {
  using namespace pymtl::test;
  return run_tests(
      {{"filters over characters, float", all_cases<float>}, {"filters over characters, double", all_cases<double>}});
}
