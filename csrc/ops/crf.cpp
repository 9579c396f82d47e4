#include "kernels/crf.h"

#include "crf_chain.h"
#include "scratch.h"

namespace pymtl::ops {
namespace {

template <typename T>
Chain<T> chain_of(const BatchSizes& packing, const Tensor& emissions, const Tensor& start, const Tensor& end,
                  const Tensor& transitions) {
  return {packing.steps, packing.batch(), packing.tokens, emissions, start, end, transitions};
}

// Tags, each a class.
template <typename T>
OptionalTensor checked_tags(const Chain<T>& chain, const OptionalTensor& given) {
  const OptionalTensor result = chain.tags(given);
  const int64_t* const values = read<int64_t>(result);
  for (int64_t n = 0; values != nullptr && n < chain.tokens; ++n) {
    check(values[n] >= 0 && values[n] < chain.classes, "tags: expected classes from 0 to ", chain.classes - 1, ", got ",
          values[n], " at token ", n, ", out of bounds");
  }
  return result;
}

std::tuple<Tensor, Tensor, Tensor> crf(Tensor emissions, Tensor batch_sizes, OptionalTensor given_tags, Tensor start,
                                       Tensor end, Tensor transitions) {
  check_cpu(emissions, "emissions");
  return with_real_type(emissions, "emissions", [&]<typename T>() {
    const BatchSizes packing(batch_sizes);
    const Chain<T> chain = chain_of<T>(packing, emissions, start, end, transitions);
    const OptionalTensor tags = checked_tags(chain, given_tags);
    const Tensor result = make(chain.emissions, {chain.batch});
    const Tensor alphas = make(chain.emissions, {chain.tokens, chain.classes}, ScalarType::Double);
    const Tensor scales = make(chain.emissions, {chain.tokens}, ScalarType::Double);
    if (chain.tokens > 0) {
      const CrfForward<T> args{chain.chain(read<int64_t>(packing.sizes)), read<int64_t>(tags), write<T>(result),
                               write<double>(alphas), write<double>(scales)};
      const Executor executor = torch_executor();
      const Scratch workspace(crf_forward_workspace(args, executor));
      crf_forward(args, workspace.memory(), executor);
    }
    return std::make_tuple(result, alphas, scales);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> crf_backward(Tensor given_grad, Tensor emissions, Tensor batch_sizes,
                                                        OptionalTensor given_tags, Tensor start, Tensor end,
                                                        Tensor transitions, Tensor given_alphas, Tensor given_scales) {
  check_cpu(emissions, "emissions");
  return with_real_type(emissions, "emissions", [&]<typename T>() {
    const BatchSizes packing(batch_sizes);
    const Chain<T> chain = chain_of<T>(packing, emissions, start, end, transitions);
    const int64_t N = chain.tokens;
    const int64_t C = chain.classes;
    const OptionalTensor tags = checked_tags(chain, given_tags);
    const Tensor grad = checked(given_grad, "grad", emissions.scalar_type(), {chain.batch});
    const Tensor alphas = checked(given_alphas, "alphas", ScalarType::Double, {N, C});
    const Tensor scales = checked(given_scales, "scales", ScalarType::Double, {N});
    const auto result = [&](const Sizes& sizes) {
      return N > 0 ? make(chain.emissions, sizes) : torch::stable::new_zeros(chain.emissions, sizes);
    };
    const Tensor grad_emissions = result({N, C});
    const Tensor grad_start = result({C});
    const Tensor grad_end = result({C});
    const Tensor grad_transitions = result({C, C});
    if (N > 0) {
      const CrfBackward<T> args{chain.chain(read<int64_t>(packing.sizes)),
                                read<int64_t>(tags),
                                read<double>(alphas),
                                read<double>(scales),
                                read<T>(grad),
                                write<T>(grad_emissions),
                                write<T>(grad_start),
                                write<T>(grad_end),
                                write<T>(grad_transitions)};
      const Executor executor = torch_executor();
      const Scratch workspace(crf_backward_workspace(args, executor));
      pymtl::crf_backward(args, workspace.memory(), executor);
    }
    return std::make_tuple(grad_emissions, grad_start, grad_end, grad_transitions);
  });
}

std::tuple<Tensor, Tensor> crf_decode(Tensor emissions, Tensor batch_sizes, Tensor start, Tensor end,
                                      Tensor transitions) {
  check_cpu(emissions, "emissions");
  return with_real_type(emissions, "emissions", [&]<typename T>() {
    const BatchSizes packing(batch_sizes);
    const Chain<T> chain = chain_of<T>(packing, emissions, start, end, transitions);
    const Tensor tags = make(chain.emissions, {chain.tokens}, ScalarType::Long);
    const Tensor scores = make(chain.emissions, {chain.batch});
    if (chain.tokens > 0) {
      const CrfDecode<T> args{chain.chain(read<int64_t>(packing.sizes)), write<int64_t>(tags), write<T>(scores)};
      const Executor executor = inference_executor();
      const Scratch workspace(crf_decode_workspace(args, executor));
      pymtl::crf_decode(args, workspace.memory(), executor);
    }
    return std::make_tuple(tags, scores);
  });
}

}  // namespace
}  // namespace pymtl::ops

STABLE_TORCH_LIBRARY_IMPL(pymtl, CPU, m) {
  m.impl("crf", TORCH_BOX(&pymtl::ops::crf));
  m.impl("crf_backward", TORCH_BOX(&pymtl::ops::crf_backward));
  m.impl("crf_decode", TORCH_BOX(&pymtl::ops::crf_decode));
}
