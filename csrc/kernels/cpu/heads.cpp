#include "../heads.h"

#include "kernels.h"
#include "schedule.h"
#include "workspace.h"

namespace pymtl {

namespace {

// Up to so many rows the columns are shared out, and packed a few at a time: a packed weight would be written and read
// again for the work of reading it once. The bits are the same.
constexpr int64_t kFewRows = 24;
constexpr int64_t kColumns = 64;  // packed at a time, whose panels stay in the second-level cache

template <typename T>
bool is_few(const Heads<T>& args) {
  return args.rows <= kFewRows && args.prepacked == nullptr;
}

// How the columns of few rows are shared out.
template <typename T>
struct Columns {
  int64_t pieces, tasks;
  int64_t panels_size;  // of a task

  Columns(const Heads<T>& args, const Executor& executor)
      : pieces((args.width + kColumns - 1) / kColumns),
        tasks(std::min(std::max<int64_t>(executor.threads, 1), pieces)),
        panels_size(args.parts * active_layers<T>().heads_panels_size(args.depth, std::min(args.width, kColumns))) {}
};

template <typename T>
void pack_part(const Heads<T>& args, int64_t part, T* panels) {
  const LayersFor<T>& kernels = active_layers<T>();
  kernels.pack_heads(args.weight + part * args.depth, args.parts * args.depth, args.depth, args.width,
                     panels + part * kernels.heads_panels_size(args.depth, args.width));
}

template <typename T>
Executor executor_of(const Heads<T>& args, const Executor& given) {
  return executor_for(args.rows * args.parts * args.depth * args.width, given);
}

// Packs and multiplies some columns after the others.
template <typename T>
void multiply_few_rows(const Heads<T>& args, T* workspace, const Executor& executor) {
  const Columns<T> columns(args, executor);
  const int64_t stride = args.parts * args.depth;
  for_each(executor, columns.tasks, [&](int64_t task) {
    T* const panels = workspace + task * columns.panels_size;
    for (int64_t piece = share(columns.pieces, task, columns.tasks);
         piece < share(columns.pieces, task + 1, columns.tasks); ++piece) {
      const int64_t first = piece * kColumns;
      Heads<T> own = args;
      own.width = std::min(kColumns, args.width - first);
      own.weight += first * stride;
      own.output += first;
      if (own.bias != nullptr) own.bias += first;
      heads_prepack(own, panels);
      active_layers<T>().heads_rows(own, panels, 0, args.rows, args.width);
    }
  });
}

}  // namespace

template <typename T>
size_t heads_prepacked_size(const Heads<T>& args) {
  return static_cast<size_t>(args.parts * active_layers<T>().heads_panels_size(args.depth, args.width));
}

template <typename T>
void heads_prepack(const Heads<T>& args, T* prepacked) {
  for (int64_t part = 0; part < args.parts; ++part) pack_part(args, part, prepacked);
}

template <typename T>
size_t heads_workspace(const Heads<T>& args, const Executor& given) {
  if (args.prepacked != nullptr) return 0;
  if (!is_few(args)) return heads_prepacked_size(args) * sizeof(T);
  const Columns<T> columns(args, executor_of(args, given));
  return static_cast<size_t>(columns.tasks * columns.panels_size) * sizeof(T);
}

template <typename T>
void heads_forward(const Heads<T>& args, void* workspace, const Executor& given) {
  constexpr int64_t kBlock = 24;
  const LayersFor<T>& kernels = active_layers<T>();
  const Executor executor = executor_of(args, given);
  if (is_few(args)) return multiply_few_rows(args, static_cast<T*>(workspace), executor);
  const T* panels = args.prepacked;
  if (panels == nullptr) {
    T* const here = static_cast<T*>(workspace);
    for_each(executor, args.parts, [&](int64_t part) { pack_part(args, part, here); });
    panels = here;
  }
  for_each(executor, (args.rows + kBlock - 1) / kBlock, [&](int64_t block) {
    kernels.heads_rows(args, panels, block * kBlock, std::min((block + 1) * kBlock, args.rows), args.width);
  });
}

namespace {

template <typename T>
struct BackwardPlan {
  Executor executor;
  int64_t tasks;
  size_t scratch_size;
  T* panels;
  char* scratch;
  size_t bytes;

  BackwardPlan(const HeadsBackward<T>& args, void* memory, const Executor& given)
      : executor(executor_for(2 * args.rows * args.features * args.width, given)),
        tasks(std::max<int64_t>(executor.threads, 1)) {
    const LayersFor<T>& kernels = active_layers<T>();
    const bool weights = args.grad_weight != nullptr || args.grad_bias != nullptr;
    scratch_size = weights ? kernels.heads_weight_gradient_scratch(args, 0, largest_share(args.width, tasks)) : 0;
    scratch_size = (scratch_size + 63) / 64 * 64;
    Workspace workspace(memory);
    panels = workspace.take<T>(args.grad_input != nullptr ? kernels.heads_panels_size(args.width, args.features) : 0);
    scratch = workspace.take<char>(tasks * static_cast<int64_t>(scratch_size));
    bytes = workspace.used();
  }
};

}  // namespace

template <typename T>
size_t heads_backward_workspace(const HeadsBackward<T>& args, const Executor& executor) {
  return BackwardPlan<T>(args, nullptr, executor).bytes;
}

template <typename T>
void heads_backward(const HeadsBackward<T>& args, void* workspace, const Executor& given) {
  const BackwardPlan<T> plan(args, workspace, given);
  const LayersFor<T>& kernels = active_layers<T>();
  if (args.grad_input != nullptr) {
    kernels.pack_heads_backward(args.weight, args.features, args.width, plan.panels);
  }
  // Every task has a share of the input's rows and one of the weight's.
  for_each(plan.executor, plan.tasks, [&](int64_t task) {
    if (args.grad_input != nullptr) {
      kernels.heads_input_gradient(args, plan.panels, share(args.rows, task, plan.tasks),
                                   share(args.rows, task + 1, plan.tasks));
    }
    const int64_t first = share(args.width, task, plan.tasks);
    const int64_t last = share(args.width, task + 1, plan.tasks);
    if (first < last && (args.grad_weight != nullptr || args.grad_bias != nullptr)) {
      kernels.heads_weight_gradient(args, first, last, plan.scratch + static_cast<size_t>(task) * plan.scratch_size);
    }
  });
}

#define PYMTL_INSTANTIATE(T)                                                          \
  template size_t heads_prepacked_size(const Heads<T>&);                              \
  template void heads_prepack(const Heads<T>&, T*);                                   \
  template size_t heads_workspace(const Heads<T>&, const Executor&);                  \
  template void heads_forward(const Heads<T>&, void*, const Executor&);               \
  template size_t heads_backward_workspace(const HeadsBackward<T>&, const Executor&); \
  template void heads_backward(const HeadsBackward<T>&, void*, const Executor&);
PYMTL_INSTANTIATE(float)
PYMTL_INSTANTIATE(double)
PYMTL_INSTANTIATE(BFloat16)
#undef PYMTL_INSTANTIATE

}  // namespace pymtl
