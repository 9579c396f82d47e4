#include "../dropout.h"

#include <cmath>

#include "kernels.h"
#include "schedule.h"

namespace pymtl {

template <typename T>
void dropout(const Dropout<T>& args, const Executor& given) {
  constexpr int64_t kBlock = 16 * 1024;
  constexpr double kValues = 65536;
  const double drop = std::nearbyint(args.p * kValues);
  const T scale = drop < kValues ? static_cast<T>(kValues / (kValues - drop)) : T(0);
  const KernelsFor<T>& kernels = active_kernels().of<T>();
  for_each(executor_for(args.count, given), (args.count + kBlock - 1) / kBlock, [&](int64_t block) {
    const int64_t first = block * kBlock;
    kernels.drop(args.input + first, args.bits + first, std::min(kBlock, args.count - first),
                 static_cast<int32_t>(drop), scale, args.output + first);
  });
}

template void dropout(const Dropout<float>&, const Executor&);
template void dropout(const Dropout<double>&, const Executor&);

}  // namespace pymtl
