// The C interface: checks of what only a caller can get wrong, and no exception past it.
#include "pymtl.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <exception>
#include <new>
#include <string>
#include <vector>

#include "kernels/isa.h"
#include "kernels/pool.h"
#include "runtime/error.h"
#include "runtime/program.h"
#include "runtime/session.h"

using pymtl::runtime::check;
using pymtl::runtime::Decoder;
using pymtl::runtime::Error;
using pymtl::runtime::executor_of;
using pymtl::runtime::Fault;
using pymtl::runtime::Field;
using pymtl::runtime::Generation;
using pymtl::runtime::Input;
using pymtl::runtime::Program;
using pymtl::runtime::Session;
using pymtl::runtime::Task;

struct pymtl_model {
  int64_t threads;
  Program program;
  size_t memory_limit;
};

struct pymtl_session {
  Session session;
  // Of a call, kept for their memory.
  std::vector<Field> fields;
  std::vector<size_t> tasks;
};

namespace {

static_assert(static_cast<int>(Input::Kind::ids) == PYMTL_IDS &&
              static_cast<int>(Input::Kind::characters) == PYMTL_CHARACTERS &&
              static_cast<int>(Input::Kind::numbers) == PYMTL_NUMBERS);
static_assert(static_cast<int>(Decoder::Kind::none) == PYMTL_LOGITS &&
              static_cast<int>(Decoder::Kind::classes) == PYMTL_CLASSES &&
              static_cast<int>(Decoder::Kind::crf) == PYMTL_PATH && static_cast<int>(Decoder::Kind::ctc) == PYMTL_CTC &&
              static_cast<int>(Decoder::Kind::ordinal) == PYMTL_ORDINAL &&
              static_cast<int>(Decoder::Kind::labels) == PYMTL_LABELS &&
              static_cast<int>(Decoder::Kind::numbers) == PYMTL_VALUES &&
              static_cast<int>(Decoder::Kind::generation) == PYMTL_GENERATED);

// Behind what the structure of 1.0 ended with, padding too.
static_assert(offsetof(pymtl_request, by_steps) == 32);

constexpr size_t kMemoryLimit = size_t{4} << 30;
constexpr int64_t kMostThreads = 256;  // as many as the pool has
constexpr const char* kNoMemory = "there is no memory left";

thread_local std::string last_error;
thread_local const char* last_error_text = "";

pymtl_status failed(pymtl_status status, const char* text) noexcept {
  try {
    last_error = text;
    last_error_text = last_error.c_str();
  } catch (...) {
    last_error_text = kNoMemory;
  }
  return status;
}

template <typename Call>
pymtl_status guarded(Call&& call) noexcept {
  try {
    call();
    return PYMTL_OK;
  } catch (const Error& error) {
    return failed(error.fault() == Fault::file       ? PYMTL_BAD_FILE
                  : error.fault() == Fault::argument ? PYMTL_BAD_ARGUMENT
                                                     : PYMTL_NO_MEMORY,
                  error.what());
  } catch (const std::bad_alloc&) {
    return failed(PYMTL_NO_MEMORY, kNoMemory);
  } catch (const std::exception& error) {
    return failed(PYMTL_INTERNAL_ERROR, error.what());
  } catch (...) {
    return failed(PYMTL_INTERNAL_ERROR, "unknown");
  }
}

template <typename T>
void check_given(const T* pointer, const char* name) {
  check(pointer != nullptr, Fault::argument, name, ": expected a pointer, got NULL");
}

// A structure of the caller's, which may be shorter or longer than this version's.
template <typename T>
T versioned(const T* given, const char* name) {
  T own{};
  if (given != nullptr) {
    check(given->size >= sizeof(size_t) && given->size <= 4096, Fault::argument, name, ".size: expected sizeof(pymtl_",
          name, "), got ", given->size);
    std::memcpy(&own, given, std::min(given->size, sizeof own));
  }
  own.size = sizeof own;
  return own;
}

size_t number_of(const Program& program, int64_t task) {
  const size_t count = program.tasks().size();
  check(task >= 0 && task < static_cast<int64_t>(count), Fault::argument, "task: expected a number from 0 to ",
        count - 1, ", got ", task);
  return static_cast<size_t>(task);
}

const Task& task_of(const pymtl_model* model, int64_t task) {
  check_given(model, "model");
  return model->program.tasks()[number_of(model->program, task)];
}

size_t input_of(const Program& program, const char* name) {
  for (size_t i = 0; i < program.inputs().size(); ++i) {
    if (program.inputs()[i].name == name) return i;
  }
  std::string known;
  for (const Input& input : program.inputs()) known += (known.empty() ? "" : ", ") + input.name;
  throw Error(Fault::argument, "fields: the model has no input '", name, "', but ", known);
}

pymtl_status new_session(const pymtl_model* model, pymtl_session** session, bool keeps_state) {
  return guarded([&] {
    check_given(model, "model");
    check_given(session, "session");
    *session = nullptr;
    *session = new pymtl_session{Session(model->program, model->threads, model->memory_limit, keeps_state), {}, {}};
  });
}

void check_stream(const pymtl_session* stream) {
  check_given(stream, "stream");
  check(stream->session.keeps_state(), Fault::argument, "stream: expected a session of pymtl_stream_new");
}

}  // namespace

