#include "../heads.h"

#include "kernels.h"
#include "schedule.h"
#include "workspace.h"

namespace pymtl {

namespace {

template <typename T>
void pack_part(const Heads<T>& args, int64_t part, T* panels) {
  const LayersFor<T>& kernels = active_layers<T>();
  kernels.pack_heads(args.weight + part * args.depth, args.parts * args.depth, args.depth, args.width,
                     panels + part * kernels.heads_panels_size(args.depth, args.width));
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
size_t heads_workspace(const Heads<T>& args) {
  return args.prepacked == nullptr ? heads_prepacked_size(args) * sizeof(T) : 0;
}

template <typename T>
void heads_forward(const Heads<T>& args, void* workspace, const Executor& given) {
  constexpr int64_t kBlock = 24;
  const LayersFor<T>& kernels = active_layers<T>();
  const Executor executor = executor_for(args.rows * args.parts * args.depth * args.width, given);
  const T* panels = args.prepacked;
  if (panels == nullptr) {
    T* const here = static_cast<T*>(workspace);
    for_each(executor, args.parts, [&](int64_t part) { pack_part(args, part, here); });
    panels = here;
  }
  for_each(executor, (args.rows + kBlock - 1) / kBlock, [&](int64_t block) {
    kernels.heads_rows(args, panels, block * kBlock, std::min((block + 1) * kBlock, args.rows));
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
  template size_t heads_workspace(const Heads<T>&);                                   \
  template void heads_forward(const Heads<T>&, void*, const Executor&);               \
  template size_t heads_backward_workspace(const HeadsBackward<T>&, const Executor&); \
  template void heads_backward(const HeadsBackward<T>&, void*, const Executor&);
PYMTL_INSTANTIATE(float)
PYMTL_INSTANTIATE(double)
PYMTL_INSTANTIATE(BFloat16)
#undef PYMTL_INSTANTIATE

}  // namespace pymtl
