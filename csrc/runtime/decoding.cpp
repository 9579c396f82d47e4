#include "decoding.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "error.h"
#include "kernels/crf.h"

namespace pymtl::runtime {
namespace {

constexpr int64_t kLongest = 1 << 20;  // of generated answers
constexpr double kNone = std::numeric_limits<double>::quiet_NaN();

struct KindName {
  const char* name;
  Decoder::Kind kind;
};
constexpr KindName kKinds[] = {{"none", Decoder::Kind::none},       {"classes", Decoder::Kind::classes},
                               {"crf", Decoder::Kind::crf},         {"ctc", Decoder::Kind::ctc},
                               {"ordinal", Decoder::Kind::ordinal}, {"labels", Decoder::Kind::labels},
                               {"numbers", Decoder::Kind::numbers}, {"generation", Decoder::Kind::generation}};

double logistic(double x) { return 1.0 / (1.0 + std::exp(-x)); }

// log(exp(a) + exp(b)).
double log_add(double a, double b) {
  const double more = std::max(a, b);
  return more == -std::numeric_limits<double>::infinity() ? more : more + std::log1p(std::exp(std::min(a, b) - more));
}

// Of each class being the one: from the logits [C - 1] of being above each class but the last. Thresholds may cross.
double ordinal_probability(const float* z, int64_t thresholds, int64_t id) {
  double sum = 0.0, own = 0.0, below = 1.0;
  for (int64_t c = 0; c <= thresholds; ++c) {
    const double above = c < thresholds ? logistic(z[c]) : 0.0;
    const double one = std::max(below - above, 0.0);
    sum += one;
    if (c == id) own = one;
    below = above;
  }
  return own / sum;
}

// The probability of labels over all their paths (Graves et al. 2006, equations 6 to 8), from the tokens' logits.
class CtcProbability {
 public:
  static size_t bytes(int64_t count) { return static_cast<size_t>(2 * count + 1) * sizeof(double); }

  // memory: bytes(count) of them.
  CtcProbability(const int64_t* labels, int64_t count, void* memory)
      : labels_(labels), sums_(static_cast<double*>(memory)), size_(2 * count + 1) {
    std::fill_n(sums_, size_, -std::numeric_limits<double>::infinity());
  }

  void step(const float* z, int64_t classes) {
    const Likeliest best = likeliest(z, classes);
    const double base = std::log(best.probability) - z[best.id];
    for (int64_t s = size_ - 1; s >= 0; --s) {
      double sum = first_ ? (s < 2 ? 0.0 : -std::numeric_limits<double>::infinity()) : sums_[s];
      if (!first_ && s > 0) sum = log_add(sum, sums_[s - 1]);
      if (!first_ && s > 1 && label(s) != 0 && label(s) != label(s - 2)) sum = log_add(sum, sums_[s - 2]);
      sums_[s] = sum + base + z[label(s)];
    }
    first_ = false;
  }

  double value() const {
    const double last = sums_[size_ - 1];
    return std::exp(size_ > 1 ? log_add(last, sums_[size_ - 2]) : last);
  }

 private:
  // Labels with a blank before, between and after them.
  int64_t label(int64_t s) const { return s % 2 == 0 ? 0 : labels_[s / 2]; }