int32_t pymtl_abi_major(void) { return PYMTL_ABI_MAJOR; }
int32_t pymtl_abi_minor(void) { return PYMTL_ABI_MINOR; }

const char* pymtl_error(void) { return last_error_text; }

const char* pymtl_isa(void) {
  const char* name = nullptr;
  guarded([&] { name = pymtl::isa_name(pymtl::active_isa()); });
  return name;
}

pymtl_status pymtl_model_load(const char* path, const pymtl_options* given, pymtl_model** model) {
  return guarded([&] {
    check_given(path, "path");
    check_given(model, "model");
    *model = nullptr;
    const pymtl_options options = versioned(given, "options");
    check(options.threads >= 0 && options.threads <= kMostThreads, Fault::argument,
          "options.threads: expected a number from 0 to ", kMostThreads, ", got ", options.threads);
    const int64_t threads = options.threads == 0 ? std::min(pymtl::available_cores(), kMostThreads) : options.threads;
    const size_t limit = options.memory_limit == 0 ? kMemoryLimit : options.memory_limit;
    *model = new pymtl_model{threads, Program(path, executor_of(threads), limit), limit};
  });
}

void pymtl_model_free(pymtl_model* model) { delete model; }

const char* pymtl_model_description(const pymtl_model* model) {
  return model == nullptr ? "" : model->program.description().c_str();
}

int64_t pymtl_input_count(const pymtl_model* model) {
  return model == nullptr ? 0 : static_cast<int64_t>(model->program.inputs().size());
}

pymtl_status pymtl_get_input(const pymtl_model* model, int64_t index, pymtl_input* input) {
  return guarded([&] {
    check_given(model, "model");
    check_given(input, "input");
    check(index >= 0 && index < pymtl_input_count(model), Fault::argument, "index: expected a number from 0 to ",
          pymtl_input_count(model) - 1, ", got ", index);
    const size_t place = static_cast<size_t>(index);
    const Input& own = model->program.inputs()[place];
    *input = {own.name.c_str(), static_cast<pymtl_input_kind>(own.kind), own.count,
              !model->program.names(place).vocabulary.empty()};
  });
}

const char* pymtl_input_name(const pymtl_model* model, int64_t index, int64_t id) {
  if (index < 0 || index >= pymtl_input_count(model)) return nullptr;
  const auto& vocabulary = model->program.names(static_cast<size_t>(index)).vocabulary;
  return id < 0 || id >= vocabulary.size() ? nullptr : vocabulary.name(id).c_str();
}

int64_t pymtl_task_count(const pymtl_model* model) {
  return model == nullptr ? 0 : static_cast<int64_t>(model->program.tasks().size());
}

pymtl_status pymtl_get_task(const pymtl_model* model, int64_t index, pymtl_task* info) {
  return guarded([&] {
    const Task& task = task_of(model, index);
    check_given(info, "info");
    *info = {task.name.c_str(),
             static_cast<pymtl_answer_kind>(task.decoder.kind()),
             task.space == pymtl::runtime::Space::tokens,
             task.width,
             static_cast<int64_t>(task.labels.size()),
             task.in_one_pass};
  });
}

int64_t pymtl_find_task(const pymtl_model* model, const char* name) {
  for (int64_t task = 0; name != nullptr && task < pymtl_task_count(model); ++task) {
    if (model->program.tasks()[static_cast<size_t>(task)].name == name) return task;
  }
  return -1;
}

const char* pymtl_label(const pymtl_model* model, int64_t task, int64_t id) {
  if (task < 0 || task >= pymtl_task_count(model)) return nullptr;
  const auto& labels = model->program.tasks()[static_cast<size_t>(task)].labels;
  return id < 0 || id >= static_cast<int64_t>(labels.size()) ? nullptr : labels[static_cast<size_t>(id)].c_str();
}

