#include "vocabulary.h"

#include "error.h"
#include "json.h"

namespace pymtl::runtime {

Vocabulary::Vocabulary(std::vector<std::string> names, int64_t unknown) : names_(std::move(names)), unknown_(unknown) {
  ids_.reserve(names_.size());
  for (const std::string& name : names_) {
    const bool is_new = ids_.emplace(name, static_cast<int64_t>(ids_.size())).second;
    check(is_new, Fault::file, "names: expected each once, got ", quoted(name), " twice");
  }
}

}  // namespace pymtl::runtime