  const int64_t* labels_;
  double* sums_;
  int64_t size_;
  bool first_ = true;
};

}  // namespace

Likeliest likeliest(const float* z, int64_t count) {
  const float* const best = std::max_element(z, z + count);
  double sum = 0.0;
  for (int64_t c = 0; c < count; ++c) sum += std::exp(static_cast<double>(z[c]) - *best);
  return {best - z, 1.0 / sum};
}

Decoder::Kind Decoder::kind_of(const Json& json) {
  const std::string& name = json.string("decoder");
  const auto* const known =
      std::find_if(std::begin(kKinds), std::end(kKinds), [&](const KindName& kind) { return name == kind.name; });
  check(known != std::end(kKinds), Fault::file, "decoder: expected one that this version knows, got ", quoted(name));
  return known->kind;
}

Decoder::Decoder(const Json& json, const File& file, Space space, int64_t width)
    : kind_(kind_of(json)), space_(space), width_(width) {
  const bool of_tokens = kind_ == Kind::crf || kind_ == Kind::ctc;
  const bool of_either = kind_ == Kind::none || kind_ == Kind::classes;
  check(of_either || (space == Space::tokens) == of_tokens, Fault::file, "decoder: expected another for rows of ",
        space == Space::tokens ? "tokens" : "sequences", " than ", quoted(json.string("decoder")));
  if (kind_ == Kind::crf) {
    const auto floats = [&](const char* key, const std::vector<int64_t>& shape) {
      return static_cast<const float*>(file.tensor(json.string(key), DType::f32, shape).data);
    };
    start_ = floats("start", {width});
    end_ = floats("end", {width});
    transitions_ = floats("transitions", {width, width});
  } else if (kind_ == Kind::numbers) {
    for (const Json& number : json.array("mean")) mean_.push_back(number.number_itself("mean"));
    for (const Json& number : json.array("std")) std_.push_back(number.number_itself("std"));
    check(static_cast<int64_t>(mean_.size()) == width && mean_.size() == std_.size(), Fault::file,
          "mean and std: expected ", width, " numbers");
    log_ = json.boolean("log");
  } else if (kind_ == Kind::generation) {
    max_length_ = json.whole("max_length", 1, kLongest);
    never_.assign(static_cast<size_t>(width), false);
    for (const Json& id : json.array("never")) never_[id.whole_itself("never", 1, width - 1)] = true;
  }
}

int64_t Decoder::ids() const {
  return kind_ == Kind::none || kind_ == Kind::numbers ? 0 : width_ + (kind_ == Kind::ordinal ? 1 : 0);
}

void Decoder::decode(const Decoded& given, Frame& frame, Answer& answer) const {
  answer.ids.clear();
  answer.numbers.clear();
  answer.probabilities.clear();
  answer.starts.assign(static_cast<size_t>(given.rows.batch) + 1, 0);
  answer.probability.assign(static_cast<size_t>(given.rows.batch), kNone);
  if (kind_ == Kind::crf) {
    decode_crf(given, frame, answer);
  } else if (kind_ == Kind::ctc) {
    decode_ctc(given, frame, answer);
  } else if (kind_ == Kind::classes && space_ == Space::tokens) {
    decode_classes(given, answer);
  } else if (kind_ != Kind::none) {
    decode_sequences(given, answer);
  }
}

void Decoder::decode_classes(const Decoded& given, Answer& answer) const {
  std::copy_n(given.start, given.rows.batch + 1, answer.starts.begin());
  answer.ids.resize(static_cast<size_t>(given.rows.count));
  answer.probabilities.resize(given.with_probabilities ? answer.ids.size() : 0);
  if (given.with_probabilities) std::fill(answer.probability.begin(), answer.probability.end(), 1.0);
  const float* z = given.logits;
  for (int64_t step = 0; step < given.rows.steps(); ++step) {
    for (int64_t row = 0; row < given.rows.batch_sizes[step]; ++row, z += width_) {
      const int64_t sequence = given.sequence[row];
      const size_t place = static_cast<size_t>(given.start[sequence] + step);
      if (!given.with_probabilities) {
        answer.ids[place] = std::max_element(z, z + width_) - z;
        continue;
      }
      const Likeliest best = likeliest(z, width_);
      answer.ids[place] = best.id;
      answer.probabilities[place] = static_cast<float>(best.probability);
      answer.probability[sequence] *= best.probability;
    }
  }
}

void Decoder::decode_crf(const Decoded& given, Frame& frame, Answer& answer) const {
  const PackedRows& rows = given.rows;
  std::copy_n(given.start, rows.batch + 1, answer.starts.begin());
  answer.ids.resize(static_cast<size_t>(rows.count));
  answer.probabilities.resize(given.with_probabilities ? answer.ids.size() : 0);
  const CrfChain<float> chain{rows.steps(), rows.batch, rows.count, width_,      rows.batch_sizes.data(),
                              given.logits, start_,     end_,       transitions_};
  // All of it in one block: the tags and the paths' scores, and for probabilities the sums over all paths, what these
  // leave for their gradients, and the gradients, which are each tag's probability.
  const auto count = [](int64_t numbers, size_t size) { return (static_cast<size_t>(numbers) * size + 63) / 64 * 64; };
  const bool all = given.with_probabilities;
  const size_t tags_size = count(rows.count, sizeof(int64_t));
  const size_t row_size = count(rows.batch, sizeof(float));
  const size_t alphas_size = all ? count(rows.count * width_, sizeof(double)) : 0;
  const size_t scales_size = all ? count(rows.count, sizeof(double)) : 0;
  const size_t marginals_size = all ? count(rows.count * width_, sizeof(float)) : 0;
  const size_t gradients_size = all ? count(width_ * (width_ + 2), sizeof(float)) : 0;
  CrfDecode<float> decode{chain, nullptr, nullptr};
  CrfForward<float> forward{chain, nullptr, nullptr, nullptr, nullptr};
  CrfBackward<float> backward{};
  backward.chain = chain;
  size_t work = crf_decode_workspace(decode, frame.executor);
  if (all) {
    work = std::max(
        {work, crf_forward_workspace(forward, frame.executor), crf_backward_workspace(backward, frame.executor)});
  }
  char* memory = static_cast<char*>(
      frame.scratch.of(tags_size + 3 * row_size + alphas_size + scales_size + marginals_size + gradients_size + work));
  const auto take = [&](size_t size) {
    char* const here = memory;
    memory += size;
    return here;
  };
  decode.tags = reinterpret_cast<int64_t*>(take(tags_size));
  decode.scores = reinterpret_cast<float*>(take(row_size));
  forward.result = reinterpret_cast<float*>(take(row_size));
  float* const ones = reinterpret_cast<float*>(take(row_size));
  forward.alphas = reinterpret_cast<double*>(take(alphas_size));
  forward.scales = reinterpret_cast<double*>(take(scales_size));
  backward.grad_emissions = reinterpret_cast<float*>(take(marginals_size));
  backward.grad_start = reinterpret_cast<float*>(take(gradients_size));
  crf_decode(decode, memory, frame.executor);
  if (all) {
    crf_forward(forward, memory, frame.executor);
    std::fill_n(ones, rows.batch, 1.0f);
    backward.alphas = forward.alphas;
    backward.scales = forward.scales;
    backward.grad_result = ones;
    backward.grad_end = backward.grad_start + width_;
    backward.grad_transitions = backward.grad_end + width_;
    crf_backward(backward, memory, frame.executor);
    for (int64_t row = 0; row < rows.batch; ++row) {
      answer.probability[given.sequence[row]] = std::exp(static_cast<double>(decode.scores[row] - forward.result[row]));
    }
  }
  int64_t n = 0;
  for (int64_t step = 0; step < rows.steps(); ++step) {
    for (int64_t row = 0; row < rows.batch_sizes[step]; ++row, ++n) {
      const size_t place = static_cast<size_t>(given.start[given.sequence[row]] + step);
      answer.ids[place] = decode.tags[n];
      if (all) answer.probabilities[place] = backward.grad_emissions[n * width_ + decode.tags[n]];
    }
  }
}

void Decoder::decode_ctc(const Decoded& given, Frame& frame, Answer& answer) const {
  const PackedRows& rows = given.rows;
  for (int64_t sequence = 0; sequence < rows.batch; ++sequence) {
    const int64_t length = given.start[sequence + 1] - given.start[sequence];
    const auto logits = [&](int64_t step) {
      return given.logits + (rows.starts[static_cast<size_t>(step)] + given.place[sequence]) * width_;
    };
    int64_t before = 0;
    for (int64_t step = 0; step < length; ++step) {
      const float* const z = logits(step);
      const int64_t id = std::max_element(z, z + width_) - z;
      if (id != 0 && id != before) answer.ids.push_back(id);
      before = id;
    }
    answer.starts[sequence + 1] = static_cast<int64_t>(answer.ids.size());
    if (!given.with_probabilities) continue;
    const int64_t begin = answer.starts[sequence];
    const int64_t count = answer.starts[sequence + 1] - begin;
    CtcProbability probability(answer.ids.data() + begin, count, frame.scratch.of(CtcProbability::bytes(count)));
    for (int64_t step = 0; step < length; ++step) probability.step(logits(step), width_);
    answer.probability[sequence] = probability.value();
  }
}

void Decoder::decode_sequences(const Decoded& given, Answer& answer) const {
  for (int64_t sequence = 0; sequence < given.rows.batch; ++sequence) {
    const float* const z = given.logits + given.place[sequence] * width_;
    double& probability = answer.probability[sequence];
    if (kind_ == Kind::classes) {
      const Likeliest best = likeliest(z, width_);
      answer.ids.push_back(best.id);
      probability = best.probability;
    } else if (kind_ == Kind::ordinal) {
      answer.ids.push_back(std::count_if(z, z + width_, [](float value) { return value > 0.0f; }));
      probability = ordinal_probability(z, width_, answer.ids.back());
    } else if (kind_ == Kind::labels) {
      probability = 1.0;
      for (int64_t c = 0; c < width_; ++c) {
        if (z[c] > 0.0f) answer.ids.push_back(c);
        probability *= logistic(std::fabs(z[c]));
      }
    } else {
      for (int64_t c = 0; c < width_; ++c) {
        const double value = mean_[c] + std_[c] * z[c];
        answer.numbers.push_back(log_ ? std::exp(value) : value);
      }
    }
    answer.starts[sequence + 1] = static_cast<int64_t>(answer.ids.size());
  }
}

}  // namespace pymtl::runtime
