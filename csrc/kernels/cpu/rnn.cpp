// Splits a call among workers; the time loops themselves are in simd/rnn.h and simd/rnn_backward.h.
#include "../rnn.h"

#include <algorithm>

#include "kernels.h"
#include "rnn_workers.h"
#include "workspace.h"

namespace pymtl {
namespace {

// Of one recurrence.
template <typename T>
RnnMasks<T> masks_of(const RnnMasks<T>& masks, const RnnShape& shape, int64_t g) {
  RnnMasks<T> result = masks;
  if (masks.dropout != nullptr) result.dropout += g * shape.batch * shape.hidden_size;
  if (masks.zoneout_h != nullptr) result.zoneout_h += g * shape.hidden_size;
  if (masks.zoneout_c != nullptr) result.zoneout_c += g * shape.hidden_size;
  return result;
}

// The time loops over weights of that format.
template <typename T>
const RnnForwardFor<T>& forward_kernels(WeightFormat format) {
  if constexpr (std::is_same_v<T, float>) {
    if (format != WeightFormat::own) return active_narrow_rnn(format).forward;
  }
  return active_layers<T>().rnn_forward;
}

// Bytes that a weight takes.
template <typename T>
size_t weight_bytes(WeightFormat format) {
  return format == WeightFormat::int8       ? sizeof(int8_t)
         : format == WeightFormat::bfloat16 ? sizeof(BFloat16)
                                            : sizeof(T);
}

template <typename T>
struct ForwardPlan {
  const RnnForwardFor<T>& kernels;
  RnnWorkers workers;
  int64_t panels_size;
  int64_t head_size;
  T* panels;
  T* head_panels;
  Accum<T>* partial;
  size_t bytes;

  ForwardPlan(const RnnForward<T>& args, void* memory, const Executor& given)
      : kernels(forward_kernels<T>(args.format)),
        workers(args.shape, weight_bytes<T>(args.format), Team::kMost, given) {
    const RnnShape& shape = args.shape;
    panels_size = kernels.panels_size(shape.cell, shape.input_size, shape.hidden_size);
    head_size = args.heads.width > 0 ? active_layers<T>().heads_panels_size(shape.hidden_size, args.heads.width) : 0;
    Workspace workspace(memory);
    workers.take(workspace, shape, largest_scratch(args));
    panels = workspace.take<T>(args.prepacked == nullptr ? shape.recurrences * panels_size : 0);
    head_panels = workspace.take<T>(args.heads.prepacked == nullptr ? shape.recurrences * head_size : 0);
    partial = workspace.take<Accum<T>>(args.heads.width > 0 ? shape.recurrences * shape.tokens * args.heads.width : 0);
    bytes = workspace.used();
  }

