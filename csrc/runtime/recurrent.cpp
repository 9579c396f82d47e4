#include "recurrent.h"

#include <algorithm>
#include <cstring>

#include "error.h"

namespace pymtl::runtime {
namespace {

constexpr int64_t kMostRecurrences = 4096;

Cell cell_of(const std::string& mode, bool normalised) {
  for (size_t i = 0; i < std::size(kCells); ++i) {
    if (kCells[i].mode == mode && kCells[i].normalised == normalised) return static_cast<Cell>(i);
  }
  throw Error(Fault::file, "mode: expected LSTM, GRU, RNN_TANH or RNN_RELU, got ", quoted(mode));
}

std::vector<float> factors(const Json& json, const char* key, int64_t count) {
  if (json.find(key) == nullptr) return {};
  const double factor = json.number(key);
  check(factor >= 0.0 && factor <= 1.0, Fault::file, key, ": expected a number from 0 to 1, got ", factor);
  return std::vector<float>(static_cast<size_t>(count), static_cast<float>(factor));
}

const float* or_null(const std::vector<float>& numbers) { return numbers.empty() ? nullptr : numbers.data(); }

}  // namespace

Recurrent::Recurrent(const Json& json, Loader& loader) {
  reads = {loader.only_input(json)};
  const Buffer in = loader.buffers[reads[0]];
  check(in.space != Space::sequences, Fault::file, "inputs: expected rows of tokens or characters, not of sequences");
  space_ = in.space;
  const bool normalised = json.find("normalised") != nullptr && json.boolean("normalised");
  cell_ = cell_of(json.string("mode"), normalised);
  hidden_size_ = json.whole("hidden_size", 1, Loader::kWidest);
  const auto& all = json.array("recurrences");
  recurrences_ = static_cast<int64_t>(all.size());
  check(recurrences_ >= 1 && recurrences_ <= kMostRecurrences, Fault::file, "recurrences: expected from 1 to ",
        kMostRecurrences, ", got ", recurrences_);
  inputs_ = normalised                             ? recurrences_
            : json.find("side_by_side") == nullptr ? 1
                                                   : json.whole("side_by_side", 1, kMostRecurrences);
  check(recurrences_ % inputs_ == 0 && in.width % inputs_ == 0, Fault::file, "side_by_side: expected a divisor of ",
        recurrences_, " recurrences and of ", in.width, " columns, got ", inputs_);
  input_size_ = in.width / inputs_;
  const int64_t gates = sizes_of(cell_).gates;
  check(!normalised || input_size_ == gates * hidden_size_, Fault::file, "inputs: expected ", gates * hidden_size_,
        " columns for each normalised recurrence, got ", input_size_);
  for (size_t g = 0; g < all.size(); ++g) {
    try {
      read_weights(all[g], loader);
    } catch (const Error& error) {
      throw Error(error.fault(), "recurrences[", g, "]: ", error.what());
    }
  }
  check(recurrences_ <= Loader::kWidest / hidden_size_, Fault::file, "recurrences: too many for their size");
  loader.take(static_cast<int64_t>(rnn_prepacked_size<float>(cell_, recurrences_, input_size_, hidden_size_, format_)));
  zoneout_h_ = factors(json, "zoneout_h", recurrences_ * hidden_size_);
  zoneout_c_ = factors(json, "zoneout_c", recurrences_ * hidden_size_);
  check(zoneout_c_.empty() || sizes_of(cell_).has_cell, Fault::file, "zoneout_c: expected none for this mode");
  const bool backward = std::any_of(weights_.begin(), weights_.end(), [](const auto& own) { return own.reverse; });
  if (space_ == Space::tokens) {
    if (backward) in_one_pass = false;
    state_ = loader.state_size;
    loader.state_size += (sizes_of(cell_).has_cell ? 2 : 1) * recurrences_ * hidden_size_;
  }
  writes = {loader.define(json.string("output"), space_, recurrences_ * hidden_size_)};
}

void Recurrent::read_weights(const Json& json, Loader& loader) {
  const int64_t rows = sizes_of(cell_).gates * hidden_size_;
  const bool normalised = sizes_of(cell_).normalised;
  const auto floats = [&](const char* key, int64_t count) {
    return json.find(key) == nullptr ? nullptr : loader.floats(json.string(key), {count});
  };
  const TensorView& w_hh = loader.file.tensor(json.string("weight_hh"));
  const WeightFormat format = w_hh.dtype == DType::f32    ? WeightFormat::own
                              : w_hh.dtype == DType::bf16 ? WeightFormat::bfloat16
                                                          : WeightFormat::int8;
  check(weights_.empty() || format == format_, Fault::file, "weight_hh: expected one dtype for all recurrences");
  format_ = format;
  loader.file.tensor(json.string("weight_hh"), w_hh.dtype, {rows, hidden_size_});
  const void* const w_ih =
      normalised ? nullptr : loader.file.tensor(json.string("weight_ih"), w_hh.dtype, {rows, input_size_}).data;
  RnnWeights<float> own{};
  own.b_ih = floats("bias_ih", rows);
  own.b_hh = floats("bias_hh", rows);
  own.reverse = json.boolean("reverse");
  if (normalised) {
    own.norm.g_hh = loader.floats(json.string("gain_hh"), {rows});
    if (sizes_of(cell_).has_cell) {
      own.norm.g_c = loader.floats(json.string("gain_c"), {hidden_size_});
      own.norm.b_c = floats("bias_c", hidden_size_);
    }
  }
  if (format == WeightFormat::own) {
    own.w_ih = static_cast<const float*>(w_ih);
    own.w_hh = static_cast<const float*>(w_hh.data);
  } else {
    const bool integers = format == WeightFormat::int8;
    check(!integers || std::max(hidden_size_, normalised ? 0 : input_size_) <= kMostInt8Depth, Fault::file,
          "weight_hh and weight_ih: expected at most ", kMostInt8Depth, " columns of 8-bit numbers");
    const auto scale = [&](const char* key) { return loader.floats(json.string(key), {rows}); };
    narrow_.push_back({w_ih, w_hh.data, integers && !normalised ? scale("scale_ih") : nullptr,
                       integers ? scale("scale_hh") : nullptr, own.b_ih, own.b_hh});
  }
  weights_.push_back(own);
}

bool Recurrent::can_take(const Instruction& reader) const {
  if (const auto* linear = dynamic_cast<const Linear*>(&reader)) {
    return linear->parts == recurrences_ && linear->width <= recurrences_ * hidden_size_;
  }
  const auto* pool = dynamic_cast<const Pool*>(&reader);
  if (pool == nullptr || space_ != Space::tokens || static_cast<int64_t>(pool->reverse.size()) != recurrences_) {
    return false;
  }
  for (size_t g = 0; g < weights_.size(); ++g) {
    if (pool->reverse[g] != weights_[g].reverse) return false;
  }
  return true;
}

void Recurrent::take(const Instruction& reader) {
  if (writes_states_) writes.clear();
  writes_states_ = false;
  if (const auto* linear = dynamic_cast<const Linear*>(&reader)) {
    const int64_t features = linear->parts * linear->depth;
    heads_.push_back({linear->writes[0], linear->width});
    head_weight_.insert(head_weight_.end(), linear->weight, linear->weight + linear->width * features);
    head_has_bias_ = head_has_bias_ || linear->bias != nullptr;
    for (int64_t c = 0; c < linear->width; ++c) {
      head_bias_.push_back(linear->bias == nullptr ? 0.0f : linear->bias[c]);
    }
  } else {
    const auto& pool = dynamic_cast<const Pool&>(reader);
    (pool.kind == Pool::Kind::mean  ? means_
     : pool.kind == Pool::Kind::max ? maxima_
                                    : lasts_)
        .push_back(pool.writes[0]);
  }
  writes.insert(writes.end(), reader.writes.begin(), reader.writes.end());
}

void Recurrent::prepare(const Executor& executor) {
  const size_t size = rnn_prepacked_size<float>(cell_, recurrences_, input_size_, hidden_size_, format_);
  float* const panels = static_cast<float*>(panels_.of(size * sizeof(float)));
  if (format_ == WeightFormat::own) {
    rnn_prepack(cell_, weights_.data(), recurrences_, input_size_, hidden_size_, panels, executor);
  } else {
    rnn_prepack(cell_, format_, narrow_.data(), recurrences_, input_size_, hidden_size_, panels, executor);
  }
  if (!heads_.empty()) {
    const int64_t width = static_cast<int64_t>(head_bias_.size());
    head_panels_ = PackedHeads(head_weight_.data(), recurrences_, hidden_size_, width);
  }
}

void Recurrent::run(Frame& frame) const {
  const PackedRows& rows = frame.packed(space_);
  const int64_t numbers = recurrences_ * rows.batch * hidden_size_;
  const int64_t width = static_cast<int64_t>(head_bias_.size());
  RnnForward<float> args{};
  args.shape = {recurrences_, rows.steps(), rows.batch, rows.count, input_size_, hidden_size_, rows.batch_sizes.data(),
                inputs_,      cell_};
  args.weights = weights_.data();
  args.prepacked = static_cast<const float*>(panels_.get());
  args.format = format_;
  args.input = frame.buffers[reads[0]];
  args.output = writes_states_ ? frame.buffers[writes[0]] : nullptr;
  args.masks.zoneout_h = or_null(zoneout_h_);
  args.masks.zoneout_c = or_null(zoneout_c_);
  const bool has_cell = sizes_of(cell_).has_cell;
  const bool keeps_state = frame.keeps_state && space_ == Space::tokens;
  // One sequence's states are read where they are. Those of several are brought together for the kernel.
  const bool gathers = keeps_state && rows.batch > 1;
  if (keeps_state) {
    args.h0 = frame.state.data() + state_;
    args.c0 = has_cell ? args.h0 + numbers : nullptr;
  }
  args.heads.width = width;
  args.heads.weight = head_weight_.data();
  args.heads.bias = head_has_bias_ ? head_bias_.data() : nullptr;
  args.heads.prepacked = head_panels_.get();
  args.heads.mean = means_.empty() ? nullptr : frame.buffers[means_[0]];
  args.heads.max = maxima_.empty() ? nullptr : frame.buffers[maxima_[0]];
  const bool several = heads_.size() > 1;
  // Where the kernel needs no address it is asked for the size of its scratch memory without one.
  const int64_t kept = (gathers ? 4 : 2) * numbers;
  const size_t states = static_cast<size_t>(kept) * sizeof(float);
  const size_t logits = several ? static_cast<size_t>(rows.count * width) * sizeof(float) : 0;
  const size_t own = (states + logits + 63) / 64 * 64;
  char* const memory = static_cast<char*>(frame.scratch.of(own + rnn_forward_workspace(args, frame.executor)));
  args.h_n = reinterpret_cast<float*>(memory);
  args.c_n = has_cell ? args.h_n + numbers : nullptr;
  float* const together = args.h_n + kept;
  if (gathers) args.h0 = gather_states(frame, args.h_n + 2 * numbers);
  if (gathers && has_cell) args.c0 = args.h0 + numbers;
  if (width > 0) args.heads.logits = several ? together : frame.buffers[heads_[0].buffer];
  rnn_forward(args, memory + own, frame.executor);

  int64_t column = 0;
  for (const Reader& head : heads_) {
    if (!several) break;
    for (int64_t row = 0; row < rows.count; ++row) {
      std::copy_n(together + row * width + column, head.width, frame.buffers[head.buffer] + row * head.width);
    }
    column += head.width;
  }
  const auto copy = [&](const std::vector<int64_t>& buffers) {
    const size_t bytes = static_cast<size_t>(numbers) * sizeof(float);
    for (size_t i = 1; i < buffers.size(); ++i)
      std::memcpy(frame.buffers[buffers[i]], frame.buffers[buffers[0]], bytes);
  };
  copy(means_);
  copy(maxima_);
  for (const int64_t buffer : lasts_) {
    float* out = frame.buffers[buffer];
    for (int64_t row = 0; row < rows.batch; ++row) {
      for (int64_t g = 0; g < recurrences_; ++g) {
        out = std::copy_n(args.h_n + (g * rows.batch + row) * hidden_size_, hidden_size_, out);
      }
    }
  }
  if (keeps_state) {
    each_state(frame, [&](int64_t place, float* own) { std::copy_n(args.h_n + place, hidden_size_, own); });
  }
}

template <typename Function>
void Recurrent::each_state(Frame& frame, Function&& function) const {
  const int64_t batch = frame.tokens.batch;
  const int64_t size = static_cast<int64_t>(frame.state.size()) / batch;  // of a sequence's row
  const int64_t states = (sizes_of(cell_).has_cell ? 2 : 1) * recurrences_;
  for (int64_t row = 0; row < batch; ++row) {
    for (int64_t part = 0; part < states; ++part) {
      function((part * batch + row) * hidden_size_, frame.state.data() + row * size + state_ + part * hidden_size_);
    }
  }
}

const float* Recurrent::gather_states(Frame& frame, float* states) const {
  each_state(frame, [&](int64_t place, const float* own) { std::copy_n(own, hidden_size_, states + place); });
  return states;
}

InstructionPtr make_recurrent(const Json& json, Loader& loader) { return std::make_unique<Recurrent>(json, loader); }

}  // namespace pymtl::runtime
