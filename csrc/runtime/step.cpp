#include "step.h"

#include "error.h"

namespace pymtl::runtime {

Step::Step(const Json& json, Loader& program, size_t& left) : routine(program.file, left) {
  Loader& loader = routine.loader();
  width = json.whole("count", 1, Loader::kWidest);
  loader.inputs.push_back({"token", Input::Kind::ids, width, -1});
  state = program.buffer(json.string("state"));
  check(program.buffers[state].space == Space::sequences, Fault::file, "state: expected rows of sequences");
  for (const auto& [name, value] : json.at("memories").object("memories")) {
    const int64_t buffer = program.buffer(value.string_itself(name));
    check(program.buffers[buffer].space == Space::tokens, Fault::file, "memories: expected rows of tokens");
    memories.push_back(buffer);
    loader.memories.push_back({name, Space::tokens, program.buffers[buffer].width});
  }
  routine.read(json);
  const int64_t size = program.buffers[state].width;
  check(loader.state_size == size, Fault::file, "state: expected ", loader.state_size, " columns, as the recurrences ",
        "have states, got ", size);
  logits = loader.buffer(json.string("logits"));
  const Buffer& found = loader.buffers[logits];
  check(found.space == Space::tokens && found.width == width, Fault::file, "logits: expected rows of ", width,
        " columns, one for each token, got ", found.width);
  std::vector<int64_t> kept = {logits};
  if (const Json* const copy = json.find("copy")) {
    check(loader.attends, Fault::file, "copy: expected an instruction that attends, which says what is copied");
    // A batch may lack it, if the task is not asked for.
    const std::string& sources = copy->string("sources");
    for (const Input& input : program.inputs) {
      check(input.name != sources || !input.is_read, Fault::file,
            "sources: expected an input that nothing else reads, got ", quoted(sources));
    }
    copies = {program.input(sources, Input::Kind::ids), loader.buffer(copy->string("gate")),
              copy->whole("unknown", 0, width - 1)};
    const Buffer& gate = loader.buffers[copies->gate];
    check(gate.space == Space::tokens && gate.width == 1, Fault::file, "gate: expected rows of one column, got ",
          gate.width);
    kept.push_back(copies->gate);
  }
  routine.finish(kept);
  needs = routine.needs(kept);
}

std::vector<int64_t> Step::reads() const {
  std::vector<int64_t> found = memories;
  found.push_back(state);
  return found;
}

}  // namespace pymtl::runtime
