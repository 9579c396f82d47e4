// Splits a conditional random field's passes among workers and does in log space what scaled probabilities
// could lose. The time loops themselves are in simd/crf.h.
#include "../crf.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels.h"
#include "schedule.h"
#include "workspace.h"

namespace pymtl {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

template <typename T>
RnnShape shape_of(const CrfChain<T>& chain) {
  return {1, chain.steps, chain.batch, chain.tokens, 0, chain.classes, chain.batch_sizes};
}

// What every pass prepares: exponentials of the transitions and of the last step's scores.
template <typename T>
struct CrfPlan {
  Executor executor;
  int64_t slices;
  int64_t* starts;
  int64_t* bounds;
  double* factors_of_transitions;  // [C, C] exp(transitions - transition_shift)
  double* panels;
  double* end;
  double* log_partition;
  double* products;
  unsigned char* lossy;
  double* scratch;
  const double** rows;
  double transition_shift = 0;
  double end_shift = 0;
  bool all_lossy = false;

  CrfPlan(const CrfChain<T>& chain, Workspace& workspace, const Executor& given)
      : executor(executor_for(chain.tokens * chain.classes * chain.classes, given)),
        slices(slice_count(shape_of(chain), executor)) {
    const int64_t C = chain.classes;
    starts = workspace.take<int64_t>(chain.steps + 1);
    bounds = workspace.take<int64_t>(slices + 1);
    factors_of_transitions = workspace.take<double>(C * C);
    panels = workspace.take<double>(active_kernels().layers_f64.heads_panels_size(C, C));
    end = workspace.take<double>(C);
    log_partition = workspace.take<double>(chain.batch);
    products = workspace.take<double>(chain.batch);
    lossy = workspace.take<unsigned char>(chain.batch);
    scratch = workspace.take<double>((chain.batch + slices) * C);
    rows = workspace.take<const double*>(chain.batch);
  }

  void prepare(const CrfChain<T>& chain, bool transposed) {
    const int64_t C = chain.classes;
    fill_starts(shape_of(chain), starts);
    fill_bounds(shape_of(chain), starts, slices, bounds);
    const auto& factors = active_kernels().of<T>().crf_factors;
    transition_shift = factors(chain.transitions, C * C, factors_of_transitions, &all_lossy);
    end_shift = factors(chain.end, C, end, &all_lossy);
    const LayersFor<double>& kernels = active_kernels().layers_f64;
    if (transposed) {
      kernels.pack_heads(factors_of_transitions, C, C, C, panels);
    } else {
      kernels.pack_heads_backward(factors_of_transitions, C, C, panels);
    }
    std::fill(lossy, lossy + chain.batch, static_cast<unsigned char>(all_lossy));
  }

  CrfTimeLoop<T> loop(const CrfChain<T>& chain, int64_t slice) const {
    CrfTimeLoop<T> result{};
    result.chain = chain;
    result.starts = starts;
    result.first_row = bounds[slice];
    result.last_row = bounds[slice + 1];
    result.panels = panels;
    result.transition_shift = transition_shift;
    result.end = end;
    result.end_shift = end_shift;
    result.lossy = lossy;
    result.log_partition = log_partition;
    result.products = products;
    result.scratch = scratch + (bounds[slice] + slice) * chain.classes;
    result.rows = rows + bounds[slice];
    return result;
  }
};

// The largest of term(i) for i in [0, count), or NaN if one is.
template <typename Term>
double largest_of(int64_t count, Term&& term) {
  double largest = -kInfinity;
  for (int64_t i = 0; i < count; ++i) {
    const double x = term(i);
    if (x != x) return x;
    if (x > largest) largest = x;
  }
  return largest;
}

// log of the sum of exp(term(i)) for i in [0, count).
template <typename Term>
double log_sum(int64_t count, Term&& term) {
  const double largest = largest_of(count, term);
  if (!(largest > -kInfinity) || !(largest < kInfinity)) return largest;
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += std::exp(term(i) - largest);
  return largest + static_cast<double>(std::log(static_cast<long double>(sum)));
}

// One sequence of a chain, in log space.
template <typename T>
struct LogSpace {
  const CrfChain<T>& chain;
  const int64_t* starts;
  int64_t row;
  int64_t length;

  LogSpace(const CrfChain<T>& given, const int64_t* given_starts, int64_t of)
      : chain(given), starts(given_starts), row(of), length(given.steps) {
    while (starts[length] - starts[length - 1] <= row) --length;
  }

