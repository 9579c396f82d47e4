// The linear-chain conditional random field on a GPU; formulas and layout are those of kernels/crf.h.
//
// A block works on one sequence after another, in the logarithms of probabilities, in float64: so no result depends on
// the scores' range. `alphas` are logarithms, which `scales` below zero say. Sums over sequences run in a fixed order.
// A tag outside [0, C) makes its sequence's result and its token's gradients NaN, and nothing outside an array is read.
// Sizes need not add up to N, the last sequences may have no token: these give 0, and rows behind the last token are
// left alone.
//
// T is float or double. Pointers are to memory of the current device, all work goes to `stream`.
#pragma once

#include <cstdint>

#include "kernels/crf.h"

namespace pymtl::cuda {

// `ends` [T]: sums of batch_sizes up to and with each step.
template <typename T>
void crf_forward(const CrfForward<T>& args, const int64_t* ends, void* stream);

// Numbers of scratch memory that crf_backward needs.
int64_t crf_backward_workspace(int64_t batch, int64_t classes);
template <typename T>
void crf_backward(const CrfBackward<T>& args, const int64_t* ends, double* workspace, void* stream);

// pointers: [N, C] scratch memory.
template <typename T>
void crf_decode(const CrfDecode<T>& args, const int64_t* ends, int32_t* pointers, void* stream);

}  // namespace pymtl::cuda
