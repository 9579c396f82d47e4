// A recurrent layer over packed rows: one launch for all its recurrences.
#pragma once

#include "instruction.h"
#include "kernels/rnn.h"
#include "linear.h"
#include "pooling.h"

namespace pymtl::runtime {

class Recurrent final : public Instruction {
 public:
  Recurrent(const Json& json, Loader& loader);

  // Takes linear layers and poolings of the states, which nothing else reads, into the last of the time loops: the
  // states are then never written. The same bits.
  bool can_take(const Instruction& reader) const;
  void take(const Instruction& reader);

  // Packs the weights for the machine; afterwards the file's are not read any more.
  void prepare(const Executor& executor);

  void run(Frame& frame) const override;

 private:
  struct Reader {
    int64_t buffer;
    int64_t width;  // of its output
  };

  void read_weights(const Json& json, Loader& loader);

  // Of each sequence and each part of its states, h and c of each recurrence: where it is among those of the kernel,
  // [parts, B, H], and where it is in the frame.
  template <typename Function>
  void each_state(Frame& frame, Function&& function) const;

  // Brings the frame's states to the kernel's.
  const float* gather_states(Frame& frame, float* states) const;

  Space space_;
  Cell cell_;
  int64_t recurrences_, inputs_, input_size_, hidden_size_;
  WeightFormat format_ = WeightFormat::own;
  std::vector<RnnWeights<float>> weights_;
  std::vector<NarrowWeights> narrow_;
  std::vector<float> zoneout_h_, zoneout_c_;
  int64_t state_;  // where its states begin among those of the program
  bool writes_states_ = true;

  // What was taken in.
  std::vector<Reader> heads_;
  std::vector<float> head_weight_, head_bias_;
  bool head_has_bias_ = false;
  PackedHeads head_panels_;
  std::vector<int64_t> means_, maxima_, lasts_;  // buffers

  Memory panels_;
};

}  // namespace pymtl::runtime
