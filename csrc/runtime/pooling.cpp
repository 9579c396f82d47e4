#include "pooling.h"

#include <algorithm>

#include "error.h"
#include "kernels/pooling.h"

namespace pymtl::runtime {
namespace {

constexpr int64_t kMostParts = 4096;

// Where rows of this space go when a sequence's are made one.
Space above(Space space) {
  check(space != Space::sequences, Fault::file, "inputs: expected rows of tokens or characters, got rows of sequences");
  return space == Space::characters ? Space::tokens : Space::sequences;
}

RnnShape shape_of(const PackedRows& rows, int64_t parts, int64_t size) {
  RnnShape shape{};
  shape.recurrences = parts;
  shape.steps = rows.steps();
  shape.batch = rows.batch;
  shape.tokens = rows.count;
  shape.hidden_size = size;
  shape.batch_sizes = rows.batch_sizes.data();
  return shape;
}

void pool_last(const PackedRows& rows, const float* in, int64_t width, const std::vector<bool>& reverse, float* out) {
  const int64_t size = width / static_cast<int64_t>(reverse.size());
  // The last step that has a sequence, from the longest sequence on.
  int64_t start = rows.count;
  int64_t row = 0;
  for (int64_t step = rows.steps() - 1; step >= 0; --step) {
    const int64_t batch = rows.batch_sizes[step];
    start -= batch;
    for (; row < batch; ++row) {
      for (size_t part = 0; part < reverse.size(); ++part) {
        const int64_t from = reverse[part] ? row : start + row;
        const int64_t column = static_cast<int64_t>(part) * size;
        std::copy_n(in + from * width + column, size, out + row * width + column);
      }
    }
  }
}

class AttentionPooling final : public Instruction {
 public:
  AttentionPooling(const Json& json, Loader& loader) {
    const std::vector<std::string> names = json.strings("inputs");
    check(names.size() == 2, Fault::file, "inputs: expected states and scores, got ", names.size(), " buffers");
    reads = {loader.buffer(names[0]), loader.buffer(names[1])};
    const Buffer states = loader.buffers[reads[0]];
    const Buffer scores = loader.buffers[reads[1]];
    check(states.space == Space::tokens && scores.space == Space::tokens, Fault::file,
          "inputs: expected rows of tokens");
    check(states.width % scores.width == 0, Fault::file, "inputs: expected scores for equal parts of ", states.width,
          " columns, got ", scores.width);
    width_ = states.width;
    heads_ = scores.width;
    in_one_pass = false;
    writes = {loader.define(json.string("output"), Space::sequences, width_)};
  }

  void run(Frame& frame) const override {
    attention_pool_forward(AttentionPool<float>{shape_of(frame.tokens, 1, width_), heads_, frame.buffers[reads[0]],
                                                frame.buffers[reads[1]], frame.buffers[writes[0]]},
                           frame.executor);
  }

 private:
  int64_t width_, heads_;
};

// Each token gets its sequence's row.
class Spread final : public Instruction {
 public:
  Spread(const Json& json, Loader& loader) {
    reads = {loader.only_input(json)};
    const Buffer in = loader.buffers[reads[0]];
    check(in.space == Space::sequences, Fault::file, "inputs: expected rows of sequences");
    in_one_pass = false;
    width_ = in.width;
    writes = {loader.define(json.string("output"), Space::tokens, width_)};
  }

  void run(Frame& frame) const override {
    float* out = frame.buffers[writes[0]];
    for (const int64_t batch : frame.tokens.batch_sizes) {
      out = std::copy_n(frame.buffers[reads[0]], batch * width_, out);
    }
  }

 private:
  int64_t width_;
};

}  // namespace

Pool::Pool(const Json& json, Loader& loader) {
  reads = {loader.only_input(json)};
  const Buffer in = loader.buffers[reads[0]];
  const std::string& name = json.string("kind");
  check(name == "last" || name == "mean" || name == "max", Fault::file, "kind: expected last, mean or max, got ",
        quoted(name));
  kind = name == "last" ? Kind::last : name == "mean" ? Kind::mean : Kind::max;
  space = in.space;
  width = in.width;
  for (const Json& flag : json.array("reverse")) {
    reverse.push_back(flag.boolean_itself("reverse"));
    check(static_cast<int64_t>(reverse.size()) <= kMostParts, Fault::file, "reverse: too many parts");
  }
  check(!reverse.empty() && width % static_cast<int64_t>(reverse.size()) == 0, Fault::file,
        "reverse: expected flags for equal parts of ", width, " columns, got ", reverse.size());
  const bool backward = std::find(reverse.begin(), reverse.end(), true) != reverse.end();
  if (space == Space::tokens && (kind != Kind::last || backward)) in_one_pass = false;
  writes = {loader.define(json.string("output"), above(space), width)};
}

void Pool::run(Frame& frame) const {
  const PackedRows& rows = frame.packed(space);
  const float* const in = frame.buffers[reads[0]];
  const bool of_words = space == Space::characters;
  const int64_t parts = static_cast<int64_t>(reverse.size());
  const int64_t numbers = rows.batch * width;
  char* const scratch = static_cast<char*>(
      frame.scratch.of(static_cast<size_t>(numbers) * (sizeof(int64_t) + sizeof(float)) + static_cast<size_t>(parts)));
  int64_t* const argmax = reinterpret_cast<int64_t*>(scratch);
  float* const pooled = of_words ? reinterpret_cast<float*>(argmax + numbers) : frame.buffers[writes[0]];
  if (kind == Kind::last) {
    pool_last(rows, in, width, reverse, pooled);
  } else {
    bool* const flags =
        reinterpret_cast<bool*>(scratch + static_cast<size_t>(numbers) * (sizeof(int64_t) + sizeof(float)));
    std::copy(reverse.begin(), reverse.end(), flags);
    pool_forward(pymtl::Pool<float>{shape_of(rows, parts, width / parts), flags,
                                    kind == Kind::mean ? Pooling::mean : Pooling::max, in, pooled,
                                    kind == Kind::mean ? nullptr : argmax},
                 frame.executor);
  }
  if (of_words) spread_words(frame, pooled, width, frame.buffers[writes[0]]);
}

void spread_words(const Frame& frame, const float* words, int64_t width, float* out) {
  for (const int64_t word : frame.characters.word) out = std::copy_n(words + word * width, width, out);
}

InstructionPtr make_attention_pool(const Json& json, Loader& loader) {
  return std::make_unique<AttentionPooling>(json, loader);
}
InstructionPtr make_pool(const Json& json, Loader& loader) { return std::make_unique<Pool>(json, loader); }
InstructionPtr make_spread(const Json& json, Loader& loader) { return std::make_unique<Spread>(json, loader); }

}  // namespace pymtl::runtime
