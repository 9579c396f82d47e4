#include "../heads.h"

#include "kernels.h"
#include "schedule.h"

namespace pymtl {

template <typename T>
size_t heads_workspace(const Heads<T>& args) {
  return static_cast<size_t>(args.parts * active_kernels().of<T>().heads_packed_size(args.depth, args.width)) *
         sizeof(T);
}

template <typename T>
void heads_forward(const Heads<T>& args, void* workspace, const Executor& given) {
  constexpr int64_t kBlock = 24;
  const KernelsFor<T>& kernels = active_kernels().of<T>();
  const Executor executor = executor_for(args.rows * args.parts * args.depth * args.width, given);
  const int64_t size = kernels.heads_packed_size(args.depth, args.width);
  T* const packed = static_cast<T*>(workspace);
  for_each(executor, args.parts, [&](int64_t part) {
    kernels.pack_heads(args.weight + part * args.depth, args.parts * args.depth, args.depth, args.width,
                       packed + part * size);
  });
  for_each(executor, (args.rows + kBlock - 1) / kBlock, [&](int64_t block) {
    kernels.heads_rows(args, packed, block * kBlock, std::min((block + 1) * kBlock, args.rows));
  });
}

template size_t heads_workspace(const Heads<float>&);
template size_t heads_workspace(const Heads<double>&);
template void heads_forward(const Heads<float>&, void*, const Executor&);
template void heads_forward(const Heads<double>&, void*, const Executor&);

}  // namespace pymtl
