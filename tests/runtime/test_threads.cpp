// One model for many threads at once, for as many seconds as the environment variable PYMTL_SECONDS says; to be run
// under the thread sanitizer too.
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <thread>

#include "sample.h"

namespace pymtl::test {
namespace {

void shared_model() {
  const char* const given = std::getenv("PYMTL_SECONDS");
  const std::chrono::duration<double> time(given == nullptr ? 1.0 : std::atof(given));
  Random random(1);
  const TemporaryFile file(sample_bytes(SampleWeights::floats, false, false, random));
  const pymtl_options options{sizeof options, 3, 0};
  pymtl_model* model = nullptr;
  CHECK(pymtl_model_load(file.path(), &options, &model) == PYMTL_OK, pymtl_error());
  const auto until = std::chrono::steady_clock::now() + time;
  std::atomic<int64_t> calls{0}, wrong{0};
  std::vector<std::thread> threads;
  std::vector<SampleBatch> batches;
  for (uint64_t number = 0; number < 8; ++number) {
    Random own(number);
    batches.emplace_back(model, number >= 6 ? 1 : 6, 40, own);
  }
  for (uint64_t number = 0; number < 8; ++number) {
    threads.emplace_back([&, number] {
      double expected = 0.0;
      for (int64_t i = 0; std::chrono::steady_clock::now() < until || i < 2; ++i) {
        pymtl_session* session = nullptr;
        const bool streams = number >= 6;
        if ((streams ? pymtl_stream_new : pymtl_session_new)(model, &session) != PYMTL_OK) ++wrong;
        const SampleBatch& batch = batches[number];
        const pymtl_request request{sizeof request, nullptr, 0, 1, 0};
        if (batch.run(session, &request) != PYMTL_OK) ++wrong;
        if (pymtl_run(session, 0, batch.lengths.data(), 3, batch.fields.data(), nullptr) == PYMTL_OK) ++wrong;
        if (std::string(pymtl_error()).find("at least one sequence") == std::string::npos) ++wrong;
        if (batch.run(session, &request) != PYMTL_OK) ++wrong;
        float sum = 0.0f;
        const float* logits;
        int64_t rows, columns;
        if (pymtl_get_logits(session, 0, &logits, &rows, &columns) != PYMTL_OK) ++wrong;
        for (int64_t n = 0; n < rows * columns; ++n) sum += logits[n];
        pymtl_answer written;
        if (!streams) {
          if (pymtl_get_answer(session, 8, &written) != PYMTL_OK) ++wrong;
          for (size_t n = 0; n < batch.lengths.size(); ++n) sum += static_cast<float>(written.probability[n]);
        }
        if (i == 0) expected = sum;
        if (sum != expected) ++wrong;
        pymtl_session_free(session);
        ++calls;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::printf("         %lld calls\n", static_cast<long long>(calls.load()));
  CHECK(wrong == 0, wrong.load());
  pymtl_model_free(model);
}

}  // namespace
}  // namespace pymtl::test

int main() {
  using namespace pymtl::test;
  return run_tests({{"eight threads", shared_model}});
}
