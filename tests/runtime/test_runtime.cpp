// The runtime behind the C interface: JSON, what a sample's answers are, streams, and what is refused.
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <new>

#include "runtime/error.h"
#include "sample.h"

namespace pymtl::test {
namespace {

using runtime::Json;

std::atomic<int64_t> allocations{0};

std::string refused(const std::string& text) {
  try {
    Json::parse(text);
  } catch (const runtime::Error& error) {
    return error.what();
  }
  return "";
}

void json() {
  const Json value = Json::parse(R"( {"a": [1, -2.5e1, true, null, "\u00e9\ud83d\ude00\n\/"], "b": {"c": 0}} )");
  CHECK(value.array("a").size() == 5);
  CHECK(value.array("a")[1].number_itself("x") == -25.0);
  CHECK(value.array("a")[4].string_itself("x") == "\xc3\xa9\xf0\x9f\x98\x80\n/");
  CHECK(value.at("b").whole("c", 0, 0) == 0);
  CHECK(value.find("z") == nullptr);
  for (const char* const text : {"",
                                 "{",
                                 "[1,]",
                                 "{\"a\":1,}",
                                 "{\"a\":1,\"a\":2}",
                                 "01",
                                 "-",
                                 "1.",
                                 ".5",
                                 "1e",
                                 "1e999",
                                 "nul",
                                 "\"\\x\"",
                                 "\"\n\"",
                                 "\"\\ud800\"",
                                 "\"\\udc00\"",
                                 "\"\\ud800\\u0041\"",
                                 "\"\xff\"",
                                 "\"\xc0\x80\"",
                                 "\"\xed\xa0\x80\"",
                                 "\"\xf4\x90\x80\x80\"",
                                 "\"\xe2\x82\"",
                                 "1 2",
                                 "[1 2]",
                                 "{1:2}",
                                 "\"",
                                 "tru",
                                 "+1",
                                 "0x1",
                                 "NaN",
                                 "Infinity"}) {
    CHECK(refused(text).rfind("JSON: ", 0) == 0, text, refused(text));
  }
  CHECK(refused(std::string(33, '[') + std::string(33, ']')).find("deeper") != std::string::npos);
  CHECK(refused(std::string(32, '[') + std::string(32, ']')).empty());
  CHECK(refused(std::string(1000000, '[')).find("deeper") != std::string::npos);
  CHECK(std::string(runtime::quoted("a\"\\\x01")) == "\"a\\\"\\\\\\u0001\"");
}

// A model of the sample, with a session.
struct Sample {
  TemporaryFile file;
  pymtl_model* model = nullptr;
  pymtl_session* session = nullptr;

  Sample(SampleWeights weights, bool convolutions, bool bidirectional, Random& random, int64_t threads = 1)
      : file(sample_bytes(weights, convolutions, bidirectional, random)) {
    const pymtl_options options{sizeof options, threads, 0};
    CHECK(pymtl_model_load(file.path(), &options, &model) == PYMTL_OK, pymtl_error());
    CHECK(pymtl_session_new(model, &session) == PYMTL_OK, pymtl_error());
  }
  ~Sample() {
    pymtl_session_free(session);
    pymtl_model_free(model);
  }

  std::vector<float> logits(int64_t task, const pymtl_session* of = nullptr) const {
    const float* numbers;
    int64_t rows, columns;
    CHECK(pymtl_get_logits(of == nullptr ? session : of, task, &numbers, &rows, &columns) == PYMTL_OK, pymtl_error());
    return {numbers, numbers + rows * columns};
  }

