#include <algorithm>

#include "kernels/cuda/crf.h"
#include "kernels/cuda/tokens.h"

namespace pymtl::cuda {
namespace {

constexpr int kWarps = kRowThreads / kWarp;
constexpr int64_t kBlocks = 132;  // that add up gradients of the parameters; fixed, so that results repeat

__device__ double infinity() { return static_cast<double>(__builtin_inff()); }

__device__ double warp_maximum(double value) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value = fmax(value, shuffle_xor(value, mask));
  return value;
}
__device__ double warp_sum(double value) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

// log sum_i exp(term(i)) over i below count, by a warp. NaN stays NaN.
template <typename Term>
__device__ double log_sum(int64_t count, const Term& term) {
  double highest = -infinity();
  bool nan = false;
  for (int64_t i = lane_index(); i < count; i += kWarp) {
    const double value = term(i);
    nan = nan || value != value;
    highest = fmax(highest, value);
  }
  highest = warp_maximum(highest);
  const double shift = highest == -infinity() ? 0.0 : highest;
  double sum = nan ? static_cast<double>(__builtin_nanf("")) : 0.0;
  for (int64_t i = lane_index(); i < count; i += kWarp) sum += exp(term(i) - shift);
  return shift + log(warp_sum(sum));
}

// One sequence of the chain.
template <typename T>
struct Sequence {
  const CrfChain<T>& chain;
  Tokens tokens;
  int64_t number;
  int64_t length;

  __device__ Sequence(const CrfChain<T>& of, const int64_t* ends, int64_t b)
      : chain(of), tokens{of.steps, of.batch, of.tokens, of.batch_sizes, ends}, number(b), length(tokens.length(b)) {}