  // Scratch memory of a time loop over all sequences: no slice needs more.
  size_t largest_scratch(const RnnForward<T>& args) const {
    const int64_t starts[2] = {0, args.shape.tokens};
    RnnTimeLoop<T> loop{};
    loop.cell = args.shape.cell;
    loop.starts = starts;
    loop.steps = 1;
    loop.last_row = args.shape.batch;
    loop.input_size = args.shape.input_size;
    loop.hidden_size = args.shape.hidden_size;
    loop.weights = args.prepacked == nullptr ? args.weights : nullptr;
    static const T some{};
    loop.head_panels = args.heads.width > 0 ? &some : nullptr;
    loop.mean = args.heads.mean;
    loop.max = args.heads.max;
    loop.masks = args.masks;
    return kernels.scratch(loop);
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

// A worker's part of a pass with these arguments, as far as both passes have it.
template <typename Loop, typename Args>
Loop loop_of(const Args& args, const RnnWorkers& workers, const RnnShare& share) {
  const RnnShape& shape = args.shape;
  const int64_t state = share.g * shape.batch * shape.hidden_size;
  Loop loop{};
  loop.cell = shape.cell;
  loop.starts = workers.starts;
  loop.steps = shape.steps;
  loop.first_row = share.first_row;
  loop.last_row = share.last_row;
  loop.reverse = args.weights[share.g].reverse;
  loop.hidden_size = shape.hidden_size;
  loop.h0 = at(args.h0, state);
  loop.c0 = at(args.c0, state);
  loop.output = at(args.output, share.g * shape.hidden_size);
  loop.output_stride = shape.recurrences * shape.hidden_size;
  loop.masks = masks_of(args.masks, shape, share.g);
  loop.norm = args.weights[share.g].norm;
  loop.scratch = share.scratch;
  loop.team = share.team;
  loop.place = share.place;
  return loop;
}

}  // namespace

template <typename T>
size_t rnn_prepacked_size(Cell cell, int64_t recurrences, int64_t input_size, int64_t hidden_size,
                          WeightFormat format) {
  return static_cast<size_t>(recurrences * forward_kernels<T>(format).panels_size(cell, input_size, hidden_size));
}

template <typename T>
PrepackedHeader rnn_prepacked_header(Cell cell, int64_t recurrences, int64_t hidden_size, WeightFormat format) {
  const RnnForwardFor<T>& kernels = forward_kernels<T>(format);
  return {PrepackedHeader::kVersion,
          prepacked_dtype<T>,
          static_cast<uint32_t>(kernels.scheme),
          static_cast<uint32_t>(kernels.lanes),
          static_cast<uint32_t>(cell),
          static_cast<uint32_t>(recurrences),
          static_cast<uint64_t>(hidden_size)};
}

template <typename T>
void rnn_prepack(Cell cell, const RnnWeights<T>* weights, int64_t recurrences, int64_t input_size, int64_t hidden_size,
                 T* prepacked, const Executor& executor) {
  const LayersFor<T>& kernels = active_layers<T>();
  const int64_t size = kernels.rnn_forward.panels_size(cell, input_size, hidden_size);
  for_each(executor, recurrences,
           [&](int64_t g) { kernels.pack_rnn(cell, weights[g], input_size, hidden_size, 0, 1, prepacked + g * size); });
}

void rnn_prepack(Cell cell, WeightFormat format, const NarrowWeights* weights, int64_t recurrences, int64_t input_size,
                 int64_t hidden_size, float* prepacked, const Executor& executor) {
  const NarrowRnn& kernels = active_narrow_rnn(format);
  const int64_t size = kernels.forward.panels_size(cell, input_size, hidden_size);
  for_each(executor, recurrences,
           [&](int64_t g) { kernels.pack(cell, weights[g], input_size, hidden_size, prepacked + g * size); });
}

template <typename T>
size_t rnn_forward_workspace(const RnnForward<T>& args, const Executor& executor) {
  return ForwardPlan<T>(args, nullptr, executor).bytes;
}

template <typename T>
void rnn_forward(const RnnForward<T>& args, void* workspace, const Executor& given) {
  const ForwardPlan<T> plan(args, workspace, given);
  const RnnWorkers& workers = plan.workers;
  const LayersFor<T>& kernels = active_layers<T>();
  const RnnShape& shape = args.shape;
  const int64_t hidden = shape.hidden_size;
  const int64_t all_hidden = shape.recurrences * hidden;
  const RnnHeads<T>& heads = args.heads;
  const int64_t reserve = sizes_of(shape.cell).reserve_with(args.masks.zoneout_h != nullptr);
  fill_starts(shape, workers.starts);
  fill_bounds(shape, workers.starts, workers.slices, workers.bounds);

  const auto pack_heads = [&](int64_t g) {
    if (heads.width > 0 && heads.prepacked == nullptr) {
      kernels.pack_heads(heads.weight + g * hidden, all_hidden, hidden, heads.width,
                         plan.head_panels + g * plan.head_size);
    }
  };
  workers.pack_together(shape, [&](int64_t g, int64_t part, int64_t parts) {
    if (args.prepacked == nullptr) {
      kernels.pack_rnn(shape.cell, args.weights[g], shape.input_size, hidden, part, parts,
                       plan.panels + g * plan.panels_size);
    }
    if (part == 0) pack_heads(g);
  });
  workers.for_each_share(shape, [&](const RnnShare& share) {
    const int64_t g = share.g;
    auto loop = loop_of<RnnTimeLoop<T>>(args, workers, share);
    loop.panels = (args.prepacked == nullptr ? plan.panels : args.prepacked) + g * plan.panels_size;
    if (!workers.one_pack()) {
      if (share.place == 0) pack_heads(g);  // the others of a team read them after they have met
      loop.weights = args.prepacked == nullptr ? &args.weights[g] : nullptr;
      loop.panels_here = plan.panels + g * plan.panels_size;
    }
    loop.input_size = shape.input_size;
    loop.input = args.input + input_column(shape, g);
    loop.input_stride = shape.inputs * shape.input_size;
    loop.h_n = args.h_n + g * shape.batch * hidden;
    loop.c_n = at(args.c_n, g * shape.batch * hidden);
    loop.gates = at(args.gates, g * shape.tokens * reserve * hidden);
    loop.cells = at(args.cells, g * shape.tokens * hidden);
    const T* const head_panels = heads.prepacked == nullptr ? plan.head_panels : heads.prepacked;
    loop.head_panels = heads.width > 0 ? head_panels + g * plan.head_size : nullptr;
    loop.head_width = heads.width;
    loop.partial = at(plan.partial, g * shape.tokens * heads.width);
    loop.mean = at(heads.mean, g * hidden);
    loop.max = at(heads.max, g * hidden);
    loop.pooled_stride = all_hidden;
    if (loop.last_row > loop.first_row) plan.kernels.time_loop(loop);
  });

  if (heads.width > 0) {
    constexpr int64_t kBlock = 256;
    const int64_t blocks = (shape.tokens + kBlock - 1) / kBlock;
    const Executor executor = executor_for(shape.recurrences * shape.tokens * heads.width, workers.executor);
    for_each(executor, blocks, [&](int64_t block) {
      kernels.sum_parts(plan.partial, shape.tokens * heads.width, shape.recurrences, heads.bias, heads.width,
                        block * kBlock, std::min((block + 1) * kBlock, shape.tokens), heads.logits, heads.width);
    });
  }
}

namespace {

template <typename T>
struct BackwardPlan {
  static constexpr int64_t kUnitsEach = 64;  // of a panel of W_hh's columns

