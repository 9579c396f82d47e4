// Attention of queries over the tokens of sequences, against plain loops.
#include "bounded.h"
#include "check.h"
#include "kernels/attention.h"
#include "rnn_case.h"

namespace pymtl::test {
namespace {

template <typename T>
struct Found {
  Buffer<T> context, weights, grad_query, grad_key, grad_value, grad_score;
};

template <typename T>
struct Case {
  Attention<T> args{};
  Buffer<int64_t> batch_sizes, sequences;
  Buffer<T> query, key, value, score, grad_context, grad_weights;
  std::vector<std::vector<int64_t>> tokens;  // of each sequence

  Case(const std::vector<int64_t>& lengths, int64_t queries, int64_t keys, int64_t values, int64_t heads, bool additive,
       Random& random)
      : batch_sizes(lengths[0]), sequences(queries), tokens(lengths.size()) {
    int64_t n = 0;
    for (int64_t t = 0; t < lengths[0]; ++t) {
      batch_sizes[t] = 0;
      for (size_t b = 0; b < lengths.size() && lengths[b] > t; ++b) {
        ++batch_sizes[t];
        tokens[b].push_back(n++);
      }
    }
    const int64_t batch = static_cast<int64_t>(lengths.size());
    for (int64_t& row : sequences) row = random.below(batch);
    query = uniform<T>(queries * keys, random, -2, 2);
    key = uniform<T>(n * keys, random);
    value = uniform<T>(n * values, random);
    if (additive) score = uniform<T>(keys, random);
    grad_context = uniform<T>(queries * values, random);
    grad_weights = uniform<T>(queries * heads * lengths[0], random);
    args.shape = {1, lengths[0], batch, n, 0, values, batch_sizes.data()};
    args.queries = queries;
    args.key_size = keys;
    args.heads = heads;
    args.query = query.data();
    args.key = key.data();
    args.value = value.data();
    args.sequences = sequences.data();
    args.score = additive ? score.data() : nullptr;
  }

