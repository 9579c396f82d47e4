#include "kernels/cuda/crf.h"

#include "ops/crf_chain.h"
#include "ops/cuda/batch.h"

namespace pymtl::ops::cuda {
namespace {

// What a chain's kernels read besides: the sizes of the steps, on the device.
template <typename T>
struct DeviceChain {
  Stream stream;
  DeviceBatchSizes batch_sizes;
  Chain<T> chain;

  DeviceChain(const Tensor& emissions, const Tensor& given_sizes, const Tensor& start, const Tensor& end,
              const Tensor& transitions)
      : stream(emissions),
        batch_sizes(given_sizes, emissions, stream),
        chain(given_sizes.size(0), batch_sizes.batch_of(rows_of(emissions), "emissions"), rows_of(emissions), emissions,
              start, end, transitions) {
    constexpr int64_t kMost = 14000;  // that the blocks' shared memory holds numbers for
    check(chain.classes <= kMost, "emissions: expected at most ", kMost, " classes on a GPU, got ", chain.classes);
  }

  CrfChain<T> arguments() const { return chain.chain(read<int64_t>(batch_sizes.sizes)); }
  const int64_t* ends() const { return read<int64_t>(batch_sizes.ends); }

  // A result whose rows are of tokens; those behind the last one are zeros.
  Tensor make_rows(const Sizes& sizes, ScalarType type) const {
    return batch_sizes.exact ? make(chain.emissions, sizes, type)
                             : torch::stable::new_zeros(chain.emissions, sizes, type);
  }

 private:
  static int64_t rows_of(const Tensor& emissions) { return emissions.dim() > 0 ? emissions.size(0) : 0; }
};

std::tuple<Tensor, Tensor, Tensor> crf(Tensor emissions, Tensor batch_sizes, OptionalTensor given_tags, Tensor start,
                                       Tensor end, Tensor transitions) {
  return with_real_type(emissions, "emissions", [&]<typename T>() {
    const DeviceChain<T> device(emissions, batch_sizes, start, end, transitions);
    const Chain<T>& chain = device.chain;
    const OptionalTensor tags = chain.tags(given_tags);
    const Tensor result = make(chain.emissions, {chain.batch});
    const Tensor alphas = make(chain.emissions, {chain.tokens, chain.classes}, ScalarType::Double);
    const Tensor scales = make(chain.emissions, {chain.tokens}, ScalarType::Double);
    if (chain.tokens > 0) {
      pymtl::cuda::crf_forward(CrfForward<T>{device.arguments(), read<int64_t>(tags), write<T>(result),
                                             write<double>(alphas), write<double>(scales)},
                               device.ends(), device.stream.get());
    }
    return std::make_tuple(result, alphas, scales);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> crf_backward(Tensor given_grad, Tensor emissions, Tensor batch_sizes,
                                                        OptionalTensor given_tags, Tensor start, Tensor end,
                                                        Tensor transitions, Tensor given_alphas, Tensor given_scales) {
  return with_real_type(emissions, "emissions", [&]<typename T>() {
    const DeviceChain<T> device(emissions, batch_sizes, start, end, transitions);
    const Chain<T>& chain = device.chain;
    const int64_t N = chain.tokens;
    const int64_t C = chain.classes;
    const int64_t B = chain.batch;
    const OptionalTensor tags = chain.tags(given_tags);
    const Tensor grad = checked(given_grad, "grad", emissions.scalar_type(), {B}, chain.emissions);
    const Tensor alphas = checked(given_alphas, "alphas", ScalarType::Double, {N, C}, chain.emissions);
    checked(given_scales, "scales", ScalarType::Double, {N}, chain.emissions);
    const auto result = [&](const Sizes& sizes) {
      return N > 0 ? make(chain.emissions, sizes) : torch::stable::new_zeros(chain.emissions, sizes);
    };
    const Tensor grad_emissions = device.make_rows({N, C}, chain.emissions.scalar_type());
    const Tensor grad_start = result({C});
    const Tensor grad_end = result({C});
    const Tensor grad_transitions = result({C, C});
    if (N > 0) {
      const CrfBackward<T> args{device.arguments(),
                                read<int64_t>(tags),
                                read<double>(alphas),
                                nullptr,
                                read<T>(grad),
                                write<T>(grad_emissions),
                                write<T>(grad_start),
                                write<T>(grad_end),
                                write<T>(grad_transitions)};
      const Tensor workspace = make(chain.emissions, {pymtl::cuda::crf_backward_workspace(B, C)}, ScalarType::Double);
      pymtl::cuda::crf_backward(args, device.ends(), write<double>(workspace), device.stream.get());
    }
    return std::make_tuple(grad_emissions, grad_start, grad_end, grad_transitions);
  });
}

std::tuple<Tensor, Tensor> crf_decode(Tensor emissions, Tensor batch_sizes, Tensor start, Tensor end,
                                      Tensor transitions) {
  return with_real_type(emissions, "emissions", [&]<typename T>() {
    const DeviceChain<T> device(emissions, batch_sizes, start, end, transitions);
    const Chain<T>& chain = device.chain;
    const Tensor tags = device.make_rows({chain.tokens}, ScalarType::Long);
    const Tensor scores = make(chain.emissions, {chain.batch});
    if (chain.tokens > 0) {
      const Tensor pointers = make(chain.emissions, {chain.tokens, chain.classes}, ScalarType::Int);
      pymtl::cuda::crf_decode(CrfDecode<T>{device.arguments(), write<int64_t>(tags), write<T>(scores)}, device.ends(),
                              write<int32_t>(pointers), device.stream.get());
    }
    return std::make_tuple(tags, scores);
  });
}

}  // namespace
}  // namespace pymtl::ops::cuda

STABLE_TORCH_LIBRARY_IMPL(pymtl, PYMTL_DISPATCH_KEY, m) {
  m.impl("crf", TORCH_BOX(&pymtl::ops::cuda::crf));
  m.impl("crf_backward", TORCH_BOX(&pymtl::ops::cuda::crf_backward));
  m.impl("crf_decode", TORCH_BOX(&pymtl::ops::cuda::crf_decode));
}
