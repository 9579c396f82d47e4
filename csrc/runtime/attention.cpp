// Attention of a step's hypotheses to the tokens of their sequences.
#include "kernels/attention.h"

#include "error.h"
#include "instruction.h"

namespace pymtl::runtime {
namespace {

// The mean of values, weighted by the softmax of products of queries with keys, or of additive scores: see
// kernels/attention.h.
class Attend final : public Instruction {
 public:
  Attend(const Json& json, Loader& loader) {
    const std::vector<std::string> names = json.strings("inputs");
    check(names.size() == 3, Fault::file, "inputs: expected queries, keys and values, got ", names.size(), " names");
    reads = {loader.buffer(names[0])};
    const Buffer query = loader.buffers[reads[0]];
    check(query.space == Space::tokens, Fault::file, "inputs: expected queries of tokens");
    keys_ = loader.memory(names[1]);
    values_ = loader.memory(names[2]);
    size_ = query.width;
    width_ = loader.memories[values_].width;
    check(loader.memories[keys_].width == size_, Fault::file, "inputs: expected queries and keys of one width, got ",
          size_, " and ", loader.memories[keys_].width);
    heads_ = json.whole("heads", 1, size_);
    check(size_ % heads_ == 0 && width_ % heads_ == 0, Fault::file, "heads: expected a divisor of ", size_, " and ",
          width_, " columns, got ", heads_);
    score_ = json.find("score") == nullptr ? nullptr : loader.floats(json.string("score"), {size_});
    check(!loader.attends, Fault::file, "expected one instruction that attends, got two");
    loader.attends = true;
    writes = {loader.define(json.string("output"), Space::tokens, width_)};
  }

  void run(Frame& frame) const override {
    Attended& attended = frame.attended;
    AttentionForward<float> args{};
    args.shape.recurrences = 1;
    args.shape.steps = attended.rows->steps();
    args.shape.batch = attended.rows->batch;
    args.shape.tokens = attended.rows->count;
    args.shape.hidden_size = width_;
    args.shape.batch_sizes = attended.rows->batch_sizes.data();
    args.queries = frame.tokens.count;
    args.key_size = size_;
    args.heads = heads_;
    args.query = frame.buffers[reads[0]];
    args.key = attended.memories[keys_];
    args.value = attended.memories[values_];
    args.sequences = attended.places.data();
    args.score = score_;
    args.context = frame.buffers[writes[0]];
    const size_t weights = static_cast<size_t>(args.queries * heads_ * args.shape.steps);
    args.weights = static_cast<float*>(attended.weights.of(weights * sizeof(float)));
    attended.heads = heads_;
    attention_forward(args, frame.scratch.of(attention_workspace(args)), frame.executor);
  }

 private:
  int64_t keys_, values_;  // memories
  int64_t size_, width_;   // of queries and keys, and of values
  int64_t heads_;
  const float* score_;  // [size] or null
};

}  // namespace

InstructionPtr make_attend(const Json& json, Loader& loader) { return std::make_unique<Attend>(json, loader); }

}  // namespace pymtl::runtime
