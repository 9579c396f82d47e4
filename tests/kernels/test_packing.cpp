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

// Against a walk over every step: the pieces in order, sorted by length.
void check_segments(int64_t batch, int64_t steps, bool batch_first, bool ragged, int64_t one_of, Random& random) {
  const Context context("B=", batch, " T=", steps, batch_first ? " batch first" : " time first",
                        ragged ? " ragged" : "", " resets one of ", one_of);
  const Buffer<int64_t> lengths = random_lengths(batch, steps, random);
  Buffer<bool> resets(batch * steps);
  for (bool& reset : resets) reset = random.below(one_of) == 0;
  Resets args{};
  args.steps = steps;
  args.batch = batch;
  args.resets = resets.data();
  args.lengths = ragged ? lengths.data() : nullptr;
  args.step_stride = batch_first ? 1 : batch;
  args.sequence_stride = batch_first ? steps : 1;

  std::vector<std::vector<int64_t>> pieces;  // of each the places of its tokens
  std::vector<int64_t> sequence_of, firsts(batch), lasts(batch);
  for (int64_t sequence = 0; sequence < batch; ++sequence) {
    for (int64_t t = 0; t < (ragged ? lengths[sequence] : steps); ++t) {
      const int64_t place = t * args.step_stride + sequence * args.sequence_stride;
      if (t == 0 || resets[place]) {
        if (t == 0) firsts[sequence] = static_cast<int64_t>(pieces.size());
        pieces.emplace_back();
        sequence_of.push_back(sequence);
      }
      pieces.back().push_back(place);
    }
    lasts[sequence] = static_cast<int64_t>(pieces.size()) - 1;
  }
  std::vector<size_t> order(pieces.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return pieces[a].size() > pieces[b].size(); });

  const SegmentCounts counts = count_segments(args);
  CHECK(counts.segments == static_cast<int64_t>(pieces.size()), counts.segments, pieces.size());
  Buffer<int64_t> batch_sizes(steps), tokens(counts.tokens), first(batch), last(batch), sequences(counts.segments);
  segment_order(args, batch_sizes.data(), tokens.data(), first.data(), last.data(), sequences.data());
  int64_t token = 0;
  for (int64_t t = 0; t < steps; ++t) {
    int64_t rows = 0;
    for (const size_t piece : order) {
      if (static_cast<int64_t>(pieces[piece].size()) <= t) continue;
      ++rows;
      if (token == counts.tokens) break;
      CHECK(tokens[token] == pieces[piece][t], t, token, tokens[token], pieces[piece][t]);
      ++token;
    }
    CHECK(batch_sizes[t] == rows, t, batch_sizes[t], rows);
  }
  CHECK(token == counts.tokens, token, counts.tokens);
  for (int64_t row = 0; row < counts.segments; ++row) {
    CHECK(sequences[row] == sequence_of[order[row]], row, sequences[row], sequence_of[order[row]]);
  }
  for (int64_t sequence = 0; sequence < batch; ++sequence) {
    const auto row_of = [&](int64_t piece) {
      return std::find(order.begin(), order.end(), static_cast<size_t>(piece)) - order.begin();
    };
    CHECK(first[sequence] == row_of(firsts[sequence]), sequence, first[sequence], row_of(firsts[sequence]));
    CHECK(last[sequence] == row_of(lasts[sequence]), sequence, last[sequence], row_of(lasts[sequence]));
  }
}

void segments() {
  Random random(3);
  for (const int64_t batch : {1, 2, 7, 40}) {
    for (const int64_t steps : {1, 2, 15, 50}) {
      for (const int64_t one_of : {1, 2, 10, 1000}) {
        for (const bool batch_first : {false, true}) {
          for (const bool ragged : {false, true}) check_segments(batch, steps, batch_first, ragged, one_of, random);
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
      {"segments", segments},
  });
}