  int64_t token(int64_t t) const { return starts[t] + row; }
  double emission(int64_t t, int64_t c) const {
    return static_cast<double>(chain.emissions[token(t) * chain.classes + c]);
  }
  double transition(int64_t from, int64_t to) const {
    return static_cast<double>(chain.transitions[from * chain.classes + to]);
  }

  // Writes the logarithms of the forward probabilities; returns log Z.
  double forward(double* alphas, double* scales) const {
    const int64_t C = chain.classes;
    for (int64_t c = 0; c < C; ++c) alphas[token(0) * C + c] = static_cast<double>(chain.start[c]) + emission(0, c);
    for (int64_t t = 1; t < length; ++t) {
      const double* const before = alphas + token(t - 1) * C;
      for (int64_t c = 0; c < C; ++c) {
        alphas[token(t) * C + c] = log_sum(C, [&](int64_t i) { return before[i] + transition(i, c); }) + emission(t, c);
      }
    }
    for (int64_t t = 0; t < length; ++t) scales[token(t)] = -1;
    const double* const last = alphas + token(length - 1) * C;
    return log_sum(C, [&](int64_t c) { return last[c] + static_cast<double>(chain.end[c]); });
  }

  // Adds what the sequence contributes to marginals [N, C] and to transitions [C, C], times `grad`.
  //
  // Backwards by p(y_{t-1} = i | y_t = c), which is proportional to exp(alpha_{t-1}(i) + transitions(i, c)): each is
  // normalised by itself, so that the scores' size costs no precision (Rabiner 1989 keeps betas, which grow with it).
  void backward(const double* alphas, double grad, double* marginals, double* transitions, double* next,
                double* conditional) const {
    const int64_t C = chain.classes;
    const double* const last = alphas + token(length - 1) * C;
    normalised([&](int64_t c) { return last[c] + static_cast<double>(chain.end[c]); }, next);
    for (int64_t t = length - 1; t >= 0; --t) {
      double* const own = marginals + token(t) * C;
      std::copy(next, next + C, own);
      if (t > 0) {
        const double* const before = alphas + token(t - 1) * C;
        std::fill(next, next + C, 0.0);
        for (int64_t c = 0; c < C; ++c) {
          if (own[c] == 0) continue;  // nothing leads there, and so nothing from there
          normalised([&](int64_t i) { return before[i] + transition(i, c); }, conditional);
          for (int64_t i = 0; i < C; ++i) {
            const double both = conditional[i] * own[c];
            next[i] += both;
            transitions[i * C + c] += grad * both;
          }
        }
      }
      for (int64_t c = 0; c < C; ++c) own[c] *= grad;
    }
  }

  // exp(term(i)) over their sum; NaN if all are zero.
  template <typename Term>
  void normalised(Term&& term, double* probabilities) const {
    const int64_t C = chain.classes;
    const double largest = largest_of(C, term);
    double sum = 0;
    for (int64_t i = 0; i < C; ++i) {
      probabilities[i] = std::exp(term(i) - largest);
      sum += probabilities[i];
    }
    for (int64_t i = 0; i < C; ++i) probabilities[i] /= sum;
  }

  double score(const int64_t* tags) const {
    double sum = static_cast<double>(chain.start[tags[token(0)]]);
    for (int64_t t = 0; t < length; ++t) {
      if (t > 0) sum += transition(tags[token(t - 1)], tags[token(t)]);
      sum += emission(t, tags[token(t)]);
    }
    return sum + static_cast<double>(chain.end[tags[token(length - 1)]]);
  }
};

template <typename T>
struct BackwardPlan : CrfPlan<T> {
  double* marginals;        // [N, C]
  double* factors;          // [N, C]
  const double** previous;  // [N]
  double* transposed;       // [C, C]
  double* transitions;      // [C, C]
  double* sums;             // [2, C]
  int64_t tasks;
  size_t scratch_size;
  char* gradient_scratch;

  BackwardPlan(const CrfChain<T>& chain, Workspace& workspace, const Executor& given)
      : CrfPlan<T>(chain, workspace, given), tasks(std::max<int64_t>(this->executor.threads, 1)) {
    const int64_t C = chain.classes;
    marginals = workspace.take<double>(chain.tokens * C);
    factors = workspace.take<double>(chain.tokens * C);
    previous = workspace.take<const double*>(chain.tokens);
    transposed = workspace.take<double>(C * C);
    transitions = workspace.take<double>(C * C);
    sums = workspace.take<double>(2 * C);
    scratch_size = active_kernels().of<T>().crf_transition_gradient_scratch(chain.tokens, C, largest_share(C, tasks));
    scratch_size = (scratch_size + 63) / 64 * 64;
    gradient_scratch = workspace.take<char>(tasks * static_cast<int64_t>(scratch_size));
  }
};

}  // namespace

