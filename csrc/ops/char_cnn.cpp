#include "kernels/char_cnn.h"

#include "scratch.h"
#include "tensors.h"

namespace pymtl::ops {
namespace {

// The words and the sizes that follow from them and the table's.
struct Words {
  Tensor ids;
  std::vector<int64_t> widths;
  CharCnnShape shape;

  // characters: the rows of the table; columns: its columns.
  Words(const Tensor& given, const std::vector<int64_t>& given_widths, int64_t characters, int64_t columns)
      : ids(given), widths(given_widths) {
    check(given.dim() == 2, "words: expected [words, characters], got ", given.dim(), "-D");
    ids = checked(given, "words", ScalarType::Long, {given.size(0), given.size(1)});
    int64_t all = 0;
    for (const int64_t width : widths) {
      check(width > 0 && width % 2 == 1 && width < (int64_t{1} << 31), "widths: expected odd numbers, got ", width);
      all += width;
    }
    check(!widths.empty(), "widths: expected at least one, got none");
    check(columns > 0 && columns % all == 0, "table: expected a number of columns that the ", all,
          " places of the windows divide, got ", columns);
    check(ids.size(1) > 0 && ids.size(1) < (int64_t{1} << 31), "words: expected at least one character, got none");
    const int64_t* const values = read<int64_t>(ids);
    for (int64_t i = 0; i < ids.numel(); ++i) {
      check(values[i] >= 0 && values[i] < characters, "words: expected characters from 0 to ", characters - 1, ", got ",
            values[i]);
    }
    const int64_t count = static_cast<int64_t>(widths.size());
    const int64_t filters = columns / all;
    shape = {ids.size(0), ids.size(1), characters, filters, widths.data(), count, count * filters, columns, values};
  }
};

std::tuple<Tensor, Tensor> char_cnn(Tensor words, Tensor given_table, std::vector<int64_t> widths, bool places) {
  return with_real_type(given_table, "table", [&]<typename T>() {
    check(given_table.dim() == 2, "table: expected a matrix, got ", given_table.dim(), "-D");
    const Sizes sizes = {given_table.size(0), given_table.size(1)};
    const Tensor table = checked(given_table, "table", given_table.scalar_type(), sizes);
    const Words given(words, widths, sizes[0], sizes[1]);
    const int64_t N = given.shape.words;
    const Tensor output = make(table, {N, given.shape.features});
    const Tensor found = make(table, {places ? N : 0, given.shape.features}, ScalarType::Long);
    if (N > 0) {
      const CharCnn<T> args{given.shape, read<T>(table), write<T>(output), write<int64_t>(found)};
      char_cnn_forward(args, places ? torch_executor() : inference_executor());
    }
    return std::make_tuple(output, found);
  });
}

Tensor char_cnn_backward(Tensor given_grad_output, Tensor words, Tensor given_places, std::vector<int64_t> widths,
                         int64_t characters) {
  return with_real_type(given_grad_output, "grad_output", [&]<typename T>() {
    check(given_grad_output.dim() == 2, "grad_output: expected a matrix, got ", given_grad_output.dim(), "-D");
    check(!widths.empty(), "widths: expected at least one, got none");
    const int64_t features = given_grad_output.size(1);
    const int64_t count = static_cast<int64_t>(widths.size());
    check(features > 0 && features % count == 0, "grad_output: expected as many filters of each of the ", count,
          " widths, got ", features, " in all");
    int64_t columns = 0;
    for (const int64_t width : widths) columns += width * (features / count);
    const Words given(words, widths, characters, columns);
    const int64_t N = given.shape.words;
    const ScalarType type = given_grad_output.scalar_type();
    const Tensor grad_output = checked(given_grad_output, "grad_output", type, {N, features});
    const Tensor places = checked(given_places, "places", ScalarType::Long, {N, features});
    const int64_t* const at = read<int64_t>(places);
    for (int64_t i = 0; i < places.numel(); ++i) {
      check(at[i] >= 0 && at[i] < given.shape.length, "places: expected numbers below ", given.shape.length, ", got ",
            at[i]);
    }
    const Tensor grad_table = make(grad_output, {characters, columns});
    const CharCnnBackward<T> args{given.shape, read<T>(grad_output), at, write<T>(grad_table)};
    const Scratch workspace(char_cnn_backward_workspace(args));
    pymtl::char_cnn_backward(args, workspace.memory(), torch_executor());
    return grad_table;
  });
}

}  // namespace
}  // namespace pymtl::ops

STABLE_TORCH_LIBRARY_IMPL(pymtl, CPU, m) {
  m.impl("char_cnn", TORCH_BOX(&pymtl::ops::char_cnn));
  m.impl("char_cnn_backward", TORCH_BOX(&pymtl::ops::char_cnn_backward));
}
