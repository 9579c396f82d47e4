// The time loops of a conditional random field over the steps of some sequences; see crf.h.
#pragma once

#include <cmath>
#include <limits>

#include "../kernels.h"
#include "activation.h"
#include "gradients.h"
#include "panels.h"

namespace pymtl {
namespace {

// Factors and probabilities are kept apart from zero by so much that no product of three of them underflows:
// 1e-87 (a transition) * 1e-65 (an emission) * 1e-150 (a probability).
constexpr double kEmissionRange = 150;  // of one token's emissions, natural logarithms
constexpr double kLeastProbability = 1e-150;
constexpr double kTransitionRange = 200;  // of the transitions and of the last step's scores

// The C library's double-precision log is newer than the oldest system a wheel should run on.
PYMTL_INLINE double log_of(double x) { return static_cast<double>(::logl(x)); }

// Exponentials of `count` scores minus the largest, which is returned. Sets *lossy if they are too far apart.
inline double shifted_exponentials(double* scores, int64_t count, double range, bool* lossy) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  Vec<double> highest = broadcast(-kInfinity);
  Vec<double> lowest = broadcast(kInfinity);
  for (int64_t c = 0; c < count; c += kLanes<double>) {
    const Vec<double> x = load_part(scores + c, count - c, -kInfinity);
    highest = maximum<double>(highest, x);
    // A score of -infinity is a path that does not exist: nothing gets lost.
    lowest = select<double>((x < lowest) & (x > broadcast(-kInfinity)), x, lowest);
  }
  const double largest = max_lanes<double>(highest);
  const double smallest = -max_lanes<double>(-lowest);
  if (!(largest < kInfinity) || !(largest > -kInfinity) || largest - smallest > range) *lossy = true;
  for (int64_t c = 0; c < count; c += kLanes<double>) {
    const Vec<double> x = load_part(scores + c, count - c, -kInfinity);
    store_part(scores + c, exp_nonpositive<double>(x - broadcast(largest)), count - c);
  }
  return largest;
}

// exp(scores - the largest) of transitions or of the last step, which is returned; see above.
template <typename T>
double crf_factors(const T* scores, int64_t count, double* factors, bool* lossy) {
  for (int64_t c = 0; c < count; ++c) factors[c] = static_cast<double>(scores[c]);
  return shifted_exponentials(factors, count, kTransitionRange, lossy);
}

template <typename T>
void crf_forward_time_loop(const CrfTimeLoop<T>& loop) {
  const CrfChain<T>& chain = loop.chain;
  const int64_t C = chain.classes;
  double* const scores = loop.scratch;
  double* const products = scores + C;
  for (int64_t t = 0; t < chain.steps; ++t) {
    const int64_t active = loop.starts[t + 1] - loop.starts[t];
    const int64_t last = active < loop.last_row ? active : loop.last_row;
    const int64_t next = t + 1 < chain.steps ? loop.starts[t + 2] - loop.starts[t + 1] : 0;
    if (last <= loop.first_row) break;
    if (t > 0) {
      const int64_t before = loop.starts[t - 1];
      for (int64_t row = loop.first_row; row < last; ++row) {
        loop.rows[row - loop.first_row] = loop.alphas + (before + row) * C;
      }
      multiply_panels<double>(loop.rows, last - loop.first_row, PanelLayout<double>{C, C}, loop.panels,
                              [&](int64_t n, int64_t column, int64_t valid, Vec<double> value)
                                  PYMTL_INLINE_LAMBDA { store_part(products + n * C + column, value, valid); });
    }
    for (int64_t row = loop.first_row; row < last; ++row) {
      const int64_t token = loop.starts[t] + row;
      const T* const emissions = chain.emissions + token * C;
      for (int64_t c = 0; c < C; ++c) scores[c] = static_cast<double>(emissions[c]);
      if (t == 0) {
        for (int64_t c = 0; c < C; ++c) scores[c] += static_cast<double>(chain.start[c]);
        loop.log_partition[row] = 0;
        loop.products[row] = 1;
      }
      bool lossy = false;
      const double shift = shifted_exponentials(scores, C, kEmissionRange, &lossy);
      const double* const predicted = products + (row - loop.first_row) * C;
      Vec<double> sums = {};
      for (int64_t c = 0; c < C; c += kLanes<double>) {
        Vec<double> p = load_part(scores + c, C - c);
        if (t > 0) p = p * load_part(predicted + c, C - c);
        sums = sums + p;
        store_part(scores + c, p, C - c);
      }
      const double scale = sum_lanes<double>(sums);
      double* const alphas = loop.alphas + token * C;
      Vec<double> least = broadcast(1.0);
      for (int64_t c = 0; c < C; c += kLanes<double>) {
        const Vec<double> alpha = load_part(scores + c, C - c) / broadcast(scale);
        const Vec<double> possible = select<double>(alpha > broadcast(0.0), alpha, broadcast(1.0));
        least = select<double>(possible < least, possible, least);
        store_part(alphas + c, alpha, C - c);
      }
      if (!(-max_lanes<double>(-least) > kLeastProbability) || !(scale > 0)) lossy = true;
      if (lossy) loop.lossy[row] = 1;
      loop.scales[token] = scale;
      loop.log_partition[row] += shift + (t > 0 ? loop.transition_shift : 0);
      // Logarithms are slow: one of a product for as long as that is far from the largest and the smallest number.
      const auto moderate = [](double x) { return x > 1e-100 && x < 1e100; };
      if (moderate(scale)) {
        loop.products[row] *= scale;
      } else {
        loop.log_partition[row] += log_of(scale);
      }
      if (!moderate(loop.products[row])) {
        loop.log_partition[row] += log_of(loop.products[row]);
        loop.products[row] = 1;
      }
      if (row >= next) {
        double sum = 0;
        for (int64_t c = 0; c < C; ++c) sum += alphas[c] * loop.end[c];
        if (!(sum > 0)) loop.lossy[row] = 1;
        loop.log_partition[row] += log_of(loop.products[row]) + log_of(sum) + loop.end_shift;
      }
    }
  }
}

// Backward probabilities times the gradient of each sequence's result. Writes the marginals times that gradient
// to loop.marginals, and for every token but a sequence's first what its predecessors' probabilities are
// multiplied with, for the gradient of the transitions, to loop.factors.
template <typename T>
void crf_backward_time_loop(const CrfTimeLoop<T>& loop) {
  const CrfChain<T>& chain = loop.chain;
  const int64_t C = chain.classes;
  double* const scores = loop.scratch;
  double* const betas = scores + C;
  for (int64_t t = chain.steps - 1; t >= 0; --t) {
    const int64_t active = loop.starts[t + 1] - loop.starts[t];
    const int64_t next = t + 1 < chain.steps ? loop.starts[t + 2] - loop.starts[t + 1] : 0;
    const int64_t last = active < loop.last_row ? active : loop.last_row;
    const int64_t going_on = next < last ? next : last;
    if (going_on > loop.first_row) {
      for (int64_t row = loop.first_row; row < going_on; ++row) {
        loop.rows[row - loop.first_row] = loop.factors + (loop.starts[t + 1] + row) * C;
      }
      multiply_panels<double>(loop.rows, going_on - loop.first_row, PanelLayout<double>{C, C}, loop.panels,
                              [&](int64_t n, int64_t column, int64_t valid, Vec<double> value)
                                  PYMTL_INLINE_LAMBDA { store_part(betas + n * C + column, value, valid); });
    }
    for (int64_t row = loop.first_row; row < last; ++row) {
      const int64_t token = loop.starts[t] + row;
      double* const factors = loop.factors + token * C;
      double* const marginals = loop.marginals + token * C;
      if (loop.lossy[row] != 0) {  // log space will do this one
        for (int64_t c = 0; c < C; ++c) factors[c] = 0;
        continue;
      }
      const double* const alphas = loop.alphas + token * C;
      double* const beta = betas + (row - loop.first_row) * C;
      if (row >= next) {
        double sum = 0;
        for (int64_t c = 0; c < C; ++c) sum += alphas[c] * loop.end[c];
        const double factor = static_cast<double>(loop.grad_result[row]) / sum;
        for (int64_t c = 0; c < C; ++c) beta[c] = loop.end[c] * factor;
      }
      for (int64_t c = 0; c < C; ++c) {
        // What no path reaches may have any backward probability, infinity too.
        if (alphas[c] == 0) beta[c] = 0;
        marginals[c] = alphas[c] * beta[c];
      }
      if (t == 0) {
        for (int64_t c = 0; c < C; ++c) factors[c] = 0;
        continue;
      }
      const T* const emissions = chain.emissions + token * C;
      for (int64_t c = 0; c < C; ++c) scores[c] = static_cast<double>(emissions[c]);
      bool lossy = false;
      shifted_exponentials(scores, C, kEmissionRange, &lossy);
      const double inverse = 1 / loop.scales[token];
      for (int64_t c = 0; c < C; ++c) factors[c] = scores[c] * beta[c] * inverse;
    }
  }
}

// Columns [first, last) of sum_n factors_n^T previous_n: the gradient of exp(transitions), transposed.
template <typename T>
void crf_transition_gradient(const CrfTransitions& args, int64_t first_column, int64_t last_column, void* scratch) {
  WeightGradient<double> gradient(args.factors, args.tokens, args.classes, first_column, last_column, scratch);
  for (int64_t first = 0; first < args.tokens; first += gradient.block()) {
    const int64_t count = args.tokens - first < gradient.block() ? args.tokens - first : gradient.block();
    gradient.start(first, count);
    gradient.add_product(args.previous + first, args.classes, args.result);
  }
}

template <typename T>
size_t crf_transition_gradient_scratch(int64_t tokens, int64_t classes, int64_t columns) {
  return WeightGradientScratch<double>(tokens, classes, columns).size;
}

// A step for the classes from `first` on, `valid` of them, in `vectors` vectors of which the last may be cut.
template <typename T, int64_t vectors>
PYMTL_INLINE void crf_best_of(const CrfChain<T>& chain, const T* before, const T* emissions, int64_t first,
                              int64_t valid, T* scores, int32_t* best) {
  constexpr int64_t L = kLanes<T>;
  const int64_t C = chain.classes;
  const auto transitions = [&](int64_t i, int64_t v) PYMTL_INLINE_LAMBDA {
    const T* const from = chain.transitions + i * C + first + v * L;
    return vectors > 1 ? load(from) : load_part(from, valid);
  };
  Vec<T> highest[vectors];
  IntVec<T> from[vectors];
  for (int64_t v = 0; v < vectors; ++v) {
    highest[v] = broadcast(before[0]) + transitions(0, v);
    from[v] = IntVec<T>{};
  }
  IntVec<T> index = {};
  for (int64_t i = 1; i < C; ++i) {
    index = index + 1;
    const Vec<T> base = broadcast(before[i]);
#pragma GCC unroll 4
    for (int64_t v = 0; v < vectors; ++v) {
      const Vec<T> score = base + transitions(i, v);
      const IntVec<T> higher = score > highest[v];
      highest[v] = higher ? score : highest[v];
      from[v] = higher ? index : from[v];
    }
  }
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t c = first + v * L;
    const int64_t own = valid - v * L;
    store_part(scores + c, highest[v] + load_part(emissions + c, own), own);
    for (int64_t lane = 0; lane < L && lane < own; ++lane) best[c + lane] = static_cast<int32_t>(from[v][lane]);
  }
}

// One step of Viterbi's algorithm: scores[c] = max_i(before[i] + transitions[i, c]) + emissions[c], and where the
// maximum was first met.
template <typename T>
void crf_best_step(const CrfChain<T>& chain, const T* before, const T* emissions, T* scores, int32_t* best) {
  // Several vectors of classes at once: a comparison waits for the one before it in the same vector.
  constexpr int64_t kWide = 4;
  const int64_t C = chain.classes;
  int64_t c = 0;
  for (; c + kWide * kLanes<T> <= C; c += kWide * kLanes<T>) {
    crf_best_of<T, kWide>(chain, before, emissions, c, kWide * kLanes<T>, scores, best);
  }
  for (; c < C; c += kLanes<T>) crf_best_of<T, 1>(chain, before, emissions, c, C - c, scores, best);
}

}  // namespace
}  // namespace pymtl
