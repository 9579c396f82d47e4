// What choice.cu chooses between: the kernels of the recurrence, for a plan each.
#pragma once

#include "kernels/cuda/rnn/cluster.h"
#include "kernels/cuda/rnn/grid.h"

namespace pymtl::cuda {

// How many clusters of a plan's kernel the current device runs at the same time.
template <typename T>
int forward_clusters_at_once(const Plan& plan);
template <typename T>
int backward_clusters_at_once(const Plan& plan);

template <typename T>
void run_forward(const RnnForward<T>& args, const Plan& plan, Stream stream);
template <typename T>
void run_backward(const RnnBackward<T>& args, const Plan& plan, Stream stream);

// The same by groups of blocks: how many blocks of the kernel for so many rows run at the same time.
template <typename T>
int forward_blocks_at_once(int rows);
template <typename T>
int backward_blocks_at_once(int rows);

template <typename T>
void run_forward(const RnnForward<T>& args, const GroupPlan& plan, void* workspace, Stream stream);
template <typename T>
void run_backward(const RnnBackward<T>& args, const GroupPlan& plan, void* workspace, Stream stream);

template <>
int forward_clusters_at_once<float>(const Plan& plan);
template <>
int backward_clusters_at_once<float>(const Plan& plan);
template <>
void run_forward(const RnnForward<float>& args, const Plan& plan, Stream stream);
template <>
void run_backward(const RnnBackward<float>& args, const Plan& plan, Stream stream);

// The same for plans in TF32.
int forward_clusters_at_once_tf32(const Plan& plan);
int backward_clusters_at_once_tf32(const Plan& plan);
void run_forward_tf32(const RnnForward<float>& args, const Plan& plan, Stream stream);
void run_backward_tf32(const RnnBackward<float>& args, const Plan& plan, Stream stream);

}  // namespace pymtl::cuda
