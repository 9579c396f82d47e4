#include <algorithm>

#include "kernels/cuda/joint_loss.h"
#include "kernels/cuda/tokens.h"

namespace pymtl::cuda {
namespace {

constexpr int kTasks = 16;  // of a launch
constexpr int kWarps = kRowThreads / kWarp;
constexpr int64_t kBlock = 32;  // rows summed together; fixed, so that results repeat

int64_t block_count_of(int64_t rows) { return (rows + kBlock - 1) / kBlock; }

template <typename T>
struct Launch {
  LossTask<T> tasks[kTasks];
  int64_t* bad_rows;     // [kTasks] the first row whose class is out of range, or -1
  double* totals;        // [kTasks] what each task's summed loss is divided by
  double* sums[kTasks];  // [blocks of rows]
};

__device__ double not_a_number() { return static_cast<double>(__builtin_nanf("")); }

__device__ double warp_sum(double value) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

// The sum over a block's threads, in a fixed order; all threads get it.
__device__ double block_sum(double value) {
  auto* const sums = reinterpret_cast<double*>(shared_memory());
  const double of_warp = warp_sum(value);
  sync_threads();
  if (lane_index() == 0) sums[thread_index() / kWarp] = of_warp;
  sync_threads();
  double sum = 0.0;
  for (int warp = 0; warp < kWarps; ++warp) sum += sums[warp];
  return sum;
}

template <typename T>
__device__ bool is_missing(const LossTask<T>& task, double target) {
  const bool ignored = task.kind == Loss::binary_cross_entropy && target == static_cast<double>(task.ignore_index);
  return target != target || ignored;
}

// The smallest of a block's threads' numbers; all threads get it.
__device__ int64_t block_least(int64_t value) {
  auto* const least = reinterpret_cast<int64_t*>(shared_memory());
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const int64_t other = shuffle_xor(value, mask);
    value = other < value ? other : value;
  }
  sync_threads();
  if (lane_index() == 0) least[thread_index() / kWarp] = value;
  sync_threads();
  for (int warp = 0; warp < kWarps; ++warp) value = least[warp] < value ? least[warp] : value;
  return value;
}

// A block for each task adds up what its loss is divided by: the targets' class weights, or the number of targets. It
// also looks for a class out of range.
template <typename T>
__global__ void add_totals(const __grid_constant__ Launch<T> launch) {
  const LossTask<T>& task = launch.tasks[block_index()];
  double total = 0.0;
  int64_t bad_row = task.rows;
  if (task.kind == Loss::cross_entropy) {
    for (int64_t row = thread_index(); row < task.rows; row += block_threads()) {
      const int64_t target = task.class_targets[row];
      if (target == task.ignore_index) continue;
      if (target < 0 || target >= task.classes) {
        total = not_a_number();
        bad_row = row < bad_row ? row : bad_row;
      } else {
        total += task.weight != nullptr ? static_cast<double>(to_accum(task.weight[target])) : 1.0;
      }
    }
  } else {
    for (int64_t i = thread_index(); i < task.rows * task.classes; i += block_threads()) {
      total += is_missing(task, static_cast<double>(to_accum(task.value_targets[i]))) ? 0.0 : 1.0;
    }
  }
  total = block_sum(total);
  bad_row = block_least(bad_row);
  if (thread_index() != 0) return;
  launch.totals[block_index()] = total;
  launch.bad_rows[block_index()] = bad_row < task.rows ? bad_row : -1;
}

// A warp's row: every lane gets the row's loss.
template <typename T>
__device__ double cross_entropy_row(const LossTask<T>& task, double scale, const T* logits, int64_t target, T* grad) {
  using R = Accum<T>;
  R shift = -static_cast<R>(__builtin_inff());
  bool nan = false;
  for (int64_t c = lane_index(); c < task.classes; c += kWarp) {
    const R z = to_accum(logits[c]);
    nan = nan || z != z;
    shift = z > shift ? z : shift;
  }
  if (nan) shift = static_cast<R>(__builtin_nanf(""));
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const R other = shuffle_xor(shift, mask);
    shift = other > shift || other != other ? other : shift;
  }
  const double smoothing = task.label_smoothing;
  double sum = 0.0;
  double smooth = 0.0;  // of what smoothing spreads the target over: weights, and weighted distances
  double spread = 0.0;
  for (int64_t c = lane_index(); c < task.classes; c += kWarp) {
    const R distance = to_accum(logits[c]) - shift;
    sum += static_cast<double>(exponential(distance));
    if (smoothing > 0) {
      const double weight = task.weight != nullptr ? static_cast<double>(to_accum(task.weight[c])) : 1.0;
      spread += weight;
      smooth -= weight * static_cast<double>(distance);
    }
  }
  sum = warp_sum(sum);
  const double log_sum = log(sum);
  const double target_weight = task.weight != nullptr ? static_cast<double>(to_accum(task.weight[target])) : 1.0;
  const double hard = (1.0 - smoothing) * target_weight;
  const double even = smoothing / static_cast<double>(task.classes);
  double loss = hard * (log_sum - static_cast<double>(to_accum(logits[target]) - shift));
  if (smoothing > 0) {
    spread = warp_sum(spread);
    loss += even * (warp_sum(smooth) + spread * log_sum);
  }
  if (grad == nullptr) return loss;
  const double factor = scale * (hard + even * spread) / sum;
  for (int64_t c = lane_index(); c < task.classes; c += kWarp) {
    double value = factor * static_cast<double>(exponential(to_accum(logits[c]) - shift));
    if (smoothing > 0) {
      value -= scale * even * (task.weight != nullptr ? static_cast<double>(to_accum(task.weight[c])) : 1.0);
    }
    if (c == target) value -= scale * hard;
    grad[c] = from_accum<T>(static_cast<R>(value));
  }
  return loss;
}