  RnnWorkers workers;
  int64_t panels_size;
  int64_t input_panels_size;
  T* panels;
  T* input_panels;
  Accum<T>* input_parts;
  size_t bytes;

  BackwardPlan(const RnnBackward<T>& args, void* memory, const Executor& given)
      : workers(args.shape, sizeof(T), args.shape.hidden_size / kUnitsEach, given) {
    const RnnShape& shape = args.shape;
    const LayersFor<T>& kernels = active_layers<T>();
    panels_size = kernels.rnn_backward_panels_size(shape.cell, shape.hidden_size);
    input_panels_size = kernels.rnn_input_gradient_panels_size(shape.cell, shape.input_size, shape.hidden_size);
    Workspace workspace(memory);
    workers.take(workspace, shape, largest_scratch(args, kernels));
    panels = workspace.take<T>(shape.recurrences * panels_size);
    input_panels = workspace.take<T>(args.grad_input != nullptr ? shape.recurrences * input_panels_size : 0);
    // Of an input that one recurrence reads, its part is the whole.
    const bool sum = args.grad_input != nullptr && shape.recurrences > shape.inputs;
    input_parts = workspace.take<Accum<T>>(sum ? shape.recurrences * shape.tokens * shape.input_size : 0);
    bytes = workspace.used();
  }

