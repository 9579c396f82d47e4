// The losses of K tasks and their gradients with respect to the logits, in one pass over the logits.
//
//   cross_entropy         -sum_n w_y [ (1-s) log p_y + s/C sum_c (w_c / w_y) log p_c ] / sum_n w_y
//                         over rows with a target; s label smoothing, w class weights: F.cross_entropy
//   mean_squared_error    mean of (z - y)^2 over entries whose target is not NaN
//   binary_cross_entropy  mean of -(w y log sigmoid(z) + (1-y) log(1 - sigmoid(z))) over entries whose
//                         target is neither NaN nor ignore_index; w the weight of positives
//
// A task with no target gives 0 and a zero gradient. Sums run in float64 over blocks of fixed size, so a
// result does not depend on the number of threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "executor.h"

namespace pymtl {

enum class Loss { cross_entropy, mean_squared_error, binary_cross_entropy };

template <typename T>
struct LossTask {
  Loss kind;
  int64_t rows;     // M
  int64_t classes;  // C
  const T* logits;  // [M, C], rows `row_stride` apart
  int64_t row_stride;
  const int64_t* class_targets;  // [M] for cross_entropy, each in [0, C) or ignore_index; else null
  const T* value_targets;        // [M, C] for the others; else null
  const T* weight;               // [C] class weights, or weights of positives; null: ones
  int64_t ignore_index;
  double label_smoothing;
  T* loss;  // scalar
  T* grad;  // [M, C] gradient of this task's loss, or null: not wanted
};

// The first row whose class target is neither in [0, C) nor ignore_index, or -1. To be asked before joint_loss.
template <typename T>
int64_t first_bad_target(const LossTask<T>& task);

template <typename T>
size_t joint_loss_workspace(const LossTask<T>* tasks, int64_t count);

template <typename T>
void joint_loss(const LossTask<T>* tasks, int64_t count, void* workspace, const Executor& executor);

}  // namespace pymtl
