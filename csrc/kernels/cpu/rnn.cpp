// Splits a call among workers; the time loops themselves are in simd/rnn.h and simd/rnn_backward.h.
#include "../rnn.h"

#include <algorithm>
#include <atomic>
#include <chrono>

#include "kernels.h"
#include "schedule.h"
#include "workspace.h"

namespace pymtl {
namespace {

// Multiply-adds of all recurrences over the whole batch.
int64_t work_of(const RnnShape& shape) {
  const CellSizes& sizes = sizes_of(shape.cell);
  const int64_t depth = (sizes.normalised ? 0 : shape.input_size) + shape.hidden_size;
  return shape.recurrences * shape.tokens * sizes.gates * shape.hidden_size * depth;
}

// Of one recurrence.
template <typename T>
RnnMasks<T> masks_of(const RnnMasks<T>& masks, const RnnShape& shape, int64_t g) {
  RnnMasks<T> result = masks;
  if (masks.dropout != nullptr) result.dropout += g * shape.batch * shape.hidden_size;
  if (masks.zoneout_h != nullptr) result.zoneout_h += g * shape.hidden_size;
  if (masks.zoneout_c != nullptr) result.zoneout_c += g * shape.hidden_size;
  return result;
}

// How long the first worker of a team waits for the others: a small part of what its time loop takes alone.
double patience(const RnnShape& shape) {
  constexpr double kMultiplyAddsASecond = 25e9;
  return 0.05 * static_cast<double>(work_of(shape) / shape.recurrences) / kMultiplyAddsASecond;
}

// If a member of a team loses its core, the others wait for milliseconds until the system schedules it again. After
// that has happened, each recurrence has a single worker for a while: the same bits, without waiting.
class TeamRest {
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::milliseconds kRest{100};

 public:
  static bool is_on() { return Clock::now().time_since_epoch().count() < until_.load(std::memory_order_relaxed); }

  static void begin_if_late(const Team* teams, int64_t count) {
    for (int64_t g = 0; g < count; ++g) {
      if (teams[g].late) until_.store((Clock::now() + kRest).time_since_epoch().count(), std::memory_order_relaxed);
    }
  }

 private:
  static inline std::atomic<Clock::rep> until_{0};
};

template <typename T>
struct ForwardPlan {
  Executor executor;
  int64_t team_workers;  // that share a recurrence's hidden units
  int64_t slices;        // of the sequences
  int64_t packed_size;
  int64_t head_size;
  size_t scratch_size;
  int64_t* starts;
  int64_t* bounds;
  T* packed;
  T* head_panels;
  Accum<T>* partial;
  Team* teams;
  char* scratch;
  size_t bytes;

  ForwardPlan(const RnnForward<T>& args, void* memory, const Executor& given)
      : executor(executor_for(work_of(args.shape), given)) {
    const RnnShape& shape = args.shape;
    const LayersFor<T>& kernels = active_layers<T>();
    team_workers = team_size(shape, executor, sizeof(T), Team::kMost);
    slices = team_workers > 1 ? 1 : slice_count(shape, executor);
    packed_size = kernels.rnn_packed_size(shape.cell, shape.input_size, shape.hidden_size);
    head_size = args.heads.width > 0 ? kernels.heads_packed_size(shape.hidden_size, args.heads.width) : 0;
    Workspace workspace(memory);
    starts = workspace.take<int64_t>(shape.steps + 1);
    bounds = workspace.take<int64_t>(slices + 1);
    packed = workspace.take<T>(args.packed == nullptr ? shape.recurrences * packed_size : 0);
    head_panels = workspace.take<T>(shape.recurrences * head_size);
    partial = workspace.take<Accum<T>>(args.heads.width > 0 ? shape.recurrences * shape.tokens * args.heads.width : 0);
    teams = workspace.take<Team>(team_workers > 1 ? shape.recurrences : 0);
    scratch_size = largest_scratch(args, kernels);
    scratch = workspace.take<char>(tasks(shape) * static_cast<int64_t>(scratch_size));
    bytes = workspace.used();
  }

  int64_t tasks(const RnnShape& shape) const { return shape.recurrences * slices * team_workers; }

