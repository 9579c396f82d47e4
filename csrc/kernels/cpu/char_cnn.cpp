#include "../char_cnn.h"

#include <algorithm>

#include "kernels.h"
#include "schedule.h"
#include "workspace.h"

namespace pymtl {

template <typename T>
void char_cnn_forward(const CharCnn<T>& args, const Executor& given) {
  constexpr int64_t kBlock = 8;
  const CharCnnShape& shape = args.shape;
  const Executor executor = executor_for(shape.words * shape.length * shape.row, given);
  for_each(executor, (shape.words + kBlock - 1) / kBlock, [&](int64_t block) {
    active_kernels().of<T>().char_cnn_words(args, block * kBlock, std::min((block + 1) * kBlock, shape.words));
  });
}

template <typename T>
size_t char_cnn_backward_workspace(const CharCnnBackward<T>& args) {
  Workspace workspace(nullptr);
  workspace.take<double>(args.shape.characters * args.shape.row);
  return workspace.used();
}

// Every task has some filters of one width, and adds up their gradients word by word: no result depends on the number
// of tasks. The sums over thousands of words are in double.
template <typename T>
void char_cnn_backward(const CharCnnBackward<T>& args, void* memory, const Executor& given) {
  constexpr int64_t kFilters = 16;
  const CharCnnShape& shape = args.shape;
  const int64_t F = shape.filters;
  const int64_t row = shape.row;
  Workspace workspace(memory);
  double* const sums = workspace.take<double>(shape.characters * row);
  const int64_t blocks = (F + kFilters - 1) / kFilters;
  const Executor executor = executor_for(shape.words * row, given);
  for_each(executor, shape.count * blocks, [&](int64_t task) {
    const int64_t d = task / blocks;
    const int64_t first = task % blocks * kFilters;
    const int64_t last = std::min(first + kFilters, F);
    const int64_t width = shape.widths[d];
    int64_t begin = 0;  // of the width's part of a row
    for (int64_t before = 0; before < d; ++before) begin += shape.widths[before] * F;
    const auto for_own = [&](auto&& body) {  // for each stretch of sums that is this task's
      for (int64_t c = 0; c < shape.characters; ++c) {
        for (int64_t k = 0; k < width; ++k) body(c * row + begin + k * F + first, last - first);
      }
    };
    for_own([&](int64_t at, int64_t count) { std::fill_n(sums + at, count, 0.0); });
    for (int64_t n = 0; n < shape.words; ++n) {
      const int64_t* const ids = shape.ids + n * shape.length;
      for (int64_t f = first; f < last; ++f) {
        const int64_t feature = n * shape.features + d * F + f;
        const int64_t start = args.places[feature] - width / 2;
        for (int64_t k = std::max<int64_t>(0, -start); k < std::min(width, shape.length - start); ++k) {
          sums[ids[start + k] * row + begin + k * F + f] += static_cast<double>(args.grad_output[feature]);
        }
      }
    }
    for_own([&](int64_t at, int64_t count) {
      for (int64_t i = at; i < at + count; ++i) args.grad_table[i] = static_cast<T>(sums[i]);
    });
  });
}

#define PYMTL_INSTANTIATE(T)                                              \
  template void char_cnn_forward(const CharCnn<T>&, const Executor&);     \
  template size_t char_cnn_backward_workspace(const CharCnnBackward<T>&); \
  template void char_cnn_backward(const CharCnnBackward<T>&, void*, const Executor&);
PYMTL_INSTANTIATE(float)
PYMTL_INSTANTIATE(double)
#undef PYMTL_INSTANTIATE

}  // namespace pymtl