template <typename T>
size_t crf_forward_workspace(const CrfForward<T>& args, const Executor& executor) {
  Workspace workspace(nullptr);
  const CrfPlan<T> plan(args.chain, workspace, executor);
  return workspace.used();
}

template <typename T>
void crf_forward(const CrfForward<T>& args, void* memory, const Executor& given) {
  Workspace workspace(memory);
  CrfPlan<T> plan(args.chain, workspace, given);
  plan.prepare(args.chain, false);
  for_each(plan.executor, plan.slices, [&](int64_t slice) {
    CrfTimeLoop<T> loop = plan.loop(args.chain, slice);
    loop.alphas = args.alphas;
    loop.scales = args.scales;
    if (!plan.all_lossy && loop.first_row < loop.last_row) active_kernels().of<T>().crf_forward_time_loop(loop);
    for (int64_t row = loop.first_row; row < loop.last_row; ++row) {
      const LogSpace<T> sequence(args.chain, plan.starts, row);
      double log_partition = plan.log_partition[row];
      if (plan.lossy[row] != 0) log_partition = sequence.forward(args.alphas, args.scales);
      args.result[row] =
          static_cast<T>(args.tags == nullptr ? log_partition : sequence.score(args.tags) - log_partition);
    }
  });
}

template <typename T>
size_t crf_backward_workspace(const CrfBackward<T>& args, const Executor& executor) {
  Workspace workspace(nullptr);
  const BackwardPlan<T> plan(args.chain, workspace, executor);
  return workspace.used();
}

template <typename T>
void crf_backward(const CrfBackward<T>& args, void* memory, const Executor& given) {
  const CrfChain<T>& chain = args.chain;
  const int64_t C = chain.classes;
  const KernelsFor<T>& kernels = active_kernels().of<T>();
  Workspace workspace(memory);
  BackwardPlan<T> plan(chain, workspace, given);
  plan.prepare(chain, true);
  for (int64_t row = 0; row < chain.batch; ++row) plan.lossy[row] = args.scales[row] < 0;  // tokens of step 0
  for_each(plan.executor, plan.slices, [&](int64_t slice) {
    CrfTimeLoop<T> loop = plan.loop(chain, slice);
    loop.alphas = const_cast<double*>(args.alphas);  // read only, in this pass
    loop.scales = const_cast<double*>(args.scales);
    loop.grad_result = args.grad_result;
    loop.marginals = plan.marginals;
    loop.factors = plan.factors;
    if (loop.first_row < loop.last_row) kernels.crf_backward_time_loop(loop);
  });

  for (int64_t t = 0; t < chain.steps; ++t) {
    for (int64_t token = plan.starts[t]; token < plan.starts[t + 1]; ++token) {
      const int64_t row = token - plan.starts[t];
      // Factors are zero at first tokens and in log space; what they meet there only has to be finite.
      const bool used = t > 0 && plan.lossy[row] == 0;
      plan.previous[token] = used ? args.alphas + (plan.starts[t - 1] + row) * C : plan.end;
    }
  }
  for_each(plan.executor, plan.tasks, [&](int64_t task) {
    const int64_t first = share(C, task, plan.tasks);
    const int64_t last = share(C, task + 1, plan.tasks);
    const CrfTransitions transitions{chain.tokens, C, plan.factors, plan.previous, plan.transposed};
    if (first < last) {
      kernels.crf_transition_gradient(transitions, first, last,
                                      plan.gradient_scratch + static_cast<size_t>(task) * plan.scratch_size);
    }
  });
  constexpr int64_t kBlock = 8;  // of a transposition: a cache line
  for (int64_t first = 0; first < C; first += kBlock) {
    for (int64_t i = 0; i < C; ++i) {
      for (int64_t c = first; c < std::min(first + kBlock, C); ++c) {
        const double factor = plan.factors_of_transitions[i * C + c];
        // Nothing passes a forbidden transition, whatever its ends' probabilities; in log space there are no factors.
        plan.transitions[i * C + c] = plan.all_lossy || factor == 0 ? 0 : plan.transposed[c * C + i] * factor;
      }
    }
  }
  for (int64_t row = 0; row < chain.batch; ++row) {
    if (plan.lossy[row] == 0) continue;
    LogSpace<T>(chain, plan.starts, row)
        .backward(args.alphas, static_cast<double>(args.grad_result[row]), plan.marginals, plan.transitions,
                  plan.scratch, plan.sums);
  }

  // log Z enters with a minus where there are tags, whose own score enters with a plus.
  const double sign = args.tags == nullptr ? 1 : -1;
  for (int64_t i = 0; i < C * C; ++i) plan.transitions[i] *= sign;
  for (int64_t i = 0; i < chain.tokens * C; ++i) plan.marginals[i] *= sign;
  for (int64_t row = 0; args.tags != nullptr && row < chain.batch; ++row) {
    const LogSpace<T> sequence(chain, plan.starts, row);
    const double grad = static_cast<double>(args.grad_result[row]);
    for (int64_t t = 0; t < sequence.length; ++t) {
      const int64_t tag = args.tags[sequence.token(t)];
      plan.marginals[sequence.token(t) * C + tag] += grad;
      if (t > 0) plan.transitions[args.tags[sequence.token(t - 1)] * C + tag] += grad;
    }
  }
  double* const start = plan.sums;
  double* const end = plan.sums + C;
  std::fill(plan.sums, plan.sums + 2 * C, 0.0);
  for (int64_t row = 0; row < chain.batch; ++row) {
    const LogSpace<T> sequence(chain, plan.starts, row);
    for (int64_t c = 0; c < C; ++c) {
      start[c] += plan.marginals[sequence.token(0) * C + c];
      end[c] += plan.marginals[sequence.token(sequence.length - 1) * C + c];
    }
  }
  const auto give = [](const double* from, int64_t count, T* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(from[i]);
  };
  give(plan.marginals, chain.tokens * C, args.grad_emissions);
  give(plan.transitions, C * C, args.grad_transitions);
  give(start, C, args.grad_start);
  give(end, C, args.grad_end);
}