  // The time loops' scratch memory serves the weights' gradients after them.
  size_t largest_scratch(const RnnBackward<T>& args, const LayersFor<T>& kernels) const {
    const RnnShape& shape = args.shape;
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
    gradient.last_column =
        largest_share(sizes_of(shape.cell).gradients * shape.hidden_size, workers.slices * workers.team_workers);
    return std::max(kernels.rnn_backward_scratch(loop), kernels.rnn_weight_gradient_scratch(gradient));
  }
};

}  // namespace

template <typename T>
size_t rnn_backward_workspace(const RnnBackward<T>& args, const Executor& executor) {
  return BackwardPlan<T>(args, nullptr, executor).bytes;
}

template <typename T>
void rnn_backward(const RnnBackward<T>& args, void* workspace, const Executor& given) {
  const BackwardPlan<T> plan(args, workspace, given);
  const RnnWorkers& workers = plan.workers;
  const LayersFor<T>& kernels = active_layers<T>();
  const RnnShape& shape = args.shape;
  const int64_t hidden = shape.hidden_size;
  const CellSizes& sizes = sizes_of(shape.cell);
  const int64_t reserve = sizes.reserve_with(args.masks.zoneout_h != nullptr);
  fill_starts(shape, workers.starts);
  fill_bounds(shape, workers.starts, workers.slices, workers.bounds);

  const auto pack = [&](int64_t g, int64_t part, int64_t parts) {
    kernels.pack_rnn_backward(shape.cell, args.weights[g].w_hh, hidden, part, parts,
                              plan.panels + g * plan.panels_size);
    if (args.grad_input != nullptr) {
      kernels.pack_rnn_input_gradient(shape.cell, args.weights[g].w_ih, shape.input_size, hidden, part, parts,
                                      plan.input_panels + g * plan.input_panels_size);
    }
  };
  workers.pack_together(shape, pack);
  workers.for_each_share(shape, [&](const RnnShare& share) {
    const int64_t g = share.g;
    if (!workers.one_pack()) pack(g, share.place, share.workers());
    const int64_t state = g * shape.batch * hidden;
    const int64_t tokens = g * shape.tokens * hidden;
    auto loop = loop_of<RnnBackwardTimeLoop<T>>(args, workers, share);
    loop.panels = plan.panels + g * plan.panels_size;
    loop.gates = at(args.gates, reserve * tokens);
    loop.cells = at(args.cells, tokens);
    loop.grad_output = at(args.grad_output, g * hidden);
    loop.grad_h_n = at(args.grad_h_n, state);
    loop.grad_c_n = at(args.grad_c_n, state);
    loop.grad_gates = args.grad_gates + sizes.gradients * tokens;
    loop.grad_h0 = at(args.grad_h0, state);
    loop.grad_c0 = at(args.grad_c0, state);
    if (loop.last_row == loop.first_row) return;
    kernels.rnn_backward_time_loop(loop);
    if (args.grad_input == nullptr) return;
    // The gate gradients just written are in this worker's cache. Another worker's would first have to leave
    // its, and to be taken back by it for the next call.
    RnnInputGradient<T> input{};
    input.cell = shape.cell;
    input.starts = workers.starts;
    input.first_step = shape.steps * share.place / share.workers();
    input.last_step = shape.steps * (share.place + 1) / share.workers();
    input.first_row = loop.first_row;
    input.last_row = loop.last_row;
    input.input_size = shape.input_size;
    input.hidden_size = hidden;
    input.grad_gates = loop.grad_gates;
    input.panels = plan.input_panels + g * plan.input_panels_size;
    const bool sum = shape.recurrences > shape.inputs;
    input.part = sum ? plan.input_parts + g * shape.tokens * shape.input_size : nullptr;
    input.result = args.grad_input + input_column(shape, g);
    input.result_stride = shape.inputs * shape.input_size;
    kernels.rnn_input_gradient(input);
  });

  // Every task has a share of a recurrence's weight rows: equal work. All sums are whole within a task, so no
  // result depends on the number of tasks.
  const int64_t tasks = workers.tasks(shape);
  const int64_t shares = tasks / shape.recurrences;
  for_each(workers.executor, tasks, [&](int64_t task) {
    const int64_t g = task / shares;
    const int64_t slice = task % shares;
    const RnnWeightGradients<T>& wanted = args.grad_weights[g];
    RnnWeightGradient<T> gradient{};
    gradient.cell = shape.cell;
    gradient.starts = workers.starts;
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
    gradient.scratch = workers.scratch_of(task);
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

#define PYMTL_INSTANTIATE(T)                                                                             \
  template size_t rnn_prepacked_size<T>(Cell, int64_t, int64_t, int64_t, WeightFormat);                  \
  template PrepackedHeader rnn_prepacked_header<T>(Cell, int64_t, int64_t, WeightFormat);                \
  template void rnn_prepack(Cell, const RnnWeights<T>*, int64_t, int64_t, int64_t, T*, const Executor&); \
  template size_t rnn_forward_workspace(const RnnForward<T>&, const Executor&);                          \
  template void rnn_forward(const RnnForward<T>&, void*, const Executor&);                               \
  template size_t rnn_backward_workspace(const RnnBackward<T>&, const Executor&);                        \
  template void rnn_backward(const RnnBackward<T>&, void*, const Executor&);
PYMTL_INSTANTIATE(float)
PYMTL_INSTANTIATE(double)
PYMTL_INSTANTIATE(BFloat16)
#undef PYMTL_INSTANTIATE

}  // namespace pymtl
