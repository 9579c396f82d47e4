#include "instruction.h"

#include "error.h"

namespace pymtl::runtime {
namespace {

constexpr size_t kMostInputs = 1024;

struct Kind {
  const char* name;
  InstructionPtr (*make)(const Json& json, Loader& loader);
};
constexpr Kind kKinds[] = {{"activation", make_activation},
                           {"attend", make_attend},
                           {"attention_pool", make_attention_pool},
                           {"character_cnn", make_character_cnn},
                           {"concatenate", make_concatenate},
                           {"gather", make_gather},
                           {"layer_norm", make_layer_norm},
                           {"linear", make_linear},
                           {"mix", make_mix},
                           {"multiply", make_multiply},
                           {"pool", make_pool},
                           {"recurrent", make_recurrent},
                           {"softmax", make_softmax},
                           {"spread", make_spread}};

}  // namespace

InstructionPtr make_instruction(const Json& json, Loader& loader) {
  const std::string& op = json.string("op");
  for (const Kind& kind : kKinds) {
    if (op == kind.name) return kind.make(json, loader);
  }
  throw Error(Fault::file, "op: expected an instruction that this version knows, got ", quoted(op));
}

void Loader::add_input(const Json& json) {
  const std::string& name = json.string("name");
  const std::string& kind = json.string("kind");
  check(inputs.size() < kMostInputs, Fault::file, "expected at most ", kMostInputs);
  for (const Input& other : inputs) {
    check(other.name != name, Fault::file, "expected inputs of different names, got ", quoted(name), " twice");
  }
  if (kind == "numbers") {
    const int64_t size = json.whole("size", 1, kWidest);
    inputs.push_back({name, Input::Kind::numbers, size, define(name, Space::tokens, size)});
    return;
  }
  check(kind == "ids" || kind == "characters", Fault::file, "kind: expected ids, characters or numbers, got ",
        quoted(kind));
  const Input::Kind known = kind == "ids" ? Input::Kind::ids : Input::Kind::characters;
  for (const Input& other : inputs) {
    check(known == Input::Kind::ids || other.kind != known, Fault::file, "expected one input of characters, got two");
  }
  inputs.push_back({name, known, json.whole("count", 1, int64_t{1} << 31), -1});
}

void Loader::take(int64_t numbers) {
  const size_t bytes = static_cast<size_t>(numbers) * sizeof(float);
  check(bytes <= left_, Fault::memory, "the model takes more than the limit of memory: raise memory_limit");
  left_ -= bytes;
}

int64_t Loader::buffer(const std::string& name) const {
  const auto found = names_.find(name);
  check(found != names_.end(), Fault::file, "inputs: there is no buffer ", quoted(name), " before this instruction");
  return found->second;
}

int64_t Loader::input(const std::string& name, Input::Kind kind) {
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (inputs[i].name != name || inputs[i].kind != kind) continue;
    inputs[i].is_read = true;
    return static_cast<int64_t>(i);
  }
  throw Error(Fault::file, "inputs: there is no input ", quoted(name), " of such a kind");
}

int64_t Loader::memory(const std::string& name) const {
  for (size_t i = 0; i < memories.size(); ++i) {
    if (memories[i].name == name) return static_cast<int64_t>(i);
  }
  throw Error(Fault::file, "inputs: there is nothing to attend to that is called ", quoted(name));
}

int64_t Loader::only_input(const Json& json) const {
  const std::vector<std::string> names = json.strings("inputs");
  check(names.size() == 1, Fault::file, "inputs: expected one buffer, got ", names.size());
  return buffer(names[0]);
}

int64_t Loader::define(const std::string& name, Space space, int64_t width) {
  check(width >= 1 && width <= kWidest, Fault::file, "output ", quoted(name), ": expected from 1 to ", kWidest,
        " columns, got ", width);
  const bool is_new = names_.emplace(name, static_cast<int64_t>(buffers.size())).second;
  check(is_new, Fault::file, "output: there is a buffer ", quoted(name), " already");
  buffers.push_back({name, space, width});
  return static_cast<int64_t>(buffers.size()) - 1;
}

}  // namespace pymtl::runtime
