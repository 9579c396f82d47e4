// crf_forward, crf_backward and crf_decode against all paths, one by one, and against log space in long double.
#include <cmath>

#include "bounded.h"
#include "check.h"
#include "kernels/crf.h"
#include "rnn_case.h"

namespace pymtl::test {
namespace {

template <typename T>
constexpr T kForbidden = -std::numeric_limits<T>::infinity();

struct Scales {
  double emissions = 1;
  double transitions = 1;
  double ends = 1;       // start, too
  double forbidden = 0;  // the part of all scores that is -infinity, but for those of the tags
  bool whole = false;    // no fractions: sums are exact, and paths often tie
};

// Some sequences and what scores them.
template <typename T>
struct Chains {
  int64_t classes;
  std::vector<int64_t> lengths;  // longest first
  std::vector<int64_t> starts;   // [T + 1] the first token of each step
  Buffer<int64_t> batch_sizes;
  Buffer<T> emissions, start, end, transitions;
  Buffer<int64_t> tags;

  Chains(int64_t given_classes, const std::vector<int64_t>& given_lengths, const Scales& scales, Random& random)
      : classes(given_classes), lengths(given_lengths), starts(1), batch_sizes(given_lengths[0]) {
    for (int64_t& size : batch_sizes) {
      const int64_t t = static_cast<int64_t>(starts.size()) - 1;
      size = std::count_if(lengths.begin(), lengths.end(), [t](int64_t length) { return length > t; });
      starts.push_back(starts.back() + size);
    }
    const auto scores = [&](int64_t count, double scale) {
      Buffer<T> result = uniform<T>(count, random, -scale, scale);
      for (T& score : result) {
        if (scales.whole) score = std::round(score);
        if (random.uniform(0, 1) < scales.forbidden) score = kForbidden<T>;
      }
      return result;
    };
    emissions = scores(tokens() * classes, scales.emissions);
    transitions = scores(classes * classes, scales.transitions);
    start = scores(classes, scales.ends);
    end = scores(classes, scales.ends);
    tags = Buffer<int64_t>(tokens());
    for (int64_t& tag : tags) tag = random.below(classes);
    const auto allow = [](T& score) { score = std::max(score, T(-1)); };
    for (int64_t row = 0; scales.forbidden > 0 && row < batch(); ++row) {
      allow(start[tags[row]]);
      for (int64_t t = 0; t < length(row); ++t) {
        const int64_t tag = tags[token(t, row)];
        allow(emissions[token(t, row) * classes + tag]);
        allow(t + 1 < length(row) ? transitions[tag * classes + tags[token(t + 1, row)]] : end[tag]);
      }
    }
  }

  int64_t steps() const { return lengths[0]; }
  int64_t batch() const { return static_cast<int64_t>(lengths.size()); }
  int64_t tokens() const { return starts.back(); }
  int64_t length(int64_t row) const { return lengths[static_cast<size_t>(row)]; }
  int64_t token(int64_t t, int64_t row) const { return starts[static_cast<size_t>(t)] + row; }
  T* emissions_of(int64_t t, int64_t row) { return emissions.data() + token(t, row) * classes; }
  CrfChain<T> chain() const {
    return {steps(),          batch(),      tokens(),   classes,           batch_sizes.data(),
            emissions.data(), start.data(), end.data(), transitions.data()};
  }
  // What tag c of step t adds to a path, and tag c after tag i.
  long double at(int64_t t, int64_t row, int64_t c) const {
    const long double score = emissions[token(t, row) * classes + c];
    return score + (t == 0 ? start[c] : 0) + (t == length(row) - 1 ? end[c] : 0);
  }
  long double step(int64_t from, int64_t to) const { return transitions[from * classes + to]; }

