// Files with damaged bytes and programs, and calls with wrong numbers: each is an error or an answer, never a crash. As
// many as the environment variable PYMTL_HOSTILE says; to be run under the sanitizers.
#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "sample.h"

namespace pymtl::test {
namespace {

int64_t count() {
  const char* const given = std::getenv("PYMTL_HOSTILE");
  return given == nullptr ? 3000 : std::atoll(given);
}

std::string damaged(const std::string& good, Random& random) {
  std::string bytes = good;
  uint64_t length;
  std::memcpy(&length, bytes.data(), sizeof length);
  const auto somewhere = [&](size_t end) { return static_cast<size_t>(random.below(static_cast<int64_t>(end))); };
  static const char* const kNumbers[] = {"0",       "-1",         "1",
                                         "2",       "3",          "7",
                                         "1e18",    "4294967296", "9007199254740993",
                                         "1048576", "0.5",        "-9223372036854775808",
                                         "1e400",   "null",       "true",
                                         "[]",      "{}"};
  const int64_t times = 1 + random.below(12) / 9;
  for (int64_t i = 0; i < times; ++i) {
    const size_t header = sizeof length + std::min<uint64_t>(length, bytes.size() - sizeof length);
    switch (random.below(16)) {
      case 0:  // a byte of the header
        bytes[somewhere(header)] = static_cast<char>(random.below(256));
        break;
      case 1:  // numbers of a tensor
        bytes[somewhere(bytes.size())] = static_cast<char>(random.below(256));
        break;
      case 2:  // cut off
        bytes.resize(somewhere(bytes.size()) + 1);
        if (bytes.size() < 16) return bytes;
        break;
      case 3: {  // a bit
        char& byte = bytes[somewhere(header)];
        byte = static_cast<char>(byte ^ (1 << random.below(8)));
        break;
      }
      case 4: {  // a piece of the header in another's place
        const size_t from = somewhere(header), to = somewhere(header);
        const size_t size = std::min({somewhere(40) + 1, header - from, header - to});
        std::memmove(bytes.data() + to, bytes.data() + from, size);
        break;
      }
      default: {  // another number, or another name, in one's place
        const bool number = random.flip();
        size_t first = 8 + somewhere(header - 8);
        const auto fits = [&](char c) {
          return number ? (c >= '0' && c <= '9') : ((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_');
        };
        while (first < header && !fits(bytes[first])) ++first;
        size_t last = first;
        while (last < header && fits(bytes[last])) ++last;
        std::string other = kNumbers[random.below(17)];
        if (!number) {
          size_t word = 8 + somewhere(header - 8);
          while (word < header && !fits(bytes[word])) ++word;
          size_t end = word;
          while (end < header && fits(bytes[end])) ++end;
          other = bytes.substr(word, end - word);
        }
        bytes.replace(first, last - first, other);
        length += other.size() - (last - first);
        // Numbers stay at multiples of their size, or all files would end there.
        const size_t shift = (8 - (sizeof length + length) % 8) % 8;
        if (sizeof length + length <= bytes.size()) {
          bytes.insert(sizeof length + length, shift, ' ');
          length += shift;
        }
        std::memcpy(bytes.data(), &length, sizeof length);
      }
    }
    std::memcpy(&length, bytes.data(), sizeof length);
  }
  return bytes;
}

void files() {
  Random random(static_cast<uint64_t>(count()));
  int64_t loaded = 0, ran = 0;
  for (int64_t i = 0; i < count(); ++i) {
    const Context context("file ", i);
    const SampleWeights weights = static_cast<SampleWeights>(random.below(3));
    const TemporaryFile file(damaged(sample_bytes(weights, random.flip(), random.flip(), random), random));
    const pymtl_options options{sizeof options, 1, size_t{1} << 26};
    pymtl_model* model = nullptr;
    const pymtl_status status = pymtl_model_load(file.path(), &options, &model);
    CHECK((status == PYMTL_OK) == (model != nullptr));
    CHECK(status == PYMTL_OK || status == PYMTL_BAD_FILE || status == PYMTL_NO_MEMORY, status, pymtl_error());
    if (model == nullptr) continue;
    ++loaded;
    const bool streams = random.below(4) == 0;
    pymtl_session* session = nullptr;
    if ((streams ? pymtl_stream_new(model, &session) : pymtl_session_new(model, &session)) == PYMTL_OK) {
      const SampleBatch batch(model, streams ? 1 : 1 + random.below(4), 6, random);
      const pymtl_request request{sizeof request, nullptr, 0, 1, 0};
      if (batch.run(session, &request) == PYMTL_OK) {
        ++ran;
        read_everything(model, session, batch.lengths.size());
      }
    }
    pymtl_session_free(session);
    pymtl_model_free(model);
  }
  std::printf("         %lld files, of which %lld were loaded and %lld answered\n", static_cast<long long>(count()),
              static_cast<long long>(loaded), static_cast<long long>(ran));
  CHECK(ran > count() / 50 && loaded < count());
}

void calls() {
  Random random(static_cast<uint64_t>(count()) + 1);
  const TemporaryFile file(sample_bytes(SampleWeights::floats, false, false, random));
  const pymtl_options options{sizeof options, 2, 0};
  pymtl_model* model = nullptr;
  CHECK(pymtl_model_load(file.path(), &options, &model) == PYMTL_OK);
  pymtl_session *session = nullptr, *stream = nullptr;
  CHECK(pymtl_session_new(model, &session) == PYMTL_OK);
  CHECK(pymtl_stream_new(model, &stream) == PYMTL_OK);
  int64_t failed = 0, made = 0;
  for (int64_t i = 0; i < count(); ++i) {
    const Context context("call ", i);
    SampleBatch batch(model, 1 + random.below(5), 9, random);
    const auto wild = [&]() -> int64_t {
      static const int64_t kWild[] = {-1,        0,        1, 2, 3, 7, 8, 100, int64_t{1} << 31, int64_t{1} << 62,
                                      INT64_MIN, INT64_MAX};
      return kWild[random.below(12)];
    };
    // Less than there is may be read, never more: what a pointer leads to is the caller's to know.
    int64_t sequences = static_cast<int64_t>(batch.lengths.size());
    if (random.below(4) == 0) sequences = std::min(wild(), sequences);
    const bool none = random.below(8) == 0;
    if (random.below(4) == 0) {
      int64_t& length = batch.lengths[static_cast<size_t>(random.below(static_cast<int64_t>(batch.lengths.size())))];
      const int64_t other = wild();
      if (other < length || other >= (int64_t{1} << 31)) length = other;
    }
    if (random.below(4) == 0) {
      pymtl_field& field = batch.fields[static_cast<size_t>(random.below(4))];
      switch (random.below(5)) {
        case 0:
          field.name = random.flip() ? nullptr : "nothing";
          break;
        case 1:
          field.strings = nullptr;
          field.ids = nullptr;
          break;
        case 2:
          field.numbers = nullptr;
          break;
        case 3:
          if (field.strings != nullptr || field.numbers != nullptr) field.width = wild();
          break;
        default:
          field.name = batch.fields[0].name;
      }
    }
    int64_t tasks[2] = {random.below(10), random.flip() ? random.below(10) : wild()};
    pymtl_request request{random.below(8) == 0 ? static_cast<size_t>(wild()) : sizeof request,
                          random.flip() ? tasks : nullptr, random.below(3), static_cast<int32_t>(random.below(2)),
                          static_cast<int32_t>(random.below(2))};
    if (request.size > sizeof request) request.size = random.flip() ? size_t{1} << 40 : 0;
    pymtl_session* const own = random.below(3) == 0 ? stream : session;
    const pymtl_status status =
        pymtl_run(own, sequences, none ? nullptr : batch.lengths.data(), random.below(8) == 0 ? wild() % 5 : 4,
                  batch.fields.data(), random.flip() ? &request : nullptr);
    CHECK(status == PYMTL_OK || status == PYMTL_BAD_ARGUMENT || status == PYMTL_NO_MEMORY, status, pymtl_error());
    failed += status != PYMTL_OK;
    if (status == PYMTL_OK) read_everything(model, own, static_cast<size_t>(sequences));
    pymtl_answer answer;
    pymtl_input input;
    pymtl_task task;
    pymtl_get_answer(own, wild(), random.below(9) == 0 ? nullptr : &answer);
    pymtl_get_input(model, wild(), random.below(9) == 0 ? nullptr : &input);
    pymtl_get_task(model, wild(), random.below(9) == 0 ? nullptr : &task);
    pymtl_label(model, wild(), wild());
    if (random.below(9) == 0) pymtl_stream_reset(random.flip() ? stream : session);
    // Steps, of which most fit: so that there are some before that others go on from.
    for (int64_t steps = random.below(4); steps > 0; --steps) {
      std::vector<int64_t> read(static_cast<size_t>(1 + random.below(6))), from(read.size());
      const int64_t task = 8 + random.below(2);
      for (int64_t& id : read) id = random.below(40) == 0 ? wild() : random.below(task == 8 ? 5 : 9);
      for (int64_t& row : from) row = random.below(40) == 0 ? wild() : random.below(3);
      const bool first = random.flip(), both = random.below(20) == 0;
      const int64_t count = random.below(20) == 0 ? std::min<int64_t>(wild(), 1) : static_cast<int64_t>(read.size());
      pymtl_scores scores;
      const pymtl_status stepped =
          pymtl_step(own, random.below(9) == 0 ? wild() : task, count, random.below(20) == 0 ? nullptr : read.data(),
                     first && !both ? nullptr : from.data(), first || both ? from.data() : nullptr,
                     random.below(20) == 0 ? nullptr : &scores);
      CHECK(stepped == PYMTL_OK || stepped == PYMTL_BAD_ARGUMENT, stepped, pymtl_error());
      if (stepped != PYMTL_OK) continue;
      ++made;
      double sum = 0.0;
      for (int64_t i = 0; i < count * scores.columns; ++i) sum += scores.logits[i];
      for (int64_t i = 0; i < count * scores.steps; ++i) sum += scores.attention[i];
      CHECK(!std::isnan(sum));
    }
  }
  std::printf("         %lld calls, of which %lld were refused, and %lld steps\n", static_cast<long long>(count()),
              static_cast<long long>(failed), static_cast<long long>(made));
  CHECK(made > count() / 20);
  CHECK(failed > count() / 4 && failed < count());
  pymtl_session_free(session);
  pymtl_session_free(stream);
  pymtl_model_free(model);
}

}  // namespace
}  // namespace pymtl::test

int main() {
  using namespace pymtl::test;
  return run_tests({{"damaged files", files}, {"hostile calls", calls}});
}
