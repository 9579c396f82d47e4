// The arguments of joint_loss, checked: the same on every device.
#pragma once

#include "kernels/joint_loss.h"
#include "tensors.h"

namespace pymtl::ops {

inline Loss kind_of(const std::string& kind) {
  if (kind == "cross_entropy") return Loss::cross_entropy;
  if (kind == "mean_squared_error") return Loss::mean_squared_error;
  check(kind == "binary_cross_entropy",
        "kinds: expected 'cross_entropy', 'mean_squared_error' or 'binary_cross_entropy', got '", kind, "'");
  return Loss::binary_cross_entropy;
}

// All on the device of the first logits. `kept` keeps copies alive that a task points into.
template <typename T>
struct LossTasks {
  Tensor losses;  // [K]
  Tensors grads;  // of the logits, or none
  Tensors kept;
  std::vector<LossTask<T>> tasks;

  LossTasks(const Tensors& logits, const Tensors& targets, const std::vector<std::string>& kinds,
            const Tensors& weights, const std::vector<int64_t>& ignore_index,
            const std::vector<double>& label_smoothing, bool gradients)
      : losses(make(logits[0], {static_cast<int64_t>(logits.size())})) {
    const ScalarType type = logits[0].scalar_type();
    const size_t count = logits.size();
    const auto as_many = [&](size_t size, const char* name, const char* of) {
      check(size == count, name, ": expected ", count, " ", of, ", got ", size);
    };
    as_many(targets.size(), "targets", "tensors");
    as_many(kinds.size(), "kinds", "names");
    as_many(weights.size(), "weights", "tensors");
    as_many(ignore_index.size(), "ignore_index", "numbers");
    as_many(label_smoothing.size(), "label_smoothing", "numbers");
    for (size_t k = 0; k < count; ++k) {
      LossTask<T> task{};
      task.kind = kind_of(kinds[k]);
      check(logits[k].dim() == 2, Name("logits", k), ": expected [rows, classes], got ", logits[k].dim(), "-D");
      task.rows = logits[k].size(0);
      task.classes = logits[k].size(1);
      check_device(logits[k], Name("logits", k), logits[0]);
      check_type(logits[k], Name("logits", k), type);
      check_memory(logits[k], Name("logits", k));
      // A slice of the columns of stacked logits is read where it is.
      const bool rows_contiguous = logits[k].stride(1) == 1;
      kept.push_back(rows_contiguous ? logits[k] : torch::stable::contiguous(logits[k]));
      task.logits = read<T>(kept.back());
      task.row_stride = rows_contiguous ? logits[k].stride(0) : task.classes;
      if (task.kind == Loss::cross_entropy) {
        kept.push_back(checked(targets[k], Name("targets", k), ScalarType::Long, {task.rows}, logits[0]));
        task.class_targets = read<int64_t>(kept.back());
      } else {
        kept.push_back(checked(targets[k], Name("targets", k), type, {task.rows, task.classes}, logits[0]));
        task.value_targets = read<T>(kept.back());
      }
      if (weights[k].numel() > 0) {
        kept.push_back(checked(weights[k], Name("weights", k), type, {task.classes}, logits[0]));
        task.weight = read<T>(kept.back());
      }
      check(label_smoothing[k] >= 0 && label_smoothing[k] <= 1, Name("label_smoothing", k),
            ": expected a number from 0 to 1, got ", label_smoothing[k]);
      task.ignore_index = ignore_index[k];
      task.label_smoothing = label_smoothing[k];
      task.loss = write<T>(losses) + k;
      if (gradients) {
        grads.push_back(make(logits[0], {task.rows, task.classes}));
        task.grad = write<T>(grads.back());
      }
      tasks.push_back(task);
    }
  }

  int64_t count() const { return static_cast<int64_t>(tasks.size()); }
};

}  // namespace pymtl::ops