  // Scratch memory of a time loop over all sequences: no slice needs more.
  static size_t largest_scratch(const RnnForward<T>& args, const LayersFor<T>& kernels) {
    const int64_t starts[2] = {0, args.shape.tokens};
    RnnTimeLoop<T> loop{};
    loop.cell = args.shape.cell;
    loop.starts = starts;
    loop.steps = 1;
    loop.last_row = args.shape.batch;
    loop.input_size = args.shape.input_size;
    loop.hidden_size = args.shape.hidden_size;
    loop.weights = args.packed == nullptr ? args.weights : nullptr;
    static const T some{};
    loop.head_panels = args.heads.width > 0 ? &some : nullptr;
    loop.mean = args.heads.mean;
    loop.max = args.heads.max;
    loop.masks = args.masks;
    return kernels.rnn_scratch(loop);
  }
};

// The first column of the input that recurrence g reads.
int64_t input_column(const RnnShape& shape, int64_t g) {
  return g / (shape.recurrences / shape.inputs) * shape.input_size;
}

template <typename T>
const T* at(const T* array, int64_t offset) {
  return array == nullptr ? nullptr : array + offset;
}

template <typename T>
T* at(T* array, int64_t offset) {
  return array == nullptr ? nullptr : array + offset;
}

}  // namespace

template <typename T>
size_t rnn_packed_size(Cell cell, int64_t recurrences, int64_t input_size, int64_t hidden_size) {
  return static_cast<size_t>(recurrences * active_layers<T>().rnn_packed_size(cell, input_size, hidden_size));
}

template <typename T>
PrepackedHeader rnn_prepacked_header(Cell cell) {
  const auto lanes = static_cast<uint32_t>(active_layers<T>().lanes);
  return {PrepackedHeader::kVersion, prepacked_dtype<T>, 0, lanes, static_cast<uint32_t>(cell)};
}

template <typename T>
void rnn_pack(Cell cell, const RnnWeights<T>* weights, int64_t recurrences, int64_t input_size, int64_t hidden_size,
              T* packed, const Executor& executor) {
  const LayersFor<T>& kernels = active_layers<T>();
  const int64_t size = kernels.rnn_packed_size(cell, input_size, hidden_size);
  for_each(executor, recurrences,
           [&](int64_t g) { kernels.pack_rnn(cell, weights[g], input_size, hidden_size, 0, 1, packed + g * size); });
}

template <typename T>
size_t rnn_forward_workspace(const RnnForward<T>& args, const Executor& executor) {
  return ForwardPlan<T>(args, nullptr, executor).bytes;
}

template <typename T>
void rnn_forward(const RnnForward<T>& args, void* workspace, const Executor& given) {
  const ForwardPlan<T> plan(args, workspace, given);
  const LayersFor<T>& kernels = active_layers<T>();
  const RnnShape& shape = args.shape;
  const int64_t hidden = shape.hidden_size;
  const int64_t all_hidden = shape.recurrences * hidden;
  const RnnHeads<T>& heads = args.heads;
  const int64_t reserve = sizes_of(shape.cell).reserve_with(args.masks.zoneout_h != nullptr);
  fill_starts(shape, plan.starts);
  fill_bounds(shape, plan.starts, plan.slices, plan.bounds);

  // A worker that has a recurrence, or some of its units, to itself packs those weights in its time loop, into its own
  // cache; workers that share out the sequences share one pack, made before.
  const auto pack_heads = [&](int64_t g) {
    if (heads.width > 0) {
      kernels.pack_heads(heads.weight + g * hidden, all_hidden, hidden, heads.width,
                         plan.head_panels + g * plan.head_size);
    }
  };
  if (plan.slices > 1) {
    for_each(plan.executor, shape.recurrences * plan.slices, [&](int64_t task) {
      const int64_t g = task / plan.slices;
      const int64_t part = task % plan.slices;
      if (args.packed == nullptr) {
        kernels.pack_rnn(shape.cell, args.weights[g], shape.input_size, hidden, part, plan.slices,
                         plan.packed + g * plan.packed_size);
      }
      if (part == 0) pack_heads(g);
    });
  }
  const bool in_teams = plan.team_workers > 1 && !TeamRest::is_on();
  for (int64_t g = 0; g < shape.recurrences && in_teams; ++g) plan.teams[g] = Team{};

  const int64_t loops = plan.team_workers > 1 && !in_teams ? shape.recurrences : plan.tasks(shape);
  for_each(plan.executor, loops, [&](int64_t task) {
    RnnTimeLoop<T> loop{};
    loop.scratch = plan.scratch + static_cast<size_t>(task) * plan.scratch_size;
    int64_t g, slice = 0;
    if (in_teams) {
      g = task % shape.recurrences;  // so that neighbours are of different teams: a thread may have several tasks
      loop.team = &plan.teams[g];
      loop.place = join(*loop.team, plan.team_workers, patience(shape), loop.scratch);
      if (loop.place < 0) return;
    } else {
      g = task / plan.slices;
      slice = task % plan.slices;
    }
    if (plan.slices == 1) {
      if (loop.place == 0) pack_heads(g);  // the others of a team read them after they have met
      loop.weights = args.packed == nullptr ? &args.weights[g] : nullptr;
      loop.packed_here = plan.packed + g * plan.packed_size;
    }
    const int64_t state = g * shape.batch * hidden;
    loop.cell = shape.cell;
    loop.starts = plan.starts;
    loop.steps = shape.steps;
    loop.first_row = plan.bounds[slice];
    loop.last_row = plan.bounds[slice + 1];
    loop.reverse = args.weights[g].reverse;
    loop.input_size = shape.input_size;
    loop.hidden_size = hidden;
    loop.input = args.input + input_column(shape, g);
    loop.input_stride = shape.inputs * shape.input_size;
    loop.packed = (args.packed == nullptr ? plan.packed : args.packed) + g * plan.packed_size;
    loop.h0 = at(args.h0, state);
    loop.c0 = at(args.c0, state);
    loop.output = at(args.output, g * hidden);
    loop.output_stride = all_hidden;
    loop.h_n = args.h_n + state;
    loop.c_n = at(args.c_n, state);
    loop.gates = at(args.gates, g * shape.tokens * reserve * hidden);
    loop.cells = at(args.cells, g * shape.tokens * hidden);
    loop.head_panels = heads.width > 0 ? plan.head_panels + g * plan.head_size : nullptr;
    loop.head_width = heads.width;
    loop.partial = at(plan.partial, g * shape.tokens * heads.width);
    loop.mean = at(heads.mean, g * hidden);
    loop.max = at(heads.max, g * hidden);
    loop.pooled_stride = all_hidden;
    loop.masks = masks_of(args.masks, shape, g);
    loop.norm = args.weights[g].norm;
    if (loop.last_row > loop.first_row) kernels.rnn_time_loop(loop);
  });
  if (in_teams) TeamRest::begin_if_late(plan.teams, shape.recurrences);

  if (heads.width > 0) {
    constexpr int64_t kBlock = 256;
    const int64_t blocks = (shape.tokens + kBlock - 1) / kBlock;
    const Executor executor = executor_for(shape.recurrences * shape.tokens * heads.width, plan.executor);
    for_each(executor, blocks, [&](int64_t block) {
      kernels.sum_parts(plan.partial, shape.tokens * heads.width, shape.recurrences, heads.bias, heads.width,
                        block * kBlock, std::min((block + 1) * kBlock, shape.tokens), heads.logits, heads.width);
    });
  }
}

namespace {

template <typename T>
struct BackwardPlan {
  Executor executor;
  int64_t team_workers;
  int64_t slices;
  int64_t packed_size;
  int64_t input_packed_size;
  size_t scratch_size;
  int64_t* starts;
  int64_t* bounds;
  T* packed;
  T* input_packed;
  Accum<T>* input_parts;
  Team* teams;
  char* scratch;
  size_t bytes;