  __device__ int64_t token(int64_t t) const { return tokens.start(t) + number; }
  __device__ double emission(int64_t t, int64_t c) const {
    return static_cast<double>(chain.emissions[token(t) * chain.classes + c]);
  }
  __device__ double transition(int64_t from, int64_t to) const {
    return static_cast<double>(chain.transitions[from * chain.classes + to]);
  }
  __device__ double start(int64_t c) const { return static_cast<double>(chain.start[c]); }
  __device__ double end(int64_t c) const { return static_cast<double>(chain.end[c]); }
};

// The score of the given tags; NaN for tags that are none. By a warp.
template <typename T>
__device__ double score_of(const Sequence<T>& sequence, const int64_t* tags) {
  const int64_t classes = sequence.chain.classes;
  double score = 0.0;
  for (int64_t t = lane_index(); t < sequence.length; t += kWarp) {
    const int64_t tag = tags[sequence.token(t)];
    const int64_t before = t > 0 ? tags[sequence.token(t - 1)] : 0;
    if (tag < 0 || tag >= classes || before < 0 || before >= classes) {
      score = static_cast<double>(__builtin_nanf(""));
      continue;
    }
    score += sequence.emission(t, tag) + (t > 0 ? sequence.transition(before, tag) : sequence.start(tag));
    if (t + 1 == sequence.length) score += sequence.end(tag);
  }
  return warp_sum(score);
}

template <typename T>
struct ForwardArgs {
  CrfForward<T> args;
  const int64_t* ends;
};

template <typename T>
__global__ void forward(const __grid_constant__ ForwardArgs<T> launch) {
  const CrfForward<T>& args = launch.args;
  const int64_t classes = args.chain.classes;
  auto* before = reinterpret_cast<double*>(shared_memory());
  auto* now = before + classes;
  const int warp = thread_index() / kWarp;
  for (int64_t b = block_index(); b < args.chain.batch; b += block_count()) {
    const Sequence<T> sequence(args.chain, launch.ends, b);
    for (int64_t t = 0; t < sequence.length; ++t) {
      for (int64_t c = warp; c < classes; c += kWarps) {
        const auto path = [&](int64_t from) { return before[from] + sequence.transition(from, c); };
        const double arriving = t == 0 ? sequence.start(c) : log_sum(classes, path);
        if (lane_index() != 0) continue;
        now[c] = arriving + sequence.emission(t, c);
        args.alphas[sequence.token(t) * classes + c] = now[c];
      }
      if (thread_index() == 0) args.scales[sequence.token(t)] = -1.0;
      sync_threads();
      double* const swapped = before;
      before = now;
      now = swapped;
    }
    if (warp == 0) {
      double score = 0.0;
      if (sequence.length > 0) {
        const double log_z = log_sum(classes, [&](int64_t c) { return before[c] + sequence.end(c); });
        score = args.tags != nullptr ? score_of(sequence, args.tags) - log_z : log_z;
      }
      if (lane_index() == 0) args.result[b] = static_cast<T>(score);
    }
    sync_threads();
  }
}

template <typename T>
struct BackwardArgs {
  CrfBackward<T> args;
  const int64_t* ends;
  double* partial;  // [blocks][C * C + 2 * C] of the transitions, start and end
};

template <typename T>
__global__ void backward(const __grid_constant__ BackwardArgs<T> launch) {
  const CrfBackward<T>& args = launch.args;
  const int64_t classes = args.chain.classes;
  auto* later = reinterpret_cast<double*>(shared_memory());  // log of what follows, for each class
  auto* now = later + classes;
  const int warp = thread_index() / kWarp;
  const int64_t size = classes * classes + 2 * classes;
  double* const of_transitions = launch.partial + block_index() * size;
  double* const of_start = of_transitions + classes * classes;
  double* const of_end = of_start + classes;
  for (int64_t i = thread_index(); i < size; i += block_threads()) of_transitions[i] = 0.0;
  sync_threads();
  for (int64_t b = block_index(); b < args.chain.batch; b += block_count()) {
    const Sequence<T> sequence(args.chain, launch.ends, b);
    if (sequence.length == 0) continue;
    const double grad = static_cast<double>(args.grad_result[b]);
    const auto alpha = [&](int64_t t, int64_t c) { return args.alphas[sequence.token(t) * classes + c]; };
    const auto tag = [&](int64_t t) { return args.tags[sequence.token(t)]; };
    // The derivative of log p: what the tags have less what is expected; of log Z what is expected. NaN for a tag that
    // is none, as the result.
    const auto share = [&](double expected, bool given, int64_t t) {
      if (args.tags == nullptr) return grad * expected;
      if (tag(t) < 0 || tag(t) >= classes) return static_cast<double>(__builtin_nanf(""));
      return grad * ((given ? 1.0 : 0.0) - expected);
    };
    const int64_t last = sequence.length - 1;
    const double log_z = log_sum(classes, [&](int64_t c) { return alpha(last, c) + sequence.end(c); });
    for (int64_t c = thread_index(); c < classes; c += block_threads()) later[c] = sequence.end(c);
    sync_threads();
    for (int64_t t = last; t >= 0; --t) {
      for (int64_t c = thread_index(); c < classes; c += block_threads()) {
        const double expected = exp(alpha(t, c) + later[c] - log_z);
        const double value = share(expected, args.tags != nullptr && tag(t) == c, t);
        args.grad_emissions[sequence.token(t) * classes + c] = static_cast<T>(value);
        if (t == 0) of_start[c] += value;
        if (t == last) of_end[c] += value;
      }
      for (int64_t from = warp; t > 0 && from < classes; from += kWarps) {
        const auto path = [&](int64_t to) {
          return sequence.transition(from, to) + sequence.emission(t, to) + later[to];
        };
        const double following = log_sum(classes, path);
        const double before = alpha(t - 1, from) - log_z;
        for (int64_t to = lane_index(); to < classes; to += kWarp) {
          const bool given = args.tags != nullptr && tag(t - 1) == from && tag(t) == to;
          of_transitions[from * classes + to] += share(exp(before + path(to)), given, t);
        }
        if (lane_index() == 0) now[from] = following;
      }
      sync_threads();
      double* const swapped = later;
      later = now;
      now = swapped;
    }
  }
}

template <typename T>
struct SumArgs {
  const double* partial;
  int64_t blocks;
  int64_t classes;
  T* grad_start;
  T* grad_end;
  T* grad_transitions;
};

template <typename T>
__global__ void add_partial(const __grid_constant__ SumArgs<T> args) {
  const int64_t squares = args.classes * args.classes;
  const int64_t size = squares + 2 * args.classes;
  const int64_t i = block_index() * block_threads() + thread_index();
  if (i >= size) return;
  double sum = 0.0;
  for (int64_t block = 0; block < args.blocks; ++block) sum += args.partial[block * size + i];
  T* const to = i < squares                  ? args.grad_transitions + i
                : i < squares + args.classes ? args.grad_start + (i - squares)
                                             : args.grad_end + (i - squares - args.classes);
  *to = static_cast<T>(sum);
}

template <typename T>
struct DecodeArgs {
  CrfDecode<T> args;
  const int64_t* ends;
  int32_t* pointers;
};

template <typename T>
struct Best {
  T score;
  int64_t place;
};

// The highest score(i), the lowest i among equals; by a warp.
template <typename T, typename Score>
__device__ Best<T> best_of(int64_t count, const Score& score) {
  Best<T> best{-static_cast<T>(__builtin_inff()), count};
  for (int64_t i = lane_index(); i < count; i += kWarp) {
    const T value = score(i);
    if (best.place == count || value > best.score) best = {value, i};
  }
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const Best<T> other{shuffle_xor(best.score, mask), shuffle_xor(best.place, mask)};
    const bool better = other.score > best.score || (other.score == best.score && other.place < best.place);
    if (other.place < count && (best.place == count || better)) best = other;
  }
  return best;
}

