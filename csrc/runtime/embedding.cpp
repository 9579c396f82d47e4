// Instructions that read ids.
#include <algorithm>

#include "error.h"
#include "instruction.h"
#include "kernels/char_cnn.h"
#include "kernels/heads.h"

namespace pymtl::runtime {
namespace {

// The row of a table for each id: of tokens, or of their distinct words' characters.
class Gather final : public Instruction {
 public:
  Gather(const Json& json, Loader& loader) {
    const std::vector<std::string> names = json.strings("inputs");
    check(names.size() == 1, Fault::file, "inputs: expected one input, got ", names.size());
    of_characters_ = json.find("characters") != nullptr && json.boolean("characters");
    input_ = loader.input(names[0], of_characters_ ? Input::Kind::characters : Input::Kind::ids);
    loader.has_characters = loader.has_characters || of_characters_;
    const TensorView& table = loader.file.tensor(json.string("table"), DType::f32, {-1, -1});
    const int64_t count = loader.inputs[input_].count;
    check(table.shape[0] >= count, Fault::file, "table: expected ", count, " rows or more, got ", table.shape[0]);
    table_ = static_cast<const float*>(table.data);
    width_ = table.shape[1];
    writes = {loader.define(json.string("output"), of_characters_ ? Space::characters : Space::tokens, width_)};
  }

  void run(Frame& frame) const override {
    float* out = frame.buffers[writes[0]];
    for (const int64_t id : of_characters_ ? frame.characters.packed : frame.ids[input_]) {
      out = std::copy_n(table_ + id * width_, width_, out);
    }
  }

 private:
  bool of_characters_;
  int64_t input_;
  const float* table_;
  int64_t width_;
};

// Words as their characters under convolutions: see kernels/char_cnn.h, whose table is made once.
class CharacterCnn final : public Instruction {
 public:
  CharacterCnn(const Json& json, Loader& loader) {
    const std::vector<std::string> names = json.strings("inputs");
    check(names.size() == 1, Fault::file, "inputs: expected one input, got ", names.size());
    characters_ = loader.inputs[loader.input(names[0], Input::Kind::characters)].count;
    loader.has_spelling = true;
    int64_t windows = 0;
    for (const Json& width : json.array("widths")) {
      widths_.push_back(width.whole_itself("widths", 1, 1024));
      check(widths_.back() % 2 == 1 && widths_.size() <= 64, Fault::file, "widths: expected at most 64 odd numbers");
      windows += widths_.back();
    }
    check(!widths_.empty(), Fault::file, "widths: expected at least one, got none");
    filters_ = json.whole("filters", 1, Loader::kWidest);
    row_ = filters_ * windows;
    features_ = filters_ * static_cast<int64_t>(widths_.size());
    const TensorView& embedding = loader.file.tensor(json.string("table"), DType::f32, {characters_, -1});
    const int64_t depth = embedding.shape[1];
    const float* const weight = loader.floats(json.string("weight"), {row_, depth});
    bias_ = loader.floats(json.string("bias"), {features_});
    check(depth >= 1, Fault::file, "table: expected columns, got none");
    loader.take(characters_ * row_);
    writes = {loader.define(json.string("output"), Space::tokens, features_)};
    Heads<float> args{characters_, 1, depth, row_, static_cast<const float*>(embedding.data), weight, nullptr, nullptr};
    args.output = static_cast<float*>(table_.of(static_cast<size_t>(characters_ * row_) * sizeof(float)));
    Memory scratch;
    const Executor alone{serially, 1};
    heads_forward(args, scratch.of(heads_workspace(args, alone)), alone);
  }

  void run(Frame& frame) const override {
    float* const out = frame.buffers[writes[0]];
    const CharCnnShape shape{frame.tokens.count,
                             frame.characters.length,
                             characters_,
                             filters_,
                             widths_.data(),
                             static_cast<int64_t>(widths_.size()),
                             features_,
                             row_,
                             frame.characters.ids.data()};
    char_cnn_forward(CharCnn<float>{shape, static_cast<const float*>(table_.get()), out, nullptr}, frame.executor);
    // A filter's bias is the same at all places of a word, and so may be added to the maximum.
    for (int64_t row = 0; row < frame.tokens.count; ++row) {
      for (int64_t f = 0; f < features_; ++f) out[row * features_ + f] += bias_[f];
    }
  }

 private:
  int64_t characters_, filters_, row_, features_;
  std::vector<int64_t> widths_;
  const float* bias_;
  Memory table_;  // [characters, row]
};

}  // namespace

InstructionPtr make_character_cnn(const Json& json, Loader& loader) {
  return std::make_unique<CharacterCnn>(json, loader);
}
InstructionPtr make_gather(const Json& json, Loader& loader) { return std::make_unique<Gather>(json, loader); }

}  // namespace pymtl::runtime
