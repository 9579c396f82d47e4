#include "json.h"

#include <cmath>
#include <cstdio>
#include <limits>
#include <locale>
#include <set>
#include <sstream>

#include "error.h"

namespace pymtl::runtime {

namespace {

constexpr int kDeepest = 32;
constexpr double kMostWhole = 9007199254740992.0;  // 2^53

void append_utf8(std::string& text, uint32_t point) {
  const auto push = [&](uint32_t byte) { text.push_back(static_cast<char>(byte)); };
  if (point < 0x80) {
    push(point);
  } else if (point < 0x800) {
    push(0xC0 | point >> 6);
    push(0x80 | (point & 0x3F));
  } else if (point < 0x10000) {
    push(0xE0 | point >> 12);
    push(0x80 | (point >> 6 & 0x3F));
    push(0x80 | (point & 0x3F));
  } else {
    push(0xF0 | point >> 18);
    push(0x80 | (point >> 12 & 0x3F));
    push(0x80 | (point >> 6 & 0x3F));
    push(0x80 | (point & 0x3F));
  }
}

}  // namespace

size_t utf8_length(std::string_view text) {
  if (text.empty()) return 0;
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned first = byte(0);
  if (first < 0x80) return 1;
  const size_t length = first >= 0xF0 ? 4 : first >= 0xE0 ? 3 : 2;
  if (first < 0xC2 || first > 0xF4 || text.size() < length) return 0;
  for (size_t i = 1; i < length; ++i) {
    if ((byte(i) & 0xC0) != 0x80) return 0;
  }
  const unsigned second = byte(1);
  const bool too_long = (first == 0xE0 && second < 0xA0) || (first == 0xF0 && second < 0x90);
  const bool surrogate = first == 0xED && second > 0x9F;
  const bool too_large = first == 0xF4 && second > 0x8F;
  return too_long || surrogate || too_large ? 0 : length;
}

Quoted::operator std::string() const {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      result += '\\';
      result += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char escape[8];
      std::snprintf(escape, sizeof escape, "\\u%04x", static_cast<unsigned>(c));
      result += escape;
    } else {
      result += c;
    }
  }
  return result + '"';
}

std::ostream& operator<<(std::ostream& out, Quoted quoted) { return out << static_cast<std::string>(quoted); }

class JsonReader {
 public:
  explicit JsonReader(std::string_view text) : text_(text) {}

  Json whole_text() {
    Json value = read(0);
    skip_spaces();
    check(at_ == text_.size(), Fault::file, "JSON: expected its end at byte ", at_);
    return value;
  }

 private:
  Json read(int depth) {
    skip_spaces();
    Json value;
    switch (peek()) {
      case '{':
        value.value_ = read_object(depth);
        break;
      case '[':
        value.value_ = read_array(depth);
        break;
      case '"':
        value.value_ = read_string();
        break;
      case 't':
        expect_word("true");
        value.value_ = true;
        break;
      case 'f':
        expect_word("false");
        value.value_ = false;
        break;
      case 'n':
        expect_word("null");
        break;
      default:
        value.value_ = read_number();
    }
    return value;
  }

  void check_depth(int depth) const {
    check(depth < kDeepest, Fault::file, "JSON: nested deeper than ", kDeepest, " levels at byte ", at_);
  }

  Json::Object read_object(int depth) {
    check_depth(depth);
    Json::Object members;
    std::set<std::string> keys;
    ++at_;
    skip_spaces();
    if (take('}')) return members;
    do {
      skip_spaces();
      std::string key = read_string();
      check(keys.insert(key).second, Fault::file, "JSON: the key ", quoted(key), " comes twice at byte ", at_);
      skip_spaces();
      expect(':');
      members.emplace_back(std::move(key), read(depth + 1));
      skip_spaces();
    } while (take(','));
    expect('}');
    return members;
  }

  Json::Array read_array(int depth) {
    check_depth(depth);
    Json::Array items;
    ++at_;
    skip_spaces();
    if (take(']')) return items;
    do {
      items.push_back(read(depth + 1));
      skip_spaces();
    } while (take(','));
    expect(']');
    return items;
  }

  std::string read_string() {
    expect('"');
    std::string result;
    for (;;) {
      const char c = peek();
      if (take('"')) return result;
      check(static_cast<unsigned char>(c) >= 0x20, Fault::file, "JSON: a control character in a string at byte ", at_);
      if (take('\\')) {
        read_escape(result);
        continue;
      }
      const size_t length = utf8_length(text_.substr(at_));
      check(length > 0, Fault::file, "JSON: no UTF-8 at byte ", at_);
      result.append(text_, at_, length);
      at_ += length;
    }
  }

  void read_escape(std::string& result) {
    const char c = peek();
    ++at_;
    switch (c) {
      case '"':
      case '\\':
      case '/':
        result += c;
        return;
      case 'b':
        result += '\b';
        return;
      case 'f':
        result += '\f';
        return;
      case 'n':
        result += '\n';
        return;
      case 'r':
        result += '\r';
        return;
      case 't':
        result += '\t';
        return;
      case 'u':
        append_utf8(result, read_point());
        return;
      default:
        throw Error(Fault::file, "JSON: an unknown escape at byte ", at_);
    }
  }

