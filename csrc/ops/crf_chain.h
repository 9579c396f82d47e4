// The arguments that the ops of the conditional random field take on every device.
#pragma once

#include "batch.h"
#include "kernels/crf.h"

namespace pymtl::ops {

// The checked arguments of a chain, all on the device of the emissions; the tensors stay alive as long as this object.
template <typename T>
struct Chain {
  int64_t steps;
  int64_t batch;
  int64_t tokens;
  int64_t classes;
  Tensor emissions, start, end, transitions;

  Chain(int64_t all_steps, int64_t sequences, int64_t rows, const Tensor& given_emissions, const Tensor& given_start,
        const Tensor& given_end, const Tensor& given_transitions)
      : steps(all_steps),
        batch(sequences),
        tokens(rows),
        classes(of(given_emissions)),
        emissions(
            checked(given_emissions, "emissions", given_emissions.scalar_type(), {tokens, classes}, given_emissions)),
        start(checked(given_start, "start", emissions.scalar_type(), {classes}, emissions)),
        end(checked(given_end, "end", emissions.scalar_type(), {classes}, emissions)),
        transitions(checked(given_transitions, "transitions", emissions.scalar_type(), {classes, classes}, emissions)) {
  }

  // sizes: batch_sizes where the kernels read them.
  CrfChain<T> chain(const int64_t* sizes) const {
    return {
        steps, batch, tokens, classes, sizes, read<T>(emissions), read<T>(start), read<T>(end), read<T>(transitions)};
  }

  OptionalTensor tags(const OptionalTensor& given) const {
    return checked(given, "tags", ScalarType::Long, {tokens}, emissions);
  }

 private:
  static int64_t of(const Tensor& emissions) {
    check(emissions.dim() == 2, "emissions: expected [tokens, classes], got ", emissions.dim(), "-D");
    check(emissions.size(1) > 0, "emissions: expected at least one class, got none");
    return emissions.size(1);
  }
};

}  // namespace pymtl::ops
