// What can go wrong with a file or a call, told by exceptions within the runtime; none leaves the C interface.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace pymtl::runtime {

enum class Fault {
  file,      // missing, damaged, or of a newer version
  argument,  // a call asks for what the model has not, or gives what does not fit
  memory     // more than the limit
};

class Error : public std::runtime_error {
 public:
  template <typename... Part>
  explicit Error(Fault fault, const Part&... parts) : std::runtime_error(joined(parts...)), fault_(fault) {}

  Fault fault() const { return fault_; }

 private:
  template <typename... Part>
  static std::string joined(const Part&... parts) {
    std::ostringstream text;
    (text << ... << parts);
    return text.str();
  }

  Fault fault_;
};

// Throws if the condition does not hold.
template <typename... Part>
void check(bool condition, Fault fault, const Part&... parts) {
  if (!condition) [[unlikely]] {
    throw Error(fault, parts...);
  }
}

}  // namespace pymtl::runtime