  uint32_t read_point() {
    const uint32_t unit = read_unit();
    const bool high = unit >= 0xD800 && unit < 0xDC00;
    if (!high) {
      check(unit < 0xDC00 || unit > 0xDFFF, Fault::file, "JSON: half of a surrogate pair at byte ", at_);
      return unit;
    }
    expect('\\');
    expect('u');
    const uint32_t low = read_unit();
    check(low >= 0xDC00 && low <= 0xDFFF, Fault::file, "JSON: half of a surrogate pair at byte ", at_);
    return 0x10000 + ((unit - 0xD800) << 10) + (low - 0xDC00);
  }

  uint32_t read_unit() {
    uint32_t unit = 0;
    for (int i = 0; i < 4; ++i) {
      const char c = peek();
      const int digit = c >= '0' && c <= '9'   ? c - '0'
                        : c >= 'a' && c <= 'f' ? c - 'a' + 10
                        : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                               : -1;
      check(digit >= 0, Fault::file, "JSON: expected a hexadecimal digit at byte ", at_);
      unit = unit * 16 + static_cast<uint32_t>(digit);
      ++at_;
    }
    return unit;
  }

  double read_number() {
    const size_t first = at_;
    const auto digits = [&] {
      const size_t before = at_;
      while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9') ++at_;
      check(at_ > before, Fault::file, "JSON: expected a value at byte ", at_);
      return at_ - before;
    };
    take('-');
    const bool leading_zero = at_ < text_.size() && text_[at_] == '0';
    const size_t count = digits();
    check(!leading_zero || count == 1, Fault::file, "JSON: a number that begins with 0 at byte ", first);
    if (take('.')) digits();
    if (take('e') || take('E')) {
      if (!take('+')) take('-');
      digits();
    }
    // Not strtod, which reads a number as the process's locale writes it.
    std::istringstream stream{std::string(text_.substr(first, at_ - first))};
    stream.imbue(std::locale::classic());
    double value = 0.0;
    stream >> value;
    check(!stream.fail() && std::isfinite(value), Fault::file, "JSON: a number out of range at byte ", first);
    return value;
  }

  void expect_word(std::string_view word) {
    check(text_.substr(at_, word.size()) == word, Fault::file, "JSON: expected a value at byte ", at_);
    at_ += word.size();
  }

  char peek() const {
    check(at_ < text_.size(), Fault::file, "JSON: ends too early");
    return text_[at_];
  }
  bool take(char c) {
    if (at_ >= text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }
  void expect(char c) { check(take(c), Fault::file, "JSON: expected '", c, "' at byte ", at_); }
  void skip_spaces() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\t' || text_[at_] == '\n' || text_[at_] == '\r'))
      ++at_;
  }

  std::string_view text_;
  size_t at_ = 0;
};

Json Json::parse(std::string_view text) { return JsonReader(text).whole_text(); }

template <typename T>
const T& Json::as(const std::string& name, const char* expected) const {
  static constexpr const char* kKinds[] = {"null", "true or false", "a number", "a string", "an array", "an object"};
  const T* const value = std::get_if<T>(&value_);
  check(value != nullptr, Fault::file, name, ": expected ", expected, ", got ", kKinds[value_.index()]);
  return *value;
}

const Json::Object& Json::object(const std::string& name) const { return as<Object>(name, "an object"); }

bool Json::boolean_itself(const std::string& name) const { return as<bool>(name, "true or false"); }

const std::string& Json::string_itself(const std::string& name) const { return as<std::string>(name, "a string"); }

double Json::number_itself(const std::string& name) const { return as<double>(name, "a number"); }

int64_t Json::whole_itself(const std::string& name, int64_t least, int64_t most) const {
  const double value = number_itself(name);
  const bool fits = std::fabs(value) <= kMostWhole && value == std::floor(value) &&
                    static_cast<int64_t>(value) >= least && static_cast<int64_t>(value) <= most;
  check(fits, Fault::file, name, ": expected a whole number from ", least, " to ", most, ", got ", value);
  return static_cast<int64_t>(value);
}

std::vector<std::string> Json::strings_itself(const std::string& name) const {
  std::vector<std::string> found;
  for (const Json& item : as<Array>(name, "an array")) found.push_back(item.string_itself(name));
  return found;
}

const Json* Json::find(const char* key) const {
  for (const auto& [name, value] : object(key)) {
    if (name == key) return std::holds_alternative<std::nullptr_t>(value.value_) ? nullptr : &value;
  }
  return nullptr;
}

const Json& Json::at(const char* key) const {
  const Json* const value = find(key);
  check(value != nullptr, Fault::file, key, ": expected a value, got none");
  return *value;
}

bool Json::boolean(const char* key) const { return at(key).boolean_itself(key); }

int64_t Json::whole(const char* key, int64_t least, int64_t most) const {
  return at(key).whole_itself(key, least, most);
}

double Json::number(const char* key) const { return at(key).number_itself(key); }

const std::string& Json::string(const char* key) const { return at(key).string_itself(key); }

const Json::Array& Json::array(const char* key) const { return at(key).as<Array>(key, "an array"); }

std::vector<std::string> Json::strings(const char* key) const { return at(key).strings_itself(key); }

}  // namespace pymtl::runtime
