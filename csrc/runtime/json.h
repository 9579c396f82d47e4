// JSON (RFC 8259) as a model's file holds it: read strictly, and checked as its values are taken.
#pragma once

#include <cstddef>
#include <cstdint>
#include <ostream>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace pymtl::runtime {

class Json {
 public:
  using Array = std::vector<Json>;
  using Object = std::vector<std::pair<std::string, Json>>;  // in the order of the text

  // Throws Error (Fault::file): the text is no JSON, is nested deeper than 32 levels, has a key twice in an object, or
  // a string that is not UTF-8.
  static Json parse(std::string_view text);

  // An object's value under a key, which is checked to be of the type and within the limits. They throw Error
  // (Fault::file) that names the key.
  const Json& at(const char* key) const;
  const Json* find(const char* key) const;  // null if there is none, or null under it
  bool boolean(const char* key) const;
  int64_t whole(const char* key, int64_t least, int64_t most) const;
  double number(const char* key) const;  // finite
  const std::string& string(const char* key) const;
  const Array& array(const char* key) const;
  std::vector<std::string> strings(const char* key) const;

  // The value itself. `name` begins the message of the error.
  const Object& object(const std::string& name) const;
  bool boolean_itself(const std::string& name) const;
  const std::string& string_itself(const std::string& name) const;
  int64_t whole_itself(const std::string& name, int64_t least, int64_t most) const;
  double number_itself(const std::string& name) const;
  std::vector<std::string> strings_itself(const std::string& name) const;

 private:
  friend class JsonReader;

  template <typename T>
  const T& as(const std::string& name, const char* expected) const;

  std::variant<std::nullptr_t, bool, double, std::string, Array, Object> value_ = nullptr;
};

// How many bytes the first character of a text takes in UTF-8 (RFC 3629), 0 if they are none.
size_t utf8_length(std::string_view text);

// A text that is printed as JSON writes it, with its quotes. Nothing is allocated before it is printed, so that checks
// that pass cost nothing. It holds a view: print it in the same expression.
struct Quoted {
  operator std::string() const;

  std::string_view text;
};
inline Quoted quoted(std::string_view text) { return {text}; }
std::ostream& operator<<(std::ostream& out, Quoted quoted);

}  // namespace pymtl::runtime