template <typename T>
size_t crf_decode_workspace(const CrfDecode<T>& args, const Executor&) {
  const CrfChain<T>& chain = args.chain;
  Workspace workspace(nullptr);
  workspace.take<int64_t>(chain.steps + 1);
  workspace.take<T>(2 * chain.batch * chain.classes);
  workspace.take<int32_t>(chain.tokens * chain.classes);
  return workspace.used();
}

template <typename T>
void crf_decode(const CrfDecode<T>& args, void* memory, const Executor& given) {
  const CrfChain<T>& chain = args.chain;
  const int64_t C = chain.classes;
  const KernelsFor<T>& kernels = active_kernels().of<T>();
  Workspace workspace(memory);
  int64_t* const starts = workspace.take<int64_t>(chain.steps + 1);
  T* const all_scores = workspace.take<T>(2 * chain.batch * C);
  int32_t* const all_best = workspace.take<int32_t>(chain.tokens * C);
  fill_starts(shape_of(chain), starts);
  for_each(executor_for(chain.tokens * C * C, given), chain.batch, [&](int64_t row) {
    const LogSpace<T> sequence(chain, starts, row);
    T* scores = all_scores + 2 * row * C;
    T* before = scores + C;
    for (int64_t c = 0; c < C; ++c) scores[c] = chain.start[c] + chain.emissions[sequence.token(0) * C + c];
    for (int64_t t = 1; t < sequence.length; ++t) {
      std::swap(scores, before);
      const int64_t at = sequence.token(t) * C;
      kernels.crf_best_step(chain, before, chain.emissions + at, scores, all_best + at);
    }
    for (int64_t c = 0; c < C; ++c) scores[c] += chain.end[c];
    int64_t tag = 0;
    for (int64_t c = 1; c < C; ++c) {
      if (scores[c] > scores[tag]) tag = c;
    }
    args.scores[row] = scores[tag];
    for (int64_t t = sequence.length - 1; t >= 0; --t) {
      args.tags[sequence.token(t)] = tag;
      if (t > 0) tag = all_best[sequence.token(t) * C + tag];
    }
  });
}

#define PYMTL_INSTANTIATE(T)                                                      \
  template size_t crf_forward_workspace(const CrfForward<T>&, const Executor&);   \
  template void crf_forward(const CrfForward<T>&, void*, const Executor&);        \
  template size_t crf_backward_workspace(const CrfBackward<T>&, const Executor&); \
  template void crf_backward(const CrfBackward<T>&, void*, const Executor&);      \
  template size_t crf_decode_workspace(const CrfDecode<T>&, const Executor&);     \
  template void crf_decode(const CrfDecode<T>&, void*, const Executor&);
PYMTL_INSTANTIATE(float)
PYMTL_INSTANTIATE(double)
#undef PYMTL_INSTANTIATE

}  // namespace pymtl
