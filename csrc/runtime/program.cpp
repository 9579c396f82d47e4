#include "program.h"

#include <algorithm>
#include <limits>
#include <map>

#include "error.h"
#include "linear.h"
#include "recurrent.h"

namespace pymtl::runtime {
namespace {

constexpr size_t kMostInstructions = 100'000;
constexpr size_t kMostTasks = 4096;

}  // namespace

Program::Program(const std::string& path, const Executor& executor, size_t memory_limit) try
    : file_(path), loader_(file_, memory_limit) {
  const Json json = Json::parse(file_.metadata("pymtl"));
  const int64_t version = json.whole("version", 1, std::numeric_limits<int32_t>::max());
  check(version <= kVersion, Fault::file, "written by a newer pymtl, in version ", version,
        " of the format; this one reads version ", kVersion, ": upgrade it");
  read(json);
  for (const InstructionPtr& instruction : instructions_) {
    if (auto* const recurrent = dynamic_cast<Recurrent*>(instruction.get())) recurrent->prepare(executor);
    if (auto* const linear = dynamic_cast<Linear*>(instruction.get())) linear->prepare();
  }
} catch (const Error& error) {
  throw Error(error.fault(), path, ": ", error.what());
}

void Program::read(const Json& json) {
  read_inputs(json);
  const auto& instructions = json.array("instructions");
  check(instructions.size() <= kMostInstructions, Fault::file, "instructions: expected at most ", kMostInstructions);
  for (size_t i = 0; i < instructions.size(); ++i) {
    try {
      instructions_.push_back(make_instruction(instructions[i], loader_));
    } catch (const Error& error) {
      throw Error(error.fault(), "instructions[", i, "]: ", error.what());
    }
  }
  read_tasks(json);
  fuse();
  find_needs();
  plan();
  description_ = json.find("description") == nullptr ? "{}" : json.string("description");
}

void Program::read_inputs(const Json& json) {
  for (const Json& input : json.array("inputs")) {
    try {
      loader_.add_input(input);
      Names names;
      if (input.find("names") != nullptr) {
        check(loader_.inputs.back().kind != Input::Kind::numbers, Fault::file, "names: expected none of numbers");
        const int64_t count = loader_.inputs.back().count;
        const int64_t unknown = input.find("unknown") == nullptr ? -1 : input.whole("unknown", 0, count - 1);
        names.vocabulary = Vocabulary(input.strings("names"), unknown);
        check(names.vocabulary.size() <= count, Fault::file, "names: expected at most ", count, ", got ",
              names.vocabulary.size());
      }
      if (loader_.inputs.back().kind == Input::Kind::characters) {
        if (input.find("of") != nullptr) names.of = loader_.input(input.string("of"), Input::Kind::ids);
        names.max_length = input.whole("max_length", 1, 1 << 20);
      }
      names_.push_back(std::move(names));
    } catch (const Error& error) {
      throw Error(error.fault(), "inputs[", names_.size(), "]: ", error.what());
    }
  }
  check(!loader_.inputs.empty(), Fault::file, "inputs: expected at least one, got none");
}

void Program::read_tasks(const Json& json) {
  for (const Json& task : json.array("tasks")) {
    const std::string& name = task.string("name");
    check(tasks_.size() < kMostTasks, Fault::file, "tasks: expected at most ", kMostTasks);
    try {
      for (const Task& other : tasks_) check(other.name != name, Fault::file, "expected tasks of different names");
      const int64_t buffer = loader_.buffer(task.string("logits"));
      const Buffer& logits = loader_.buffers[buffer];
      check(logits.space != Space::characters, Fault::file, "logits: expected rows of tokens or sequences");
      Task found{name, buffer, logits.space, logits.width, Decoder(task, file_, logits.space, logits.width),
                 {},   {},     false};
      if (task.find("labels") != nullptr) {
        found.labels = task.strings("labels");
        const int64_t ids = found.decoder.ids();
        check(static_cast<int64_t>(found.labels.size()) == ids, Fault::file, "labels: expected ", ids, ", got ",
              found.labels.size());
      }
      tasks_.push_back(std::move(found));
    } catch (const Error& error) {
      throw Error(error.fault(), "task ", quoted(name), ": ", error.what());
    }
  }
  check(!tasks_.empty(), Fault::file, "tasks: expected at least one, got none");
  std::vector<bool> in_one_pass(loader_.buffers.size(), true);
  for (const InstructionPtr& instruction : instructions_) {
    bool own = instruction->in_one_pass;
    for (const int64_t read : instruction->reads) own = own && in_one_pass[read];
    for (const int64_t written : instruction->writes) in_one_pass[written] = own;
  }
  for (Task& task : tasks_) task.in_one_pass = in_one_pass[task.buffer];
}

void Program::fuse() {
  std::vector<std::vector<size_t>> readers(loader_.buffers.size());
  for (size_t i = 0; i < instructions_.size(); ++i) {
    for (const int64_t read : instructions_[i]->reads) readers[read].push_back(i);
  }
  std::vector<bool> is_answer(loader_.buffers.size(), false);
  for (const Task& task : tasks_) is_answer[task.buffer] = true;
  for (const InstructionPtr& instruction : instructions_) {
    auto* const recurrent = dynamic_cast<Recurrent*>(instruction.get());
    if (recurrent == nullptr || is_answer[recurrent->writes[0]]) continue;
    const std::vector<size_t>& own = readers[recurrent->writes[0]];
    const int64_t width = loader_.buffers[recurrent->writes[0]].width;
    int64_t heads = 0;
    for (const size_t reader : own) {
      const auto* const linear = dynamic_cast<const Linear*>(instructions_[reader].get());
      heads += linear == nullptr ? 0 : linear->width;
    }
    const auto fits = [&](size_t reader) { return recurrent->can_take(*instructions_[reader]); };
    if (own.empty() || heads > width || !std::all_of(own.begin(), own.end(), fits)) continue;
    for (const size_t reader : own) {
      recurrent->take(*instructions_[reader]);
      instructions_[reader].reset();
    }
  }
  std::erase(instructions_, nullptr);
}

void Program::find_needs() {
  for (Task& task : tasks_) {
    std::vector<bool> buffers(loader_.buffers.size(), false);
    buffers[task.buffer] = true;
    task.needs.assign(instructions_.size(), false);
    for (size_t i = instructions_.size(); i-- > 0;) {
      const Instruction& instruction = *instructions_[i];
      const auto needed = [&](int64_t buffer) { return buffers[buffer]; };
      if (std::none_of(instruction.writes.begin(), instruction.writes.end(), needed)) continue;
      task.needs[i] = true;
      for (const int64_t read : instruction.reads) buffers[read] = true;
    }
  }
}

void Program::plan() {
  const size_t count = loader_.buffers.size();
  constexpr size_t kEver = std::numeric_limits<size_t>::max();
  std::vector<size_t> last_use(count, 0);
  for (size_t i = 0; i < instructions_.size(); ++i) {
    for (const int64_t read : instructions_[i]->reads) last_use[read] = i;
  }
  for (const Task& task : tasks_) last_use[task.buffer] = kEver;
  slot_of_.assign(count, -1);
  std::vector<bool> in_use;
  const auto take = [&](int64_t buffer) {
    const Buffer& own = loader_.buffers[buffer];
    size_t slot = 0;
    while (slot < slots_.size() && (in_use[slot] || slots_[slot].space != own.space)) ++slot;
    if (slot == slots_.size()) {
      slots_.push_back({own.space, 0});
      in_use.push_back(false);
    }
    slots_[slot].width = std::max(slots_[slot].width, own.width);
    in_use[slot] = true;
    slot_of_[buffer] = static_cast<int64_t>(slot);
  };
  for (const Input& input : loader_.inputs) {
    if (input.buffer >= 0) take(input.buffer);
  }
  for (size_t i = 0; i < instructions_.size(); ++i) {
    for (const int64_t written : instructions_[i]->writes) take(written);
    const auto free = [&](const std::vector<int64_t>& buffers) {
      for (const int64_t buffer : buffers) {
        if (last_use[buffer] <= i) in_use[static_cast<size_t>(slot_of_[buffer])] = false;
      }
    };
    free(instructions_[i]->reads);
    free(instructions_[i]->writes);  // what nobody reads
  }
}

void Program::place_buffers(Frame& frame, size_t limit) const {
  // A place is a multiple of 64 bytes. Widths are at most kWidest, and so no product overflows before the limit.
  const auto size = [&](const Slot& slot) {
    return (static_cast<size_t>(frame.rows(slot.space)) * static_cast<size_t>(slot.width) * sizeof(float) + 63) / 64 *
           64;
  };
  size_t bytes = 0;
  for (const Slot& slot : slots_) {
    bytes += size(slot);
    check(bytes <= limit, Fault::memory, "expected a batch that fits into ", limit,
          " bytes, the limit of memory, got one of ", frame.tokens.count, " tokens: split it");
  }
  char* const memory = static_cast<char*>(frame.memory.of(bytes));
  frame.places.resize(slots_.size());
  size_t place = 0;
  for (size_t slot = 0; slot < slots_.size(); ++slot) {
    frame.places[slot] = reinterpret_cast<float*>(memory + place);
    place += size(slots_[slot]);
  }
  frame.buffers.assign(slot_of_.size(), nullptr);
  for (size_t buffer = 0; buffer < slot_of_.size(); ++buffer) {
    if (slot_of_[buffer] >= 0) frame.buffers[buffer] = frame.places[static_cast<size_t>(slot_of_[buffer])];
  }
}

void Program::run(Frame& frame, const std::vector<bool>& needed) const {
  for (size_t i = 0; i < instructions_.size(); ++i) {
    if (needed[i]) instructions_[i]->run(frame);
  }
}

}  // namespace pymtl::runtime
