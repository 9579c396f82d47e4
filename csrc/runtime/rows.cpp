// Instructions that compute each row of their output from the same row of their inputs.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "error.h"
#include "instruction.h"
#include "kernels/activation.h"
#include "linear.h"

namespace pymtl::runtime {
namespace {

// Rows [N, F] of several inputs of one space.
class RowWise : public Instruction {
 protected:
  RowWise(const Json& json, const Loader& loader) {
    for (const std::string& name : json.strings("inputs")) reads.push_back(loader.buffer(name));
    check(!reads.empty(), Fault::file, "inputs: expected at least one buffer, got none");
    space_ = loader.buffers[reads[0]].space;
    for (const int64_t read : reads) {
      widths_.push_back(loader.buffers[read].width);
      check(loader.buffers[read].space == space_, Fault::file, "inputs: expected rows of one kind, got several");
    }
  }

  void write(const Json& json, Loader& loader, int64_t width) {
    width_ = width;
    writes = {loader.define(json.string("output"), space_, width)};
  }

  void expect_inputs(size_t count) const {
    check(reads.size() == count, Fault::file, "inputs: expected ", count, " buffers, got ", reads.size());
  }

  Space space_;
  std::vector<int64_t> widths_;
  int64_t width_ = 0;
};

// Some columns of each input, side by side.
class Concatenate final : public RowWise {
 public:
  Concatenate(const Json& json, Loader& loader) : RowWise(json, loader) {
    const Json* const columns = json.find("columns");
    int64_t width = 0;
    for (size_t i = 0; i < reads.size(); ++i) {
      Part part{0, widths_[i]};
      if (columns != nullptr) {
        const auto& all = json.array("columns");
        check(all.size() == reads.size(), Fault::file, "columns: expected ", reads.size(), ", got ", all.size());
        part.first = all[i].whole("first", 0, widths_[i] - 1);
        part.count = all[i].whole("count", 1, widths_[i] - part.first);
      }
      parts_.push_back(part);
      width += part.count;
    }
    write(json, loader, width);
  }

  void run(Frame& frame) const override {
    const int64_t rows = frame.rows(space_);
    float* out = frame.buffers[writes[0]];
    for (int64_t row = 0; row < rows; ++row) {
      for (size_t i = 0; i < parts_.size(); ++i) {
        const float* const in = frame.buffers[reads[i]] + row * widths_[i] + parts_[i].first;
        out = std::copy_n(in, parts_[i].count, out);
      }
    }
  }

 private:
  struct Part {
    int64_t first, count;
  };
  std::vector<Part> parts_;
};

class Activation final : public RowWise {
 public:
  Activation(const Json& json, Loader& loader) : RowWise(json, loader) {
    const std::string& kind = json.string("kind");
    check(kind == "tanh" || kind == "sigmoid", Fault::file, "kind: expected tanh or sigmoid, got ", quoted(kind));
    function_ = kind == "tanh" ? &hyperbolic_tangent<float> : &sigmoid<float>;
    expect_inputs(1);
    write(json, loader, widths_[0]);
  }

  void run(Frame& frame) const override {
    function_(frame.buffers[reads[0]], frame.buffers[writes[0]], frame.rows(space_) * width_);
  }

 private:
  void (*function_)(const float*, float*, int64_t);
};

class Softmax final : public RowWise {
 public:
  Softmax(const Json& json, Loader& loader) : RowWise(json, loader) {
    expect_inputs(1);
    write(json, loader, widths_[0]);
  }

  void run(Frame& frame) const override {
    const float* in = frame.buffers[reads[0]];
    float* out = frame.buffers[writes[0]];
    for (int64_t row = 0; row < frame.rows(space_); ++row, in += width_, out += width_) softmax(in, out, width_);
  }
};

// The product, number by number.
class Multiply final : public RowWise {
 public:
  Multiply(const Json& json, Loader& loader) : RowWise(json, loader) {
    expect_inputs(2);
    check(widths_[0] == widths_[1], Fault::file, "inputs: expected buffers of one width, got ", widths_[0], " and ",
          widths_[1]);
    write(json, loader, widths_[0]);
  }

  void run(Frame& frame) const override {
    const float* const a = frame.buffers[reads[0]];
    const float* const b = frame.buffers[reads[1]];
    float* const out = frame.buffers[writes[0]];
    const int64_t count = frame.rows(space_) * width_;
    for (int64_t i = 0; i < count; ++i) out[i] = a[i] * b[i];
  }
};

// Weighted sums of E parts of a row: once, by a row of E weights beside it; or J times, by a matrix [J, E].
class Mix final : public RowWise {
 public:
  Mix(const Json& json, Loader& loader) : RowWise(json, loader) {
    if (json.find("weights") != nullptr) {
      expect_inputs(1);
      const TensorView& weights = loader.file.tensor(json.string("weights"), DType::f32, {-1, -1});
      weights_ = static_cast<const float*>(weights.data);
      sums_ = weights.shape[0];
      parts_ = weights.shape[1];
    } else {
      expect_inputs(2);
      parts_ = widths_[1];
    }
    check(parts_ > 0 && widths_[0] % parts_ == 0, Fault::file, "inputs: expected ", parts_, " parts of one width, got ",
          widths_[0], " columns");
    size_ = widths_[0] / parts_;
    check(sums_ <= Loader::kWidest / size_, Fault::file, "weights: too many rows");
    write(json, loader, sums_ * size_);
  }

