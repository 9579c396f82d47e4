#include "session.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <sstream>

#include "error.h"
#include "kernels/packing.h"
#include "kernels/pool.h"

namespace pymtl::runtime {
namespace {

constexpr int64_t kMostTokens = int64_t{1} << 31;

bool is_of_paths(Decoder::Kind kind) { return kind == Decoder::Kind::crf || kind == Decoder::Kind::ctc; }

}  // namespace

Executor executor_of(int64_t threads) {
  return threads == 1 ? Executor{serially, 1} : pool_executor(threads, serially);
}

Session::Session(const Program& program, int64_t threads, size_t memory_limit, bool keeps_state)
    : program_(program), threads_(threads), memory_limit_(memory_limit) {
  frame_.keeps_state = keeps_state;
  frame_.memory.limit = frame_.scratch.limit = memory_limit;
  frame_.ids.resize(program.inputs().size());
  for (const Task& task : program.tasks()) {
    needs_.push_back(keeps_state && !task.in_one_pass ? std::vector<bool>() : task.needs);
    generations_.push_back(task.step == nullptr ? nullptr : std::make_unique<Generation>(*task.step, memory_limit));
  }
  const auto answers = [](const std::vector<bool>& needs) { return !needs.empty(); };
  check(!keeps_state || std::any_of(needs_.begin(), needs_.end(), answers), Fault::argument,
        "expected a model with a task whose answers follow from the tokens so far, got none: it has to read in one "
        "direction, and pool by \"last\" (model.bidirectional = false, pooling = \"last\")");
  frame_.state.assign(keeps_state ? static_cast<size_t>(program.state_size()) : 0, 0.0f);
  wanted_.assign(program.tasks().size(), false);
  has_answers_ = wanted_;
  answers_.resize(program.tasks().size());
  logits_.resize(program.tasks().size());
}

void Session::forget_answers() { std::fill(has_answers_.begin(), has_answers_.end(), false); }

void Session::reset() {
  forget_answers();
  std::fill(frame_.state.begin(), frame_.state.end(), 0.0f);
}

void Session::run(const int64_t* lengths, int64_t batch, const std::vector<Field>& fields,
                  const std::vector<size_t>& tasks, bool with_probabilities, bool by_steps) {
  forget_answers();  // should the batch not fit, there are none
  const size_t all = program_.tasks().size();
  wanted_.assign(all, false);
  for (const size_t task : tasks) {
    check(task < all, Fault::argument, "tasks: expected numbers below ", all, ", got ", task);
    check(!needs_[task].empty() || !frame_.keeps_state, Fault::argument, "tasks: a stream has no answers of ",
          quoted(program_.tasks()[task].name), ", which depend on tokens to come");
    wanted_[task] = true;
  }
  needed_.assign(program_.routine().instruction_count(), false);
  for (size_t task = 0; task < all; ++task) {
    if (tasks.empty()) wanted_[task] = !frame_.keeps_state || !needs_[task].empty();
    // A stream's states go on with every token, whatever is asked of it.
    const bool runs = wanted_[task] || frame_.keeps_state;
    for (size_t i = 0; runs && i < needs_[task].size(); ++i) needed_[i] = needed_[i] || needs_[task][i];
  }
  frame_.executor = executor_of(threads_);
  arrange(lengths, batch);
  read_fields(fields);
  kept_state_ = frame_.state;
  try {
    program_.routine().run(frame_, needed_);
    for (size_t task = 0; task < all; ++task) {
      if (wanted_[task]) collect(task, with_probabilities, by_steps);
    }
  } catch (...) {
    std::copy(kept_state_.begin(), kept_state_.end(), frame_.state.begin());  // a call that failed has read no tokens
    throw;
  }
  has_answers_ = wanted_;
  by_steps_ = by_steps;
}

void Session::arrange(const int64_t* lengths, int64_t batch) {
  check(batch >= 1 && batch < kMostTokens, Fault::argument, "batch: expected at least one sequence, got ", batch);
  check(batch == 1 || !frame_.keeps_state, Fault::argument, "batch: expected one sequence of a stream, got ", batch);
  starts_.resize(static_cast<size_t>(batch) + 1);
  starts_[0] = 0;
  int64_t longest = 0;
  for (int64_t i = 0; i < batch; ++i) {
    check(lengths[i] >= 1 && lengths[i] < kMostTokens, Fault::argument, "lengths: expected at least one token, got ",
          lengths[i], " of sequence ", i);
    longest = std::max(longest, lengths[i]);
    starts_[i + 1] = starts_[i] + lengths[i];
    check(starts_[i + 1] < kMostTokens, Fault::argument, "lengths: expected fewer than ", kMostTokens, " tokens");
  }
  PackedRows& rows = frame_.tokens;
  rows.count = starts_[batch];
  // Of what follows; the plan of the buffers checks them by itself.
  constexpr size_t kOrderOfToken = 3 * sizeof(int64_t);
  check(static_cast<size_t>(rows.count) <= memory_limit_ / kOrderOfToken, Fault::memory,
        "expected a batch that fits into ", memory_limit_, " bytes, the limit of memory, got one of ", rows.count,
        " tokens: split it");
  rows.batch = batch;
  rows.batch_sizes.resize(static_cast<size_t>(longest));
  sequence_.resize(static_cast<size_t>(batch));
  places_.resize(static_cast<size_t>(batch));
  packing_order(lengths, batch, longest, rows.batch_sizes.data(), sequence_.data(), places_.data());
  token_.resize(static_cast<size_t>(rows.count));
  rows.starts.resize(static_cast<size_t>(longest));
  int64_t n = 0;
  for (int64_t step = 0; step < longest; ++step) {
    rows.starts[static_cast<size_t>(step)] = n;
    for (int64_t row = 0; row < rows.batch_sizes[step]; ++row) token_[n++] = starts_[sequence_[row]] + step;
  }
}

std::string Session::place_of(int64_t token) const {
  const int64_t sequence = std::upper_bound(starts_.begin(), starts_.end(), token) - starts_.begin() - 1;
  std::ostringstream text;
  text << "token " << token - starts_[sequence] << " of sequence " << sequence;
  return text.str();
}

void Session::read_fields(const std::vector<Field>& fields) {
  std::vector<const Field*>& by_input = by_input_;
  by_input.assign(program_.inputs().size(), nullptr);
  for (const Field& field : fields) {
    check(by_input[field.input] == nullptr, Fault::argument, "fields: expected each once, got ",
          quoted(program_.inputs()[field.input].name), " twice");
    by_input[field.input] = &field;
  }
  const auto read = [&](const Field& field) {
    const Input& input = program_.inputs()[field.input];
    if (input.kind == Input::Kind::ids) {
      read_ids(field);
    } else if (input.kind == Input::Kind::characters) {
      read_characters(field);
    }
  };
  for (size_t i = 0; i < by_input.size(); ++i) {
    const Input& input = program_.inputs()[i];
    if (by_input[i] != nullptr) {
      read(*by_input[i]);
      continue;
    }
    if (!is_needed(i)) {
      frame_.ids[i].assign(token_.size(), 0);
      continue;
    }
    const int64_t of = program_.names(i).of;
    const bool is_there = of >= 0 && by_input[of] != nullptr && by_input[of]->strings != nullptr;
    check(is_there, Fault::argument, "field ", quoted(input.name), ": expected one of the batch, got none");
    read({i, by_input[of]->strings});
  }
  program_.routine().place_buffers(frame_, memory_limit_);
  for (const Field* const field : by_input) {
    if (field != nullptr && program_.inputs()[field->input].kind == Input::Kind::numbers) read_numbers(*field);
  }
}

// Every input is, except the sources of a task that copies and is not wanted.
bool Session::is_needed(size_t input) const {
  for (size_t task = 0; task < wanted_.size(); ++task) {
    const Step* const step = program_.tasks()[task].step.get();
    const bool copies_it = step != nullptr && step->copies && step->copies->sources == static_cast<int64_t>(input);
    if (copies_it) return wanted_[task];
  }
  return true;
}

void Session::check_strings(const Field& field) const {
  for (int64_t token = 0; field.strings != nullptr && token < frame_.tokens.count; ++token) {
    if (field.strings[token] == nullptr) [[unlikely]] {
      throw Error(Fault::argument, "field ", quoted(program_.inputs()[field.input].name),
                  ": expected a string, got NULL at ", place_of(token));
    }
  }
}

void Session::read_ids(const Field& field) {
  const Input& input = program_.inputs()[field.input];
  const Vocabulary& vocabulary = program_.names(field.input).vocabulary;
  std::vector<int64_t>& ids = frame_.ids[field.input];
  ids.resize(token_.size());
  check(field.ids != nullptr || field.strings != nullptr, Fault::argument, "field ", quoted(input.name),
        ": expected ids or strings, got neither");
  check(field.ids != nullptr || !vocabulary.empty(), Fault::argument, "field ", quoted(input.name),
        ": expected ids, since the model has no names of them, got strings");
  check_strings(field);
  for (size_t n = 0; n < token_.size(); ++n) {
    const int64_t token = token_[n];
    const int64_t id = field.ids != nullptr ? field.ids[token] : vocabulary.id(field.strings[token]);
    if (id < 0 || id >= input.count) [[unlikely]] {
      throw Error(Fault::argument, "field ", quoted(input.name), ": expected ",
                  field.ids != nullptr ? "ids" : "names of ids", " from 0 to ", input.count - 1, ", got ",
                  field.ids != nullptr ? std::to_string(id) : quoted(field.strings[token]), " at ", place_of(token));
    }
    ids[n] = id;
  }
}

void Session::read_characters(const Field& field) {
  const Input& input = program_.inputs()[field.input];
  const Names& names = program_.names(field.input);
  Characters& characters = frame_.characters;
  const int64_t count = frame_.tokens.count;
  check(field.ids != nullptr || field.strings != nullptr, Fault::argument, "field ", quoted(input.name),
        ": expected ids or strings, got neither");
  const auto make_room = [&] {
    const size_t size = static_cast<size_t>(count * characters.length);
    check(size <= memory_limit_ / (2 * sizeof(int64_t)), Fault::memory, "field ", quoted(input.name),
          ": expected a batch that fits into ", memory_limit_, " bytes, the limit of memory, got ", count,
          " tokens of up to ", characters.length, " characters: split it");
    spelled_.assign(size, 0);
  };
  if (field.ids != nullptr) {
    check(field.width >= 0 && field.width <= kMostTokens / count, Fault::argument, "field ", quoted(input.name),
          ": expected fewer characters a token, got ", field.width);
    characters.length = std::max<int64_t>(field.width, 1);
    make_room();
    for (int64_t i = 0; i < count * field.width; ++i) {
      if (field.ids[i] < 0 || field.ids[i] >= input.count) [[unlikely]] {
        throw Error(Fault::argument, "field ", quoted(input.name), ": expected ids from 0 to ", input.count - 1,
                    ", got ", field.ids[i], " at ", place_of(i / field.width));
      }
      spelled_[i] = field.ids[i];
    }
  } else {
    check(!names.vocabulary.empty(), Fault::argument, "field ", quoted(input.name),
          ": expected ids, since the model has no names of them, got strings");
    check_strings(field);
    // Code points of the longest word, cut off at what is read of it.
    characters.length = 1;
    const auto each = [&](int64_t token, auto&& function) {
      std::string_view rest = field.strings[token];
      for (int64_t i = 0; i < names.max_length && !rest.empty(); ++i) {
        const size_t length = utf8_length(rest);
        if (length == 0) [[unlikely]] {
          throw Error(Fault::argument, "field ", quoted(input.name), ": expected UTF-8, got other bytes at ",
                      place_of(token));
        }
        function(i, rest.substr(0, length));
        rest.remove_prefix(length);
      }
    };
    for (int64_t token = 0; token < count; ++token) {
      each(token, [&](int64_t i, std::string_view) { characters.length = std::max(characters.length, i + 1); });
    }
    check(characters.length <= kMostTokens / count, Fault::argument, "field ", quoted(input.name),
          ": expected shorter words");
    make_room();
    for (int64_t token = 0; token < count; ++token) {
      each(token, [&](int64_t i, std::string_view character) {
        const int64_t id = names.vocabulary.id(character);
        if (id < 0) [[unlikely]] {
          throw Error(Fault::argument, "field ", quoted(input.name), ": expected characters that the model knows, got ",
                      quoted(character), " at ", place_of(token));
        }
        spelled_[static_cast<size_t>(token * characters.length + i)] = id;
      });
    }
  }
  if (program_.reads_spelling() || program_.reads_characters()) {
    characters.ids.resize(spelled_.size());
    for (int64_t n = 0; n < count; ++n) {
      std::copy_n(spelled_.data() + token_[n] * characters.length, characters.length,
                  characters.ids.data() + n * characters.length);
    }
  }
  if (program_.reads_characters()) find_words();
}

void Session::find_words() {
  Characters& characters = frame_.characters;
  const int64_t count = frame_.tokens.count;
  const int64_t width = characters.length;
  const auto spelling = [&](int64_t n) { return characters.ids.data() + n * width; };
  // As many characters as are not 0, and at least one.
  const auto length = [&](int64_t n) {
    return std::max<int64_t>(std::count_if(spelling(n), spelling(n) + width, [](int64_t id) { return id != 0; }), 1);
  };
  order_.resize(static_cast<size_t>(count));
  std::iota(order_.begin(), order_.end(), int64_t{0});
  const auto compare = [&](int64_t a, int64_t b) {
    return std::memcmp(spelling(a), spelling(b), static_cast<size_t>(width) * sizeof(int64_t));
  };
  std::sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) {
    const int64_t own = length(a), others = length(b);
    return own != others ? own > others : compare(a, b) < 0;
  });
  characters.word.resize(static_cast<size_t>(count));
  PackedRows& words = characters.words;
  words.batch = 0;
  words.batch_sizes.clear();
  int64_t distinct = 0;  // how many of the order are a word's first token
  for (int64_t i = 0; i < count; ++i) {
    if (i == 0 || compare(order_[i], order_[i - 1]) != 0) {
      const int64_t own = length(order_[i]);
      if (words.batch_sizes.empty()) words.batch_sizes.assign(static_cast<size_t>(own), 0);
      for (int64_t step = 0; step < own; ++step) ++words.batch_sizes[step];
      ++distinct;
    }
    characters.word[order_[i]] = distinct - 1;
  }
  words.batch = distinct;
  words.count = std::accumulate(words.batch_sizes.begin(), words.batch_sizes.end(), int64_t{0});
  first_.assign(static_cast<size_t>(distinct), 0);
  for (int64_t i = count - 1; i >= 0; --i) first_[characters.word[order_[i]]] = order_[i];
  characters.packed.resize(static_cast<size_t>(words.count));
  int64_t place = 0;
  for (int64_t step = 0; step < words.steps(); ++step) {
    for (int64_t word = 0; word < words.batch_sizes[step]; ++word) {
      characters.packed[place++] = spelling(first_[word])[step];
    }
  }
}