// A lane's entry of a row.
template <typename T>
__device__ double entry_loss(const LossTask<T>& task, double scale, double z, double y, int64_t c, double* grad) {
  *grad = 0.0;
  if (is_missing(task, y)) return 0.0;
  if (task.kind == Loss::mean_squared_error) {
    *grad = scale * 2.0 * (z - y);
    return (z - y) * (z - y);
  }
  // -log sigmoid(z) = max(-z, 0) + log(1 + exp(-|z|))
  const double positive = task.weight != nullptr ? static_cast<double>(to_accum(task.weight[c])) : 1.0;
  const double e = exp(z < 0 ? z : -z);
  const double tail = log1p(e);
  const double p = z < 0 ? e / (1.0 + e) : 1.0 / (1.0 + e);
  *grad = scale * (p * (positive * y + 1.0 - y) - positive * y);
  return positive * y * ((z < 0 ? -z : 0.0) + tail) + (1.0 - y) * ((z < 0 ? 0.0 : z) + tail);
}

template <typename T>
__device__ double row_loss(const LossTask<T>& task, double scale, int64_t row) {
  const T* const logits = task.logits + row * task.row_stride;
  T* const grad = task.grad == nullptr ? nullptr : task.grad + row * task.classes;
  if (task.kind == Loss::cross_entropy) {
    const int64_t target = task.class_targets[row];
    if (target >= 0 && target < task.classes && target != task.ignore_index) {
      return cross_entropy_row(task, scale, logits, target, grad);
    }
    const double nothing = target == task.ignore_index ? 0.0 : not_a_number();
    for (int64_t c = lane_index(); c < task.classes && grad != nullptr; c += kWarp) {
      grad[c] = from_accum<T>(static_cast<Accum<T>>(nothing));
    }
    return nothing;
  }
  double loss = 0.0;
  for (int64_t c = lane_index(); c < task.classes; c += kWarp) {
    double of_entry = 0.0;
    const auto target = static_cast<double>(to_accum(task.value_targets[row * task.classes + c]));
    loss += entry_loss(task, scale, static_cast<double>(to_accum(logits[c])), target, c, &of_entry);
    if (grad != nullptr) grad[c] = from_accum<T>(static_cast<Accum<T>>(of_entry));
  }
  return warp_sum(loss);
}

