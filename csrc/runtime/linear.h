// Linear layers, which recurrent layers may take into their time loop.
#pragma once

#include "instruction.h"
#include "kernels/heads.h"

namespace pymtl::runtime {

// A weight [C, parts * K], packed for the machine.
class PackedHeads {
 public:
  PackedHeads() = default;
  PackedHeads(const float* weight, int64_t parts, int64_t depth, int64_t width);

  const float* get() const { return panels_; }

 private:
  std::unique_ptr<Memory> memory_;
  float* panels_ = nullptr;
};

// y = x W^T + b, the depth summed in equal parts (see kernels/heads.h).
class Linear final : public Instruction {
 public:
  Linear(const Json& json, Loader& loader);

  // Packs the weight, of one that runs by itself.
  void prepare();
  void run(Frame& frame) const override;

  Space space;
  int64_t parts, depth, width;
  const float* weight;  // [C, parts * K]
  const float* bias;    // [C] or null

 private:
  PackedHeads panels_;
};

// Over `count` numbers, of which there is at least one. in and out may be the same.
void softmax(const float* in, float* out, int64_t count);

}  // namespace pymtl::runtime