  BackwardPlan(const RnnBackward<T>& args, void* memory, const Executor& given)
      : executor(executor_for(work_of(args.shape), given)) {
    const RnnShape& shape = args.shape;
    const LayersFor<T>& kernels = active_layers<T>();
    constexpr int64_t kUnitsEach = 64;  // of a panel of W_hh's columns
    team_workers = team_size(shape, executor, sizeof(T), shape.hidden_size / kUnitsEach);
    slices = team_workers > 1 ? 1 : slice_count(shape, executor);
    packed_size = kernels.rnn_backward_packed_size(shape.cell, shape.hidden_size);
    input_packed_size = kernels.rnn_input_gradient_packed_size(shape.cell, shape.input_size, shape.hidden_size);
    Workspace workspace(memory);
    starts = workspace.take<int64_t>(shape.steps + 1);
    bounds = workspace.take<int64_t>(slices + 1);
    packed = workspace.take<T>(shape.recurrences * packed_size);
    input_packed = workspace.take<T>(args.grad_input != nullptr ? shape.recurrences * input_packed_size : 0);
    // Of an input that one recurrence reads, its part is the whole.
    const bool sum = args.grad_input != nullptr && shape.recurrences > shape.inputs;
    input_parts = workspace.take<Accum<T>>(sum ? shape.recurrences * shape.tokens * shape.input_size : 0);
    // The time loops' scratch memory serves the weights' gradients after them.
    RnnBackwardTimeLoop<T> loop{};
    loop.cell = shape.cell;
    loop.last_row = shape.batch;
    loop.hidden_size = shape.hidden_size;
    loop.masks = args.masks;
    RnnWeightGradient<T> gradient{};
    gradient.cell = shape.cell;
    gradient.input_size = shape.input_size;
    gradient.hidden_size = shape.hidden_size;
    gradient.tokens = shape.tokens;
    gradient.dropout = args.masks.dropout;
    gradient.last_column = largest_share(sizes_of(shape.cell).gradients * shape.hidden_size, slices * team_workers);
    scratch_size = std::max(kernels.rnn_backward_scratch(loop), kernels.rnn_weight_gradient_scratch(gradient));
    scratch_size = (scratch_size + 63) / 64 * 64;
    teams = workspace.take<Team>(team_workers > 1 ? shape.recurrences : 0);
    scratch = workspace.take<char>(tasks(shape) * static_cast<int64_t>(scratch_size));
    bytes = workspace.used();
  }

