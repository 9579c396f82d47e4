// The instructions of a program, and what they are made from.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "file.h"
#include "frame.h"
#include "json.h"

namespace pymtl::runtime {

// What a program reads of a token.
struct Input {
  enum class Kind { ids, characters, numbers };

  std::string name;
  Kind kind;
  int64_t count;         // of ids and characters: they are below it; of numbers: how many there are
  int64_t buffer;        // of numbers, where they are; of others -1
  bool is_read = false;  // of ids and characters, whether an instruction reads them, or a task that copies
};

struct Buffer {
  std::string name;
  Space space;
  int64_t width;  // F
};

class Instruction {
 public:
  virtual ~Instruction() = default;

  // Computes the outputs from the inputs. Throws std::bad_alloc or Error (Fault::memory) alone.
  virtual void run(Frame& frame) const = 0;

  std::vector<int64_t> reads;   // buffers
  std::vector<int64_t> writes;  // the same
  bool in_one_pass = true;      // whether what is written of a token depends on no later token
};

// What instructions are made from: the file's tensors, and the buffers that are defined so far.
class Loader {
 public:
  static constexpr int64_t kWidest = 1 << 20;  // of a buffer

  // left: bytes that the model may still take besides its file, of all its routines together.
  Loader(const File& file, size_t& left) : file(file), left_(left) {}

  void add_input(const Json& description);

  // The buffer or the input that is called so; throws Error (Fault::file) if there is none.
  int64_t buffer(const std::string& name) const;
  int64_t input(const std::string& name, Input::Kind kind);  // which is read then

  // What is attended to and called so; throws Error (Fault::file) if there is nothing.
  int64_t memory(const std::string& name) const;

  // The only buffer among an instruction's inputs.
  int64_t only_input(const Json& json) const;

  // A new buffer for an instruction's output.
  int64_t define(const std::string& name, Space space, int64_t width);

  const float* floats(const std::string& name, const std::vector<int64_t>& shape) const {
    return static_cast<const float*>(file.tensor(name, DType::f32, shape).data);
  }

  // Counts memory that the model takes besides its file. Throws Error (Fault::memory): it is more than the limit.
  void take(int64_t numbers);

  const File& file;
  std::vector<Buffer> buffers;
  std::vector<Input> inputs;
  std::vector<Buffer> memories;  // of another routine, which an instruction attends to
  int64_t state_size = 0;        // numbers that recurrences keep of one sequence
  bool attends = false;          // whether there is an instruction that attends
  bool has_characters = false;   // whether the program reads the characters of distinct words, as sequences
  bool has_spelling = false;     // whether it reads those of each token

 private:
  std::map<std::string, int64_t> names_;
  size_t& left_;
};

using InstructionPtr = std::unique_ptr<Instruction>;

// The instruction that a description means. Throws Error (Fault::file): it does not fit.
InstructionPtr make_instruction(const Json& json, Loader& loader);

// One by one, for make_instruction.
InstructionPtr make_activation(const Json& json, Loader& loader);
InstructionPtr make_attend(const Json& json, Loader& loader);
InstructionPtr make_attention_pool(const Json& json, Loader& loader);
InstructionPtr make_character_cnn(const Json& json, Loader& loader);
InstructionPtr make_concatenate(const Json& json, Loader& loader);
InstructionPtr make_gather(const Json& json, Loader& loader);
InstructionPtr make_layer_norm(const Json& json, Loader& loader);
InstructionPtr make_linear(const Json& json, Loader& loader);
InstructionPtr make_mix(const Json& json, Loader& loader);
InstructionPtr make_multiply(const Json& json, Loader& loader);
InstructionPtr make_pool(const Json& json, Loader& loader);
InstructionPtr make_recurrent(const Json& json, Loader& loader);
InstructionPtr make_softmax(const Json& json, Loader& loader);
InstructionPtr make_spread(const Json& json, Loader& loader);

}  // namespace pymtl::runtime