  // The score of a path, added up in the order of the kernels.
  template <typename S, typename Path>
  S score(int64_t row, Path&& tag_of) const {
    S sum = start[tag_of(0)];
    for (int64_t t = 0; t < length(row); ++t) {
      if (t > 0) sum = sum + S(transitions[tag_of(t - 1) * classes + tag_of(t)]);
      sum = sum + S(emissions[token(t, row) * classes + tag_of(t)]);
    }
    return sum + S(end[tag_of(length(row) - 1)]);
  }
};

// What the kernels should find.
struct Expected {
  std::vector<long double> log_partition;  // [B]
  std::vector<long double> marginals;      // [N, C] probabilities of tags
  std::vector<long double> pairs;          // [B, C, C] expected numbers of transitions
  std::vector<int64_t> tags;               // [N] the best paths
  std::vector<long double> best;           // [B] and their scores

  Expected(int64_t batch, int64_t tokens, int64_t classes)
      : log_partition(batch),
        marginals(tokens * classes),
        pairs(batch * classes * classes),
        tags(tokens),
        best(batch) {}
};

template <typename T>
Expected by_enumeration(const Chains<T>& chains) {
  const int64_t C = chains.classes;
  Expected result(chains.batch(), chains.tokens(), C);
  for (int64_t row = 0; row < chains.batch(); ++row) {
    const int64_t length = chains.length(row);
    std::vector<int64_t> path(static_cast<size_t>(length));
    const auto tag_of = [&](int64_t t) { return path[static_cast<size_t>(t)]; };
    // The first step's tag changes fastest: the first path among ties has the lowest tags, from the last one back.
    const auto for_each_path = [&](auto&& visit) {
      size_t t = 0;
      while (t < path.size()) {
        visit(chains.template score<long double>(row, tag_of));
        for (t = 0; t < path.size() && ++path[t] == C; ++t) path[t] = 0;
      }
    };
    long double best = kForbidden<long double>;
    for_each_path([&](long double score) {
      if (!(score > best)) return;
      best = score;
      for (int64_t t = 0; t < length; ++t) result.tags[chains.token(t, row)] = tag_of(t);
    });
    long double sum = 0;
    for_each_path([&](long double score) { sum += std::exp(score - best); });
    for_each_path([&](long double score) {
      for (int64_t t = 0; t < length; ++t) {
        const long double p = std::exp(score - best) / sum;
        result.marginals[chains.token(t, row) * C + tag_of(t)] += p;
        if (t > 0) result.pairs[(row * C + tag_of(t - 1)) * C + tag_of(t)] += p;
      }
    });
    result.best[row] = best;
    result.log_partition[row] = best + std::log(sum);
  }
  return result;
}

long double log_sum(const std::vector<long double>& terms) {
  const long double largest = *std::max_element(terms.begin(), terms.end());
  if (!std::isfinite(largest)) return largest;
  long double sum = 0;
  for (const long double term : terms) sum += std::exp(term - largest);
  return largest + std::log(sum);
}

// The forward-backward algorithm and Viterbi's.
template <typename T>
Expected by_log_space(const Chains<T>& chains) {
  const int64_t C = chains.classes;
  Expected result(chains.batch(), chains.tokens(), C);
  std::vector<long double> terms(static_cast<size_t>(C));
  const auto highest = [&] { return std::max_element(terms.begin(), terms.end()) - terms.begin(); };
  for (int64_t row = 0; row < chains.batch(); ++row) {
    const int64_t length = chains.length(row);
    std::vector<long double> alphas(length * C), betas(length * C), most(length * C);
    std::vector<int64_t> from(length * C);
    for (int64_t t = 0; t < length; ++t) {
      for (int64_t c = 0; c < C; ++c) {
        alphas[t * C + c] = most[t * C + c] = chains.at(t, row, c);
        if (t == 0) continue;
        for (int64_t i = 0; i < C; ++i) terms[i] = alphas[(t - 1) * C + i] + chains.step(i, c);
        alphas[t * C + c] += log_sum(terms);
        for (int64_t i = 0; i < C; ++i) terms[i] = most[(t - 1) * C + i] + chains.step(i, c);
        from[t * C + c] = highest();
        most[t * C + c] += terms[highest()];
      }
    }
    terms.assign(most.end() - C, most.end());
    int64_t tag = highest();
    result.best[row] = terms[tag];
    for (int64_t t = length - 1; t >= 0; tag = from[t-- * C + tag]) result.tags[chains.token(t, row)] = tag;
    terms.assign(alphas.end() - C, alphas.end());
    const long double log_partition = result.log_partition[row] = log_sum(terms);

    for (int64_t t = length - 1; t >= 0; --t) {
      for (int64_t c = 0; c < C; ++c) {
        const long double p = std::exp(alphas[t * C + c] + betas[t * C + c] - log_partition);
        result.marginals[chains.token(t, row) * C + c] = p;
      }
      for (int64_t i = 0; t > 0 && i < C; ++i) {
        for (int64_t c = 0; c < C; ++c) {
          terms[c] = chains.step(i, c) + chains.at(t, row, c) + betas[t * C + c];
          result.pairs[(row * C + i) * C + c] += std::exp(alphas[(t - 1) * C + i] + terms[c] - log_partition);
        }
        betas[(t - 1) * C + i] = log_sum(terms);
      }
    }
  }
  return result;
}

constexpr double kDoubleUnit = Bounded<double>::kUnit;

// How far log Z of a sequence may be from the truth in double, and log p(tags). In a step at most 6 operations
// round sums of scores, 2 more for the tags; C products and C sums are rounded, 3 functions are within 2 ulp, and
// 4 operations remain. The relative errors of positive sums are the logarithms' errors, and nothing amplifies them.
template <typename T>
double log_error(const Chains<T>& chains, int64_t row, bool tagged) {
  const auto largest = [](const T* scores, int64_t count) {
    double result = 0;
    for (int64_t c = 0; c < count; ++c) {
      if (std::isfinite(scores[c])) result = std::max(result, std::abs(static_cast<double>(scores[c])));
    }
    return result;
  };
  const int64_t C = chains.classes;
  const double classes = static_cast<double>(C);
  const double length = static_cast<double>(chains.length(row));
  double size = largest(chains.start.data(), C) + largest(chains.end.data(), C) + length * std::log(classes) +
                (length - 1) * largest(chains.transitions.data(), C * C);
  for (int64_t t = 0; t < chains.length(row); ++t) {
    size += largest(chains.emissions.data() + chains.token(t, row) * C, C);
  }
  return kDoubleUnit * (length + 1) * ((tagged ? 8 : 6) * size + 2 * classes + 16);
}

template <typename T>
struct Outcome {
  Buffer<T> result;
  Buffer<T> emissions, start, end, transitions;  // gradients
  Buffer<int64_t> tags;
  Buffer<T> scores;
};

template <typename T>
Outcome<T> run(const CrfChain<T>& chain, const int64_t* tags, const T* grad, const Executor& executor) {
  const int64_t N = chain.tokens, B = chain.batch, C = chain.classes;
  Outcome<T> out{Buffer<T>(B),     Buffer<T>(N * C),   Buffer<T>(C), Buffer<T>(C),
                 Buffer<T>(C * C), Buffer<int64_t>(N), Buffer<T>(B)};
  Buffer<double> alphas(N * C), scales(N);
  const CrfForward<T> forward{chain, tags, out.result.data(), alphas.data(), scales.data()};
  Workspace of_forward = workspace_of(crf_forward_workspace(forward, executor));
  crf_forward(forward, of_forward.data(), executor);

  CrfBackward<T> backward{chain, tags, alphas.data(), scales.data(), grad, out.emissions.data(), 0, 0, 0};
  backward.grad_start = out.start.data();
  backward.grad_end = out.end.data();
  backward.grad_transitions = out.transitions.data();
  Workspace of_backward = workspace_of(crf_backward_workspace(backward, executor));
  crf_backward(backward, of_backward.data(), executor);

  const CrfDecode<T> decode{chain, out.tags.data(), out.scores.data()};
  Workspace of_decode = workspace_of(crf_decode_workspace(decode, executor));
  crf_decode(decode, of_decode.data(), executor);
  return out;
}

// Sums in double that are then rounded to T.
template <typename T>
void check_sums(const char* name, const Buffer<T>& actual, const std::vector<Bounded<double>>& sums) {
  std::vector<Bounded<T>> rounded;
  for (const Bounded<double>& sum : sums) rounded.push_back(Bounded<T>::rounded(sum.value, sum.error));
  check_within(name, actual, rounded);
}

template <typename T>
void check_gradients(const Chains<T>& chains, const Expected& expected, bool tagged, const Buffer<T>& grad,
                     const Outcome<T>& out) {
  const int64_t C = chains.classes;
  std::vector<Bounded<double>> emissions(chains.tokens() * C), start(C), end(C), transitions(C * C);
  for (int64_t row = 0; row < chains.batch(); ++row) {
    // A marginal is made of a forward and a backward probability, Z, and their product: each as far off as Z.
    const double part = std::expm1(4 * log_error(chains, row, false));
    const auto add = [](Bounded<double>& sum, long double term, double error, int64_t terms) {
      const double off = error * std::abs(static_cast<double>(term));
      const double underflow = static_cast<double>(terms) * std::numeric_limits<double>::min();
      sum = sum + Bounded<double>::rounded(term, off + underflow, static_cast<double>(terms));
    };
    const long double of_tags = grad[row];
    const long double of_partition = tagged ? -of_tags : of_tags;
    const int64_t length = chains.length(row);
    for (int64_t t = 0; t < length; ++t) {
      const int64_t token = chains.token(t, row);
      const int64_t tag = chains.tags[token];
      const auto add_marginals = [&](Bounded<double>* sums) {
        for (int64_t c = 0; c < C; ++c) add(sums[c], of_partition * expected.marginals[token * C + c], part, 1);
        if (tagged) add(sums[tag], of_tags, 0, 1);
      };
      add_marginals(&emissions[token * C]);
      if (t == 0) add_marginals(&start[0]);
      if (t == length - 1) add_marginals(&end[0]);
      if (tagged && t > 0) add(transitions[chains.tags[chains.token(t - 1, row)] * C + tag], of_tags, 0, 1);
    }
    for (int64_t i = 0; i < C * C; ++i) {
      add(transitions[i], of_partition * expected.pairs[row * C * C + i], part, length);
    }
  }
  check_sums("gradient of emissions", out.emissions, emissions);
  check_sums("gradient of start", out.start, start);
  check_sums("gradient of end", out.end, end);
  check_sums("gradient of transitions", out.transitions, transitions);
}

template <typename T>
void check_decoded(const Chains<T>& chains, const Expected& expected, bool exact, const Outcome<T>& out) {
  for (int64_t row = 0; row < chains.batch(); ++row) {
    const auto tag_of = [&](int64_t t) { return out.tags[chains.token(t, row)]; };
    const auto best_of = [&](int64_t t) { return expected.tags[static_cast<size_t>(chains.token(t, row))]; };
    bool valid = true, same = true;
    for (int64_t t = 0; t < chains.length(row); ++t) {
      valid = valid && tag_of(t) >= 0 && tag_of(t) < chains.classes;
      same = same && tag_of(t) == best_of(t);
    }
    CHECK(valid, row);
    if (!valid) continue;
    const T score = chains.template score<T>(row, tag_of);
    CHECK(same_bits(&score, &out.scores[row], 1), row, score, out.scores[row]);
    CHECK(!exact || (same && score == expected.best[row]), row, same, score, expected.best[row]);
    // Rounded sums are no larger for the best path, so its true score is not much larger.
    const Bounded<T> found = chains.template score<Bounded<T>>(row, tag_of);
    const double bound = found.error + chains.template score<Bounded<T>>(row, best_of).error;
    CHECK(expected.best[row] - found.value <= bound, row, expected.best[row], found.value, bound);
  }
}

// A sequence gets the same bits without the others.
template <typename T>
void check_alone(const Chains<T>& chains, int64_t row, bool tagged, const Buffer<T>& grad, const Outcome<T>& out) {
  const int64_t C = chains.classes;
  const int64_t length = chains.length(row);
  const std::vector<int64_t> ones(static_cast<size_t>(length), 1);
  Buffer<T> emissions(length * C);
  Buffer<int64_t> tags(length);
  for (int64_t t = 0; t < length; ++t) {
    std::copy_n(chains.emissions.data() + chains.token(t, row) * C, C, emissions.data() + t * C);
    tags[t] = chains.tags[chains.token(t, row)];
  }
  const CrfChain<T> all = chains.chain();
  const CrfChain<T> chain{length, 1, length, C, ones.data(), emissions.data(), all.start, all.end, all.transitions};
  const Outcome<T> alone = run(chain, tagged ? tags.data() : nullptr, grad.data() + row, serial());
  CHECK(same_bits(&alone.result[0], &out.result[row], 1), row, alone.result[0], out.result[row]);
  CHECK(same_bits(&alone.scores[0], &out.scores[row], 1), row, alone.scores[0], out.scores[row]);
  for (int64_t t = 0; t < length; ++t) {
    const int64_t token = chains.token(t, row);
    CHECK(same_bits(alone.emissions.data() + t * C, out.emissions.data() + token * C, C), row, t);
    CHECK(alone.tags[t] == out.tags[token], row, t);
  }
}

template <typename T>
void check_case(const Chains<T>& chains, bool exact, Random& random) {
  const double paths = std::pow(static_cast<double>(chains.classes), static_cast<double>(chains.steps()));
  const Expected expected = paths <= 1000 ? by_enumeration(chains) : by_log_space(chains);
  const Buffer<T> grad = uniform<T>(chains.batch(), random, -2, 2);
  for (const bool tagged : {false, true}) {
    const Context context(kTypeName<T>, " C=", chains.classes, " B=", chains.batch(), " T=", chains.steps(),
                          " N=", chains.tokens(), tagged ? ", with tags" : "");
    const int64_t* const tags = tagged ? chains.tags.data() : nullptr;
    const Outcome<T> out = run(chains.chain(), tags, grad.data(), serial());
    std::vector<Bounded<T>> results;
    for (int64_t row = 0; row < chains.batch(); ++row) {
      const auto tag_of = [&](int64_t t) { return chains.tags[chains.token(t, row)]; };
      long double result = expected.log_partition[row];
      if (tagged) result = chains.template score<long double>(row, tag_of) - result;
      results.push_back(Bounded<T>::rounded(result, log_error(chains, row, tagged)));
    }
    check_within("result", out.result, results);
    check_gradients(chains, expected, tagged, grad, out);
    check_decoded(chains, expected, exact, out);
    for (int64_t row = 0; row < chains.batch(); row += 1 + random.below(4)) check_alone(chains, row, tagged, grad, out);

    const NamedExecutor other = any_executor(random);
    const Context how(other.name);
    const Outcome<T> again = run(chains.chain(), tags, grad.data(), other.executor);
    const auto same = [](const auto& a, const auto& b) { return same_bits(a.data(), b.data(), a.size()); };
    CHECK(same(again.result, out.result) && same(again.tags, out.tags) && same(again.scores, out.scores));
    CHECK(same(again.emissions, out.emissions) && same(again.transitions, out.transitions));
    CHECK(same(again.start, out.start) && same(again.end, out.end));
  }
}

// Where scaled probabilities stay in range, at the edge of it, and beyond; and with paths that do not exist.
const std::vector<Scales> all_scales = {{1, 1, 1, 0},           {2, 2, 2, 0, true},  {1, 1, 1, 0.3}, {1, 1, 1, 0.9},
                                        {74, 99, 99, 0},        {74, 99, 1, 0.2},    {300, 1, 1, 0}, {1, 300, 1, 0},
                                        {2, 2, 300, 0.5, true}, {300, 300, 300, 0.3}};

template <typename T>
void against_reference() {
  Random random(1);
  largest_part_of_bound = 0;
  for (const int64_t classes : {1, 2, 3, 7, 8, 9, 15, 16, 17, 33, 72}) {
    for (const int64_t batch : {1, 2, 3, 4, 5, 6, 7, 8, 9}) {
      for (const int64_t steps : {1, 2, 3, 5, 9, 17, 40}) {
        // The larger, the rarer, but for the largest: most of the time is the reference's.
        const bool large = classes * batch * steps == 72 * 9 * 40;
        if (!large && random.below(1 + classes * classes * batch * steps / 6000) > 0) continue;
        const Scales& scales = all_scales[large ? 0 : random.bits() % all_scales.size()];
        std::vector<int64_t> lengths = ragged(batch, steps, random);
        if (random.below(4) == 0) lengths.assign(lengths.size(), steps);
        Chains<T> chains(classes, lengths, scales, random);
        // One sequence is out of range, beside others that are not.
        const int64_t wide = random.below(3 * batch);
        for (int64_t t = 0; wide < batch && t < chains.length(wide); ++t) {
          for (int64_t c = 0; c < classes; ++c) chains.emissions_of(t, wide)[c] *= 256;
        }
        check_case(chains, scales.whole, random);
      }
    }
  }
  std::printf("         largest error: %.2f of its bound\n", largest_part_of_bound);
}

// A tag e^-800 as likely as the others, at once or little by little, until the last token leaves no other.
template <typename T>
void unlikely() {
  Random random(3);
  largest_part_of_bound = 0;
  constexpr int64_t kSteps = 17;
  for (const int64_t classes : {2, 3, 9, 17}) {
    for (const std::string where : {"start", "first emission", "emissions", "transitions"}) {
      for (const T across : {kForbidden<T>, T(-1900), T(-60)}) {
        for (const T others : {kForbidden<T>, T(-2000), T(-100)}) {
          const bool at_end = random.flip();
          const Context context(where, ", across ", across, ", others ", others, at_end ? " at the end" : "");
          Chains<T> chains(classes, {kSteps, kSteps, 9, 1}, {}, random);
          const int64_t tag = random.below(classes);
          std::fill(chains.tags.begin(), chains.tags.end(), tag);  // this path exists
          for (int64_t i = 0; i < classes * classes; ++i) {
            if (i / classes != i % classes) chains.transitions[i] = across;
          }
          if (where == "start") chains.start[tag] = -800;
          if (where == "first emission") chains.emissions_of(0, 0)[tag] = -800;
          for (int64_t t = 0; where == "emissions" && t < kSteps - 1; ++t) chains.emissions_of(t, 0)[tag] = -50;
          if (where == "transitions") chains.transitions[tag * classes + tag] = -50;
          T* const last = at_end ? chains.end.data() : chains.emissions_of(kSteps - 1, 0);
          for (int64_t c = 0; c < classes; ++c) last[c] = c == tag ? last[c] : others;
          check_case(chains, false, random);
        }
      }
    }
  }
  std::printf("         largest error: %.2f of its bound\n", largest_part_of_bound);
}

template <typename T>
void impossible() {
  Random random(4);
  for (const int64_t classes : {1, 3, 8, 17}) {
    const Context context(kTypeName<T>, " C=", classes);
    // A sequence that has no path does not disturb the others.
    Chains<T> chains(classes, {6, 6, 4, 4, 1}, {}, random);
    std::fill_n(chains.emissions_of(2, 1), classes, kForbidden<T>);
    const Buffer<T> grad = uniform<T>(chains.batch(), random);
    const Outcome<T> out = run<T>(chains.chain(), nullptr, grad.data(), any_executor(random).executor);
    CHECK(out.result[1] == kForbidden<T> && out.scores[1] == kForbidden<T>, out.result[1], out.scores[1]);
    for (const int64_t row : {0, 2, 3, 4}) check_alone(chains, row, false, grad, out);
    // No sequence has a second token, so that no step is allowed changes nothing.
    Chains<T> single(classes, {1, 1, 1}, {}, random);
    std::fill(single.transitions.begin(), single.transitions.end(), kForbidden<T>);
    check_case(single, false, random);
  }
}

}  // namespace
}  // namespace pymtl::test

int main() {
  using namespace pymtl::test;
  return run_tests({
      {"against long double, float", against_reference<float>},
      {"against long double, double", against_reference<double>},
      {"unlikely until the end, float", unlikely<float>},
      {"unlikely until the end, double", unlikely<double>},
      {"impossible sequences, float", impossible<float>},
      {"impossible sequences, double", impossible<double>},
  });
}