  int64_t tasks(const RnnShape& shape) const { return shape.recurrences * slices * team_workers; }
};

}  // namespace

template <typename T>
size_t rnn_backward_workspace(const RnnBackward<T>& args, const Executor& executor) {
  return BackwardPlan<T>(args, nullptr, executor).bytes;
}

template <typename T>
void rnn_backward(const RnnBackward<T>& args, void* workspace, const Executor& given) {
  const BackwardPlan<T> plan(args, workspace, given);
  const LayersFor<T>& kernels = active_layers<T>();
  const RnnShape& shape = args.shape;
  const int64_t hidden = shape.hidden_size;
  const CellSizes& sizes = sizes_of(shape.cell);
  const int64_t reserve = sizes.reserve_with(args.masks.zoneout_h != nullptr);
  fill_starts(shape, plan.starts);
  fill_bounds(shape, plan.starts, plan.slices, plan.bounds);

  const auto pack = [&](int64_t g, int64_t part, int64_t parts) {
    kernels.pack_rnn_backward(shape.cell, args.weights[g].w_hh, hidden, part, parts,
                              plan.packed + g * plan.packed_size);
    if (args.grad_input != nullptr) {
      kernels.pack_rnn_input_gradient(shape.cell, args.weights[g].w_ih, shape.input_size, hidden, part, parts,
                                      plan.input_packed + g * plan.input_packed_size);
    }
  };
  if (plan.slices > 1) {
    for_each(plan.executor, shape.recurrences * plan.slices,
             [&](int64_t task) { pack(task / plan.slices, task % plan.slices, plan.slices); });
  }
  const bool in_teams = plan.team_workers > 1 && !TeamRest::is_on();
  for (int64_t g = 0; g < shape.recurrences && in_teams; ++g) plan.teams[g] = Team{};

  const int64_t loops = plan.team_workers > 1 && !in_teams ? shape.recurrences : plan.tasks(shape);
  for_each(plan.executor, loops, [&](int64_t task) {
    RnnBackwardTimeLoop<T> loop{};
    loop.scratch = plan.scratch + static_cast<size_t>(task) * plan.scratch_size;
    int64_t g, slice = 0;
    if (in_teams) {
      g = task % shape.recurrences;
      loop.team = &plan.teams[g];
      loop.place = join(*loop.team, plan.team_workers, patience(shape), nullptr);
      if (loop.place < 0) return;
      pack(g, loop.place, loop.team->size);
    } else {
      g = task / plan.slices;
      slice = task % plan.slices;
      if (plan.slices == 1) pack(g, 0, 1);
    }
    const int64_t state = g * shape.batch * hidden;
    const int64_t tokens = g * shape.tokens * hidden;
    loop.cell = shape.cell;
    loop.starts = plan.starts;
    loop.steps = shape.steps;
    loop.first_row = plan.bounds[slice];
    loop.last_row = plan.bounds[slice + 1];
    loop.reverse = args.weights[g].reverse;
    loop.hidden_size = hidden;
    loop.packed = plan.packed + g * plan.packed_size;
    loop.h0 = at(args.h0, state);
    loop.c0 = at(args.c0, state);
    loop.output = args.output + g * hidden;
    loop.output_stride = shape.recurrences * hidden;
    loop.gates = at(args.gates, reserve * tokens);
    loop.cells = at(args.cells, tokens);
    loop.grad_output = at(args.grad_output, g * hidden);
    loop.grad_h_n = at(args.grad_h_n, state);
    loop.grad_c_n = at(args.grad_c_n, state);
    loop.grad_gates = args.grad_gates + sizes.gradients * tokens;
    loop.grad_h0 = at(args.grad_h0, state);
    loop.grad_c0 = at(args.grad_c0, state);
    loop.masks = masks_of(args.masks, shape, g);
    loop.norm = args.weights[g].norm;
    if (loop.last_row == loop.first_row) return;
    kernels.rnn_backward_time_loop(loop);
    if (args.grad_input == nullptr) return;
    // The gate gradients just written are in this worker's cache. Another worker's would first have to leave
    // its, and to be taken back by it for the next call.
    RnnInputGradient<T> input{};
    input.cell = shape.cell;
    input.starts = plan.starts;
    const int64_t workers = loop.team == nullptr ? 1 : loop.team->size;
    input.first_step = shape.steps * loop.place / workers;
    input.last_step = shape.steps * (loop.place + 1) / workers;
    input.first_row = loop.first_row;
    input.last_row = loop.last_row;
    input.input_size = shape.input_size;
    input.hidden_size = hidden;
    input.grad_gates = loop.grad_gates;
    input.packed = plan.input_packed + g * plan.input_packed_size;
    const bool sum = shape.recurrences > shape.inputs;
    input.part = sum ? plan.input_parts + g * shape.tokens * shape.input_size : nullptr;
    input.result = args.grad_input + input_column(shape, g);
    input.result_stride = shape.inputs * shape.input_size;
    kernels.rnn_input_gradient(input);
  });
  if (in_teams) TeamRest::begin_if_late(plan.teams, shape.recurrences);

  // Every task has a share of a recurrence's weight rows: equal work. All sums are whole within a task, so no
  // result depends on the number of tasks.
  const int64_t tasks = plan.tasks(shape);
  const int64_t shares = tasks / shape.recurrences;
  for_each(plan.executor, tasks, [&](int64_t task) {
    const int64_t g = task / shares;
    const int64_t slice = task % shares;
    const RnnWeightGradients<T>& wanted = args.grad_weights[g];
    RnnWeightGradient<T> gradient{};
    gradient.cell = shape.cell;
    gradient.starts = plan.starts;
    gradient.steps = shape.steps;
    gradient.tokens = shape.tokens;
    gradient.reverse = args.weights[g].reverse;
    gradient.input_size = shape.input_size;
    gradient.hidden_size = hidden;
    gradient.first_column = share(sizes.gradients * hidden, slice, shares);
    gradient.last_column = share(sizes.gradients * hidden, slice + 1, shares);
    gradient.grad_gates = args.grad_gates + g * shape.tokens * sizes.gradients * hidden;
    gradient.input = args.input + input_column(shape, g);
    gradient.input_stride = shape.inputs * shape.input_size;
    gradient.h0 = at(args.h0, g * shape.batch * hidden);
    gradient.dropout = masks_of(args.masks, shape, g).dropout;
    gradient.output = args.output + g * hidden;
    gradient.output_stride = shape.recurrences * hidden;
    gradient.w_ih = wanted.w_ih;
    gradient.w_hh = wanted.w_hh;
    gradient.bias = wanted.bias;
    gradient.scratch = plan.scratch + static_cast<size_t>(task) * plan.scratch_size;
    if (gradient.last_column > gradient.first_column) kernels.rnn_weight_gradient(gradient);
    if (args.grad_input != nullptr && shape.recurrences > shape.inputs) {
      const int64_t part = shape.tokens * shape.input_size;
      const int64_t readers = shape.recurrences / shape.inputs;
      for (int64_t p = 0; p < shape.inputs; ++p) {
        kernels.sum_parts(plan.input_parts + p * readers * part, part, readers, nullptr, shape.input_size,
                          share(shape.tokens, task, tasks), share(shape.tokens, task + 1, tasks),
                          args.grad_input + p * shape.input_size, shape.inputs * shape.input_size);
      }
    }
  });
}

#define PYMTL_INSTANTIATE(T)                                                                          \
  template size_t rnn_packed_size<T>(Cell, int64_t, int64_t, int64_t);                                \
  template PrepackedHeader rnn_prepacked_header<T>(Cell);                                             \
  template void rnn_pack(Cell, const RnnWeights<T>*, int64_t, int64_t, int64_t, T*, const Executor&); \
  template size_t rnn_forward_workspace(const RnnForward<T>&, const Executor&);                       \
  template void rnn_forward(const RnnForward<T>&, void*, const Executor&);                            \
  template size_t rnn_backward_workspace(const RnnBackward<T>&, const Executor&);                     \
  template void rnn_backward(const RnnBackward<T>&, void*, const Executor&);
PYMTL_INSTANTIATE(float)
PYMTL_INSTANTIATE(double)
PYMTL_INSTANTIATE(BFloat16)
#undef PYMTL_INSTANTIATE

}  // namespace pymtl
