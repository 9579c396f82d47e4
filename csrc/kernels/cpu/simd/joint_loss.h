// The losses of rows of logits and their gradients; see joint_loss.h for the formulas.
#pragma once

#include <cmath>
#include <limits>

#include "../kernels.h"
#include "activation.h"

namespace pymtl {
namespace {

// The C library's double-precision log is newer than the oldest system a wheel should run on; its long
// double one is not.
PYMTL_INLINE float logarithm(float x) { return ::logf(x); }
PYMTL_INLINE double logarithm(double x) { return static_cast<double>(::logl(x)); }
PYMTL_INLINE double log1p_of(double x) { return static_cast<double>(::log1pl(x)); }

template <typename T>
double cross_entropy_row(const LossTask<T>& task, double scale, const T* logits, int64_t target, T* grad) {
  const int64_t classes = task.classes;
  Vec<T> highest = broadcast(-std::numeric_limits<T>::infinity());
  for (int64_t c = 0; c < classes; c += kLanes<T>) {
    highest = maximum<T>(highest, load_part(logits + c, classes - c, -std::numeric_limits<T>::infinity()));
  }
  const T shift = max_lanes<T>(highest);
  // An infinite maximum subtracted from itself gives NaN, as in torch.
  Vec<T> sums = {};
  for (int64_t c = 0; c < classes; c += kLanes<T>) {
    const Vec<T> z = load_part(logits + c, classes - c, -std::numeric_limits<T>::infinity());
    const Vec<T> e = exp_nonpositive<T>(z - broadcast(shift));
    sums = sums + e;
    if (grad != nullptr) store_part(grad + c, e, classes - c);
  }
  const T sum = sum_lanes<T>(sums);
  const double log_sum = static_cast<double>(logarithm(sum));

  const double smoothing = task.label_smoothing;
  const double target_weight = task.weight != nullptr ? static_cast<double>(task.weight[target]) : 1.0;
  const double hard = (1.0 - smoothing) * target_weight;
  double loss = hard * (log_sum - (static_cast<double>(logits[target]) - shift));
  double spread = 0;  // sum of the class weights that smoothing spreads the target over
  if (smoothing > 0) {
    double smooth = 0;
    for (int64_t c = 0; c < classes; ++c) {
      const double weight = task.weight != nullptr ? static_cast<double>(task.weight[c]) : 1.0;
      spread += weight;
      smooth += weight * (log_sum - (static_cast<double>(logits[c]) - shift));
    }
    loss += smoothing / static_cast<double>(classes) * smooth;
  }
  if (grad != nullptr) {
    const double even = smoothing / static_cast<double>(classes);
    const Vec<T> factor = broadcast(static_cast<T>(scale * (hard + even * spread) / static_cast<double>(sum)));
    for (int64_t c = 0; c < classes; c += kLanes<T>) {
      store_part(grad + c, load_part(grad + c, classes - c) * factor, classes - c);
    }
    if (smoothing > 0) {
      for (int64_t c = 0; c < classes; ++c) {
        const double weight = task.weight != nullptr ? static_cast<double>(task.weight[c]) : 1.0;
        grad[c] -= static_cast<T>(scale * even * weight);
      }
    }
    grad[target] -= static_cast<T>(scale * hard);
  }
  return loss;
}

template <typename T>
double squared_error_row(const LossTask<T>& task, double scale, const T* logits, const T* targets, T* grad) {
  double loss = 0;
  for (int64_t c = 0; c < task.classes; ++c) {
    if (targets[c] != targets[c]) {
      if (grad != nullptr) grad[c] = 0;
      continue;
    }
    const double difference = static_cast<double>(logits[c]) - static_cast<double>(targets[c]);
    loss += difference * difference;
    if (grad != nullptr) grad[c] = static_cast<T>(scale * 2 * difference);
  }
  return loss;
}

template <typename T>
double binary_cross_entropy_row(const LossTask<T>& task, double scale, const T* logits, const T* targets, T* grad) {
  double loss = 0;
  for (int64_t c = 0; c < task.classes; ++c) {
    const double y = static_cast<double>(targets[c]);
    if (y != y || y == static_cast<double>(task.ignore_index)) {
      if (grad != nullptr) grad[c] = 0;
      continue;
    }
    // -log sigmoid(z) = max(-z, 0) + log(1 + exp(-|z|))
    const double positive = task.weight != nullptr ? static_cast<double>(task.weight[c]) : 1.0;
    const double z = static_cast<double>(logits[c]);
    const double e = static_cast<double>(exp_nonpositive<double>(broadcast(z < 0 ? z : -z))[0]);
    const double tail = log1p_of(e);
    const double minus_log_yes = (z < 0 ? -z : 0) + tail;
    const double minus_log_no = (z < 0 ? 0 : z) + tail;
    loss += positive * y * minus_log_yes + (1 - y) * minus_log_no;
    if (grad != nullptr) {
      const double p = z < 0 ? e / (1 + e) : 1 / (1 + e);
      grad[c] = static_cast<T>(scale * (p * (positive * y + 1 - y) - positive * y));
    }
  }
  return loss;
}

template <typename T>
double loss_rows(const LossTask<T>& task, double scale, int64_t first, int64_t last) {
  double loss = 0;
  for (int64_t row = first; row < last; ++row) {
    const T* const logits = task.logits + row * task.row_stride;
    T* const grad = task.grad == nullptr ? nullptr : task.grad + row * task.classes;
    switch (task.kind) {
      case Loss::cross_entropy:
        if (task.class_targets[row] != task.ignore_index) {
          loss += cross_entropy_row(task, scale, logits, task.class_targets[row], grad);
        } else if (grad != nullptr) {
          for (int64_t c = 0; c < task.classes; ++c) grad[c] = 0;
        }
        break;
      case Loss::mean_squared_error:
        loss += squared_error_row(task, scale, logits, task.value_targets + row * task.classes, grad);
        break;
      case Loss::binary_cross_entropy:
        loss += binary_cross_entropy_row(task, scale, logits, task.value_targets + row * task.classes, grad);
        break;
    }
  }
  return loss;
}

}  // namespace
}  // namespace pymtl