pymtl_status pymtl_session_new(const pymtl_model* model, pymtl_session** session) {
  return new_session(model, session, false);
}

pymtl_status pymtl_stream_new(const pymtl_model* model, pymtl_session** stream) {
  return new_session(model, stream, true);
}

void pymtl_session_free(pymtl_session* session) { delete session; }

pymtl_status pymtl_stream_reset(pymtl_session* stream) {
  return guarded([&] {
    check_stream(stream);
    stream->session.reset();
  });
}

pymtl_status pymtl_stream_state(pymtl_session* stream, float** state, int64_t* count) {
  return guarded([&] {
    check_stream(stream);
    check_given(state, "state");
    check_given(count, "count");
    *state = stream->session.state().data();
    *count = static_cast<int64_t>(stream->session.state().size());
  });
}

pymtl_status pymtl_run(pymtl_session* session, int64_t batch, const int64_t* lengths, int64_t field_count,
                       const pymtl_field* fields, const pymtl_request* given) {
  return guarded([&] {
    check_given(session, "session");
    session->session.forget_answers();
    check_given(lengths, "lengths");
    check(fields != nullptr || field_count == 0, Fault::argument, "fields: expected a pointer, got NULL");
    const pymtl_request request = versioned(given, "request");
    const Program& program = session->session.program();
    check(field_count >= 0 && field_count <= static_cast<int64_t>(program.inputs().size()), Fault::argument,
          "field_count: expected from 0 to ", program.inputs().size(), ", got ", field_count);
    session->fields.clear();
    for (int64_t i = 0; i < field_count; ++i) {
      const pymtl_field& field = fields[i];
      check_given(field.name, "fields.name");
      check((field.strings != nullptr) + (field.ids != nullptr) + (field.numbers != nullptr) <= 1, Fault::argument,
            "fields: expected strings, ids or numbers of '", field.name, "', got more than one of them");
      session->fields.push_back({input_of(program, field.name), field.strings, field.ids, field.numbers, field.width});
    }
    session->tasks.clear();
    check(request.tasks == nullptr ? request.task_count == 0 : request.task_count >= 1, Fault::argument,
          "request.task_count: expected at least one of tasks, and 0 without tasks, got ", request.task_count);
    for (int64_t i = 0; i < request.task_count; ++i) {
      session->tasks.push_back(number_of(program, request.tasks[i]));
    }
    session->session.run(lengths, batch, session->fields, session->tasks, request.probabilities != 0,
                         request.by_steps != 0);
  });
}

pymtl_status pymtl_get_answer(const pymtl_session* session, int64_t task, pymtl_answer* answer) {
  return guarded([&] {
    check_given(session, "session");
    check_given(answer, "answer");
    const pymtl::runtime::Answer& own = session->session.answer(number_of(session->session.program(), task));
    const auto or_null = [](const auto& list) { return list.empty() ? nullptr : list.data(); };
    *answer = {own.ids.data(), own.starts.data(), or_null(own.numbers), own.probability.data(),
               or_null(own.probabilities)};
  });
}

pymtl_status pymtl_get_logits(const pymtl_session* session, int64_t task, const float** logits, int64_t* rows,
                              int64_t* columns) {
  return guarded([&] {
    check_given(session, "session");
    check_given(logits, "logits");
    check_given(rows, "rows");
    check_given(columns, "columns");
    const size_t number = number_of(session->session.program(), task);
    const std::vector<float>& own = session->session.logits(number);
    *logits = own.data();
    *columns = session->session.program().tasks()[number].width;
    *rows = static_cast<int64_t>(own.size()) / *columns;
  });
}

pymtl_status pymtl_step(pymtl_session* session, int64_t task, int64_t count, const int64_t* ids, const int64_t* parents,
                        const int64_t* sequences, pymtl_scores* scores) {
  return guarded([&] {
    check_given(session, "session");
    check_given(ids, "ids");
    check_given(scores, "scores");
    check((parents == nullptr) != (sequences == nullptr), Fault::argument,
          "parents and sequences: expected one of them, and NULL in the other's place");
    const size_t number = number_of(session->session.program(), task);
    Generation& generation = session->session.generation(number);
    generation.step(count, ids, parents, sequences);
    *scores = {generation.logits(), generation.attention(), generation.columns(), generation.steps()};
  });
}
