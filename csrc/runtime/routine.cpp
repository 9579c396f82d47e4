#include "routine.h"

#include <algorithm>
#include <limits>

#include "error.h"
#include "linear.h"
#include "recurrent.h"

namespace pymtl::runtime {
namespace {

constexpr size_t kMostInstructions = 100'000;

}  // namespace

void Routine::read(const Json& json) {
  const auto& instructions = json.array("instructions");
  check(instructions.size() <= kMostInstructions, Fault::file, "instructions: expected at most ", kMostInstructions);
  for (size_t i = 0; i < instructions.size(); ++i) {
    try {
      instructions_.push_back(make_instruction(instructions[i], loader_));
    } catch (const Error& error) {
      throw Error(error.fault(), "instructions[", i, "]: ", error.what());
    }
  }
}

void Routine::finish(const std::vector<int64_t>& kept) {
  in_one_pass_.assign(loader_.buffers.size(), true);
  for (const InstructionPtr& instruction : instructions_) {
    bool own = instruction->in_one_pass;
    for (const int64_t read : instruction->reads) own = own && in_one_pass_[read];
    for (const int64_t written : instruction->writes) in_one_pass_[written] = own;
  }
  std::vector<bool> is_kept(loader_.buffers.size(), false);
  for (const int64_t buffer : kept) is_kept[buffer] = true;
  fuse(is_kept);
  plan(kept);
}

void Routine::prepare(const Executor& executor) {
  for (const InstructionPtr& instruction : instructions_) {
    if (auto* const recurrent = dynamic_cast<Recurrent*>(instruction.get())) recurrent->prepare(executor);
    if (auto* const linear = dynamic_cast<Linear*>(instruction.get())) linear->prepare();
  }
}

std::vector<bool> Routine::needs(const std::vector<int64_t>& wanted) const {
  std::vector<bool> buffers(loader_.buffers.size(), false), found(instructions_.size(), false);
  for (const int64_t buffer : wanted) buffers[buffer] = true;
  for (size_t i = instructions_.size(); i-- > 0;) {
    const Instruction& instruction = *instructions_[i];
    const auto needed = [&](int64_t buffer) { return buffers[buffer]; };
    if (std::none_of(instruction.writes.begin(), instruction.writes.end(), needed)) continue;
    found[i] = true;
    for (const int64_t read : instruction.reads) buffers[read] = true;
  }
  return found;
}

void Routine::fuse(const std::vector<bool>& kept) {
  std::vector<std::vector<size_t>> readers(loader_.buffers.size());
  for (size_t i = 0; i < instructions_.size(); ++i) {
    for (const int64_t read : instructions_[i]->reads) readers[read].push_back(i);
  }
  for (const InstructionPtr& instruction : instructions_) {
    auto* const recurrent = dynamic_cast<Recurrent*>(instruction.get());
    if (recurrent == nullptr || kept[recurrent->writes[0]]) continue;
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

void Routine::plan(const std::vector<int64_t>& kept) {
  const size_t count = loader_.buffers.size();
  constexpr size_t kEver = std::numeric_limits<size_t>::max();
  std::vector<size_t> last_use(count, 0);
  for (size_t i = 0; i < instructions_.size(); ++i) {
    for (const int64_t read : instructions_[i]->reads) last_use[read] = i;
  }
  for (const int64_t buffer : kept) last_use[buffer] = kEver;
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

void Routine::place_buffers(Frame& frame, size_t limit) const {
  // A place is a multiple of 64 bytes. Widths are at most kWidest, and so no product overflows before the limit.
  const auto size = [&](const Slot& slot) {
    return (static_cast<size_t>(frame.rows(slot.space)) * static_cast<size_t>(slot.width) * sizeof(float) + 63) / 64 *
           64;
  };
  size_t bytes = 0;
  for (const Slot& slot : slots_) {
    bytes += size(slot);
    check(bytes <= limit, Fault::memory, "expected a batch that fits into ", limit,
          " bytes, the limit of memory, got one of ", frame.tokens.count, " tokens or hypotheses: split it");
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

void Routine::run(Frame& frame, const std::vector<bool>& needed) const {
  for (size_t i = 0; i < instructions_.size(); ++i) {
    if (needed[i]) instructions_[i]->run(frame);
  }
}

}  // namespace pymtl::runtime