void Session::read_numbers(const Field& field) {
  const Input& input = program_.inputs()[field.input];
  check(field.numbers != nullptr, Fault::argument, "field ", quoted(input.name), ": expected numbers, got none");
  check(field.width == input.count, Fault::argument, "field ", quoted(input.name), ": expected ", input.count,
        " numbers a token, got ", field.width);
  float* out = frame_.buffers[input.buffer];
  for (const int64_t token : token_) out = std::copy_n(field.numbers + token * input.count, input.count, out);
}

void Session::collect(size_t index, bool with_probabilities, bool by_steps) {
  const Task& task = program_.tasks()[index];
  if (task.step != nullptr) {
    generations_[index]->begin(frame_, places_.data());
    if (!by_steps) generations_[index]->find_likeliest(task.decoder, with_probabilities, answers_[index]);
    return;
  }
  const float* const packed = frame_.buffers[task.reads[0]];
  std::vector<float>& logits = logits_[index];
  logits.resize(static_cast<size_t>(frame_.rows(task.space) * task.width));
  const std::vector<int64_t>& order = task.space == Space::tokens ? token_ : sequence_;
  for (size_t row = 0; row < order.size(); ++row) {
    std::copy_n(packed + static_cast<int64_t>(row) * task.width, task.width, logits.data() + order[row] * task.width);
  }
  // Of a stream there is no last token yet, from which paths are found backwards.
  if (frame_.keeps_state && is_of_paths(task.decoder.kind())) return;
  task.decoder.decode({packed, frame_.tokens, sequence_.data(), places_.data(), starts_.data(), with_probabilities},
                      frame_, answers_[index]);
}

void Session::check_answered(size_t task) const {
  check(has_answers_[task], Fault::argument, "task ", quoted(program_.tasks()[task].name),
        ": there are no answers: run a batch that asks for it first");
}

const Answer& Session::answer(size_t task) const {
  check_answered(task);
  const Task& asked = program_.tasks()[task];
  check(!frame_.keeps_state || !is_of_paths(asked.decoder.kind()), Fault::argument, "task ", quoted(asked.name),
        ": a stream has its logits alone: the answer depends on tokens to come");
  check(!by_steps_ || asked.step == nullptr, Fault::argument, "task ", quoted(asked.name),
        ": its answers were left to steps");
  return answers_[task];
}

const std::vector<float>& Session::logits(size_t task) const {
  check_answered(task);
  check(program_.tasks()[task].step == nullptr, Fault::argument, "task ", quoted(program_.tasks()[task].name),
        ": its answers are generated, and only a step has logits");
  return logits_[task];
}

Generation& Session::generation(size_t task) {
  check_answered(task);
  check(generations_[task] != nullptr, Fault::argument, "task ", quoted(program_.tasks()[task].name),
        ": expected one whose answers are generated");
  return *generations_[task];
}

}  // namespace pymtl::runtime
