// Between padded batches and the packed layout: the order of sequences, and rows of any size moved as bytes.
#include <numeric>

#include "check.h"
#include "kernels/packing.h"

namespace pymtl::test {
namespace {

struct Order {
  Buffer<int64_t> batch_sizes, sorted, unsorted;
};

Order order_of(const Buffer<int64_t>& lengths, int64_t steps) {
  Order order{Buffer<int64_t>(steps), Buffer<int64_t>(lengths.size()), Buffer<int64_t>(lengths.size())};
  packing_order(lengths.data(), lengths.size(), steps, order.batch_sizes.data(), order.sorted.data(),
                order.unsorted.data());
  return order;
}

Buffer<int64_t> random_lengths(int64_t batch, int64_t longest, Random& random) {
  Buffer<int64_t> lengths(batch);
  for (int64_t& length : lengths) length = 1 + random.below(longest);
  return lengths;
}

void orders() {
  Random random(1);
  for (const int64_t batch : {1, 2, 3, 7, 40, 300}) {
    for (const int64_t longest : {1, 2, 5, 60}) {
      for (const int64_t more : {0, 3}) {  // steps that no sequence has
        const Context context("B=", batch, " longest ", longest, " and ", more);
        const Buffer<int64_t> lengths = random_lengths(batch, longest, random);
        const int64_t steps = longest + more;
        const Order order = order_of(lengths, steps);
        for (int64_t row = 0; row < batch; ++row) {
          const int64_t here = order.sorted[row];
          CHECK(here >= 0 && here < batch, row, here);
          if (here < 0 || here >= batch) return;
          CHECK(order.unsorted[here] == row, row, here, order.unsorted[here]);
          if (row == 0) continue;
          const int64_t before = order.sorted[row - 1];
          CHECK(lengths[before] > lengths[here] || (lengths[before] == lengths[here] && before < here), row, before,
                here);
        }
        for (int64_t t = 0; t < steps; ++t) {
          const int64_t expected =
              std::count_if(lengths.data(), lengths.data() + batch, [t](int64_t n) { return n > t; });
          CHECK(order.batch_sizes[t] == expected, t, order.batch_sizes[t], expected);
        }
      }
    }
  }
}

// How the tokens of a padded batch lie in memory.
enum class Padded { batch_first, time_first, batch_first_with_gaps, time_first_with_gaps };

void check_case(int64_t batch, int64_t steps, int64_t row_bytes, Padded kind, bool sorted, Random& random) {
  const Context context("B=", batch, " T=", steps, " bytes ", row_bytes, " kind ", static_cast<int>(kind),
                        sorted ? " sorted" : " in order");
  Buffer<int64_t> lengths = random_lengths(batch, steps, random);
  if (!sorted) std::sort(lengths.begin(), lengths.end(), std::greater<int64_t>());
  const Order order = order_of(lengths, steps);
  const int64_t tokens = std::accumulate(lengths.begin(), lengths.end(), int64_t{0});

  const bool gaps = kind == Padded::batch_first_with_gaps || kind == Padded::time_first_with_gaps;
  const bool batch_first = kind == Padded::batch_first || kind == Padded::batch_first_with_gaps;
  const int64_t cell = row_bytes + (gaps ? 3 : 0);
  Packing args{};
  args.steps = steps;
  args.batch = batch;
  args.batch_sizes = order.batch_sizes.data();
  args.sorted_indices = sorted ? order.sorted.data() : nullptr;
  args.row_bytes = row_bytes;
  args.step_stride = batch_first ? cell : batch * cell + (gaps ? 5 : 0);
  args.sequence_stride = batch_first ? steps * cell + (gaps ? 5 : 0) : cell;
  const auto at = [&](int64_t t, int64_t sequence) { return t * args.step_stride + sequence * args.sequence_stride; };

  // No memory past the last token: padding is not read.
  int64_t end = 0;
  for (int64_t sequence = 0; sequence < batch; ++sequence) {
    end = std::max(end, at(lengths[sequence] - 1, sequence) + row_bytes);
  }
  Buffer<unsigned char> padded(end);
  for (unsigned char& byte : padded) byte = static_cast<unsigned char>(random.bits());

  Buffer<unsigned char> expected(tokens * row_bytes);
  int64_t token = 0;
  for (int64_t t = 0; t < steps; ++t) {
    for (int64_t row = 0; row < batch; ++row) {
      const int64_t sequence = order.sorted[row];
      if (lengths[sequence] <= t) continue;
      std::copy_n(&padded[at(t, sequence)], row_bytes, &expected[token++ * row_bytes]);
    }
  }
  CHECK(token == tokens, token, tokens);

  const int64_t whole = at(steps - 1, batch - 1) + row_bytes;
  for (const NamedExecutor& named : {NamedExecutor{"serial", serial()}, any_executor(random)}) {
    const Context how(named.name);
    Buffer<unsigned char> packed(tokens * row_bytes);
    pack(args, padded.data(), packed.data(), named.executor);
    CHECK(same_bits(packed.data(), expected.data(), expected.size()));

    // The same tokens again, zeros at padding, and gaps as they were.
    Buffer<unsigned char> back(whole);
    Buffer<unsigned char> wanted(whole);
    std::fill(back.begin(), back.end(), static_cast<unsigned char>(0x77));
    std::fill(wanted.begin(), wanted.end(), static_cast<unsigned char>(0x77));
    for (int64_t sequence = 0; sequence < batch; ++sequence) {
      for (int64_t t = 0; t < steps; ++t) {
        if (t < lengths[sequence]) {
          std::copy_n(&padded[at(t, sequence)], row_bytes, &wanted[at(t, sequence)]);
        } else {
          std::fill_n(&wanted[at(t, sequence)], row_bytes, static_cast<unsigned char>(0));
        }
      }
    }
    unpack(args, packed.data(), back.data(), named.executor);
    CHECK(same_bits(back.data(), wanted.data(), whole));
  }
}

void round_trips() {
  Random random(2);
  for (const int64_t batch : {1, 2, 7, 40}) {
    for (const int64_t steps : {1, 2, 15, 50}) {
      for (const int64_t row_bytes : {1, 3, 4, 8, 17, 1200}) {
        for (const Padded kind :
             {Padded::batch_first, Padded::time_first, Padded::batch_first_with_gaps, Padded::time_first_with_gaps}) {
          for (const bool sorted : {false, true}) check_case(batch, steps, row_bytes, kind, sorted, random);
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
      {"order", orders},
      {"round trips", round_trips},
  });
}
