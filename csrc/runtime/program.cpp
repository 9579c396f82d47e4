#include "program.h"

#include <limits>

#include "error.h"

namespace pymtl::runtime {
namespace {

constexpr size_t kMostTasks = 4096;

}  // namespace

Program::Program(const std::string& path, const Executor& executor, size_t memory_limit) try
    : file_(path), left_(memory_limit), routine_(file_, left_) {
  const Json json = Json::parse(file_.metadata("pymtl"));
  const int64_t version = json.whole("version", 1, std::numeric_limits<int32_t>::max());
  check(version <= kVersion, Fault::file, "written by a newer pymtl, in version ", version,
        " of the format; this one reads version ", kVersion, ": upgrade it");
  read(json);
  routine_.prepare(executor);
  for (const Task& task : tasks_) {
    if (task.step != nullptr) task.step->routine.prepare(executor);
  }
} catch (const Error& error) {
  throw Error(error.fault(), path, ": ", error.what());
}

void Program::read(const Json& json) {
  read_inputs(json);
  routine_.read(json);
  read_tasks(json);
  std::vector<int64_t> kept;
  for (const Task& task : tasks_) kept.insert(kept.end(), task.reads.begin(), task.reads.end());
  routine_.finish(kept);
  for (Task& task : tasks_) {
    task.needs = routine_.needs(task.reads);
    // Generated answers follow from a sequence's last state, and so from all its tokens.
    task.in_one_pass = task.step == nullptr && routine_.in_one_pass(task.reads[0]);
  }
  description_ = json.find("description") == nullptr ? "{}" : json.string("description");
}

void Program::read_inputs(const Json& json) {
  Loader& loader = routine_.loader();
  for (const Json& input : json.array("inputs")) {
    try {
      loader.add_input(input);
      Names names;
      if (input.find("names") != nullptr) {
        check(loader.inputs.back().kind != Input::Kind::numbers, Fault::file, "names: expected none of numbers");
        const int64_t count = loader.inputs.back().count;
        const int64_t unknown = input.find("unknown") == nullptr ? -1 : input.whole("unknown", 0, count - 1);
        names.vocabulary = Vocabulary(input.strings("names"), unknown);
        check(names.vocabulary.size() <= count, Fault::file, "names: expected at most ", count, ", got ",
              names.vocabulary.size());
      }
      if (loader.inputs.back().kind == Input::Kind::characters) {
        if (input.find("of") != nullptr) names.of = loader.input(input.string("of"), Input::Kind::ids);
        names.max_length = input.whole("max_length", 1, 1 << 20);
      }
      names_.push_back(std::move(names));
    } catch (const Error& error) {
      throw Error(error.fault(), "inputs[", names_.size(), "]: ", error.what());
    }
  }
  check(!loader.inputs.empty(), Fault::file, "inputs: expected at least one, got none");
}

void Program::read_tasks(const Json& json) {
  for (const Json& task : json.array("tasks")) {
    const std::string& name = task.string("name");
    check(tasks_.size() < kMostTasks, Fault::file, "tasks: expected at most ", kMostTasks);
    try {
      for (const Task& other : tasks_) check(other.name != name, Fault::file, "expected tasks of different names");
      tasks_.push_back(read_task(task));
    } catch (const Error& error) {
      throw Error(error.fault(), "task ", quoted(name), ": ", error.what());
    }
  }
  check(!tasks_.empty(), Fault::file, "tasks: expected at least one, got none");
}

Task Program::read_task(const Json& json) {
  Task task{};
  task.name = json.string("name");
  if (Decoder::kind_of(json) == Decoder::Kind::generation) {
    task.step = std::make_unique<Step>(json.at("step"), routine_.loader(), left_);
    task.reads = task.step->reads();
    task.space = Space::sequences;
    task.width = task.step->width;
  } else {
    const int64_t buffer = routine_.loader().buffer(json.string("logits"));
    const Buffer& logits = routine_.loader().buffers[buffer];
    check(logits.space != Space::characters, Fault::file, "logits: expected rows of tokens or sequences");
    task.reads = {buffer};
    task.space = logits.space;
    task.width = logits.width;
  }
  task.decoder = Decoder(json, file_, task.space, task.width);
  if (json.find("labels") != nullptr) {
    task.labels = json.strings("labels");
    const int64_t ids = task.decoder.ids();
    check(static_cast<int64_t>(task.labels.size()) == ids, Fault::file, "labels: expected ", ids, ", got ",
          task.labels.size());
  }
  return task;
}

}  // namespace pymtl::runtime