  Found<T> run(const Executor& executor) const {
    Found<T> found{Buffer<T>(grad_context.size()), Buffer<T>(grad_weights.size()), Buffer<T>(query.size()),
                   Buffer<T>(key.size()),          Buffer<T>(value.size()),        Buffer<T>(score.size())};
    const AttentionForward<T> forward{args, found.context.data(), found.weights.data()};
    Workspace workspace = workspace_of(attention_workspace(forward));
    attention_forward(forward, workspace.data(), executor);
    attention_backward(AttentionBackward<T>{args, found.weights.data(), grad_context.data(), grad_weights.data(),
                                            found.grad_query.data(), found.grad_key.data(), found.grad_value.data(),
                                            args.score == nullptr ? nullptr : found.grad_score.data()},
                       executor);
    return found;
  }
};

template <typename T>
using Exact = std::vector<Bounded<T>>;

template <typename T>
Exact<T> zeros(int64_t count) {
  return Exact<T>(static_cast<size_t>(count), Bounded<T>(T(0)));
}

template <typename T>
void add(Exact<T>& to, int64_t at, const Bounded<T>& value) {
  to[static_cast<size_t>(at)] = to[static_cast<size_t>(at)] + value;
}

template <typename T>
void check_case(const Case<T>& given, Random& random) {
  const Attention<T>& args = given.args;
  const int64_t D = args.key_size, F = args.shape.hidden_size, steps = args.shape.steps;
  const int64_t keys = D / args.heads, values = F / args.heads;
  const Found<T> found = given.run(serial());
  Exact<T> context = zeros<T>(found.context.size()), weights = zeros<T>(found.weights.size());
  Exact<T> grad_query = zeros<T>(found.grad_query.size()), grad_key = zeros<T>(found.grad_key.size());
  Exact<T> grad_value = zeros<T>(found.grad_value.size()), grad_score = zeros<T>(found.grad_score.size());
  for (int64_t m = 0; m < args.queries; ++m) {
    const std::vector<int64_t>& tokens = given.tokens[static_cast<size_t>(given.sequences[m])];
    for (int64_t j = 0; j < args.heads; ++j) {
      const auto mixed = [&](int64_t token, int64_t d) {
        return tanh_of(Bounded<T>(given.query[m * D + d]) + Bounded<T>(given.key[token * D + d]));
      };
      Exact<T> scores, own, of_weights, products;
      T most = -std::numeric_limits<T>::infinity();
      for (const int64_t token : tokens) {
        Exact<T> parts;
        for (int64_t d = j * keys; d < (j + 1) * keys; ++d) {
          parts.push_back(args.score == nullptr
                              ? Bounded<T>(given.query[m * D + d]) * Bounded<T>(given.key[token * D + d])
                              : Bounded<T>(given.score[d]) * mixed(token, d));
        }
        scores.push_back(sum_of(parts));
        most = std::max(most, static_cast<T>(scores.back().value));
      }
      for (const Bounded<T>& score : scores) own.push_back(exponential_of(score - Bounded<T>(most)));
      const Bounded<T> sum = sum_of(own);
      for (size_t t = 0; t < tokens.size(); ++t) {
        const int64_t at = (m * args.heads + j) * steps + static_cast<int64_t>(t);
        own[t] = quotient(own[t], sum);
        weights[static_cast<size_t>(at)] = own[t];
        Exact<T> parts{Bounded<T>(given.grad_weights[at])};
        for (int64_t f = j * values; f < (j + 1) * values; ++f) {
          const Bounded<T> dy(given.grad_context[m * F + f]), x(given.value[tokens[t] * F + f]);
          add(context, m * F + f, own[t] * x);
          add(grad_value, tokens[t] * F + f, own[t] * dy);
          parts.push_back(dy * x);
        }
        of_weights.push_back(sum_of(parts));
        products.push_back(own[t] * of_weights.back());
      }
      const Bounded<T> mean = sum_of(products);
      for (size_t t = 0; t < tokens.size(); ++t) {
        const Bounded<T> ds = own[t] * (of_weights[t] - mean);
        for (int64_t d = j * keys; d < (j + 1) * keys; ++d) {
          const Bounded<T> q(given.query[m * D + d]), k(given.key[tokens[t] * D + d]);
          if (args.score == nullptr) {
            add(grad_query, m * D + d, ds * k);
            add(grad_key, tokens[t] * D + d, ds * q);
          } else {
            const Bounded<T> u = mixed(tokens[t], d);
            const Bounded<T> inner = ds * Bounded<T>(given.score[d]) * (Bounded<T>(T(1)) - u * u);
            add(grad_query, m * D + d, inner);
            add(grad_key, tokens[t] * D + d, inner);
            add(grad_score, d, ds * u);
          }
        }
      }
    }
  }
  check_within("context", found.context, context);
  check_within("weights", found.weights, weights);
  check_within("gradient of the queries", found.grad_query, grad_query);
  check_within("gradient of the keys", found.grad_key, grad_key);
  check_within("gradient of the values", found.grad_value, grad_value);
  check_within("gradient of the score", found.grad_score, grad_score);
  const NamedExecutor any = any_executor(random);
  const Found<T> again = given.run(any.executor);
  const auto same = [&](const Buffer<T>& a, const Buffer<T>& b) { return same_bits(a.data(), b.data(), a.size()); };
  CHECK(same(found.context, again.context), any.name);
  CHECK(same(found.weights, again.weights), any.name);
  CHECK(same(found.grad_query, again.grad_query), any.name);
  CHECK(same(found.grad_key, again.grad_key), any.name);
  CHECK(same(found.grad_value, again.grad_value), any.name);
  CHECK(same(found.grad_score, again.grad_score), any.name);
}

template <typename T>
void cases() {
  Random random(1);
  largest_part_of_bound = 0;
  for (const bool additive : {false, true}) {
    for (const int64_t keys : {1, 6, 33, 64}) {
      for (const int64_t heads : {1, 3}) {
        for (const int64_t batch : {1, 3, 9}) {
          for (const int64_t steps : {1, 5, 40}) {
            for (const int64_t queries : {1, 4, 30}) {
              if (keys % heads != 0) continue;
              const int64_t values = heads * (1 + random.below(40));
              const Context context(kTypeName<T>, additive ? " additive" : " product", " D=", keys, " F=", values,
                                    " J=", heads, " B=", batch, " T=", steps, " M=", queries);
              check_case(Case<T>(ragged(batch, steps, random), queries, keys, values, heads, additive, random), random);
            }
          }
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
  return run_tests({{"attention, float", cases<float>}, {"attention, double", cases<double>}});
}
