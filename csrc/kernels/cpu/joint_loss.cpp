#include "../joint_loss.h"

#include "kernels.h"
#include "schedule.h"
#include "workspace.h"

namespace pymtl {
namespace {

constexpr int64_t kBlock = 16;  // rows summed together; fixed, so that no result depends on the threads

int64_t block_count(int64_t rows) { return (rows + kBlock - 1) / kBlock; }

// What the task's summed loss is divided by: the targets' class weights, or the number of targets.
template <typename T>
double normaliser(const LossTask<T>& task) {
  double total = 0;
  if (task.kind == Loss::cross_entropy) {
    for (int64_t row = 0; row < task.rows; ++row) {
      const int64_t target = task.class_targets[row];
      if (target == task.ignore_index) continue;
      total += task.weight != nullptr ? static_cast<double>(task.weight[target]) : 1.0;
    }
    return total;
  }
  for (int64_t i = 0; i < task.rows * task.classes; ++i) {
    const double target = static_cast<double>(task.value_targets[i]);
    const bool missing = target != target ||
                         (task.kind == Loss::binary_cross_entropy && target == static_cast<double>(task.ignore_index));
    total += missing ? 0.0 : 1.0;
  }
  return total;
}

}  // namespace

template <typename T>
int64_t first_bad_target(const LossTask<T>& task) {
  if (task.kind != Loss::cross_entropy) return -1;
  for (int64_t row = 0; row < task.rows; ++row) {
    const int64_t target = task.class_targets[row];
    if (target != task.ignore_index && (target < 0 || target >= task.classes)) return row;
  }
  return -1;
}

template <typename T>
size_t joint_loss_workspace(const LossTask<T>* tasks, int64_t count) {
  Workspace workspace(nullptr);
  for (int64_t k = 0; k < count; ++k) workspace.take<double>(block_count(tasks[k].rows));
  return workspace.used();
}

template <typename T>
void joint_loss(const LossTask<T>* tasks, int64_t count, void* memory, const Executor& given) {
  const KernelsFor<T>& kernels = active_kernels().of<T>();
  Workspace workspace(memory);
  for (int64_t k = 0; k < count; ++k) {
    const LossTask<T>& task = tasks[k];
    const double total = normaliser(task);
    const double scale = total == 0 ? 0 : 1 / total;
    const int64_t blocks = block_count(task.rows);
    double* const sums = workspace.take<double>(blocks);
    // An exponential costs about sixteen multiply-adds.
    const Executor executor = executor_for(16 * task.rows * task.classes, given);
    for_each(executor, blocks, [&](int64_t block) {
      sums[block] = kernels.loss_rows(task, scale, block * kBlock, std::min((block + 1) * kBlock, task.rows));
    });
    double sum = 0;
    for (int64_t block = 0; block < blocks; ++block) sum += sums[block];
    *task.loss = total == 0 ? T(0) : static_cast<T>(sum / total);
  }
}

#define PYMTL_INSTANTIATE(T)                                         \
  template int64_t first_bad_target(const LossTask<T>&);             \
  template size_t joint_loss_workspace(const LossTask<T>*, int64_t); \
  template void joint_loss(const LossTask<T>*, int64_t, void*, const Executor&);
PYMTL_INSTANTIATE(float)
PYMTL_INSTANTIATE(double)
#undef PYMTL_INSTANTIATE

}  // namespace pymtl