  void run(Frame& frame) const override {
    const float* in = frame.buffers[reads[0]];
    const float* weights = weights_ == nullptr ? frame.buffers[reads[1]] : weights_;
    float* out = frame.buffers[writes[0]];
    for (int64_t row = 0; row < frame.rows(space_); ++row, in += widths_[0]) {
      for (int64_t j = 0; j < sums_; ++j, out += size_) {
        const float* const own = weights + j * parts_;
        for (int64_t f = 0; f < size_; ++f) out[f] = own[0] * in[f];
        for (int64_t e = 1; e < parts_; ++e) {
          for (int64_t f = 0; f < size_; ++f) out[f] += own[e] * in[e * size_ + f];
        }
      }
      if (weights_ == nullptr) weights += parts_;
    }
  }

 private:
  const float* weights_ = nullptr;
  int64_t sums_ = 1;   // J
  int64_t parts_ = 0;  // E
  int64_t size_ = 0;   // of a part
};

// Layer normalisation (Ba et al. 2016) of each of several groups of columns, with a gain: g (x - mean) / sqrt(variance
// + 1e-5).
class LayerNorm final : public RowWise {
 public:
  LayerNorm(const Json& json, Loader& loader) : RowWise(json, loader) {
    expect_inputs(1);
    groups_ = json.whole("groups", 1, widths_[0]);
    check(widths_[0] % groups_ == 0, Fault::file, "groups: expected a divisor of ", widths_[0], " columns, got ",
          groups_);
    gain_ = loader.floats(json.string("gain"), {widths_[0]});
    write(json, loader, widths_[0]);
  }

  void run(Frame& frame) const override {
    const int64_t size = width_ / groups_;
    const float* in = frame.buffers[reads[0]];
    float* out = frame.buffers[writes[0]];
    for (int64_t group = 0; group < frame.rows(space_) * groups_; ++group, in += size, out += size) {
      const float* const gain = gain_ + group % groups_ * size;
      double mean = 0.0, variance = 0.0;
      for (int64_t i = 0; i < size; ++i) mean += in[i];
      mean /= static_cast<double>(size);
      for (int64_t i = 0; i < size; ++i) variance += (in[i] - mean) * (in[i] - mean);
      const double scale = 1.0 / std::sqrt(variance / static_cast<double>(size) + 1e-5);
      for (int64_t i = 0; i < size; ++i) out[i] = static_cast<float>((in[i] - mean) * scale) * gain[i];
    }
  }

 private:
  int64_t groups_ = 1;
  const float* gain_ = nullptr;
};

template <typename Made>
InstructionPtr made(const Json& json, Loader& loader) {
  return std::make_unique<Made>(json, loader);
}

}  // namespace

void softmax(const float* in, float* out, int64_t count) {
  const float most = *std::max_element(in, in + count);
  for (int64_t i = 0; i < count; ++i) out[i] = in[i] - most;
  exponential(out, out, count);
  float sum = 0.0f;
  for (int64_t i = 0; i < count; ++i) sum += out[i];
  for (int64_t i = 0; i < count; ++i) out[i] /= sum;
}

Linear::Linear(const Json& json, Loader& loader) {
  reads = {loader.only_input(json)};
  const Buffer in = loader.buffers[reads[0]];
  space = in.space;
  const TensorView& view = loader.file.tensor(json.string("weight"), DType::f32, {-1, in.width});
  width = view.shape[0];
  parts = json.find("parts") == nullptr ? 1 : json.whole("parts", 1, in.width);
  check(in.width % parts == 0, Fault::file, "parts: expected a divisor of ", in.width, " columns, got ", parts);
  depth = in.width / parts;
  weight = static_cast<const float*>(view.data);
  bias = json.find("bias") == nullptr ? nullptr : loader.floats(json.string("bias"), {width});
  loader.take(width * in.width);
  writes = {loader.define(json.string("output"), space, width)};
}

void Linear::prepare() { panels_ = PackedHeads(weight, parts, depth, width); }

void Linear::run(Frame& frame) const {
  const Heads<float> args{frame.rows(space),        parts,        depth, width, frame.buffers[reads[0]], weight, bias,
                          frame.buffers[writes[0]], panels_.get()};
  heads_forward(args, frame.scratch.of(heads_workspace(args, frame.executor)), frame.executor);
}

PackedHeads::PackedHeads(const float* weight, int64_t parts, int64_t depth, int64_t width)
    : memory_(std::make_unique<Memory>()) {
  Heads<float> args{};
  args.parts = parts;
  args.depth = depth;
  args.width = width;
  args.weight = weight;
  panels_ = static_cast<float*>(memory_->of(heads_prepacked_size<float>(args) * sizeof(float)));
  heads_prepack(args, panels_);
}

InstructionPtr make_activation(const Json& json, Loader& loader) { return made<Activation>(json, loader); }
InstructionPtr make_concatenate(const Json& json, Loader& loader) { return made<Concatenate>(json, loader); }
InstructionPtr make_layer_norm(const Json& json, Loader& loader) { return made<LayerNorm>(json, loader); }
InstructionPtr make_linear(const Json& json, Loader& loader) { return made<Linear>(json, loader); }
InstructionPtr make_mix(const Json& json, Loader& loader) { return made<Mix>(json, loader); }
InstructionPtr make_multiply(const Json& json, Loader& loader) { return made<Multiply>(json, loader); }
InstructionPtr make_softmax(const Json& json, Loader& loader) { return made<Softmax>(json, loader); }

}  // namespace pymtl::runtime