template <typename T>
__global__ void decode(const __grid_constant__ DecodeArgs<T> launch) {
  const CrfDecode<T>& args = launch.args;
  const int64_t classes = args.chain.classes;
  // In T, in the order of plain code: so that equal paths are equal.
  auto* before = reinterpret_cast<T*>(shared_memory());
  auto* now = before + classes;
  const int warp = thread_index() / kWarp;
  for (int64_t b = block_index(); b < args.chain.batch; b += block_count()) {
    const Sequence<T> sequence(args.chain, launch.ends, b);
    for (int64_t t = 0; t < sequence.length; ++t) {
      for (int64_t c = warp; c < classes; c += kWarps) {
        Best<T> best{args.chain.start[c], 0};
        const auto path = [&](int64_t from) { return before[from] + args.chain.transitions[from * classes + c]; };
        if (t > 0) best = best_of<T>(classes, path);
        if (lane_index() != 0) continue;
        now[c] = best.score + args.chain.emissions[sequence.token(t) * classes + c];
        launch.pointers[sequence.token(t) * classes + c] = static_cast<int32_t>(best.place);
      }
      sync_threads();
      T* const swapped = before;
      before = now;
      now = swapped;
    }
    if (warp == 0) {
      const Best<T> last = best_of<T>(classes, [&](int64_t c) { return before[c] + args.chain.end[c]; });
      if (lane_index() == 0) {
        args.scores[b] = sequence.length > 0 ? last.score : T(0);
        int64_t tag = last.place < classes ? last.place : 0;
        for (int64_t t = sequence.length - 1; t >= 0; --t) {
          args.tags[sequence.token(t)] = tag;
          tag = launch.pointers[sequence.token(t) * classes + tag];
          if (tag >= classes) tag = 0;
        }
      }
    }
    sync_threads();
  }
}

int64_t blocks_for(int64_t batch) { return std::min(batch, kBlocks); }

size_t shared_for(int64_t classes) { return static_cast<size_t>(2 * classes) * sizeof(double); }

}  // namespace

template <typename T>
void crf_forward(const CrfForward<T>& args, const int64_t* ends, void* stream) {
  launch(forward<T>, {args.chain.batch, kRowThreads, 0, shared_for(args.chain.classes)}, static_cast<Stream>(stream),
         ForwardArgs<T>{args, ends});
}

int64_t crf_backward_workspace(int64_t batch, int64_t classes) {
  return blocks_for(batch) * (classes * classes + 2 * classes);
}

template <typename T>
void crf_backward(const CrfBackward<T>& args, const int64_t* ends, double* workspace, void* given) {
  const auto stream = static_cast<Stream>(given);
  const int64_t classes = args.chain.classes;
  const int64_t blocks = blocks_for(args.chain.batch);
  launch(backward<T>, {blocks, kRowThreads, 0, shared_for(classes)}, stream, BackwardArgs<T>{args, ends, workspace});
  const int64_t numbers = classes * classes + 2 * classes;
  launch(add_partial<T>, {(numbers + kRowThreads - 1) / kRowThreads, kRowThreads, 0, 0}, stream,
         SumArgs<T>{workspace, blocks, classes, args.grad_start, args.grad_end, args.grad_transitions});
}

template <typename T>
void crf_decode(const CrfDecode<T>& args, const int64_t* ends, int32_t* pointers, void* stream) {
  launch(decode<T>, {args.chain.batch, kRowThreads, 0, shared_for(args.chain.classes)}, static_cast<Stream>(stream),
         DecodeArgs<T>{args, ends, pointers});
}

#define PYMTL_INSTANTIATE(T)                                                         \
  template void crf_forward(const CrfForward<T>&, const int64_t*, void*);            \
  template void crf_backward(const CrfBackward<T>&, const int64_t*, double*, void*); \
  template void crf_decode(const CrfDecode<T>&, const int64_t*, int32_t*, void*);
PYMTL_INSTANTIATE(float)
PYMTL_INSTANTIATE(double)
#undef PYMTL_INSTANTIATE

}  // namespace pymtl::cuda
