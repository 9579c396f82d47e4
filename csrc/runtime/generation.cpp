#include "generation.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "error.h"
#include "kernels/activation.h"
#include "linear.h"

namespace pymtl::runtime {
namespace {

constexpr int64_t kMostHypotheses = int64_t{1} << 31;
constexpr int64_t kEnd = 0;               // the id that ends an answer, and that is read before its first
constexpr float kNoProbability = 1e-12f;  // added to probabilities whose logarithm is taken, as in pymtl/decoder.py

// The likeliest id that may come, and its part of the softmax of all.
Likeliest likeliest_of(const Decoder& decoder, const float* z, int64_t count) {
  const Likeliest all = likeliest(z, count);
  if (decoder.may_come(all.id)) return all;
  int64_t best = kEnd;
  for (int64_t id = 1; id < count; ++id) {
    if (decoder.may_come(id) && z[id] > z[best]) best = id;
  }
  return {best, all.probability * std::exp(static_cast<double>(z[best]) - z[all.id])};
}

}  // namespace

Generation::Generation(const Step& step, size_t memory_limit)
    : step_(step), memory_limit_(memory_limit), state_size_(step.routine.loader().state_size) {
  frame_.keeps_state = true;
  frame_.memory.limit = frame_.scratch.limit = frame_.attended.weights.limit = memory_limit;
  frame_.ids.resize(1);
  frame_.tokens.batch_sizes.resize(1);
  frame_.tokens.starts.assign(1, 0);
  frame_.attended.memories.resize(step.memories.size());
}

void Generation::begin(const Frame& batch, const int64_t* places) {
  count_ = 0;
  frame_.executor = batch.executor;
  frame_.attended.rows = &batch.tokens;
  for (size_t i = 0; i < step_.memories.size(); ++i) {
    frame_.attended.memories[i] = batch.buffers[step_.memories[i]];
  }
  first_states_ = batch.buffers[step_.state];
  places_ = places;
  columns_ = step_.width;
  if (step_.copies) {
    const PackedRows& rows = batch.tokens;
    sources_ = batch.ids[step_.copies->sources].data();
    own_columns_.assign(static_cast<size_t>(rows.batch), step_.width);
    for (int64_t t = 0; t < rows.steps(); ++t) {
      for (int64_t row = 0; row < rows.batch_sizes[t]; ++row) {
        own_columns_[row] = std::max(own_columns_[row], sources_[rows.starts[t] + row] + 1);
      }
    }
    columns_ = *std::max_element(own_columns_.begin(), own_columns_.end());
  }
}

void Generation::step(int64_t count, const int64_t* ids, const int64_t* parents, const int64_t* sequences) {
  check(count >= 1 && count < kMostHypotheses, Fault::argument, "count: expected from 1 to ", kMostHypotheses - 1,
        " hypotheses, got ", count);
  check(parents == nullptr || count_ > 0, Fault::argument,
        "parents: expected hypotheses of the step before, but there was none: begin with sequences");
  const size_t size = static_cast<size_t>(count);
  // States and sequences are there twice: of this step and of the one before.
  const int64_t mixed = step_.copies ? columns_ : 0;
  const size_t row = static_cast<size_t>(2 * state_size_ + steps() + mixed) * sizeof(float) + 4 * sizeof(int64_t);
  check(size <= memory_limit_ / row, Fault::memory, "expected a step that fits into ", memory_limit_,
        " bytes, the limit of memory, got one of ", count, " hypotheses: fewer of them, or a smaller batch");
  next_sequences_.resize(size);
  frame_.ids[0].resize(size);
  frame_.attended.places.resize(size);
  frame_.state.resize(size * static_cast<size_t>(state_size_));
  // With which they change places.
  sequences_.reserve(size);
  states_.reserve(frame_.state.size());
  const int64_t before = parents == nullptr ? batch() : count_;
  for (int64_t m = 0; m < count; ++m) {
    check(ids[m] >= 0 && ids[m] < columns_, Fault::argument, "ids: expected numbers from 0 to ", columns_ - 1, ", got ",
          ids[m], " of hypothesis ", m);
    const int64_t from = parents == nullptr ? sequences[m] : parents[m];
    check(from >= 0 && from < before, Fault::argument, parents == nullptr ? "sequences" : "parents",
          ": expected numbers below ", before, parents == nullptr ? ", the batch's sequences" : ", the last step's",
          ", got ", from, " of hypothesis ", m);
    const int64_t sequence = parents == nullptr ? from : sequences_[from];
    next_sequences_[m] = sequence;
    frame_.ids[0][m] = ids[m] < step_.width ? ids[m] : step_.copies->unknown;
    frame_.attended.places[m] = places_[sequence];
    const float* const state = parents == nullptr ? first_state(from) : states_.data() + from * state_size_;
    std::copy_n(state, state_size_, frame_.state.data() + m * state_size_);
  }
  frame_.tokens.count = frame_.tokens.batch = frame_.tokens.batch_sizes[0] = count;
  frame_.attended.heads = 0;
  step_.routine.place_buffers(frame_, memory_limit_);
  step_.routine.run(frame_, step_.needs);
  std::swap(states_, frame_.state);
  std::swap(sequences_, next_sequences_);
  count_ = count;
  const int64_t heads = frame_.attended.heads;
  attention_.assign(heads == 0 ? 0 : size * static_cast<size_t>(steps()), 0.0f);
  const float* weights = static_cast<const float*>(frame_.attended.weights.get());
  for (int64_t m = 0; heads > 0 && m < count; ++m) {
    float* const own = attention_.data() + m * steps();
    for (int64_t j = 0; j < heads; ++j) {
      for (int64_t t = 0; t < steps(); ++t) own[t] += *weights++ / static_cast<float>(heads);
    }
  }
  if (step_.copies) mix_copies();
}

// The logits where tokens may be copied (See et al. 2017, equation 9): log(g p + (1 - g) a) of each id, where p is the
// softmax of what the step says, a how much is read of the sequence's tokens that are this id, and g the gate.
void Generation::mix_copies() {
  const PackedRows& rows = *frame_.attended.rows;
  const float* z = frame_.buffers[step_.logits];
  mixed_.assign(static_cast<size_t>(count_ * columns_), 0.0f);
  for (int64_t m = 0; m < count_; ++m, z += step_.width) {
    float* const own = mixed_.data() + m * columns_;
    float gate;
    sigmoid(frame_.buffers[step_.copies->gate] + m, &gate, 1);
    softmax(z, own, step_.width);
    for (int64_t c = 0; c < step_.width; ++c) own[c] *= gate;
    const int64_t place = frame_.attended.places[m];
    for (int64_t t = 0; !attention_.empty() && t < steps() && place < rows.batch_sizes[t]; ++t) {
      own[sources_[rows.starts[t] + place]] += (1.0f - gate) * attention_[m * steps() + t];
    }
    const int64_t known = own_columns_[place];
    for (int64_t c = 0; c < known; ++c) own[c] = std::log(own[c] + kNoProbability);
    std::fill(own + known, own + columns_, -std::numeric_limits<float>::infinity());
  }
}

const float* Generation::logits() const {
  check(count_ > 0, Fault::argument, "there was no step: make one first");
  return step_.copies ? mixed_.data() : frame_.buffers[step_.logits];
}

const float* Generation::attention() const {
  check(count_ > 0, Fault::argument, "there was no step: make one first");
  return attention_.empty() ? nullptr : attention_.data();
}

void Generation::find_likeliest(const Decoder& decoder, bool with_probabilities, Answer& answer) {
  const size_t size = static_cast<size_t>(batch());
  size_t left = memory_limit_ / (2 * (sizeof(int64_t) + sizeof(float)));  // ids, here and in the answer
  if (found_.size() < size) found_.resize(size);
  for (size_t i = 0; i < size; ++i) {
    found_[i].ids.clear();
    found_[i].probabilities.clear();
    found_[i].probability = 1.0;
  }
  // A hypothesis of each sequence, as long as it goes on; live_: which sequences these are.
  live_.resize(size);
  std::iota(live_.begin(), live_.end(), int64_t{0});
  ids_.assign(size, kEnd);
  parents_.clear();
  // One step more than there may be ids, at which only an end counts.
  for (int64_t length = 0; length <= decoder.max_length() && !live_.empty(); ++length) {
    step(static_cast<int64_t>(live_.size()), ids_.data(), length == 0 ? nullptr : parents_.data(), live_.data());
    size_t next = 0;
    parents_.resize(live_.size());
    for (size_t m = 0; m < live_.size(); ++m) {
      const Likeliest best = likeliest_of(decoder, logits() + static_cast<int64_t>(m) * columns_, columns_);
      if (length == decoder.max_length() && best.id != kEnd) continue;
      check(!std::isnan(best.probability), Fault::argument,
            "expected numbers to choose the next id by, got nan: is a weight or an input nan?");
      Found& own = found_[live_[m]];
      own.probability *= best.probability;
      if (best.id == kEnd) continue;
      check(left-- > 0, Fault::memory, "expected answers that fit into ", memory_limit_,
            " bytes, the limit of memory, got longer ones: a smaller batch");
      own.ids.push_back(best.id);
      own.probabilities.push_back(static_cast<float>(best.probability));
      live_[next] = live_[m];
      ids_[next] = best.id;
      parents_[next] = static_cast<int64_t>(m);
      ++next;
    }
    live_.resize(next);
  }
  answer.ids.clear();
  answer.numbers.clear();
  answer.probabilities.clear();
  answer.starts.assign(size + 1, 0);
  answer.probability.resize(size);
  for (size_t i = 0; i < size; ++i) {
    answer.ids.insert(answer.ids.end(), found_[i].ids.begin(), found_[i].ids.end());
    if (with_probabilities) {
      answer.probabilities.insert(answer.probabilities.end(), found_[i].probabilities.begin(),
                                  found_[i].probabilities.end());
    }
    answer.starts[i + 1] = static_cast<int64_t>(answer.ids.size());
    answer.probability[i] = found_[i].probability;
  }
  count_ = 0;
}

}  // namespace pymtl::runtime