// A row of blocks for each task, a block for kBlock rows of logits.
template <typename T>
__global__ void add_losses(const __grid_constant__ Launch<T> launch) {
  const LossTask<T>& task = launch.tasks[block_row()];
  const double total = launch.totals[block_row()];
  const double scale = total == 0.0 ? 0.0 : 1.0 / total;
  const int64_t blocks = (task.rows + kBlock - 1) / kBlock;
  for (int64_t block = block_index(); block < blocks; block += block_count()) {
    double loss = 0.0;
    for (int64_t i = thread_index() / kWarp; i < kBlock; i += kWarps) {
      const int64_t row = block * kBlock + i;
      if (row < task.rows) loss += row_loss(task, scale, row);
    }
    loss = block_sum(lane_index() == 0 ? loss : 0.0);
    if (thread_index() == 0) launch.sums[block_row()][block] = loss;
  }
}

template <typename T>
__global__ void finish(const __grid_constant__ Launch<T> launch) {
  const LossTask<T>& task = launch.tasks[block_index()];
  const int64_t blocks = (task.rows + kBlock - 1) / kBlock;
  double sum = 0.0;
  for (int64_t i = thread_index(); i < blocks; i += block_threads()) sum += launch.sums[block_index()][i];
  sum = block_sum(sum);
  const double total = launch.totals[block_index()];
  if (thread_index() == 0) *task.loss = from_accum<T>(static_cast<Accum<T>>(total == 0.0 ? 0.0 : sum / total));
}

}  // namespace

template <typename T>
int64_t joint_loss_workspace(const LossTask<T>* tasks, int64_t count) {
  int64_t numbers = count;
  for (int64_t k = 0; k < count; ++k) numbers += block_count_of(tasks[k].rows);
  return numbers;
}

template <typename T>
void joint_loss(const LossTask<T>* tasks, int64_t count, int64_t* bad_rows, double* workspace, void* given) {
  const auto stream = static_cast<Stream>(given);
  double* sums = workspace + count;
  for (int64_t first = 0; first < count; first += kTasks) {
    const int64_t here = std::min<int64_t>(count - first, kTasks);
    Launch<T> args{};
    args.bad_rows = bad_rows + first;
    args.totals = workspace + first;
    int64_t blocks = 1;
    for (int64_t k = 0; k < here; ++k) {
      args.tasks[k] = tasks[first + k];
      args.sums[k] = sums;
      sums += block_count_of(tasks[first + k].rows);
      blocks = std::max(blocks, block_count_of(tasks[first + k].rows));
    }
    constexpr size_t kShared = kWarps * sizeof(double);
    constexpr int64_t kMostBlocks = 65536;
    launch(add_totals<T>, {here, kRowThreads, 0, kShared}, stream, args);
    launch(add_losses<T>, {std::min(blocks, kMostBlocks), kRowThreads, 0, kShared, here}, stream, args);
    launch(finish<T>, {here, kRowThreads, 0, kShared}, stream, args);
  }
}

#define PYMTL_INSTANTIATE(T)                                          \
  template int64_t joint_loss_workspace(const LossTask<T>*, int64_t); \
  template void joint_loss(const LossTask<T>*, int64_t, int64_t*, double*, void*);
PYMTL_INSTANTIATE(float)
PYMTL_INSTANTIATE(double)
PYMTL_INSTANTIATE(BFloat16)
PYMTL_INSTANTIATE(Float16)
#undef PYMTL_INSTANTIATE

}  // namespace pymtl::cuda
