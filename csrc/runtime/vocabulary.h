// The ids of names.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace pymtl::runtime {

class Vocabulary {
 public:
  Vocabulary() = default;

  // Of names in the order of their ids; `unknown` is the id of all others, or -1: there are no others.
  // Throws Error (Fault::file) if a name comes twice.
  Vocabulary(std::vector<std::string> names, int64_t unknown);
  Vocabulary(Vocabulary&&) = default;
  Vocabulary& operator=(Vocabulary&&) = default;

  bool empty() const { return names_.empty(); }
  int64_t size() const { return static_cast<int64_t>(names_.size()); }
  const std::string& name(int64_t id) const { return names_[static_cast<size_t>(id)]; }

  // -1 if there is none.
  int64_t id(std::string_view name) const {
    const auto found = ids_.find(name);
    return found == ids_.end() ? unknown_ : found->second;
  }

 private:
  std::vector<std::string> names_;
  std::unordered_map<std::string_view, int64_t> ids_;  // of the names, which do not move
  int64_t unknown_ = -1;
};

}  // namespace pymtl::runtime