  // The answers that were generated to a batch: of each sequence its ids, with each one's probability.
  std::vector<std::vector<std::pair<int64_t, float>>> written(size_t batch, int64_t task) const {
    pymtl_answer answer;
    CHECK(pymtl_get_answer(session, task, &answer) == PYMTL_OK, pymtl_error());
    std::vector<std::vector<std::pair<int64_t, float>>> found(batch);
    for (size_t i = 0; i < batch; ++i) {
      for (int64_t n = answer.starts[i]; n < answer.starts[i + 1]; ++n) {
        found[i].emplace_back(answer.ids[n], answer.probabilities == nullptr ? 0.0f : answer.probabilities[n]);
      }
    }
    return found;
  }
};

constexpr int64_t kWritten = 8, kCopied = 9;  // the tasks whose answers are generated

constexpr SampleWeights kWeights[] = {SampleWeights::floats, SampleWeights::halves, SampleWeights::integers};

// The fields of one sequence of a batch.
std::vector<pymtl_field> fields_of(const SampleBatch& batch, int64_t first) {
  std::vector<pymtl_field> fields = batch.fields;
  for (pymtl_field& field : fields) {
    if (field.strings != nullptr) field.strings += first;
    if (field.ids != nullptr) field.ids += first * field.width;
    if (field.numbers != nullptr) field.numbers += first * field.width;
  }
  return fields;
}

void batches() {
  Random random(1);
  for (const SampleWeights weights : kWeights) {
    for (const bool convolutions : {false, true}) {
      for (const bool bidirectional : {false, true}) {
        for (const int64_t threads : {1, 3}) {
          const Context context("weights ", static_cast<int>(weights), " convolutions ", convolutions,
                                " bidirectional ", bidirectional, " threads ", threads);
          const Sample sample(weights, convolutions, bidirectional, random, threads);
          const SampleBatch batch(sample.model, 1 + random.below(9), 12, random);
          const pymtl_request request{sizeof request, nullptr, 0, 1, 0};
          CHECK(batch.run(sample.session, &request) == PYMTL_OK, pymtl_error());
          CHECK(std::isfinite(read_everything(sample.model, sample.session, 0)));
          std::vector<std::vector<float>> together;
          for (int64_t task = 0; task < kWritten; ++task) together.push_back(sample.logits(task));
          const auto written = sample.written(batch.lengths.size(), kWritten);
          const auto copied = sample.written(batch.lengths.size(), kCopied);
          // Each sequence alone.
          int64_t first = 0;
          for (size_t i = 0; i < batch.lengths.size(); ++i) {
            const std::vector<pymtl_field> fields = fields_of(batch, first);
            const int64_t length = batch.lengths[i];
            CHECK(pymtl_run(sample.session, 1, &length, static_cast<int64_t>(fields.size()), fields.data(), &request) ==
                      PYMTL_OK,
                  pymtl_error());
            CHECK(sample.written(1, kWritten)[0] == written[i], i);
            CHECK(sample.written(1, kCopied)[0] == copied[i], i);
            for (int64_t task = 0; task < kWritten; ++task) {
              pymtl_task info;
              CHECK(pymtl_get_task(sample.model, task, &info) == PYMTL_OK);
              const std::vector<float> own = sample.logits(task);
              const int64_t row = info.of_tokens != 0 ? first : static_cast<int64_t>(i);
              CHECK(same_bits(own.data(), together[task].data() + row * info.columns, static_cast<int64_t>(own.size())),
                    info.name, i);
            }
            first += length;
          }
        }
      }
    }
  }
}

void answers() {
  Random random(2);
  const Sample sample(SampleWeights::floats, true, true, random);
  const SampleBatch batch(sample.model, 7, 9, random);
  const pymtl_request request{sizeof request, nullptr, 0, 1, 0};
  CHECK(batch.run(sample.session, &request) == PYMTL_OK, pymtl_error());
  const auto answer = [&](const char* name) {
    pymtl_answer found;
    CHECK(pymtl_get_answer(sample.session, pymtl_find_task(sample.model, name), &found) == PYMTL_OK);
    return found;
  };
  const auto logits = [&](const char* name) { return sample.logits(pymtl_find_task(sample.model, name)); };
  const size_t sequences = batch.lengths.size();
  const auto best = [](const float* z) { return std::max_element(z, z + 4) - z; };
  const auto share = [](const float* z, int64_t id) {
    double sum = 0.0;
    for (int64_t c = 0; c < 4; ++c) sum += std::exp(static_cast<double>(z[c]) - z[id]);
    return 1.0 / sum;
  };

  const pymtl_answer tokens = answer("tokens");
  const std::vector<float> token_logits = logits("tokens");
  for (size_t i = 0, n = 0; i < sequences; ++i) {
    double whole = 1.0;
    for (int64_t t = 0; t < batch.lengths[i]; ++t, ++n) {
      CHECK(tokens.ids[n] == best(&token_logits[4 * n]));
      CHECK(std::fabs(tokens.probabilities[n] - share(&token_logits[4 * n], tokens.ids[n])) < 1e-6);
      whole *= tokens.probabilities[n];
    }
    CHECK(std::fabs(tokens.probability[i] - whole) < 1e-6);
    CHECK(tokens.starts[i + 1] - tokens.starts[i] == batch.lengths[i]);
  }
  CHECK(std::string(pymtl_label(sample.model, 0, 2)) == "C");
  CHECK(pymtl_label(sample.model, 0, 4) == nullptr && pymtl_label(sample.model, 0, -1) == nullptr);

  const pymtl_answer classes = answer("class");
  const std::vector<float> class_logits = logits("class");
  const pymtl_answer many = answer("many");
  const std::vector<float> many_logits = logits("many");
  const pymtl_answer values = answer("values");
  const std::vector<float> value_logits = logits("values");
  const pymtl_answer ordered = answer("ordered");
  const std::vector<float> ordered_logits = logits("ordered");
  for (size_t i = 0; i < sequences; ++i) {
    const float* const z = &class_logits[4 * i];
    CHECK(classes.starts[i] == static_cast<int64_t>(i) && classes.ids[i] == best(z));
    CHECK(std::fabs(classes.probability[i] - share(z, classes.ids[i])) < 1e-9);
    int64_t place = many.starts[i];
    for (int64_t c = 0; c < 4; ++c) {
      if (many_logits[4 * i + static_cast<size_t>(c)] > 0) CHECK(many.ids[place++] == c);
    }
    CHECK(place == many.starts[i + 1]);
    for (size_t c = 0; c < 4; ++c) {
      const double expected = std::exp(static_cast<double>(c) + (c == 1 ? 2.0 : 1.0) * value_logits[4 * i + c]);
      CHECK(std::fabs(values.numbers[4 * i + c] - expected) <= 1e-12 * expected);
    }
    const float* const above = &ordered_logits[4 * i];
    CHECK(ordered.ids[i] == std::count_if(above, above + 4, [](float number) { return number > 0; }));
    CHECK(ordered.probability[i] >= 0.0 && ordered.probability[i] <= 1.0);
  }

  // Of short sequences all paths can be gone through.
  const int64_t one = 1, three = 3;
  const auto check_paths = [&](const std::vector<pymtl_field>& fields, int64_t length) {
    CHECK(
        pymtl_run(sample.session, 1, &length, static_cast<int64_t>(fields.size()), fields.data(), &request) == PYMTL_OK,
        pymtl_error());
    const std::vector<float> z = logits("ctc");
    const pymtl_answer found = answer("ctc");
    std::vector<int64_t> path(static_cast<size_t>(length), 0);
    double all = 0.0, own = 0.0;
    for (int64_t number = 0; number < std::pow(4, length); ++number) {
      double probability = 1.0;
      std::vector<int64_t> labels;
      int64_t rest = number, before = 0;
      for (int64_t t = 0; t < length; ++t, rest /= 4) {
        const int64_t id = rest % 4;
        probability *= share(&z[static_cast<size_t>(4 * t)], id);
        if (id != 0 && id != before) labels.push_back(id);
        before = id;
      }
      all += probability;
      if (labels == std::vector<int64_t>(found.ids, found.ids + found.starts[1])) own += probability;
    }
    CHECK(std::fabs(all - 1.0) < 1e-9);
    CHECK(std::fabs(found.probability[0] - own) < 1e-6, found.probability[0], own);
  };
  check_paths(fields_of(batch, 0), one);
  if (batch.lengths[0] + batch.lengths[1] >= 3) check_paths(fields_of(batch, 0), three);
}

// A file with another text in one's place in its header.
std::string changed(std::string bytes, const char* from, const char* to) {
  const size_t place = bytes.find(from);
  CHECK(place != std::string::npos, from);
  if (place == std::string::npos) return bytes;
  bytes.replace(place, std::strlen(from), to);
  // The header's length, and as many bytes of padding before the numbers as there were.
  uint64_t length;
  std::memcpy(&length, bytes.data(), sizeof length);
  const size_t end = sizeof length + length + std::strlen(to) - std::strlen(from);
  bytes.insert(end, (8 - end % 8) % 8, ' ');
  length = end + (8 - end % 8) % 8 - sizeof length;
  std::memcpy(bytes.data(), &length, sizeof length);
  return bytes;
}

// What steps of one hypothesis each say of the answers to a batch.
void check_steps(const Sample& sample, const SampleBatch& batch, int64_t task) {
  const int64_t sequences = static_cast<int64_t>(batch.lengths.size());
  const int64_t* const sources = batch.fields[3].ids;  // of kCopied
  const pymtl_request request{sizeof request, nullptr, 0, 1, 0}, by_steps{sizeof by_steps, nullptr, 0, 0, 1};
  CHECK(batch.run(sample.session, &request) == PYMTL_OK, pymtl_error());
  const auto written = sample.written(batch.lengths.size(), task);
  pymtl_answer answer;
  CHECK(pymtl_get_answer(sample.session, task, &answer) == PYMTL_OK);
  const std::vector<double> whole(answer.probability, answer.probability + sequences);
  CHECK(batch.run(sample.session, &by_steps) == PYMTL_OK, pymtl_error());
  CHECK(pymtl_get_answer(sample.session, task, &answer) == PYMTL_BAD_ARGUMENT);
  CHECK(std::strstr(pymtl_error(), "left to steps") != nullptr, pymtl_error());
  int64_t tokens = 0, columns = 5;
  for (const int64_t length : batch.lengths) tokens += length;
  if (task == kCopied) columns = std::max<int64_t>(columns, *std::max_element(sources, sources + tokens) + 1);
  int64_t first = 0;  // of the sequence's tokens
  for (int64_t i = 0; i < sequences; first += batch.lengths[i++]) {
    int64_t own = 5;
    if (task == kCopied)
      own = std::max<int64_t>(own, *std::max_element(sources + first, sources + first + batch.lengths[i]) + 1);
    double product = 1.0;
    int64_t read = 0;
    for (size_t length = 0; length <= written[i].size(); ++length) {
      pymtl_scores scores;
      const int64_t parent = 0;
      CHECK(pymtl_step(sample.session, task, 1, &read, length == 0 ? nullptr : &parent, length == 0 ? &i : nullptr,
                       &scores) == PYMTL_OK,
            pymtl_error());
      CHECK(scores.columns == columns, scores.columns, columns);
      CHECK(scores.steps == *std::max_element(batch.lengths.begin(), batch.lengths.end()));
      double attention = 0.0, sum = 0.0;
      for (int64_t t = 0; t < scores.steps; ++t) {
        attention += scores.attention[t];
        CHECK(t < batch.lengths[i] || scores.attention[t] == 0.0f);
        // A token of the sequence itself has some probability, log(1e-12) = -27.6 being none.
        if (task == kCopied && t < batch.lengths[i] && sources[first + t] >= 5) {
          CHECK(scores.logits[sources[first + t]] > -20.0f);
        }
      }
      CHECK(std::fabs(attention - 1.0) < 1e-6, attention);
      int64_t best = 0;
      for (int64_t c = 0; c < columns; ++c) {
        sum += std::exp(static_cast<double>(scores.logits[c]));
        CHECK((c < own) == std::isfinite(scores.logits[c]), c, own);
        if (c != 1 && scores.logits[c] > scores.logits[best]) best = c;  // 1 is never to come
      }
      CHECK(task != kCopied || std::fabs(sum - 1.0) < 1e-5, sum);
      const double probability = std::exp(static_cast<double>(scores.logits[best])) / sum;
      if (length == written[i].size()) {
        CHECK(best == 0 || length == 4);
        if (best == 0) product *= probability;
        break;
      }
      CHECK(best == written[i][length].first, i, length);
      CHECK(std::fabs(probability - written[i][length].second) < 1e-6);
      product *= probability;
      read = best;
    }
    CHECK(std::fabs(product - whole[static_cast<size_t>(i)]) < 1e-6 * product);
  }
}

// Generated answers, written and copied, and what is refused of steps.
void generated() {
  Random random(7);
  const pymtl_request by_steps{sizeof by_steps, nullptr, 0, 0, 1};
  for (const SampleWeights weights : kWeights) {
    const Sample sample(weights, false, true, random);
    const SampleBatch batch(sample.model, 6, 9, random);
    const int64_t sequences = static_cast<int64_t>(batch.lengths.size());
    check_steps(sample, batch, kCopied);
    check_steps(sample, batch, kWritten);
    const auto refused = [&](int64_t task, int64_t count, int64_t id, const int64_t* parents, const int64_t* of,
                             const char* says) {
      pymtl_scores scores;
      CHECK(pymtl_step(sample.session, task, count, &id, parents, of, &scores) == PYMTL_BAD_ARGUMENT);
      CHECK(std::strstr(pymtl_error(), says) != nullptr, pymtl_error(), says);
    };
    const int64_t zero = 0, one = 1;
    refused(0, 1, 0, nullptr, &zero, "expected one whose answers are generated");
    refused(kWritten, 0, 0, nullptr, &zero, "count: expected from 1 to 2147483647 hypotheses, got 0");
    refused(kWritten, 1, 5, nullptr, &zero, "ids: expected numbers from 0 to 4, got 5 of hypothesis 0");
    refused(kWritten, 1, 0, nullptr, &sequences, "sequences: expected numbers below 6");
    refused(kWritten, 1, 0, &one, nullptr, "parents: expected numbers below 1, the last step's, got 1");
    refused(kWritten, 1, 0, &zero, &zero, "expected one of them");
    refused(kWritten, 1, 0, nullptr, nullptr, "expected one of them");
    const float* logits;
    int64_t rows, columns;
    refused(kCopied, 1, 9, nullptr, &zero, "ids: expected numbers from 0 to ");
    CHECK(pymtl_get_logits(sample.session, kWritten, &logits, &rows, &columns) == PYMTL_BAD_ARGUMENT);
    CHECK(std::strstr(pymtl_error(), "only a step has logits") != nullptr, pymtl_error());
    CHECK(batch.run(sample.session, &by_steps) == PYMTL_OK);
    refused(kWritten, 1, 0, &zero, nullptr, "there was none: begin with sequences");
    // What tokens are among the ids of a task that copies is needed where the task is.
    const pymtl_request other{sizeof other, &kWritten, 1, 0, 0}, same{sizeof same, &kCopied, 1, 0, 0};
    CHECK(pymtl_run(sample.session, sequences, batch.lengths.data(), 3, batch.fields.data(), &other) == PYMTL_OK);
    CHECK(pymtl_run(sample.session, sequences, batch.lengths.data(), 3, batch.fields.data(), &same) ==
          PYMTL_BAD_ARGUMENT);
    CHECK(std::strstr(pymtl_error(), "field \"copied/sources\": expected one of the batch") != nullptr, pymtl_error());
  }
}

// What a caller of 1.0 has in the place of newer fields; attention that nothing reads; numbers that are none.
void generated_oddly() {
  Random random(8);
  const char *const both = R"(\"inputs\":[\"d\",\"a\"])", *const none_read = R"(\"inputs\":[\"d\",\"d\",\"d\"])";
  // Of both tasks: the one that copies then copies nothing.
  const std::string good = changed(sample_bytes(SampleWeights::floats, false, true, random), both, none_read);
  const TemporaryFile file(changed(good, both, none_read));
  pymtl_model* model = nullptr;
  pymtl_session* session = nullptr;
  CHECK(pymtl_model_load(file.path(), nullptr, &model) == PYMTL_OK, pymtl_error());
  CHECK(pymtl_session_new(model, &session) == PYMTL_OK, pymtl_error());
  SampleBatch batch(model, 3, 9, random);
  struct {
    size_t size;
    const int64_t* tasks;
    int64_t task_count;
    int32_t probabilities;
  } old;
  std::memset(&old, 0xaa, sizeof old);
  old.size = sizeof old;
  old.tasks = nullptr;
  old.task_count = old.probabilities = 0;
  CHECK(batch.run(session, reinterpret_cast<const pymtl_request*>(&old)) == PYMTL_OK, pymtl_error());
  pymtl_answer answer;
  CHECK(pymtl_get_answer(session, kWritten, &answer) == PYMTL_OK, pymtl_error());
  const int64_t zero = 0;
  pymtl_scores scores;
  CHECK(pymtl_step(session, kWritten, 1, &zero, nullptr, &zero, &scores) == PYMTL_OK, pymtl_error());
  CHECK(scores.attention == nullptr && scores.columns == 5);
  CHECK(pymtl_step(session, kCopied, 1, &zero, nullptr, &zero, &scores) == PYMTL_OK, pymtl_error());
  CHECK(scores.attention == nullptr && scores.columns >= 5);
  const std::vector<float> none(100, std::numeric_limits<float>::quiet_NaN());
  batch.fields[2].numbers = none.data();
  CHECK(batch.run(session) == PYMTL_BAD_ARGUMENT);
  CHECK(std::strstr(pymtl_error(), "expected numbers to choose the next id by, got nan") != nullptr, pymtl_error());
  CHECK(pymtl_get_answer(session, kWritten, &answer) == PYMTL_BAD_ARGUMENT);
  const int64_t tokens = 0;
  const pymtl_request others{sizeof others, &tokens, 1, 0, 0};
  CHECK(batch.run(session, &others) == PYMTL_OK, pymtl_error());
  pymtl_session_free(session);
  pymtl_model_free(model);
}

// After the first batch of a size, another takes no memory.
void memory() {
  Random random(6);
  for (const bool convolutions : {false, true}) {
    for (const bool probabilities : {false, true}) {
      const Sample sample(SampleWeights::floats, convolutions, true, random);
      const SampleBatch batch(sample.model, 5, 30, random);
      const int64_t tasks[] = {0, 5};
      const pymtl_request all{sizeof all, nullptr, 0, probabilities, 0}, some{sizeof some, tasks, 2, probabilities, 0};
      const pymtl_request steps{sizeof steps, nullptr, 0, probabilities, 1};
      for (int again = 0; again < 3; ++again) {
        const int64_t before = allocations;
        CHECK(batch.run(sample.session, &all) == PYMTL_OK, pymtl_error());
        CHECK(batch.run(sample.session, &some) == PYMTL_OK, pymtl_error());
        const int64_t ids[] = {0, 0, 2}, of[] = {4, 0, 0}, parents[] = {2, 2, 0};
        pymtl_scores scores;
        CHECK(batch.run(sample.session, &steps) == PYMTL_OK, pymtl_error());
        CHECK(pymtl_step(sample.session, kWritten, 3, ids, nullptr, of, &scores) == PYMTL_OK, pymtl_error());
        CHECK(pymtl_step(sample.session, kWritten, 3, ids, parents, nullptr, &scores) == PYMTL_OK, pymtl_error());
        CHECK(pymtl_step(sample.session, kCopied, 3, ids, nullptr, of, &scores) == PYMTL_OK, pymtl_error());
        CHECK(again == 0 || allocations == before, convolutions, probabilities, allocations - before);
      }
    }
  }
}

void streams() {
  Random random(3);
  for (const SampleWeights weights : kWeights) {
    const Sample sample(weights, false, false, random);
    pymtl_session* stream;
    CHECK(pymtl_stream_new(sample.model, &stream) == PYMTL_OK, pymtl_error());
    const SampleBatch batch(sample.model, 1, 40, random);
    const int64_t length = batch.lengths[0];
    CHECK(batch.run(sample.session) == PYMTL_OK, pymtl_error());
    const std::vector<float> tokens = sample.logits(0), last = sample.logits(3), path = sample.logits(6);
    for (int again = 0; again < 2; ++again) {
      std::vector<float> kept;
      for (int64_t first = 0; first < length;) {
        const int64_t count = std::min<int64_t>(length - first, 1 + random.below(4));
        const std::vector<pymtl_field> fields = fields_of(batch, first);
        // Once, back to a state from before.
        if (first > 0 && random.flip()) {
          float* state;
          int64_t size;
          CHECK(pymtl_stream_state(stream, &state, &size) == PYMTL_OK && size == 32);
          const std::vector<float> before(state, state + size);
          CHECK(pymtl_run(stream, 1, &count, 3, fields.data(), nullptr) == PYMTL_OK, pymtl_error());
          std::copy(before.begin(), before.end(), state);
        }
        CHECK(pymtl_run(stream, 1, &count, 3, fields.data(), nullptr) == PYMTL_OK, pymtl_error());
        const std::vector<float> own = sample.logits(0, stream), own_path = sample.logits(6, stream);
        CHECK(same_bits(own.data(), tokens.data() + 4 * first, 4 * count), first, count);
        CHECK(same_bits(own_path.data(), path.data() + 4 * first, 4 * count), first, count);
        first += count;
      }
      const std::vector<float> own = sample.logits(3, stream);
      CHECK(same_bits(own.data(), last.data(), 4));
      pymtl_answer answer;
      CHECK(pymtl_get_answer(stream, 1, &answer) == PYMTL_BAD_ARGUMENT);  // a mean over all tokens
      CHECK(pymtl_get_answer(stream, 0, &answer) == PYMTL_OK);
      CHECK(pymtl_get_answer(stream, 6, &answer) == PYMTL_BAD_ARGUMENT);  // a path, which ends with the last token
      CHECK(pymtl_stream_reset(stream) == PYMTL_OK);
      CHECK(pymtl_get_answer(stream, 0, &answer) == PYMTL_BAD_ARGUMENT);
    }
    const int64_t wanted = 1;
    const pymtl_request request{sizeof request, &wanted, 1, 0, 0};
    CHECK(batch.run(stream, &request) == PYMTL_BAD_ARGUMENT);
    CHECK(std::string(pymtl_error()).find("depend on tokens to come") != std::string::npos, pymtl_error());
    const int64_t two[] = {1, 1};
    CHECK(length < 2 || pymtl_run(stream, 2, two, 3, batch.fields.data(), nullptr) == PYMTL_BAD_ARGUMENT);
    CHECK(pymtl_stream_reset(sample.session) == PYMTL_BAD_ARGUMENT);
    pymtl_session_free(stream);
  }
  const Sample both(SampleWeights::floats, false, true, random);
  pymtl_session* stream = nullptr;
  // One of its tasks, "free", follows from a recurrence that reads both ways, and so do all others.
  CHECK(pymtl_stream_new(both.model, &stream) == PYMTL_BAD_ARGUMENT && stream == nullptr);
}

void refusals() {
  Random random(4);
  const Sample sample(SampleWeights::floats, true, true, random);
  const SampleBatch batch(sample.model, 2, 5, random);
  const auto text = [](pymtl_status status, pymtl_status expected) {
    CHECK(status == expected, status, pymtl_error());
    return std::string(pymtl_error());
  };
  const auto with = [&](size_t field, auto&& change) {
    std::vector<pymtl_field> fields = batch.fields;
    change(fields[field]);
    return pymtl_run(sample.session, 2, batch.lengths.data(), static_cast<int64_t>(fields.size()), fields.data(),
                     nullptr);
  };
  const auto has = [](const std::string& error, const char* part) {
    CHECK(error.find(part) != std::string::npos, error, part);
  };
  const int longest = batch.lengths[1] > batch.lengths[0] ? 1 : 0;  // which is read first
  std::vector<int64_t> ids(20, 6);
  const auto unknown_ids = [&](pymtl_field& f) { f.strings = nullptr, f.ids = ids.data(); };
  has(text(with(0, unknown_ids), PYMTL_BAD_ARGUMENT),
      longest == 0 ? "got 6 at token 0 of sequence 0" : "got 6 at token 0 of sequence 1");
  has(text(with(0, [&](pymtl_field& f) { f.name = "letters"; }), PYMTL_BAD_ARGUMENT), "no input 'letters'");
  has(text(with(0, [&](pymtl_field& f) { f.strings = nullptr, f.ids = nullptr; }), PYMTL_BAD_ARGUMENT), "got neither");
  const std::vector<const char*> none(20, nullptr);
  const std::vector<const char*> bad(20, "\xff");
  has(text(with(0, [&](pymtl_field& f) { f.strings = none.data(), f.ids = nullptr; }), PYMTL_BAD_ARGUMENT), "got NULL");
  const auto broken = [&](pymtl_field& f) { f.strings = bad.data(), f.ids = nullptr; };
  has(text(with(1, broken), PYMTL_BAD_ARGUMENT), "expected UTF-8");
  has(text(with(2, [&](pymtl_field& f) { f.width = 2; }), PYMTL_BAD_ARGUMENT), "expected 1 numbers a token, got 2");
  has(text(with(2, [&](pymtl_field& f) { f.numbers = nullptr; }), PYMTL_BAD_ARGUMENT), "got none");
  has(text(pymtl_run(sample.session, 2, batch.lengths.data(), 1, batch.fields.data(), nullptr), PYMTL_BAD_ARGUMENT),
      "expected one of the batch, got none");
  has(text(pymtl_run(sample.session, 0, batch.lengths.data(), 3, batch.fields.data(), nullptr), PYMTL_BAD_ARGUMENT),
      "at least one sequence");
  has(text(with(1, [&](pymtl_field& f) { f = batch.fields[0]; }), PYMTL_BAD_ARGUMENT), "expected each once");
  has(text(with(2, [&](pymtl_field& f) { f.ids = ids.data(); }), PYMTL_BAD_ARGUMENT), "got more than one of them");
  const pymtl_request no_tasks{sizeof no_tasks, nullptr, 7, 0, 0};
  has(text(batch.run(sample.session, &no_tasks), PYMTL_BAD_ARGUMENT), "0 without tasks, got 7");
  const int64_t empty[] = {1, 0}, huge[] = {int64_t{1} << 40, 1};
  has(text(pymtl_run(sample.session, 2, empty, 3, batch.fields.data(), nullptr), PYMTL_BAD_ARGUMENT),
      "got 0 of sequence 1");
  has(text(pymtl_run(sample.session, 2, huge, 3, batch.fields.data(), nullptr), PYMTL_BAD_ARGUMENT), "sequence 0");
  pymtl_answer answer;
  text(pymtl_get_answer(sample.session, 0, &answer), PYMTL_BAD_ARGUMENT);  // after a batch that failed
  CHECK(batch.run(sample.session) == PYMTL_OK);
  CHECK(pymtl_get_answer(sample.session, 0, &answer) == PYMTL_OK);
  for (const int64_t task : {int64_t{-1}, int64_t{10}, std::numeric_limits<int64_t>::min()}) {
    CHECK(batch.run(sample.session) == PYMTL_OK);
    const std::string error = text(pymtl_get_answer(sample.session, task, &answer), PYMTL_BAD_ARGUMENT);
    has(error, ("from 0 to 9, got " + std::to_string(task)).c_str());
    const pymtl_request request{sizeof request, &task, 1, 0, 0};
    text(batch.run(sample.session, &request), PYMTL_BAD_ARGUMENT);
    text(pymtl_get_answer(sample.session, 0, &answer), PYMTL_BAD_ARGUMENT);  // nor are there older answers
  }
  CHECK(std::string(pymtl_input_name(sample.model, 0, 5)) == "n\xc3\xa9");
  CHECK(pymtl_input_name(sample.model, 0, 6) == nullptr && pymtl_input_name(sample.model, 2, 0) == nullptr);
  text(pymtl_run(nullptr, 2, batch.lengths.data(), 3, batch.fields.data(), nullptr), PYMTL_BAD_ARGUMENT);
  text(pymtl_run(sample.session, 2, nullptr, 3, batch.fields.data(), nullptr), PYMTL_BAD_ARGUMENT);
  text(pymtl_run(sample.session, 2, batch.lengths.data(), 3, nullptr, nullptr), PYMTL_BAD_ARGUMENT);
  pymtl_model* model = nullptr;
  has(text(pymtl_model_load("/nowhere/at.all", nullptr, &model), PYMTL_BAD_FILE), "/nowhere/at.all: No such file");
  has(text(pymtl_model_load("/tmp", nullptr, &model), PYMTL_BAD_FILE), "/tmp: ");
  text(pymtl_model_load(nullptr, nullptr, &model), PYMTL_BAD_ARGUMENT);
  const pymtl_options options{sizeof options, -1, 0};
  text(pymtl_model_load(sample.file.path(), &options, &model), PYMTL_BAD_ARGUMENT);
  // Of a limit that the weights take, and of one that they leave room in.
  const pymtl_options none_left{sizeof none_left, 1, 64}, small{sizeof small, 1, size_t{1} << 20};
  has(text(pymtl_model_load(sample.file.path(), &none_left, &model), PYMTL_NO_MEMORY), "more than the limit of memory");
  CHECK(pymtl_model_load(sample.file.path(), &small, &model) == PYMTL_OK, pymtl_error());
  pymtl_session* session;
  CHECK(pymtl_session_new(model, &session) == PYMTL_OK);
  CHECK(batch.run(session) == PYMTL_OK, pymtl_error());
  const int64_t enormous = std::numeric_limits<int32_t>::max();  // which no order of tokens is made of
  has(text(pymtl_run(session, 1, &enormous, 0, nullptr, nullptr), PYMTL_NO_MEMORY), "got one of 2147483647 tokens");
  const SampleBatch large(model, 400, 100, random);
  has(text(large.run(session), PYMTL_NO_MEMORY), "the limit of memory");
  text(pymtl_get_answer(session, 0, &answer), PYMTL_BAD_ARGUMENT);
  CHECK(batch.run(session) == PYMTL_OK, pymtl_error());
  pymtl_session_free(session);
  pymtl_model_free(model);
  pymtl_session_free(nullptr);
  pymtl_model_free(nullptr);
  CHECK(model != nullptr && pymtl_find_task(nullptr, "x") == -1 && pymtl_find_task(sample.model, "x") == -1);
  CHECK(std::string(pymtl_model_description(sample.model)) == "a sample");
}

// Each program is refused, with a message that names the place.
void bad_programs() {
  Random random(5);
  const std::string good = sample_bytes(SampleWeights::floats, true, true, random);
  const struct {
    const char* from;
    const char* to;
    const char* says;
  } cases[] = {
      {R"(\"version\":1)", R"(\"version\":2)", "newer pymtl, in version 2"},
      {R"(\"op\":\"softmax\")", R"(\"op\":\"sofmax\")", "got \"sofmax\""},
      {R"(\"table\":\"words\")", R"(\"table\":\"wards\")", "instructions[0]: there is no tensor \"wards\""},
      {R"(\"table\":\"words\")", R"(\"table\":\"l1\")", "instructions[0]: table: expected 6 rows or more, got 4"},
      {R"(\"output\":\"x\")", R"(\"output\":\"w\")", "there is a buffer \"w\" already"},
      {R"(\"inputs\":[\"h\"],\"output\":\"tokens\")", R"(\"inputs\":[\"q\"],\"output\":\"tokens\")",
       "no buffer \"q\" before"},
      {R"(\"inputs\":[\"h\"],\"output\":\"tokens\")", R"(\"inputs\":[\"x\"],\"output\":\"tokens\")",
       "expected F32 [any, 10], got F32 [4, 8]"},
      {R"(\"hidden_size\":4)", R"(\"hidden_size\":5)", "recurrences[0]: tensor"},
      {R"(\"mode\":\"LSTM\")", R"(\"mode\":\"LSTN\")", "mode: expected LSTM, GRU"},
      {R"(\"parts\":2)", R"(\"parts\":3)", "parts: expected a divisor of 8"},
      {R"(\"parts\":2)", R"(\"parts\":2.5)", "parts: expected a whole number"},
      {R"(\"groups\":2)", R"(\"groups\":0)", "groups: expected a whole number from 1"},
      {R"(\"kind\":\"tanh\")", R"(\"kind\":\"relu\")", "expected tanh or sigmoid"},
      {R"(\"inputs\":[\"ce\"],\"output\":\"cet\")", R"(\"inputs\":[\"x\"],\"output\":\"cet\")",
       "expected rows of sequences"},
      {R"(\"count\":12})", R"(\"count\":13})", "count: expected a whole number from 1 to 12"},
      {R"(\"decoder\":\"crf\",\"start\":\"bias4\")", R"(\"decoder\":\"crf\",\"start\":\"bias8\")",
       "task \"crf\": tensor"},
      {R"(\"logits\":\"values\",\"decoder\":\"numbers\")", R"(\"logits\":\"values\",\"decoder\":\"ctc\")",
       "task \"values\": decoder"},
      {R"(\"std\":[1,2,1,1])", R"(\"std\":[1,2,1])", "mean and std: expected 4"},
      {R"(\"name\":\"many\")", R"(\"name\":\"class\")", "different names"},
      {R"(\"names\":[\"<pad>\",\"<unk>\",\"a\",\"b\")", R"(\"names\":[\"<pad>\",\"<unk>\",\"a\",\"a\")",
       "got \"a\" twice"},
      {R"(\"kind\":\"numbers\",\"size\":1)", R"(\"kind\":\"numbers\",\"size\":0)", "inputs[2]: size"},
      {R"(\"widths\":[1,3])", R"(\"widths\":[1,2])", "odd numbers"},
      {R"(\"labels\":[\"A\",\"B\",\"C\",\"D\"])", R"(\"labels\":[\"A\",\"B\",\"C\"])", "labels: expected 4, got 3"},
      {R"(\"zoneout_h\":0.1)", R"(\"zoneout_h\":1.1)", "zoneout_h: expected a number from 0 to 1"},
      {R"(\"state\":\"last\")", R"(\"state\":\"ex\")", "task \"written\": state: expected rows of sequences"},
      {R"(\"state\":\"last\")", R"(\"state\":\"class\")",
       "state: expected 8 columns, as the recurrences have states, got 4"},
      {R"(\"keys\":\"tokens\")", R"(\"keys\":\"class\")", "memories: expected rows of tokens"},
      {R"(\"keys\":\"tokens\")", R"(\"keys\":\"ex\")", "expected queries and keys of one width, got 4 and 8"},
      {R"(\"keys\":\"tokens\")", R"(\"locks\":\"tokens\")", "nothing to attend to that is called \"keys\""},
      {R"(\"heads\":2)", R"(\"heads\":3)", "heads: expected a divisor of 4 and 8 columns, got 3"},
      {R"(\"inputs\":[\"da\"],\"output\":\"said\",\"weight\":\"said\")",
       R"(\"inputs\":[\"d\"],\"output\":\"said\",\"weight\":\"l1\")", "expected F32 [any, 4], got F32 [4, 8]"},
      {R"(\"logits\":\"said\")", R"(\"logits\":\"a\")", "logits: expected rows of 5 columns"},
      {R"(\"count\":5)", R"(\"count\":6)", "task \"written\": instructions[0]: table: expected 6 rows or more, got 5"},
      {R"(\"max_length\":4)", R"(\"max_length\":0)", "max_length: expected a whole number from 1"},
      {R"(\"never\":[1])", R"(\"never\":[0])", "never: expected a whole number from 1 to 4"},
      {R"(\"sources\":\"copied/sources\")", R"(\"sources\":\"said/sources\")",
       "task \"copied\": inputs: there is no input \"said/sources\" of such a kind"},
      {R"(\"sources\":\"copied/sources\")", R"(\"sources\":\"signal\")",
       "task \"copied\": inputs: there is no input \"signal\" of such a kind"},
      {R"(\"gate\":\"switch\")", R"(\"gate\":\"known\")", "gate: expected rows of one column, got 5"},
      {R"(\"gate\":\"switch\")", R"(\"gates\":\"switch\")", "task \"copied\": gate: expected a value, got none"},
      {R"(\"sources\":\"copied/sources\")", R"(\"sources\":\"words\")",
       "task \"copied\": sources: expected an input that nothing else reads, got \"words\""},
      {R"(\"gate\":\"switch\",\"unknown\":1)", R"(\"gate\":\"switch\",\"unknown\":5)",
       "unknown: expected a whole number from 0 to 4"},
      {R"({\"op\":\"attend\",\"inputs\":[\"d\",\"keys\",\"values\"],\"output\":\"a\",\"heads\":2})",
       R"({\"op\":\"concatenate\",\"inputs\":[\"d\",\"d\"],\"output\":\"a\"})",
       "copy: expected an instruction that attends"},
      {R"("dtype":"F32")", R"("dtype":"F64")", "got \"F64\""},
      {R"("shape":[6,5])", R"("shape":[6,6])", "data_offsets: expected 144 bytes, got 120"},
      {R"("shape":[6,5])", R"("shape":[999999999,9999999])", "shape: too large"},
      {R"("pymtl":)", R"("pymtk":)", "expected a file that pymtl.export has written"},
  };
  for (const auto& each : cases) {
    const Context context(each.from, " -> ", each.to);
    const TemporaryFile file(changed(good, each.from, each.to));
    pymtl_model* model = nullptr;
    CHECK(pymtl_model_load(file.path(), nullptr, &model) == PYMTL_BAD_FILE);
    CHECK(std::string(pymtl_error()).find(each.says) != std::string::npos, pymtl_error(), each.says);
    pymtl_model_free(model);
  }
}

}  // namespace
}  // namespace pymtl::test

// Counted. Not inlined, or the compiler takes free for the wrong counterpart of new.
__attribute__((noinline)) void* operator new(size_t size) {
  ++pymtl::test::allocations;
  if (void* const memory = std::malloc(size)) return memory;
  throw std::bad_alloc();
}
__attribute__((noinline)) void operator delete(void* memory) noexcept { std::free(memory); }
__attribute__((noinline)) void operator delete(void* memory, size_t) noexcept { std::free(memory); }

int main() {
  using namespace pymtl::test;
  return run_tests({{"JSON", json},
                    {"batches", batches},
                    {"answers", answers},
                    {"generated", generated},
                    {"generated oddly", generated_oddly},
                    {"memory", memory},
                    {"streams", streams},
                    {"refusals", refusals},
                    {"bad programs", bad_programs}});
}
